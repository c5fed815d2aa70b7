"""Launchers of balanced codes in Triton.

With the products P_nk = a x_n . e_k in place of the scores s_nk = P_nk + b_k + c_n, Sinkhorn's steps are alike for rows
and codes and need no bias but each other's result:

    f = -log sum_k exp(P + h),   h = -log sum_n exp(P + f),   from h = b;   code = argmax_k s + h - b
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, library

from dgi_kernels.clustering import triton_kernels as kernels
from dgi_kernels.clustering.costs import SMALLEST_AMPLITUDE, pair_costs
from dgi_kernels.triton_common import multiprocessors
from dgi_kernels.types import Metric

TILE = (64, 64, 32)  # rows, y, dimensions
WARPS, STAGES = 8, 3
PROGRAMS_TO_A_MULTIPROCESSOR = 4
MOST_PARTS = 256
CHUNK_COSTS = 1 << 23  # of vectors and codes, that are in memory at once: 64 MB


def balanced_codes(x: Tensor, codebook: Tensor, metric: Metric, eps: float, epsilon: float, iterations: int) -> Tensor:
    """(N, D), (K, D) float32 -> (N,) int64. The range of the costs and the last argmax are float64, in chunks."""
    codes = x.new_empty(len(x), dtype=torch.int64)
    if len(x) == 0:
        return codes
    lowest, highest = torch.aminmax(
        torch.stack([torch.stack(costs.aminmax()) for _, costs in _costs(x, codebook, metric, eps)])
    )
    scale = 1 / (epsilon * ((highest - lowest) / 2 + SMALLEST_AMPLITUDE))
    left, right, bias = _operands(x, codebook, metric, eps, scale)
    h = bias
    for _ in range(iterations):
        h = -log_sums(right, left, -log_sums(left, right, h))
    g = h.double() - bias
    for rows, costs in _costs(x, codebook, metric, eps):
        codes[rows] = (g - scale * costs).argmax(dim=1)
    return codes


@library.custom_op("dgi_kernels::log_sums_triton", mutates_args=())
def log_sums(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """(N, D), (K, D), (K,) float32, contiguous, K >= 1 -> (N,): log sum_k exp(x . y_k + bias_k)."""
    b_n, b_k, b_d = TILE
    rows, columns = len(x), len(y)
    row_blocks, column_blocks = triton.cdiv(rows, b_n), triton.cdiv(columns, b_k)
    wanted = triton.cdiv(PROGRAMS_TO_A_MULTIPROCESSOR * multiprocessors(x), row_blocks)
    part = b_k * triton.cdiv(column_blocks, max(1, min(wanted, column_blocks, MOST_PARTS)))
    parts = triton.cdiv(columns, part)
    out = x.new_empty(rows, parts)
    with torch.cuda.device_of(x):
        kernels.log_sum_kernel[(row_blocks, parts)](
            x,
            p_y=y,
            p_bias=bias,
            p_out=out,
            N=rows,
            K=columns,
            D=x.shape[1],
            part=part,
            b_n=b_n,
            b_k=b_k,
            b_d=b_d,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return out.logsumexp(dim=1)


@log_sums.register_fake
def _(x, y, bias):
    return x.new_empty(x.shape[0])


def _costs(x: Tensor, codebook: Tensor, metric: Metric, eps: float) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of rows and their costs (rows, K) in float64."""
    codebook, step = codebook.double(), max(1, CHUNK_COSTS // len(codebook))
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        yield rows, pair_costs(x[rows].double(), codebook, metric, eps)


def _operands(x: Tensor, codebook: Tensor, metric: Metric, eps: float, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N, D), (K, D), (K,) float32: a x, e and b; by the Euclidean metric relative to the mean of the codes."""
    bias = codebook.new_zeros(len(codebook))
    if metric == "euclidean":
        centre = codebook.double().mean(dim=0).float()
        codebook = codebook - centre
        bias = (-scale * codebook.double().square().sum(dim=1)).float()
        x = 2 * (x - centre)
    elif metric == "cosine":
        x, codebook = F.normalize(x, dim=1, eps=eps), F.normalize(codebook, dim=1, eps=eps)
    return (x * scale.float()).contiguous(), codebook.contiguous(), bias
