"""Triton kernels of the cosine cross-entropy: formulas, the flash form for D <= 128, and what both forms share.

    s_nk = scale * h^_n . w^_k + b_k    loss_n = L_n - (1 - e) s_nt - e mean_k s_nk,    L_n = log sum_k exp(s_nk)
    t_nk = u_n (p_nk - (1 - e) [k = t] - e / K) + v_n p_nk,   p = softmax(s)   (u, v: upstream gradients of loss and L)
    dh_n = scale rh_n (I - h^ h^T) o_n,    o_n = sum_k t_nk w^_k,    dscale = sum_n h^_n . o_n
    dw_k = scale rw_k (I - w^ w^T) sum_n t_nk h^_n,    db_k = sum_n t_nk

Columns of the target's group that are not the target (``same_as``) are left out of a row: of its sum, of its mean and
of the K that it is divided by.

What makes it legal and cheap:

- The operands of every product are the stored vectors; a tile of products is scaled by ``scale rh_n rw_k``.
- ``dh`` needs of the softmax only ``o_n``, so the forward pass accumulates it as attention accumulates its values, and
  backward recomputes the logits once, for dw: 8 N K D operations in all, and nothing of size N x K leaves a tile.
- The target is kept out of the tiles: its logit, known beforehand from one row gather, starts the running maximum, and
  ``p_t - 1 = -(sum of the others) / (sum of all)`` has no cancellation where p_t is nearly 1.
- Smoothing is of rank one: ``e sum_k w^_k / K`` is one vector of D numbers, never a term of a tile. With columns left
  out it is not: that case takes the chunked form, whose tiles have room for it.
- ``|s| <= |scale|``, so a scale of up to PLAIN needs no maximum: bfloat16 and float32 hold exp(s) and sums of it. What
  the scale is only the device knows: of two launches, one for plain scales and one for others, one ends at once.
- For others, for float16 and with biases the running maximum is raised (and the sums rescaled) only by a step of more
  than 2^SLACK: after the first tiles of a row it costs one comparison a tile.
- No tile is left out, however peaked the softmax: to find that its weights are negligible takes as long as the product
  that it saves, since the elements' work and not the products bind these kernels.
- dw has no atomics: a program owns its columns and loops over rows; row splits write partials, added in a fixed order.

Logits are in base 2 inside the kernels (exp2 is one instruction). ``label`` is the target, -1 where it is ignored and
-2 where it is out of range: such a row has no gradient, and the loss 0 or NaN.

Operations for each of the N K elements beside the products, counted: about 8 forward, with a plain scale, and 7 in dw
(scale 2, target 2, exp2 1, weight 1, conversion 1/2, forward a sum); bytes: h and w once for each tile that owns rows
of the other, from L2, and 8 N D of device memory. No kernel of this file has run on a GPU yet; ``bench/gpu_time.py``
has the estimated times.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.triton_common import (
    LN2,
    LOG2E,
    SLACK,
    code_bias,
    is_constant,
    present,
    radial_part,
    reciprocal_norm,
    scores,
)

IGNORED = tl.constexpr(-1)
WILD = tl.constexpr(-2)
UNSET = tl.constexpr(-1e38)  # a running maximum that has met no score yet
PLAIN = tl.constexpr(48.0)  # 2^(48 log2 e) = 2^69: 2^58 are left for the number of columns and for 1 / norms
FAR = tl.constexpr(-256.0)  # a target's logit below it is no start for a running maximum


@triton.jit(do_not_specialize=["N", "rows_each"])
def weighted_sum_kernel(
    p_x,  # (N, D), rows stride apart
    p_weight,  # (N,)
    p_partial,  # (programs, D) out: sum_n weight_n x_n over each program's rows_each rows
    N,
    D,
    stride,
    rows_each,
    b_n: tl.constexpr,
    b_d: tl.constexpr,
):
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
def target_kernel(
    p_h,  # (N, D), rows stride_h apart
    p_w,  # (K, D), rows stride_w apart
    p_target,  # (N,) int64
    p_scale,  # ()
    p_bias,  # (K,) or None
    p_centre,  # (D,) e mean_k w^_k
    p_bias_centre,  # () e mean_k b_k, or None: no bias, or no smoothing
    p_rnorm,  # (N,) out: 1 / ||h_n||
    p_logit,  # (N,) out: s_t in base 2
    p_extra,  # (N,) out: e s_t - e mean_k s_k, natural
    p_label,  # (N,) out, int32: the target, IGNORED or WILD
    N,
    K,
    D,
    stride_h,
    stride_w,
    ignore_index,
    eps,
    smoothing,
    b_n: tl.constexpr,
    b_d: tl.constexpr,
):
    """All that a row knows before it meets the codebook: its norm and its target's logit."""
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
    bias = code_bias(p_bias, target, m_n & known)
    logit = scores(cosine, scale, LOG2E, bias)
    if p_bias_centre is not None:  # a target that the bias takes out has an infinite loss, whatever the others'
        extra += tl.where(logit > float("-inf"), smoothing * LN2 * bias - tl.load(p_bias_centre), 0.0)
    label = tl.where(known, target, tl.where(target == ignore_index, IGNORED, WILD)).to(tl.int32)
    tl.store(p_rnorm + o_n, rnorm, mask=m_n)
    tl.store(p_logit + o_n, tl.where(known, logit, 0.0), mask=m_n)
    tl.store(p_extra + o_n, extra, mask=m_n)
    tl.store(p_label + o_n, label, mask=m_n)


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


@triton.jit
def is_plain(scale):
    """Whether exponentials of all scores, and their sums, are in range without an offset."""
    return tl.abs(scale) <= PLAIN


@triton.jit
def loss_of_plain(offset, others, logit, extra, label, smoothing):
    """:func:`finish_loss` of sums that are relative to an offset, not to a maximum.

    It gets them relative to the largest, or what is near 0 of a loss would be the difference of two logarithms.
    """
    top = tl.maximum(logit, offset + tl.log2(tl.maximum(others, 1e-38)))
    return finish_loss(top, others * tl.exp2(offset - top), logit, extra, label, smoothing)


@triton.jit
def group_of_column(p_group, o_k, m_k):
    """What a row compares with :func:`group_of_target`: columns of one group are one item."""
    return o_k if p_group is None else tl.load(p_group + o_k, mask=m_k, other=-3)


@triton.jit
def group_of_target(p_group, label):
    return label if p_group is None else tl.load(p_group + label, mask=label >= 0, other=-1)


@triton.jit
def first_maximum(logit, p_bias):
    """Where a row's running maximum starts: at its target, but not at one that its bias takes out or far down.

    All that a difference of a score and the maximum has of the score is what the maximum's size leaves.
    """
    return logit if p_bias is None else tl.where(logit < FAR, UNSET, logit)


@triton.jit
def with_target(top, others, logit, p_bias):
    """Maximum and sum of the others' weights, where the maximum may have started without the target."""
    if p_bias is None:
        return top, others
    raised = tl.where(logit > top, logit, top)
    return raised, others * tl.exp2(top - raised)


@triton.jit(do_not_specialize=["N"])
def flash_forward_kernel(
    p_h,  # (N, D), rows stride_h apart
    p_w,  # (K, D), rows stride_w apart
    p_rnorm_h,  # (N,)
    p_rnorm_w,  # (K,)
    p_bias,  # (K,) or None
    p_group,  # (K,) int32 or None: columns of one group are one item
    p_logit,  # (N,)
    p_extra,  # (N,)
    p_label,  # (N,) int32
    p_scale,  # ()
    p_gain,  # () or None: keeps float16 weights in range
    p_loss,  # (N,) out
    p_lse,  # (N,) out: L in base 2, inf for a row without a target
    p_residue,  # (N,) out: g_t = p_t - (1 - e)
    p_mean,  # (N, D) out, with_mean: the mean of w^_k over all k but the target, by their p_k
    N,
    K,
    D,
    stride_h,
    stride_w,
    smoothing,
    with_mean: tl.constexpr,
    plain: tl.constexpr,
    whole: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """A program owns b_n rows. Kept in registers: the mean, maximum and sum of each; h in shared memory.

    The mean is of the size of 1 however small the p_k are, so float16 can keep it. ``plain``: True for plain scales
    alone, which need no maximum, False for the others alone, None for all; of the rest a program ends at once.
    ``whole``: K is a multiple of b_k.
    """
    if plain is not None:  # noqa: SIM102 (the first is decided when the kernel is compiled)
        if is_plain(tl.load(p_scale)) != plain:
            return
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    h = tl.load(p_h + o_n[:, None] * stride_h + o_d[None, :], mask=m_nd, other=0.0)
    label = tl.load(p_label + o_n, mask=m_n, other=IGNORED)
    logit = tl.load(p_logit + o_n, mask=m_n, other=0.0)
    rnorm = tl.load(p_rnorm_h + o_n, mask=m_n, other=0.0)
    gain = 1.0 if p_gain is None else tl.load(p_gain)
    scale_h = rnorm * (tl.load(p_scale) * LOG2E)

    group = group_of_target(p_group, label)
    # A row without a target has no weights, and asks for no product.
    top = tl.where(label >= 0, first_maximum(logit, p_bias), 1e30)
    waiting = 0 if p_bias is None else (tl.min(top) == UNSET).to(tl.int32)
    others = tl.zeros((b_n,), tl.float32)
    mean = tl.zeros((b_n, b_d), tl.float32)
    o_tile = tl.arange(0, b_k)[:, None] * stride_w + o_d[None, :]
    for start in range(0, K, b_k):
        o_k = start + tl.arange(0, b_k)
        m_k = present(o_k, K, whole)
        w = tl.load(p_w + o_tile, mask=m_k[:, None] & m_d[None, :], other=0.0)
        p_w += b_k * stride_w
        rnorm_w = tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0)
        s = tl.dot(h, tl.trans(w), input_precision="ieee")
        bias = code_bias(p_bias, o_k[None, :], m_k[None, :])
        s = scores(s, rnorm_w[None, :], scale_h[:, None], bias)
        apart = group_of_column(p_group, o_k, m_k)[None, :] == group[:, None]
        if not whole:
            apart |= (o_k >= K)[None, :]
        if plain:
            p = tl.where(apart, 0.0, tl.exp2(s))
        else:
            if p_bias is not None:  # noqa: SIM102 (the first is decided when the kernel is compiled)
                if waiting != 0:
                    top = tl.where(top == UNSET, tl.maximum(tl.max(tl.where(apart, UNSET, s), axis=1), UNSET), top)
                    waiting = (tl.min(top) == UNSET).to(tl.int32)
            s = tl.where(apart, float("-inf"), s - top[:, None])
            if tl.max(s) > SLACK:
                rise = tl.maximum(tl.max(s, axis=1), 0.0)
                s -= rise[:, None]
                top += rise
                others *= tl.exp2(-rise)
                if with_mean:
                    mean *= tl.exp2(-rise)[:, None]
            p = tl.exp2(s)
        others += tl.sum(p, axis=1)
        if with_mean:
            mean = tl.dot((p * (rnorm_w * gain)[None, :]).to(w.dtype), w, mean, input_precision="ieee")

    extra = tl.load(p_extra + o_n, mask=m_n, other=0.0)
    if plain:
        loss, lse, residue = loss_of_plain(0.0, others, logit, extra, label, smoothing)
    else:
        highest_of_row, others_by_it = with_target(top, others, logit, p_bias)
        loss, lse, residue = finish_loss(highest_of_row, others_by_it, logit, extra, label, smoothing)
    tl.store(p_loss + o_n, loss, mask=m_n)
    tl.store(p_lse + o_n, lse, mask=m_n)
    tl.store(p_residue + o_n, residue, mask=m_n)
    if with_mean:
        # Others that weigh next to nothing move nothing, and the reciprocal of a subnormal sum would be infinite.
        mean *= tl.where(others > 1e-30, 1.0 / (others * gain), 0.0)[:, None]
        tl.store(p_mean + o_n[:, None] * D + o_d[None, :], mean.to(h.dtype), mask=m_nd)


@triton.jit(do_not_specialize=["N"])
def flash_hidden_kernel(
    p_mean,  # (N, D) of flash_forward_kernel
    p_h,  # (N, D), rows stride_h apart
    p_w,  # (K, D), rows stride_w apart
    p_rnorm_h,  # (N,)
    p_rnorm_w,  # (K,)
    p_residue,  # (N,) g_t
    p_upstream,  # (N,) u
    p_both,  # (N,) u + v, or None where v is 0
    p_own,  # (N,) t_nk of the target but for its e / K, or None
    p_label,  # (N,) int32
    p_scale,  # ()
    p_centre,  # (D,) e mean_k w^_k
    p_out,  # (N, width) out: dh, which may be the mean itself: a program stores what it has read
    p_radial,  # (N,) out: h^_n . o_n
    N,
    D,
    width,
    stride_h,
    stride_w,
    smoothing,
    eps,
    b_n: tl.constexpr,
    b_d: tl.constexpr,
):
    """The end of dh in the flash form. width <= D <= b_d."""
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
    of_others = smoothing - residue
    of_target = residue
    if p_both is not None:
        of_others *= tl.load(p_both + o_n, mask=m_n, other=0.0)
        of_target = tl.load(p_own + o_n, mask=m_n, other=0.0)
    of_target *= tl.load(p_rnorm_w + label, mask=known, other=0.0)
    w = tl.load(p_w + label[:, None] * stride_w + o_d[None, :], mask=known[:, None] & m_d[None, :], other=0.0)
    h = tl.load(p_h + o_n[:, None] * stride_h + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    o = tl.load(p_mean + o_n[:, None] * D + o_d[None, :], mask=m_nd & known[:, None], other=0.0).to(tl.float32)
    centre = tl.load(p_centre + o_d, mask=m_d, other=0.0)[None, :]
    if p_both is not None:
        centre *= upstream[:, None]
        upstream = known.to(tl.float32)
    o = o * of_others[:, None] + w.to(tl.float32) * of_target[:, None] - centre
    radial = tl.sum(o * h, axis=1) * rnorm
    o -= tl.where(is_constant(rnorm, eps), 0.0, radial * rnorm)[:, None] * h  # a norm below eps is a constant
    factor = tl.load(p_scale) * upstream * tl.where(rnorm == 0.0, 1.0 / eps, rnorm)
    out = tl.where(known[:, None], o * factor[:, None], 0.0)
    tl.store(p_out + o_n[:, None] * width + o_d[None, :], out, mask=m_n[:, None] & (o_d < width)[None, :])
    tl.store(p_radial + o_n, tl.where(known, radial * upstream, 0.0), mask=m_n)


@triton.jit(do_not_specialize=["N", "K"])
def flash_weight_kernel(
    p_h,  # (N, D), rows stride_h apart
    p_w,  # (K, D), rows stride_w apart
    p_rnorm_h,  # (N,), as are lse, residue, upstream, both, own and label
    p_rnorm_w,  # (K,)
    p_bias,  # (K,) or None
    p_group,  # (K,) int32 or None
    p_lse,  # in base 2
    p_residue,  # g_t, or None where p_both is given
    p_upstream,  # u rh, times the gain that keeps float16 in range, or None where p_both is given
    p_both,  # u + v, or None: neither v nor a gradient of the bias
    p_own,  # t_nk of the target but for its e / K, or None
    p_gain,  # () or None: the gain, where p_both is given
    p_label,  # int32
    p_scale,  # ()
    p_partial,  # (splits, K, D) out: over every splits-th tile of rows sum_n t_nk h^_n, but for what is e / K
    p_largest,  # (splits, K) out: its largest number, which it is divided by
    p_dbias,  # (splits, K) out: sum_n t_nk, but for what is e / K; None where there is no p_both
    N,
    K,
    D,
    stride_h,
    stride_w,
    whole: tl.constexpr,
    b_k: tl.constexpr,
    b_n: tl.constexpr,
    b_d: tl.constexpr,
):
    """A program owns b_k columns of one split. ``whole``: N is a multiple of b_n."""
    o_k = tl.program_id(0) * b_k + tl.arange(0, b_k)
    i_split = tl.program_id(1)
    m_k = o_k < K
    o_d = tl.arange(0, b_d)
    m_kd = m_k[:, None] & (o_d < D)[None, :]
    w = tl.load(p_w + o_k.to(tl.int64)[:, None] * stride_w + o_d[None, :], mask=m_kd, other=0.0)
    scale_w = tl.load(p_rnorm_w + o_k, mask=m_k, other=0.0) * (tl.load(p_scale) * LOG2E)
    bias = code_bias(p_bias, o_k[:, None], m_k[:, None])
    group = group_of_column(p_group, o_k, m_k)

    dw = tl.zeros((b_k, b_d), tl.float32)
    dbias = tl.zeros((b_k,), tl.float32)
    for start in range(i_split * b_n, N, tl.num_programs(1) * b_n):
        o_n = start + tl.arange(0, b_n)
        m_n = present(o_n, N, whole)
        o_nd = o_n.to(tl.int64)[:, None] * stride_h + o_d[None, :]
        h = tl.load(p_h + o_nd, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
        rnorm = tl.load(p_rnorm_h + o_n, mask=m_n, other=0.0)
        lse = tl.load(p_lse + o_n, mask=m_n, other=float("inf"))
        label = tl.load(p_label + o_n, mask=m_n, other=IGNORED)
        s = tl.dot(w, tl.trans(h), input_precision="ieee")
        g = tl.exp2(scores(s, scale_w[:, None], rnorm[None, :], bias) - lse[None, :])
        if p_group is not None:
            g = tl.where(group[:, None] == group_of_target(p_group, label)[None, :], 0.0, g)
        is_target = o_k[:, None] == label[None, :]
        if p_both is None:
            g = tl.where(is_target, tl.load(p_residue + o_n, mask=m_n, other=0.0)[None, :], g)
            upstream = tl.load(p_upstream + o_n, mask=m_n, other=0.0)
        else:
            both = tl.load(p_both + o_n, mask=m_n, other=0.0)
            own = tl.load(p_own + o_n, mask=m_n, other=0.0)
            g = tl.where(is_target, own[None, :], g * both[None, :])
            dbias += tl.sum(g, axis=1)
            upstream = rnorm if p_gain is None else rnorm * tl.load(p_gain)
        dw = tl.dot((g * upstream[None, :]).to(h.dtype), h, dw, input_precision="ieee")
    o_partial = i_split.to(tl.int64) * K + o_k
    largest = tl.max(tl.abs(dw), axis=1)
    dw *= tl.where(largest > 1e-30, 1.0 / largest, 1e30)[:, None]
    tl.store(p_largest + o_partial, tl.where(largest > 1e-30, largest, 1e-30), mask=m_k)
    if p_dbias is not None:
        tl.store(p_dbias + o_partial, dbias, mask=m_k)
    tl.store(p_partial + o_partial[:, None] * D + o_d[None, :], dw.to(p_partial.dtype.element_ty), mask=m_kd)


@triton.jit(do_not_specialize=["N", "splits"], do_not_specialize_on_alignment=["p_rnorm", "p_product"])
def finish_kernel(
    p_partial,  # (splits, N, D)
    p_largest,  # (splits, N), a factor of each row of the partials, or None
    p_x,  # (N, D), rows stride apart
    p_rnorm,  # (N,) 1 / ||x_n||
    p_scale,  # ()
    p_gain,  # () or None: what the partials are too large by
    p_centre,  # (D,), or None: 0
    p_label,  # (N,) int32, or None: rows below 0 have no gradient
    p_out,  # (N, width) out: scale rx (I - x^ x^T) (sum partial / gain - centre); may be the partial, where it is one
    p_product,  # (N,) out: x . (sum partial / gain - centre), or None
    splits,
    N,
    D,
    width,
    stride,
    eps,
    scaled: tl.constexpr,
    b_n: tl.constexpr,
    b_d: tl.constexpr,
):
    """The end of dw, and of dh in the chunked forms, where rx is in the partials already if they are ``scaled``.

    width <= D <= b_d.
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
    rnorm = tl.load(p_rnorm + o_n, mask=m_n, other=0.0)
    if p_centre is not None:
        centre = tl.load(p_centre + o_d, mask=m_d, other=0.0)[None, :]
        total -= centre * tl.where(rnorm == 0.0, 1.0, rnorm)[:, None] if scaled else centre
    if p_label is not None:
        total = tl.where((tl.load(p_label + o_n, mask=m_n, other=IGNORED) >= 0)[:, None], total, 0.0)
    x = tl.load(p_x + o_n[:, None] * stride + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    product = tl.sum(total * x, axis=1)
    total -= radial_part(product, rnorm, eps)[:, None] * x
    factor = tl.where(rnorm == 0.0, 1.0 / eps, 1.0 if scaled else rnorm) * tl.load(p_scale)
    m_out = m_n[:, None] & (o_d < width)[None, :]
    tl.store(p_out + o_n[:, None] * width + o_d[None, :], total * factor[:, None], mask=m_out)
    if p_product is not None:
        tl.store(p_product + o_n, product, mask=m_n)
