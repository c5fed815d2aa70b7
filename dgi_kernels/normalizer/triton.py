"""Launcher of log_normalizer in Triton: an operator that torch.compile keeps whole."""

from __future__ import annotations

import torch
import triton
from torch import Tensor, library

from dgi_kernels.normalizer import triton_kernels as kernels
from dgi_kernels.triton_common import multiprocessors

BLOCK, WARPS = 2048, 8
BLOCKS_TO_A_MULTIPROCESSOR = 8  # programs, where there are fewer rows
MOST_PARTS = 256


@library.custom_op("dgi_kernels::log_normalizer_triton", mutates_args=())
def log_normalizer(logits: Tensor) -> Tensor:
    """(..., V) float32, bfloat16 or float16 of any strides -> (...) float32."""
    out = logits.new_empty(logits.shape[:-1], dtype=torch.float32)
    rows, codes = out.numel(), logits.shape[-1]
    if rows == 0 or codes == 0:
        return out.fill_(-torch.inf)
    table = _two_leading(logits)
    wanted = triton.cdiv(BLOCKS_TO_A_MULTIPROCESSOR * multiprocessors(logits), rows)
    blocks = triton.cdiv(codes, BLOCK)
    part = BLOCK * triton.cdiv(blocks, max(1, min(wanted, blocks, MOST_PARTS)))
    parts = triton.cdiv(codes, part)
    of_parts = out if parts == 1 else out.new_empty(rows, parts)
    with torch.cuda.device_of(logits):
        kernels.part_kernel[(rows, parts)](
            table,
            p_out=of_parts,
            B=table.shape[1],
            V=codes,
            stride_a=table.stride(0),
            stride_b=table.stride(1),
            stride_v=table.stride(2),
            part=part,
            b_v=BLOCK,
            num_warps=WARPS,
        )
        if parts > 1:
            b_p = triton.next_power_of_2(parts)
            kernels.join_kernel[(rows,)](of_parts, p_out=out, parts=parts, b_p=b_p, num_warps=1)
    return out


@log_normalizer.register_fake
def _(logits):
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)


def _two_leading(logits: Tensor) -> Tensor:
    """(A, B, V): as it is with up to two leading dimensions; more are joined where strides allow it, else copied."""
    while logits.ndim < 3:
        logits = logits.unsqueeze(0)
    for count in range(1, logits.ndim - 1):  # which leading dimensions make A
        try:
            first, second = logits.shape[:count].numel(), logits.shape[count:-1].numel()
            return logits.view(first, second, logits.shape[-1])
        except RuntimeError:
            continue
    return logits.contiguous().view(-1, logits.shape[-2], logits.shape[-1])
