"""What the Triton kernels and launchers of every op share: scores, norms, tiles, chunks, and float32 products.

    s_nk = a_n S_nk f_k + b_k,    S_nk = r_n . e_k

is every score: a cosine has a_n = scale / ||r_n||, f_k = 1 / ||e_k||, a dot product a_n = scale, f_k = 1; b is the bias
of the codes, if they have one. Inside the kernels scores are in base 2, since exp2 is one instruction.

Nothing here knows an op; each op's own ``triton.py`` has its tables of tiles and its choice of a form.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from dgi_kernels.tiles import Tiles as Tiles

HALF = (torch.float16, torch.bfloat16)
NORM_BLOCK = (16, 128)  # rows, dimensions
CHUNK_BYTES = 32 << 20  # products and weights of one chunk: they stay in the L2 of an H100 or H200 (50 MB)
SUMS_IN_PLACE = hasattr(torch.ops.aten.addmm, "dtype_out")  # of float32 and 16-bit products, from torch 2.11 on

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A running maximum may lag by this much: weights stay below 2^8 (and float16 ones, times a gain of 2^6, below its
# largest).
SLACK = tl.constexpr(8.0)
NONE = tl.constexpr(0x7FFFFFFF)  # no code: beyond all


@functools.cache
def architecture(device: torch.device) -> int:
    """Major compute capability; the interpreter runs the tiles of Hopper."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def norms(x: Tensor, eps: float, rnorm: Tensor) -> None:
    """rnorm (N,) = 1 / max(||x_n||, eps)"""
    b_n, b_d = NORM_BLOCK
    if len(x):
        norm_kernel[(triton.cdiv(len(x), b_n),)](
            x, p_rnorm=rnorm, N=x.shape[0], D=x.shape[1], stride=x.stride(0), eps=eps, b_n=b_n, b_d=b_d, num_warps=4
        )


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (float32) = a @ b, through cuBLAS with float32 accumulation and result (TF32 as torch's setting says)."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def add_product(a: Tensor, b: Tensor, total: Tensor, *, begins: bool = False) -> None:
    """total (float32) += a @ b, or = where the sum ``begins``"""
    if begins:
        product(a, b, total)
    elif a.dtype == torch.float32:
        total.addmm_(a, b)
    elif total.is_cuda and SUMS_IN_PLACE:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        part = torch.empty_like(total)
        product(a, b, part)
        total.add_(part)


def chunks(rows: int, codes: int, buffers: int, dtype: torch.dtype, budget: int) -> Iterator[slice]:
    """Slices of rows whose products with all codes fit ``budget`` bytes: ``buffers`` times (rows, codes) in float32,
    and their weights in ``dtype`` where it is smaller. The first is the largest."""
    size = max(1, budget // (max(codes, 1) * buffers * (4 if dtype == torch.float32 else 6)))
    size = min(rows, size if size < 128 else size // 128 * 128)
    for start in range(0, rows, max(size, 1)):
        yield slice(start, min(start + size, rows))


def gain_of(largest: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What brings weights of up to ``largest`` near the top of float16's range; other dtypes need nothing."""
    return 2.0**14 / largest.amax().clamp(min=1e-30) if dtype == torch.float16 and largest.numel() else None


def or_one(rnorm: Tensor) -> Tensor:
    """A vector of norm 0 has a gradient too, of 1 / eps: its products are not to be multiplied by 0."""
    return torch.threshold(rnorm, 0.0, 1.0)  # one launch, where a comparison and a choice are two


def finish_block(dim: int) -> tuple[int, int]:
    """Rows and dimensions of a tile of whole rows with about 2048 elements."""
    b_d = max(16, triton.next_power_of_2(dim))
    return max(1, 2048 // b_d), b_d


def multiprocessors(x: Tensor) -> int:
    """Of the GPU that x lies on; the interpreter has 4."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


@triton.jit(do_not_specialize=["N"])
def norm_kernel(
    p_x,  # (N, D), rows stride apart
    p_rnorm,  # (N,) out, float32
    N,
    D,
    stride,
    eps,
    b_n: tl.constexpr,
    b_d: tl.constexpr,
):
    """1 / max(||x||, eps) of every row, and 0 for a vector of norm 0, whose products are 0 whatever their scale."""
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


@triton.jit
def radial_part(product, rnorm, eps):
    """How much of x the projection (I - x^ x^T) takes off a vector whose product with x is ``product``."""
    return tl.where(is_constant(rnorm, eps), 0.0, product * rnorm * rnorm)


@triton.jit
def present(o_k, K, whole: tl.constexpr):
    """Which of the codes of a tile there are; known when the kernel is compiled if tiles are ``whole``."""
    return tl.full(o_k.shape, 1, tl.int1) if whole else o_k < K


@triton.jit
def code_bias(p_bias, o_k, m_k):
    """b of the codes ``o_k`` in base 2, -inf beyond the last; None where there is no bias."""
    return None if p_bias is None else tl.load(p_bias + o_k, mask=m_k, other=float("-inf")) * LOG2E


@triton.jit
def scores(products, one, other, bias):
    """s = a S f + b of a tile of products S (..., in base 2 where a and b are), whichever way the tile lies.

    ``one`` and ``other`` are a and f, in the order in which they are to multiply (it decides how s is rounded), each
    with a dimension of 1 where the tile has the other's. ``bias`` is b likewise, or None: then it costs nothing.
    """
    s = products * one * other
    if bias is not None:
        s += bias
    return s
