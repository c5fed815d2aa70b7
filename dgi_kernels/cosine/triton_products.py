"""The chunked form of the cosine cross-entropy for 16-bit operands: products with their epilogue in one kernel.

The formulas are those of :mod:`dgi_kernels.cosine.triton_kernels`. A program makes tiles of h w^T as a matrix product
does, step by step over D, so that D is of any size and both operands of every product lie in shared memory. What it
keeps of a tile is small:

- forward: maximum and sum of exponentials of each row, over the tiles of one part of the columns. Parts fill the GPU
  where there are few rows; neighbouring programs share the rows and the columns that they read, in the L2.
- backward: t_nk for a chunk of rows, 16 bits each, of which cuBLAS makes dh (``g w``) and dw (``g^T h``, added up in
  place). Logits are in no memory, neither forward nor backward.

Operations: 8 N K D as in the flash form, without its accumulators of D numbers a row. Bytes: of device memory 6 N K for
the weights of backward (written once, read twice); of the L2 each operand once for each tile of the other.

A loss that is reduced weighs all rows alike, so that its gradients are made together with it, of one product of logits:
6 N K D operations. A chunk's weights are then E_nk = 2^(s_nk - o_n) with an offset o_n that is known before the row's
sum: since ``|s_nk| <= |scale|``, it is 0 for ``|scale| <= PLAIN``, where neither E nor a sum of it leaves the range of
float32 and bfloat16. For larger scales it is the log-sum-exp, of a pass of product_loss_kernel that returns at once
for the others. What is 1 / sum_k E_nk is applied to the other operand: to h for dw, to the result for dh. A row's sum
is added up by the program that is the last with that row's tiles, in their order; an atomic count says which one it is.
Not yet run on a GPU; ``bench/gpu_time.py`` has the estimated time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.cosine.triton_chunks import PER_ROW, chunk_weights
from dgi_kernels.cosine.triton_kernels import (
    IGNORED,
    UNSET,
    finish_loss,
    group_of_column,
    group_of_target,
    is_plain,
    loss_of_plain,
)
from dgi_kernels.triton_common import LN2, LOG2E, code_bias, scores


@triton.jit
def tile_products(p_a, p_b, m_a, m_b, D, b_r: tl.constexpr, b_c: tl.constexpr, b_d: tl.constexpr):
    """(b_r, b_c) float32: products of the vectors at p_a (b_r,) and p_b (b_c,), 0 where the mask is."""
    products = tl.zeros((b_r, b_c), tl.float32)
    o_d = tl.arange(0, b_d)
    for start in range(0, D, b_d):
        m_d = o_d < D - start
        a = tl.load(p_a[:, None] + (start + o_d)[None, :], mask=m_a[:, None] & m_d[None, :], other=0.0)
        b = tl.load(p_b[:, None] + (start + o_d)[None, :], mask=m_b[:, None] & m_d[None, :], other=0.0)
        products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    return products


@triton.jit(do_not_specialize=["N"])
def product_loss_kernel(
    p_h,  # (N, D), rows stride_h apart
    p_w,  # (K, D), rows stride_w apart
    p_rnorm_h,  # (N,)
    p_rnorm_w,  # (K,)
    p_bias,  # (K,) or None
    p_group,  # (K,) int32 or None: columns of one group are one item
    p_label,  # (N,) int32
    p_scale,  # ()
    p_top,  # (parts, N) out: maximum of the part's scores, UNSET where it has none, in base 2
    p_others,  # (parts, N) out: sum of 2^(s - top)
    p_total,  # (parts, N) out: sum of s, or None
    p_count,  # (parts, N) out: how many these are, or None
    N,
    K,
    D,
    stride_h,
    stride_w,
    large_alone: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """A program owns b_n rows and every parts-th tile of columns. The target and its group are in no sum.

    large_alone: of scales that are not plain; of those that are no column is looked at.
    """
    i_part, parts = tl.program_id(0), tl.num_programs(0)
    o_n = tl.program_id(1).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    scale_h = tl.load(p_rnorm_h + o_n, mask=m_n, other=0.0) * (tl.load(p_scale) * LOG2E)
    group = group_of_target(p_group, tl.load(p_label + o_n, mask=m_n, other=IGNORED))
    top = tl.full((b_n,), UNSET, tl.float32)
    others = tl.zeros((b_n,), tl.float32)
    total = tl.zeros((b_n,), tl.float32)
    count = tl.zeros((b_n,), tl.float32)
    if large_alone:
        K = tl.where(is_plain(tl.load(p_scale)), 0, K)
    for first in range(i_part * b_k, K, parts * b_k):
        o_k = first + tl.arange(0, b_k)
        m_k = o_k < K
        p_column = p_w + o_k.to(tl.int64) * stride_w
        s = tile_products(p_h + o_n * stride_h, p_column, m_n, m_k, D, b_n, b_k, b_d)
        rnorm_w = tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0)
        bias = None if p_bias is None else code_bias(p_bias, o_k, m_k)[None, :]
        s = scores(s, scale_h[:, None], rnorm_w[None, :], bias)
        apart = (group_of_column(p_group, o_k, m_k)[None, :] == group[:, None]) | (o_k >= K)[None, :]
        if p_total is not None:
            total += tl.sum(tl.where(apart, 0.0, s), axis=1)
            count += tl.sum(tl.where(apart, 0.0, 1.0), axis=1)
        s = tl.where(apart, float("-inf"), s)
        raised = tl.maximum(top, tl.max(s, axis=1), propagate_nan=tl.PropagateNan.ALL)
        others = others * tl.exp2(top - raised) + tl.sum(tl.exp2(s - raised[:, None]), axis=1)
        top = raised
    o_part = i_part.to(tl.int64) * N + o_n
    tl.store(p_top + o_part, top, mask=m_n)
    tl.store(p_others + o_part, others, mask=m_n)
    if p_total is not None:
        tl.store(p_total + o_part, total, mask=m_n)
        tl.store(p_count + o_part, count, mask=m_n)


@triton.jit(do_not_specialize=["N", "parts"])
def parts_loss_kernel(
    p_top,  # (parts, N) of product_loss_kernel, as are the next three
    p_others,
    p_total,
    p_count,
    p_logit,  # (N,)
    p_extra,  # (N,); if p_total is given, it is e s_t alone
    p_label,  # (N,) int32
    p_loss,  # (N,) out
    p_lse,  # (N,) out, in base 2
    p_residue,  # (N,) out: g_t but for its e / K
    N,
    parts,
    smoothing,
    b_n: tl.constexpr,
):
    """The loss of every row from its parts, added up in their order, and its target."""
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    label = tl.load(p_label + o_n, mask=m_n, other=IGNORED)
    logit = tl.load(p_logit + o_n, mask=m_n, other=0.0)
    extra = tl.load(p_extra + o_n, mask=m_n, other=0.0)
    top = tl.where(logit > UNSET, logit, UNSET)
    others = tl.zeros((b_n,), tl.float32)
    total = logit
    count = tl.full((b_n,), 1.0, tl.float32)
    for i in range(parts):
        o_part = i * N + o_n
        own = tl.load(p_top + o_part, mask=m_n, other=UNSET)
        raised = tl.maximum(top, own, propagate_nan=tl.PropagateNan.ALL)
        others = others * tl.exp2(top - raised) + tl.load(p_others + o_part, mask=m_n, other=0.0) * tl.exp2(
            own - raised
        )
        top = raised
        if p_total is not None:
            total += tl.load(p_total + o_part, mask=m_n, other=0.0)
            count += tl.load(p_count + o_part, mask=m_n, other=0.0)
    if p_total is not None:
        extra -= tl.where((smoothing > 0.0) & (logit > float("-inf")), smoothing * LN2 * (total / count), 0.0)
    loss, lse, residue = finish_loss(top, others, logit, extra, label, smoothing)
    tl.store(p_loss + o_n, loss, mask=m_n)
    tl.store(p_lse + o_n, lse, mask=m_n)
    tl.store(p_residue + o_n, residue, mask=m_n)


@triton.jit(do_not_specialize=["first", "rows"], do_not_specialize_on_alignment=PER_ROW)
def product_gradient_kernel(
    p_h,  # (N, D), rows stride_h apart
    p_w,  # (K, D), rows stride_w apart
    p_g,  # (rows, K) out: upstream_n rw_k (g_nk - centre), or gain_n rw_k t_nk
    p_rnorm_h,  # (N,)
    p_rnorm_w,  # (K,)
    p_factor_w,  # (K,) rw, but 1 for a vector of norm 0: it has a gradient too, of 1 / eps
    p_bias,  # (K,) or None
    p_group,  # (K,) int32 or None
    p_lse,  # (N,) in base 2
    p_residue,  # (N,) g_t but for its e / K
    p_upstream,  # (N,) u rh and the gain; where p_both is given, rh and the gain
    p_both,  # (N,) u + v; or None: no group, no v and no gradient of the bias
    p_own,  # (N,) t_nk of the target but for its e / K, or None
    p_even,  # (N,) u e / K, or None
    p_label,  # (N,) int32
    p_scale,  # ()
    p_dbias,  # (row tiles, K) out: sum_n t_nk of the tile, or None
    first,
    rows,
    K,
    D,
    stride_h,
    stride_w,
    centre,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """A tile of what both products of a chunk's gradients need: rows first ... first + rows - 1; centre is e / K."""
    i_n = tl.program_id(1)
    o_row = i_n * b_n + tl.arange(0, b_n)
    m_n = o_row < rows
    o_n = first + o_row.to(tl.int64)
    o_k = tl.program_id(0) * b_k + tl.arange(0, b_k)
    m_k = o_k < K
    p_column = p_w + o_k.to(tl.int64) * stride_w
    s = tile_products(p_h + o_n * stride_h, p_column, m_n, m_k, D, b_n, b_k, b_d)
    scale_h = tl.load(p_rnorm_h + o_n, mask=m_n, other=0.0) * (tl.load(p_scale) * LOG2E)
    rnorm_w = tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0)
    bias = None if p_bias is None else code_bias(p_bias, o_k, m_k)[None, :]
    lse = tl.load(p_lse + o_n, mask=m_n, other=float("inf"))
    label = tl.load(p_label + o_n, mask=m_n, other=IGNORED)
    is_target = o_k[None, :] == label[:, None]
    if p_both is None:
        g = tl.exp2(scores(s, scale_h[:, None], rnorm_w[None, :], bias) - lse[:, None])
        g = tl.where(is_target, tl.load(p_residue + o_n, mask=m_n, other=0.0)[:, None], g) - centre
    else:
        apart = group_of_column(p_group, o_k, m_k)[None, :] == group_of_target(p_group, label)[:, None]
        g = chunk_weights(
            s,
            scale_h[:, None],
            rnorm_w[None, :],
            bias,
            lse[:, None],
            is_target,
            apart,
            tl.load(p_both + o_n, mask=m_n, other=0.0)[:, None],
            tl.load(p_own + o_n, mask=m_n, other=0.0)[:, None],
            tl.load(p_even + o_n, mask=m_n, other=0.0)[:, None],
        )
        if p_dbias is not None:
            tl.store(p_dbias + i_n.to(tl.int64) * K + o_k, tl.sum(g, axis=0), mask=m_k)
    factor = tl.load(p_factor_w + o_k, mask=m_k, other=0.0)
    g *= tl.load(p_upstream + o_n, mask=m_n, other=0.0)[:, None] * factor[None, :]
    o_g = o_row.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_g + o_g, g.to(p_g.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=["first", "rows"], do_not_specialize_on_alignment=PER_ROW)
def product_weights_kernel(
    p_h,  # (N, D), rows stride_h apart
    p_w,  # (K, D), rows stride_w apart
    p_g,  # (rows, K) out: rw_k E_nk; at the target rw_k g_nk sum_k E_nk, g_nk but for its e / K
    p_sums,  # (column tiles, rows) out: sum_k E_nk of the tile, but for the target
    p_arrived,  # (row tiles,) int32: programs that are done with their tile of these rows; 0 before and after
    p_rnorm_h,  # (N,)
    p_rnorm_w,  # (K,)
    p_logit,  # (N,)
    p_extra,  # (N,)
    p_lse,  # (N,) in base 2, of scales that are not plain
    p_label,  # (N,) int32
    p_scale,  # ()
    p_loss,  # (N,) out
    p_inverse,  # (N,) out: 1 / sum_k E_nk, 0 for a row without a target
    p_rows,  # (rows, D) out: h^_n / sum_k E_nk, rows stride_rows apart, or None
    first,
    rows,
    K,
    D,
    stride_h,
    stride_w,
    stride_rows,
    smoothing,
    ragged: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
    b_t: tl.constexpr,
    b_r: tl.constexpr,
):
    """A tile of a chunk's weights before its rows' sums are known: rows first ... first + rows - 1. Unless it is
    ragged, K is a multiple of b_k. Whichever program of a tile of rows is the last has all sums, and finishes them: it
    reads those of b_t tiles at once, and b_r dimensions of the rows."""
    i_k, i_n = tl.program_id(0), tl.program_id(1)
    o_row = i_n * b_n + tl.arange(0, b_n)
    m_n = o_row < rows
    o_n = first + o_row.to(tl.int64)
    o_k = i_k * b_k + tl.arange(0, b_k)
    m_k = o_k < K if ragged else tl.full((b_k,), True, tl.int1)
    p_column = p_w + o_k.to(tl.int64) * stride_w
    s = tile_products(p_h + o_n * stride_h, p_column, m_n, m_k, D, b_n, b_k, b_d)
    scale = tl.load(p_scale)
    scale_h = tl.load(p_rnorm_h + o_n, mask=m_n, other=0.0) * (scale * LOG2E)
    rnorm_w = tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0)
    offset = offset_of(p_lse + o_n, m_n, scale)
    label = tl.load(p_label + o_n, mask=m_n, other=IGNORED)
    apart = o_k[None, :] == label[:, None]
    if ragged:
        apart |= (o_k >= K)[None, :]
    g = tl.where(apart, 0.0, tl.exp2(scores(s, scale_h[:, None], rnorm_w[None, :], None) - offset[:, None]))
    tl.store(p_sums + i_k.to(tl.int64) * rows + o_row, tl.sum(g, axis=1), mask=m_n)
    g *= factor_of(rnorm_w)[None, :]
    o_g = o_row.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(p_g + o_g, g.to(p_g.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])

    # All threads have stored before one of them says so: who counts the last of these sees what the others stored.
    tl.debug_barrier()
    if tl.atomic_add(p_arrived + i_n, 1) < tl.num_programs(0) - 1:
        return
    # What follows from the sums of rows: the loss, the target's weights, the rows that make dw.
    tl.store(p_arrived + i_n, 0)
    tiles = tl.num_programs(0)
    others = tl.zeros((b_n,), tl.float32)
    for start in range(0, tiles, b_t):
        o_t = (start + tl.arange(0, b_t)).to(tl.int64)
        p_own = p_sums + o_t[:, None] * rows + o_row[None, :]
        m_own = (o_t < tiles)[:, None] & m_n[None, :]
        others += tl.sum(tl.load(p_own, mask=m_own, other=0.0, cache_modifier=".cg"), axis=0)
    logit = tl.load(p_logit + o_n, mask=m_n, other=0.0)
    extra = tl.load(p_extra + o_n, mask=m_n, other=0.0)
    known = label >= 0
    loss, _, _ = loss_of_plain(offset, others, logit, extra, label, smoothing)
    tl.store(p_loss + o_n, loss, mask=m_n)
    total = tl.exp2(logit - offset) + others
    inverse = tl.where(known, 1.0 / total, 0.0)
    tl.store(p_inverse + o_n, inverse, mask=m_n)
    m_t = m_n & known
    g_t = (smoothing * total - others) * factor_of(tl.load(p_rnorm_w + label, mask=m_t, other=0.0))
    tl.store(p_g + o_row.to(tl.int64) * K + label, g_t.to(p_g.dtype.element_ty), mask=m_t)
    if p_rows is not None:
        factor = inverse * tl.load(p_rnorm_h + o_n, mask=m_n, other=0.0)
        for start in range(0, D, b_r):
            o_d = start + tl.arange(0, b_r)
            m_nd = m_n[:, None] & (o_d < D)[None, :]
            h = tl.load(p_h + o_n[:, None] * stride_h + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
            h = tl.where(known[:, None], h * factor[:, None], 0.0)
            tl.store(p_rows + o_row.to(tl.int64)[:, None] * stride_rows + o_d[None, :], h, mask=m_nd)


@triton.jit
def factor_of(rnorm_w):
    """Of a column's weights: a vector of norm 0 has a gradient too, of 1 / eps."""
    return tl.where(rnorm_w == 0.0, 1.0, rnorm_w)


@triton.jit
def offset_of(p_lse, m_n, scale):
    """o_n; a row without a target has an infinite log-sum-exp, and weights that nothing reads."""
    return tl.where(is_plain(scale), 0.0, tl.load(p_lse, mask=m_n, other=0.0))


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["p_sum", "p_counted"])
def sum_loss_kernel(
    p_loss,  # (count,) losses of rows, or of parts of them
    p_label,  # (count,) int32 labels of rows, or how many of each part are not ignored
    p_sum,  # (programs,) out: the sum of the losses; of all rows divided by how many count, if ``mean``
    p_counted,  # (programs,) out: how many are not ignored; of all rows at least 1, and 1 unless ``mean``
    count,
    of_rows: tl.constexpr,
    of_all: tl.constexpr,
    mean: tl.constexpr,
    b_n: tl.constexpr,
):
    """The loss of b_n rows, or of all rows from those of such parts, in a fixed order."""
    i_part = tl.program_id(0).to(tl.int64)
    total = tl.zeros((b_n,), tl.float32)
    counted = tl.zeros((b_n,), tl.int64)
    for start in range(0, count if of_all else b_n, b_n):
        o_n = i_part * b_n + start + tl.arange(0, b_n)
        m_n = o_n < count
        total += tl.load(p_loss + o_n, mask=m_n, other=0.0)
        label = tl.load(p_label + o_n, mask=m_n, other=IGNORED if of_rows else 0)
        counted += (label != IGNORED).to(tl.int64) if of_rows else label.to(tl.int64)
    loss = tl.sum(total, axis=0)
    rows = tl.sum(counted, axis=0)
    if of_all:
        if mean:
            loss = loss / rows.to(tl.float32)
            rows = tl.maximum(rows, 1)
        else:
            rows = tl.full((), 1, tl.int64)
    tl.store(p_sum + i_part, loss)
    tl.store(p_counted + i_part, rows.to(p_counted.dtype.element_ty))


@triton.jit(do_not_specialize=["N"])
def cosine_logits_kernel(
    p_h,  # (N, D), rows stride_h apart
    p_w,  # (K, D), rows stride_w apart
    p_rnorm_h,  # (N,)
    p_rnorm_w,  # (K,)
    p_scale,  # ()
    p_out,  # (N, K) out: scale h^ . w^
    N,
    K,
    D,
    stride_h,
    stride_w,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """A tile of logits that are wanted as a tensor."""
    o_n = tl.program_id(1).to(tl.int64) * b_n + tl.arange(0, b_n)
    o_k = tl.program_id(0) * b_k + tl.arange(0, b_k)
    m_n, m_k = o_n < N, o_k < K
    p_column = p_w + o_k.to(tl.int64) * stride_w
    s = tile_products(p_h + o_n * stride_h, p_column, m_n, m_k, D, b_n, b_k, b_d)
    rnorm_h = tl.load(p_rnorm_h + o_n, mask=m_n, other=0.0)
    rnorm_w = tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0)
    s = s * rnorm_w[None, :] * rnorm_h[:, None] * tl.load(p_scale)
    tl.store(p_out + o_n[:, None] * K + o_k[None, :], s.to(p_out.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])
