"""What the Triton launchers of every op share: tiles, norms, and float32 products of any operands.

Nothing here knows an op; each op's own ``triton.py`` has its tables of tiles and its choice of a form.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgi_kernels.tiles import Tiles as Tiles

HALF = (torch.float16, torch.bfloat16)
NORM_BLOCK = (16, 128)  # rows, dimensions


@functools.cache
def architecture(device: torch.device) -> int:
    """Major compute capability; the interpreter runs the tiles of Hopper."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def norms(x: Tensor, eps: float, rnorm: Tensor) -> None:
    """rnorm (N,) = 1 / max(||x_n||, eps)"""
    b_n, b_d = NORM_BLOCK
    if len(x):
        norm_kernel[(triton.cdiv(len(x), b_n),)](x, rnorm, *x.shape, x.stride(0), eps, b_n=b_n, b_d=b_d, num_warps=4)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (float32) = a @ b, through cuBLAS with float32 accumulation and result (TF32 as torch's setting says)."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def add_product(a: Tensor, b: Tensor, total: Tensor) -> None:
    """total (float32) += a @ b"""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:  # addmm takes no float32 sum of 16-bit products before torch 2.11
        part = torch.empty_like(total)
        product(a, b, part)
        total.add_(part)


def finish_block(dim: int) -> tuple[int, int]:
    """Rows and dimensions of a tile of whole rows with about 2048 elements."""
    b_d = max(16, triton.next_power_of_2(dim))
    return max(1, 2048 // b_d), b_d


def multiprocessors(x: Tensor) -> int:
    """Of the GPU that x lies on; the interpreter has 4."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


@triton.jit(do_not_specialize=["N"])
def norm_kernel(p_x, p_rnorm, N, D, stride, eps, b_n: tl.constexpr, b_d: tl.constexpr):
    """x (N, D) -> 1 / max(||x||, eps) (N,), and 0 for a vector of norm 0, whose products are 0 whatever their scale."""
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    total = tl.zeros((b_n,), tl.float32)
    for start in range(0, D, b_d):
        o_d = start + tl.arange(0, b_d)
        x = tl.load(p_x + o_n[:, None] * stride + o_d[None, :], mask=(o_n < N)[:, None] & (o_d < D)[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32) * x.to(tl.float32), axis=1)
    tl.store(p_rnorm + o_n, reciprocal_norm(total, eps), mask=o_n < N)


@triton.jit
def reciprocal_norm(squares, eps):
    norm = tl.sqrt_rn(squares)
    return tl.where(norm == 0.0, 0.0, tl.div_rn(1.0, tl.maximum(norm, eps)))


@triton.jit
def is_constant(rnorm, eps):
    """Whether :func:`reciprocal_norm` is of a norm below eps, which is then a constant: of the same rounded quotient,
    since a GPU's plain division may err by two units and would take a short vector for a long one."""
    return rnorm >= tl.div_rn(1.0, eps)
