"""Triton kernels of the cosine cross-entropy: flash form for D <= 256, epilogues of the chunked form beyond.

    s_nk = scale * h^_n . w^_k        loss_n = log sum_k exp(s_nk) - (1 - e) s_nt - e mean_k s_nk
    g_nk = p_nk - (1 - e) [k = t] - e / K,  p = softmax(s)
    dh_n = u_n scale rh_n (I - h^ h^T) o_n,    o_n = sum_k g_nk w^_k          (u: the upstream gradient of loss_n)
    dw_k = scale rw_k (I - w^ w^T) sum_n u_n g_nk h^_n,    dscale = sum_n u_n h^_n . o_n

What makes it legal and cheap:

- The operands of every product are the stored vectors; a tile of products is scaled by ``scale rh_n rw_k``.
- ``dh`` needs of the softmax only ``o_n``, so the forward pass accumulates it as attention accumulates its values, and
  backward recomputes the logits once, for dw: 8 N K D operations in all, and nothing of size N x K leaves a tile.
- The target is kept out of the tiles: its logit, known beforehand from one row gather, starts the running maximum, and
  ``p_t - 1 = -(sum of the others) / (sum of all)`` has no cancellation where p_t is nearly 1.
- Smoothing is of rank one: ``e sum_k w^_k / K`` is one vector of D numbers, never a term of a tile.
- The running maximum is raised (and the sums rescaled) only by a step of more than 2^SLACK: after the first tiles of a
  row it costs one comparison a tile. So it serves every scale, with no look by the host at a scale that lies on the
  device; a fixed offset for scale <= 64 would save only the maximum that the skipping needs anyway.
- A tile whose weights are all below ``2^log2_skip`` of their rows' mass does no second product. The running maximum is
  a lower bound of the mass from the first tile on, since it starts at the target's logit.
- dw has no atomics: a program owns its columns and loops over rows; row splits write partials, added in a fixed order.

Logits are in base 2 inside the kernels (exp2 is one instruction). ``label`` is the target, -1 where it is ignored and
-2 where it is out of range: such a row has no gradient, and the loss 0 or NaN.

Operations for each of the N K elements beside the products, counted: about 10 forward and 10 in dw (scale 2, target 2,
maximum 1, exp2 1, sum or weight 2, conversion 1); bytes: h and w once for each tile that owns rows of the other, from
L2, and 8 N D of device memory. PREDICTED, not measured (no kernel of this file has run on a GPU yet), for one H200 at
N = 65536, K = 4096, bfloat16, forward and backward:

- D = 256: products 0.70 ms at 790 TFLOP/s (the floor); element work 2 x 0.09 ms where it does not overlap with them;
  norms, order and partials 0.06 ms. 0.85-0.95 ms, 1.2-1.4 times the floor; peaked (9 tiles in 10 skipped) 0.50-0.55.
- D = 64: products 0.17 ms, element work 0.19 ms, which binds. 0.30-0.40 ms.
- D = 768, chunked: products 2.1 ms, 10 bytes of L2 traffic an element in the epilogues 0.7 ms. 2.6-3.0 ms.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.triton_common import is_constant, reciprocal_norm

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SLACK = tl.constexpr(8.0)  # weights stay below 2^8 (and float16 ones, times their gain of 2^6, below its largest)
IGNORED = tl.constexpr(-1)
WILD = tl.constexpr(-2)
# Slices of a chunk, read one number a program: their alignment changes nothing, and would only compile kernels twice.
PER_ROW = ["p_rnorm_h", "p_logit", "p_extra", "p_label", "p_loss", "p_lse", "p_residue", "p_upstream"]


@triton.jit(do_not_specialize=["N", "rows_each"])
def weighted_sum_kernel(p_x, p_weight, p_partial, N, D, stride, rows_each, b_n: tl.constexpr, b_d: tl.constexpr):
    """x (N, D), weight (N,) -> partial (programs, D): sum_n weight_n x_n over each program's rows_each rows."""
    i_part = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * b_d + tl.arange(0, b_d)
    total = tl.zeros((b_d,), tl.float32)
    for start in range(0, rows_each, b_n):
        o_row = start + tl.arange(0, b_n)
        o_n = i_part * rows_each + o_row
        m_n = (o_row < rows_each) & (o_n < N)
        x = tl.load(p_x + o_n[:, None] * stride + o_d[None, :], mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
        weight = tl.load(p_weight + o_n, mask=m_n, other=0.0)
        total += tl.sum(x.to(tl.float32) * weight[:, None], axis=0)
    tl.store(p_partial + i_part * D + o_d, total, mask=o_d < D)


@triton.jit(do_not_specialize=["N", "K", "ignore_index"])
def target_kernel(p_h, p_w, p_target, p_scale, p_centre, p_rnorm, p_logit, p_extra, p_label, p_key, N, K, D, stride_h,
                  stride_w, ignore_index, eps, smoothing, b_n: tl.constexpr, b_d: tl.constexpr):
    """All that a row knows before it meets the codebook: its norm, its target's logit, its part of the order.

    centre (D,) is e mean_k w^_k. Writes rnorm, logit (base 2), extra = e s_t - e mean_k s_k (natural), label, key (N,).
    Rows of near keys share tiles: first those far from their target (a flat softmax), then those near it (cosine >=
    1/2: most of a tile's weights are negligible), by target, so that few tiles hold targets; last the ignored.
    """
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    target = tl.load(p_target + o_n, mask=m_n, other=0)
    known = (target >= 0) & (target < K) & (target != ignore_index)
    squares_h = tl.zeros((b_n,), tl.float32)
    squares_w = tl.zeros((b_n,), tl.float32)
    product = tl.zeros((b_n,), tl.float32)
    central = tl.zeros((b_n,), tl.float32)
    for start in range(0, D, b_d):
        o_d = start + tl.arange(0, b_d)
        m_d = o_d < D
        h = tl.load(p_h + o_n[:, None] * stride_h + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        m_w = (m_n & known)[:, None] & m_d[None, :]
        w = tl.load(p_w + target[:, None] * stride_w + o_d[None, :], mask=m_w, other=0.0)
        centre = tl.load(p_centre + o_d, mask=m_d, other=0.0)
        h = h.to(tl.float32)
        w = w.to(tl.float32)
        squares_h += tl.sum(h * h, axis=1)
        squares_w += tl.sum(w * w, axis=1)
        product += tl.sum(h * w, axis=1)
        central += tl.sum(h * centre[None, :], axis=1)
    rnorm = reciprocal_norm(squares_h, eps)
    cosine = product * rnorm * reciprocal_norm(squares_w, eps)
    scale = tl.load(p_scale)
    extra = scale * (smoothing * cosine - central * rnorm)
    label = tl.where(known, target, tl.where(target == ignore_index, IGNORED, WILD)).to(tl.int32)
    key = tl.where(known, tl.where(cosine >= 0.5, K + target, target), 2 * K)
    tl.store(p_rnorm + o_n, rnorm, mask=m_n)
    tl.store(p_logit + o_n, tl.where(known, cosine * scale * LOG2E, 0.0), mask=m_n)
    tl.store(p_extra + o_n, extra, mask=m_n)
    tl.store(p_label + o_n, label, mask=m_n)
    tl.store(p_key + o_n, key.to(tl.int32), mask=m_n)


@triton.jit
def finish_loss(top, others, logit, extra, label, smoothing):
    """Maximum and sum of the others' weights -> loss, base-2 log-sum-exp, g_t, all of the row's.

    log(u) + (others - (u - own)) / u is log(own + others) with the part of others that u, their sum, has rounded away.
    """
    own = tl.exp2(logit - top)
    total = own + others
    loss = LN2 * (top - logit) + tl.log(total) + (others - (total - own)) / total + extra
    loss = tl.where(label >= 0, loss, tl.where(label == WILD, float("nan"), 0.0))
    lse = tl.where(label >= 0, top + tl.log2(total), float("inf"))
    return loss, lse, tl.where(label >= 0, smoothing - others / total, 0.0)


@triton.jit(do_not_specialize=["N", "K"])
def flash_forward_kernel(p_h, p_w, p_rnorm_h, p_rnorm_w, p_logit, p_extra, p_label, p_order, p_scale, p_gain, p_loss,
                         p_lse, p_residue, p_mean, N, K, D, stride_h, stride_w, smoothing, log2_skip,
                         with_mean: tl.constexpr, b_n: tl.constexpr, b_k: tl.constexpr, b_d: tl.constexpr):
    """h (N, D), w (K, D) -> loss, lse, residue g_t (N,); with_mean: mean (N, D).

    A program owns b_n rows. Kept in registers: the mean, maximum and sum of each; h in shared memory. The mean of w^_k
    over all k but the target, by their p_k, is of the size of 1 however small they are, so float16 can keep it.
    """
    o_slot = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_slot < N
    o_n = tl.load(p_order + o_slot, mask=m_n, other=0).to(tl.int32)
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    h = tl.load(p_h + o_n[:, None].to(tl.int64) * stride_h + o_d[None, :], mask=m_nd, other=0.0)
    label = tl.load(p_label + o_n, mask=m_n, other=IGNORED)
    logit = tl.load(p_logit + o_n, mask=m_n, other=0.0)
    rnorm = tl.load(p_rnorm_h + o_n, mask=m_n, other=0.0)
    gain = 1.0 if p_gain is None else tl.load(p_gain)
    scale_h = rnorm * (tl.load(p_scale) * LOG2E)

    top = tl.where(label >= 0, logit, 1e30)  # a row without a target has no weights, and asks for no product
    others = tl.zeros((b_n,), tl.float32)
    mean = tl.zeros((b_n, b_d), tl.float32)
    o_tile = tl.arange(0, b_k)[:, None] * stride_w + o_d[None, :]
    for start in range(0, K, b_k):
        o_k = start + tl.arange(0, b_k)
        m_k = o_k < K
        w = tl.load(p_w + o_tile, mask=m_k[:, None] & m_d[None, :], other=0.0)
        p_w += b_k * stride_w
        rnorm_w = tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0)
        s = tl.dot(h, tl.trans(w), input_precision="ieee")
        s = s * rnorm_w[None, :] * scale_h[:, None] - top[:, None]
        s = tl.where((o_k[None, :] == label[:, None]) | (o_k >= K)[None, :], float("-inf"), s)
        highest = tl.max(s)
        if highest > SLACK:
            rise = tl.maximum(tl.max(s, axis=1), 0.0)
            s -= rise[:, None]
            top += rise
            others *= tl.exp2(-rise)
            if with_mean:
                mean *= tl.exp2(-rise)[:, None]
        p = tl.exp2(s)
        others += tl.sum(p, axis=1)
        if with_mean:  # noqa: SIM102 (the first is decided when the kernel is compiled)
            if highest >= log2_skip:
                mean = tl.dot((p * (rnorm_w * gain)[None, :]).to(w.dtype), w, mean, input_precision="ieee")

    extra = tl.load(p_extra + o_n, mask=m_n, other=0.0)
    loss, lse, residue = finish_loss(top, others, logit, extra, label, smoothing)
    tl.store(p_loss + o_n, loss, mask=m_n)
    tl.store(p_lse + o_n, lse, mask=m_n)
    tl.store(p_residue + o_n, residue, mask=m_n)
    if with_mean:
        # Others that weigh next to nothing move nothing, and the reciprocal of a subnormal sum would be infinite.
        mean *= tl.where(others > 1e-30, 1.0 / (others * gain), 0.0)[:, None]
        # The rows are read again, or the addresses made of them would take 32 registers all through the loop.
        o_n = tl.load(p_order + o_slot, mask=m_n, other=0, volatile=True)
        tl.store(p_mean + o_n[:, None] * D + o_d[None, :], mean.to(h.dtype), mask=m_nd)


@triton.jit(do_not_specialize=["N"])
def flash_hidden_kernel(p_mean, p_h, p_w, p_rnorm_h, p_rnorm_w, p_residue, p_upstream, p_label, p_scale, p_centre,
                        p_out, p_radial, N, D, width, stride_h, stride_w, smoothing, eps, b_n: tl.constexpr,
                        b_d: tl.constexpr):
    """mean (N, D) -> dh (N, width), radial_n = u_n h^_n . o_n (N,); width <= D <= b_d.

    dh may be the mean itself: a program stores what it has read, after sums over all of it.
    """
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    label = tl.load(p_label + o_n, mask=m_n, other=IGNORED).to(tl.int64)
    known = label >= 0
    upstream = tl.load(p_upstream + o_n, mask=m_n, other=0.0)
    rnorm = tl.load(p_rnorm_h + o_n, mask=m_n, other=0.0)
    residue = tl.load(p_residue + o_n, mask=m_n, other=0.0)
    of_target = residue * tl.load(p_rnorm_w + label, mask=known, other=0.0)
    w = tl.load(p_w + label[:, None] * stride_w + o_d[None, :], mask=known[:, None] & m_d[None, :], other=0.0)
    h = tl.load(p_h + o_n[:, None] * stride_h + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    o = tl.load(p_mean + o_n[:, None] * D + o_d[None, :], mask=m_nd & known[:, None], other=0.0).to(tl.float32)
    centre = tl.load(p_centre + o_d, mask=m_d, other=0.0)
    o = o * (smoothing - residue)[:, None] + w.to(tl.float32) * of_target[:, None] - centre[None, :]
    radial = tl.sum(o * h, axis=1) * rnorm
    o -= tl.where(is_constant(rnorm, eps), 0.0, radial * rnorm)[:, None] * h  # a norm below eps is a constant
    factor = tl.load(p_scale) * upstream * tl.where(rnorm == 0.0, 1.0 / eps, rnorm)
    out = tl.where(known[:, None], o * factor[:, None], 0.0)
    tl.store(p_out + o_n[:, None] * width + o_d[None, :], out, mask=m_n[:, None] & (o_d < width)[None, :])
    tl.store(p_radial + o_n, tl.where(known, radial * upstream, 0.0), mask=m_n)


@triton.jit(do_not_specialize=["N", "K"])
def flash_weight_kernel(p_h, p_w, p_rnorm_h, p_rnorm_w, p_lse, p_residue, p_upstream, p_label, p_order, p_scale,
                        p_partial, p_largest, N, K, D, stride_h, stride_w, skip, b_k: tl.constexpr, b_n: tl.constexpr,
                        b_d: tl.constexpr):
    """-> partial (splits, K, D) times largest (splits, K), its largest number: over every splits-th tile of rows,

    sum_n upstream_n (p_nk - (1 - e) [k = t]) h_n.

    upstream (N,) is u_n rh_n (times the gain that keeps float16 in range). A program owns b_k columns of one split.
    """
    o_k = tl.program_id(0) * b_k + tl.arange(0, b_k)
    i_split = tl.program_id(1)
    m_k = o_k < K
    o_d = tl.arange(0, b_d)
    m_kd = m_k[:, None] & (o_d < D)[None, :]
    w = tl.load(p_w + o_k.to(tl.int64)[:, None] * stride_w + o_d[None, :], mask=m_kd, other=0.0)
    scale_w = tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0) * (tl.load(p_scale) * LOG2E)

    dw = tl.zeros((b_k, b_d), tl.float32)
    for start in range(i_split * b_n, N, tl.num_programs(1) * b_n):
        o_slot = start + tl.arange(0, b_n)
        m_n = o_slot < N
        o_n = tl.load(p_order + o_slot, mask=m_n, other=0)
        h = tl.load(p_h + o_n[:, None] * stride_h + o_d[None, :], mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
        rnorm = tl.load(p_rnorm_h + o_n, mask=m_n, other=0.0)
        lse = tl.load(p_lse + o_n, mask=m_n, other=float("inf"))
        residue = tl.load(p_residue + o_n, mask=m_n, other=0.0)
        upstream = tl.load(p_upstream + o_n, mask=m_n, other=0.0)
        label = tl.load(p_label + o_n, mask=m_n, other=IGNORED)
        s = tl.dot(w, tl.trans(h), input_precision="ieee")
        g = tl.exp2(s * scale_w[:, None] * rnorm[None, :] - lse[None, :])
        g = tl.where(o_k[:, None] == label[None, :], residue[None, :], g)
        unknown = tl.max((lse != lse).to(tl.int32), axis=0)  # tl.max drops NaN, which must reach dw
        if (tl.max(tl.abs(g)) >= skip) | (unknown > 0):
            dw = tl.dot((g * upstream[None, :]).to(h.dtype), h, dw, input_precision="ieee")
    o_partial = i_split.to(tl.int64) * K + o_k
    largest = tl.max(tl.abs(dw), axis=1)
    dw *= tl.where(largest > 1e-30, 1.0 / largest, 1e30)[:, None]
    tl.store(p_largest + o_partial, tl.where(largest > 1e-30, largest, 1e-30), mask=m_k)
    tl.store(p_partial + o_partial[:, None] * D + o_d[None, :], dw.to(p_partial.dtype.element_ty), mask=m_kd)


@triton.jit(do_not_specialize=["N", "splits"], do_not_specialize_on_alignment=["p_rnorm", "p_product"])
def finish_kernel(p_partial, p_largest, p_x, p_rnorm, p_scale, p_gain, p_centre, p_out, p_product, splits, N, D, width,
                  stride, eps, scaled: tl.constexpr, b_n: tl.constexpr, b_d: tl.constexpr):
    """partial (splits, N, D), x (N, D) -> out (N, width) = scale rx (I - x^ x^T) (sum partial / gain - centre).

    Partials are times largest (splits, N), if there is one.

    The end of dw, and of dh in the chunked form, where rx is in the partials already (``scaled``) and product (N,), x .
    partial, is wanted too. width <= D <= b_d.
    """
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    o_d = tl.arange(0, b_d)
    m_n = o_n < N
    m_d = o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    total = tl.zeros((b_n, b_d), tl.float32)
    for i in range(splits):
        partial = tl.load(p_partial + (i * N + o_n[:, None]) * D + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
        if p_largest is not None:
            partial *= tl.load(p_largest + i * N + o_n, mask=m_n, other=0.0)[:, None]
        total += partial
    if p_gain is not None:
        total /= tl.load(p_gain)
    total -= tl.load(p_centre + o_d, mask=m_d, other=0.0)[None, :]
    rnorm = tl.load(p_rnorm + o_n, mask=m_n, other=0.0)
    x = tl.load(p_x + o_n[:, None] * stride + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    product = tl.sum(total * x, axis=1)
    total -= tl.where(is_constant(rnorm, eps), 0.0, product * rnorm * rnorm)[:, None] * x
    factor = tl.where(rnorm == 0.0, 1.0 / eps, 1.0 if scaled else rnorm) * tl.load(p_scale)
    m_out = m_n[:, None] & (o_d < width)[None, :]
    tl.store(p_out + o_n[:, None] * width + o_d[None, :], total * factor[:, None], mask=m_out)
    if p_product is not None:
        tl.store(p_product + o_n, product, mask=m_n)


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def chunk_loss_kernel(p_s, p_rnorm_h, p_rnorm_w, p_logit, p_extra, p_label, p_scale, p_loss, p_lse, p_residue, K,
                      smoothing, b_k: tl.constexpr):
    """Products s (rows, K) float32 of a chunk -> loss, lse, residue (rows,). One row a program, read once."""
    i_n = tl.program_id(0).to(tl.int64)
    label = tl.load(p_label + i_n)
    logit = tl.load(p_logit + i_n)
    scale_h = tl.load(p_rnorm_h + i_n) * (tl.load(p_scale) * LOG2E)
    top = logit
    others = 0.0
    for start in range(0, K, b_k):
        o_k = start + tl.arange(0, b_k)
        m_k = o_k < K
        s = tl.load(p_s + i_n * K + o_k, mask=m_k, other=0.0)
        s = s * scale_h * tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0)
        s = tl.where(m_k & (o_k != label), s, float("-inf"))
        raised = tl.maximum(top, tl.max(s, axis=0), propagate_nan=tl.PropagateNan.ALL)
        others = others * tl.exp2(top - raised) + tl.sum(tl.exp2(s - raised), axis=0)
        top = raised
    loss, lse, residue = finish_loss(top, others, logit, tl.load(p_extra + i_n), label, smoothing)
    tl.store(p_loss + i_n, loss)
    tl.store(p_lse + i_n, lse)
    tl.store(p_residue + i_n, residue)


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def chunk_gradient_kernel(p_s, p_g, p_rnorm_h, p_rnorm_w, p_lse, p_residue, p_upstream, p_label, p_scale, K, centre,
                          b_k: tl.constexpr):
    """Products s (rows, K) of a chunk -> g (rows, K) = upstream_n rw_k (g_nk - centre), ready for both products.

    upstream is u_n rh_n and the gain; centre is e / K. g may be s itself: every element is read by who writes it.
    """
    i_n = tl.program_id(0).to(tl.int64)
    o_k = tl.program_id(1) * b_k + tl.arange(0, b_k)
    m_k = o_k < K
    rnorm_w = tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0)
    scale_h = tl.load(p_rnorm_h + i_n) * (tl.load(p_scale) * LOG2E)
    s = tl.load(p_s + i_n * K + o_k, mask=m_k, other=0.0)
    g = tl.exp2(s * scale_h * rnorm_w - tl.load(p_lse + i_n))
    g = tl.where(o_k == tl.load(p_label + i_n), tl.load(p_residue + i_n), g)
    rnorm_w = tl.where(rnorm_w == 0.0, 1.0, rnorm_w)  # a vector of norm 0 has a gradient too, of 1 / eps
    g = (g - centre) * (tl.load(p_upstream + i_n) * rnorm_w)
    tl.store(p_g + i_n * K + o_k, g.to(p_g.dtype.element_ty), mask=m_k)
