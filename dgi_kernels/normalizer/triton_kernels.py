"""Log-sum-exp of rows in Triton.

    out = log sum_k exp(x_k),   NaN and -inf add nothing, +inf counts as the largest finite number

A program reads a part of one row, block by block, with a running maximum and a sum for each lane, which are put
together once at the end. Few long rows are cut into parts, so that all of a GPU reads; a second kernel adds these up in
their order.

Bytes: the logits, once. Compiled for sm_80, sm_90 and sm_100; not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def part_kernel(
    p_logits,  # (A, B, V) by strides
    p_out,  # (A * B, parts) out, float32
    B,
    V,
    stride_a,
    stride_b,
    stride_v,
    part,  # logits of a program
    b_v: tl.constexpr,
):
    """The log-sum-exp of one part of one row."""
    row, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_row = p_logits + (row // B) * stride_a + (row % B) * stride_b
    begin = i.to(tl.int64) * part
    end = tl.minimum(begin + part, V)
    maximum = tl.full((b_v,), float("-inf"), tl.float32)
    total = tl.zeros((b_v,), tl.float32)
    for start in range(begin, end, b_v):
        o_v = start + tl.arange(0, b_v)
        x = tl.load(p_row + o_v * stride_v, mask=o_v < end, other=float("-inf")).to(tl.float32)
        x = tl.where(x == x, tl.minimum(x, LARGEST), float("-inf"))
        larger = tl.maximum(maximum, x)
        offset = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp2((maximum - offset) * LOG2E) + tl.exp2((x - offset) * LOG2E)
        maximum = larger
    tl.store(p_out + row * tl.num_programs(1) + i, log_sum(maximum, total))


@triton.jit
def join_kernel(p_parts, p_out, parts, b_p: tl.constexpr):
    """The log-sum-exp of a row's (rows, parts) float32."""
    row = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, b_p)
    x = tl.load(p_parts + row * parts + o_p, mask=o_p < parts, other=float("-inf"))
    tl.store(p_out + row, log_sum(x, tl.where(x == float("-inf"), 0.0, 1.0)))


@triton.jit
def log_sum(maximum, total):
    """maximum + log(total) over all lanes; -inf where all are."""
    largest = tl.max(maximum, axis=0)
    offset = tl.where(largest == float("-inf"), 0.0, largest)
    whole = tl.sum(total * tl.exp2((maximum - offset) * LOG2E), axis=0)
    return tl.where(largest == float("-inf"), float("-inf"), offset + tl.log(tl.maximum(whole, 1.0)))
