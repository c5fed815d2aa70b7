"""Epilogues of the cosine cross-entropy's chunked form: products of a chunk of rows come from cuBLAS and stay in L2.

The formulas are those of :mod:`dgi_kernels.cosine.triton_kernels`. One row a program, but for the gradient of the bias.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.cosine.triton_kernels import (
    IGNORED,
    finish_loss,
    first_maximum,
    group_of_column,
    group_of_target,
    with_target,
)
from dgi_kernels.triton_common import LN2, LOG2E, code_bias, scores

# Slices of a chunk, read one number a program: their alignment changes nothing, and would only compile kernels twice.
PER_ROW = [
    "p_rnorm_h",
    "p_logit",
    "p_extra",
    "p_label",
    "p_loss",
    "p_lse",
    "p_residue",
    "p_upstream",
    "p_both",
    "p_own",
    "p_even",
]


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def chunk_loss_kernel(
    p_s,  # (rows, K) float32: products
    p_rnorm_h,  # (rows,)
    p_rnorm_w,  # (K,)
    p_bias,  # (K,) or None
    p_group,  # (K,) int32 or None; if given, extra is e s_t alone
    p_logit,  # (rows,)
    p_extra,  # (rows,)
    p_label,  # (rows,) int32
    p_scale,  # ()
    p_loss,  # (rows,) out
    p_lse,  # (rows,) out, in base 2
    p_residue,  # (rows,) out: g_t but for its e / K
    K,
    smoothing,
    b_k: tl.constexpr,
):
    """The loss of a chunk's rows. One row a program, read once."""
    i_n = tl.program_id(0).to(tl.int64)
    label = tl.load(p_label + i_n)
    logit = tl.load(p_logit + i_n)
    scale_h = tl.load(p_rnorm_h + i_n) * (tl.load(p_scale) * LOG2E)
    group = group_of_target(p_group, label)
    top = first_maximum(logit, p_bias)
    others = 0.0
    total = logit
    count = 1.0
    for start in range(0, K, b_k):
        o_k = start + tl.arange(0, b_k)
        m_k = o_k < K
        s = tl.load(p_s + i_n * K + o_k, mask=m_k, other=0.0)
        s = scores(s, scale_h, tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0), code_bias(p_bias, o_k, m_k))
        counted = m_k & (group_of_column(p_group, o_k, m_k) != group)
        if p_group is not None:
            total += tl.sum(tl.where(counted, s, 0.0), axis=0)
            count += tl.sum(counted.to(tl.float32), axis=0)
        s = tl.where(counted, s, float("-inf"))
        raised = tl.maximum(top, tl.max(s, axis=0), propagate_nan=tl.PropagateNan.ALL)
        others = others * tl.exp2(top - raised) + tl.sum(tl.exp2(s - raised), axis=0)
        top = raised
    extra = tl.load(p_extra + i_n)
    if p_group is not None:
        extra -= tl.where((smoothing > 0.0) & (logit > float("-inf")), smoothing * LN2 * (total / count), 0.0)
    top, others = with_target(top, others, logit, p_bias)
    loss, lse, residue = finish_loss(top, others, logit, extra, label, smoothing)
    tl.store(p_loss + i_n, loss)
    tl.store(p_lse + i_n, lse)
    tl.store(p_residue + i_n, residue)


@triton.jit
def chunk_weights(s, scale_h, factor, bias, lse, is_target, is_left_out, both, own, even):
    """t_nk of any tile: of products s, with u e / K (``even``) in all that are not left out."""
    p = tl.exp2(scores(s, scale_h, factor, bias) - lse)
    return tl.where(is_left_out & (is_target == 0), 0.0, tl.where(is_target, own, p * both) - even)


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def chunk_gradient_kernel(
    p_s,  # (rows, K) float32: products
    p_g,  # (rows, K) out: upstream_n rw_k (g_nk - centre), or gain_n rw_k t_nk; may be s itself
    p_rnorm_h,  # (rows,)
    p_rnorm_w,  # (K,)
    p_bias,  # (K,) or None
    p_group,  # (K,) int32 or None
    p_lse,  # (rows,) in base 2
    p_residue,  # (rows,) g_t but for its e / K
    p_upstream,  # (rows,) u rh and the gain; where p_both is given, rh and the gain
    p_both,  # (rows,) u + v; or None: no group, no v and no gradient of the bias
    p_own,  # (rows,) t_nk of the target but for its e / K, or None
    p_even,  # (rows,) u e / K, or None
    p_label,  # (rows,) int32
    p_scale,  # ()
    K,
    centre,
    b_k: tl.constexpr,
):
    """What both products of a chunk's gradients need; centre is e / K. Every element is read by who writes it."""
    i_n = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * b_k + tl.arange(0, b_k)
    m_k = o_k < K
    rnorm_w = tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0)
    scale_h = tl.load(p_rnorm_h + i_n) * (tl.load(p_scale) * LOG2E)
    s = tl.load(p_s + i_n * K + o_k, mask=m_k, other=0.0)
    bias = code_bias(p_bias, o_k, m_k)
    lse = tl.load(p_lse + i_n)
    label = tl.load(p_label + i_n)
    if p_both is None:
        g = tl.exp2(scores(s, scale_h, rnorm_w, bias) - lse)
        g = tl.where(o_k == label, tl.load(p_residue + i_n), g) - centre
    else:
        apart = group_of_column(p_group, o_k, m_k) == group_of_target(p_group, label)
        g = chunk_weights(
            s,
            scale_h,
            rnorm_w,
            bias,
            lse,
            o_k == label,
            apart,
            tl.load(p_both + i_n),
            tl.load(p_own + i_n),
            tl.load(p_even + i_n),
        )
    rnorm_w = tl.where(rnorm_w == 0.0, 1.0, rnorm_w)  # a vector of norm 0 has a gradient too, of 1 / eps
    g *= tl.load(p_upstream + i_n) * rnorm_w
    tl.store(p_g + i_n * K + o_k, g.to(p_g.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=PER_ROW)
def chunk_bias_kernel(
    p_s,  # (N, K) float32: products
    p_rnorm_h,  # (N,)
    p_rnorm_w,  # (K,)
    p_bias,  # (K,)
    p_group,  # (K,) int32 or None
    p_lse,  # (N,) in base 2
    p_both,  # (N,) u + v
    p_own,  # (N,) t_nk of the target but for its e / K
    p_even,  # (N,) u e / K
    p_label,  # (N,) int32
    p_scale,  # ()
    p_dbias,  # (splits, K) added to: sum_n t_nk over every splits-th tile of rows
    N,
    K,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
):
    """A program owns b_k columns of one split; chunks come one after the other, so their sums have one order."""
    o_k = tl.program_id(0) * b_k + tl.arange(0, b_k)
    m_k = o_k < K
    rnorm_w = tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0)[None, :]
    bias = code_bias(p_bias, o_k[None, :], m_k[None, :])
    group = group_of_column(p_group, o_k, m_k)[None, :]
    scale = tl.load(p_scale) * LOG2E
    o_sum = tl.program_id(1).to(tl.int64) * K + o_k
    dbias = tl.load(p_dbias + o_sum, mask=m_k, other=0.0)
    for start in range(tl.program_id(1) * b_n, N, tl.num_programs(1) * b_n):
        o_n = start + tl.arange(0, b_n)
        m_n = o_n < N
        label = tl.load(p_label + o_n, mask=m_n, other=IGNORED)
        s = tl.load(p_s + o_n[:, None].to(tl.int64) * K + o_k[None, :], mask=m_n[:, None] & m_k[None, :], other=0.0)
        scale_h = tl.load(p_rnorm_h + o_n, mask=m_n, other=0.0) * scale
        apart = group == group_of_target(p_group, label)[:, None]
        t = chunk_weights(
            s,
            scale_h[:, None],
            rnorm_w,
            bias,
            tl.load(p_lse + o_n, mask=m_n, other=float("inf"))[:, None],
            o_k[None, :] == label[:, None],
            apart,
            tl.load(p_both + o_n, mask=m_n, other=0.0)[:, None],
            tl.load(p_own + o_n, mask=m_n, other=0.0)[:, None],
            tl.load(p_even + o_n, mask=m_n, other=0.0)[:, None],
        )
        dbias += tl.sum(t, axis=0)
    tl.store(p_dbias + o_sum, dbias, mask=m_k)
