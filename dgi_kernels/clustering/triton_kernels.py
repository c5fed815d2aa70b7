"""Log-sum-exp of biased products in Triton: both steps of Sinkhorn's algorithm.

    out_n = log sum_k exp(x_n . y_k + b_k)

A program has a block of rows of x and goes through a part of y, with a running maximum and sum for each row; products
live in registers. Few rows (the codes, whose sums are over all vectors) are many parts, which the launcher adds up.

Products are float32 throughout: a score of Sinkhorn's is up to 2 / epsilon, and its difference counts.

Bytes: x once, y once for each block of rows. 2 N K D operations and N K exponentials. Compiled for sm_80, sm_90 and
sm_100; not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.triton_common import LN2, LOG2E


@triton.jit(do_not_specialize=["N", "K"])
def log_sum_kernel(
    p_x,  # (N, D) float32
    p_y,  # (K, D) float32
    p_bias,  # (K,) float32
    p_out,  # (N, parts) out, float32
    N,
    K,
    D,
    part,  # rows of y of a program
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """The log-sum-exp of a block of rows over one part of y."""
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    i = tl.program_id(1)
    begin = i.to(tl.int64) * part
    end = tl.minimum(begin + part, K)
    m_n = o_n < N
    maximum = tl.full((b_n,), float("-inf"), tl.float32)
    total = tl.zeros((b_n,), tl.float32)
    for start in range(begin, end, b_k):
        o_k = start + tl.arange(0, b_k)
        m_k = o_k < end
        s = tl.zeros((b_n, b_k), tl.float32)
        for first in range(0, D, b_d):
            o_d = first + tl.arange(0, b_d)
            m_d = o_d < D
            x = tl.load(p_x + o_n[:, None] * D + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
            y = tl.load(p_y + o_k[None, :] * D + o_d[:, None], mask=m_k[None, :] & m_d[:, None], other=0.0)
            s = tl.dot(x, y, s, input_precision="ieee")
        s += tl.load(p_bias + o_k, mask=m_k, other=float("-inf"))[None, :]
        larger = tl.maximum(maximum, tl.max(s, axis=1))  # of at least one y: finite
        total *= tl.exp2((maximum - larger) * LOG2E)
        total += tl.sum(tl.exp2((s - larger[:, None]) * LOG2E), axis=1)
        maximum = larger
    tl.store(p_out + o_n * tl.num_programs(1) + i, maximum + tl.log2(total) * LN2, mask=m_n)
