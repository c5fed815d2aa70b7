"""Triton kernels of soft residual quantization: flash form for D <= 256, epilogues of the chunked form beyond.

    l_nk = (scale r^_n . e^_k + g_nk) / tau,    p = softmax(l),    z~_n = sum_k p_nk e_k,    r'_n = r_n - z~_n
    c_nk = z_n . e_k + v_k   (z: gradient of z~ at the row, v: gradient of usage / N)
    w_nk = p_nk (c_nk - sum_k p_nk c_nk + L_n) = dl_nk   (L: gradient of the log-normalizer)
    dr_n = scale / tau rr_n (I - r^ r^T) sum_k w_nk e^_k
    de_k = scale / tau re_k (I - e^ e^T) sum_n w_nk r^_n + sum_n p_nk z_n
    dscale = sum_n r^_n . (sum_k w_nk e^_k) / tau,    dtau = -sum_nk w_nk l_nk / tau

This is attention with the residual as query and the codebook as key and as value, with noise made inside.

- Operands of products are the stored vectors; a tile of products is scaled by ``scale rr_n re_k``. The residual is carried
  from level to level in float32 and rounded only as an operand: N x D numbers against N x K of work, so each level is a
  launch of its own and the residuals, which are an output, are written once and read once.
- The softmax is never stored: forward keeps the log-normalizer, every other pass makes logits and noise again. ``w`` needs
  sum_k p c before the first product with it (p c and its mean cancel where p is peaked, so rounded operands cannot be
  corrected afterwards); the row kernel therefore passes over the codes twice.
- No atomics: a program owns its rows or its codes; splits write partials that are added in a fixed order.
- Peaked rows: the pass for ``usage`` notes the largest p of every tile; backward leaves out whole tiles, noise and products,
  that lie below ``skip``. Rows are visited in the order of their sampled codes, so that what is large shares tiles.
- 16-bit gradients keep their range: z_n enters products with norm 1, weights are scaled by powers of a bound of theirs.

Logits, noise and log-normalizers are in base 2 inside the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.cosine.triton_kernels import reciprocal_norm
from dgi_kernels.gumbel.triton_noise import LN2, LOG2E, noise_tile, noise_tile_by_code

SLACK = tl.constexpr(8.0)  # the running maximum may lag by this much: weights stay below 2^8
STREAM = tl.constexpr(0)  # of the noise of residual_quantize
SOFT = tl.constexpr(0)
STRAIGHT_THROUGH = tl.constexpr(1)
HARD = tl.constexpr(2)
VARYING = ["N", "level", "row_offset"]  # no code of their own for the value 1 or a multiple of 16


@triton.jit(do_not_specialize=VARYING)
def level_kernel(p_rest, p_e, p_rnorm_e, p_seed, p_scale, p_tau, p_residual, p_quantized, p_codes, p_sampled, p_lse, p_rnorm,
                 N, K, D, stride_d, stride_m, level, row_offset, eps, log2_skip, mode: tl.constexpr, noisy: tl.constexpr,
                 b_n: tl.constexpr, b_k: tl.constexpr, b_d: tl.constexpr):
    """One level: rest (N, D) float32, e (K, D) -> residual, quantized (N, D), codes, sampled, lse, rnorm (N,); rest -= z~.

    A program owns b_n rows. Kept: rest and its rounding r, o (b_n, b_d), maximum and sum, two best codes (b_n,).
    """
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    p_rest += o_n[:, None] * D + o_d[None, :]
    rest = tl.load(p_rest, mask=m_nd, other=0.0)
    rnorm = reciprocal_norm(tl.sum(rest * rest, axis=1), eps)
    r = rest.to(p_e.dtype.element_ty)
    tl.store(p_residual + o_n[:, None] * stride_d + o_d[None, :], r, mask=m_nd)
    tl.store(p_rnorm + o_n * stride_m, rnorm, mask=m_n)
    scale_r = rnorm * (tl.load(p_scale) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    seed = tl.load(p_seed)
    o_row = (o_n + row_offset).to(tl.uint32)

    code = tl.zeros((b_n,), tl.int32)
    sampled = tl.zeros((b_n,), tl.int32)
    best = tl.full((b_n,), float("-inf"), tl.float32)
    best_noisy = tl.full((b_n,), float("-inf"), tl.float32)
    top = tl.full((b_n,), float("-inf"), tl.float32)
    total = tl.zeros((b_n,), tl.float32)
    o = tl.zeros((b_n, b_d), tl.float32)
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        m_k = o_k < K
        e = tl.load(p_e + o_k.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
        rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
        y = tl.dot(r, tl.trans(e), input_precision="ieee") * scale_r[:, None] * rnorm_e[None, :]
        y = tl.where(m_k[None, :], y, float("-inf"))
        highest, where = tl.max(y, axis=1, return_indices=True)
        code = tl.where(highest > best, first + where, code)
        best = tl.maximum(best, highest)
        if noisy:
            y += noise_tile(seed, first, o_row, level, STREAM, b_k)
            highest, where = tl.max(y, axis=1, return_indices=True)
            sampled = tl.where(highest > best_noisy, first + where, sampled)
            best_noisy = tl.maximum(best_noisy, highest)
        highest *= inv_tau
        rises = highest > top + SLACK
        if tl.max(rises.to(tl.int32), axis=0) > 0:
            raised = tl.where(rises, highest, top)
            shrink = tl.exp2(top - raised)
            top = raised
            total *= shrink
            if mode == SOFT:
                o *= shrink[:, None]
        p = tl.exp2(y * inv_tau - top[:, None])
        total += tl.sum(p, axis=1)
        if mode == SOFT:  # noqa: SIM102 (the first is decided when the kernel is compiled)
            if tl.max(highest - top, axis=0) >= log2_skip:
                o = tl.dot(p.to(e.dtype), e, o, input_precision="ieee")

    lse = LN2 * (top + tl.log2(total))
    if not noisy:
        sampled = code
    if mode == SOFT:
        quantized = o / total[:, None]
    else:
        emitted = code if mode == HARD else sampled
        row = p_e + emitted.to(tl.int64)[:, None] * D + o_d[None, :]
        quantized = tl.load(row, mask=m_nd, other=0.0).to(tl.float32)
        if mode == STRAIGHT_THROUGH:
            quantized = tl.where((lse == lse)[:, None], quantized, float("nan"))
    tl.store(p_rest, rest - quantized, mask=m_nd)
    tl.store(p_quantized + o_n[:, None] * stride_d + o_d[None, :], quantized.to(r.dtype), mask=m_nd)
    tl.store(p_codes + o_n * stride_m, code.to(tl.int64), mask=m_n)
    tl.store(p_sampled + o_n * stride_m, sampled.to(tl.int64), mask=m_n)
    tl.store(p_lse + o_n * stride_m, lse, mask=m_n)


@triton.jit
def log2_softmax(products, scale_r, rnorm_e, noise, inv_tau, lse, noisy: tl.constexpr):
    """log2 p of a tile, its operands broadcast to it by the caller; lse natural, +inf for rows that are not there."""
    y = products * scale_r * rnorm_e
    if noisy:
        y += noise
    return y * inv_tau - lse * LOG2E


@triton.jit(do_not_specialize=VARYING)
def usage_kernel(p_r, p_e, p_rnorm, p_rnorm_e, p_seed, p_scale, p_tau, p_lse, p_sampled, p_order, p_partial, p_largest, N, K,
                 D, stride_d, stride_m, level, row_offset, noisy: tl.constexpr, b_n: tl.constexpr, b_k: tl.constexpr,
                 b_d: tl.constexpr):
    """-> partial (splits, K) = sum_n p_nk, largest (row tiles, code tiles) = max p, 1 in a tile that holds a sampled code.

    A program owns b_k codes of one split: every splits-th tile of rows.
    """
    i_k = tl.program_id(0)
    o_k = i_k * b_k + tl.arange(0, b_k)
    m_k = o_k < K
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    e = tl.load(p_e + o_k.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
    scale_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0) * (tl.load(p_scale) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    seed = tl.load(p_seed)
    usage = tl.zeros((b_k,), tl.float32)
    for first in range(tl.program_id(1) * b_n, N, tl.num_programs(1) * b_n):
        o_slot = first + tl.arange(0, b_n)
        m_n = o_slot < N
        o_n = tl.load(p_order + o_slot, mask=m_n, other=0)
        r = tl.load(p_r + o_n[:, None] * stride_d + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
        rnorm = tl.load(p_rnorm + o_n * stride_m, mask=m_n, other=0.0)
        lse = tl.load(p_lse + o_n * stride_m, mask=m_n, other=float("inf"))
        sampled = tl.load(p_sampled + o_n * stride_m, mask=m_n, other=-1)
        products = tl.dot(e, tl.trans(r), input_precision="ieee")
        noise = 0.0
        if noisy:
            noise = noise_tile_by_code(seed, i_k * b_k, (o_n + row_offset).to(tl.uint32), level, STREAM, b_k)
        p = tl.exp2(log2_softmax(products, scale_e[:, None], rnorm[None, :], noise, inv_tau, lse[None, :], noisy))
        usage += tl.sum(p, axis=1)
        known = tl.where((o_k[:, None] == sampled[None, :]) | (p != p), 1.0, p)  # NaN must reach the gradients
        largest = tl.max(tl.max(tl.where(m_k[:, None], known, 0.0), axis=1), axis=0)
        tl.store(p_largest + (first // b_n) * tl.num_programs(0) + i_k, largest)
    tl.store(p_partial + tl.program_id(1) * K + o_k, usage, mask=m_k)


@triton.jit(do_not_specialize=VARYING)
def row_gradient_kernel(p_r, p_e, p_rnorm, p_rnorm_e, p_seed, p_scale, p_tau, p_lse, p_order, p_largest, p_unit, p_norm,
                        p_bound, p_dusage, p_dlse, p_gain, p_mean, p_out, p_dtau, N, K, D, stride_d, stride_m, level,
                        row_offset, skip, noisy: tl.constexpr, b_n: tl.constexpr, b_k: tl.constexpr, b_d: tl.constexpr):
    """-> mean (N,) = sum_k p c, out (N, D) = rr_n sum_k w e^_k, dtau (N,) = sum_k w log2 p, for the rows of one tile.

    unit (N, D) and norm (N,) are z; bound (N,) is one of |c - mean + L|; dusage (K,) is v, None where it is 0.
    """
    i_n = tl.program_id(0).to(tl.int64)
    o_slot = i_n * b_n + tl.arange(0, b_n)
    m_n = o_slot < N
    o_n = tl.load(p_order + o_slot, mask=m_n, other=0)
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    r = tl.load(p_r + o_n[:, None] * stride_d + o_d[None, :], mask=m_nd, other=0.0)
    unit = tl.load(p_unit + o_n[:, None] * D + o_d[None, :], mask=m_nd, other=0.0)
    rnorm = tl.load(p_rnorm + o_n * stride_m, mask=m_n, other=0.0)
    lse = tl.load(p_lse + o_n * stride_m, mask=m_n, other=float("inf"))
    norm = tl.load(p_norm + o_n, mask=m_n, other=0.0)
    bound = tl.load(p_bound + o_n, mask=m_n, other=1.0)
    gain = 1.0 if p_gain is None else tl.load(p_gain)
    scale_r = rnorm * (tl.load(p_scale) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    seed = tl.load(p_seed)
    o_row = (o_n + row_offset).to(tl.uint32)
    tiles = tl.cdiv(K, b_k)

    mean = tl.zeros((b_n,), tl.float32)
    mass = tl.zeros((b_n,), tl.float32)
    dtau = tl.zeros((b_n,), tl.float32)
    o = tl.zeros((b_n, b_d), tl.float32)
    for i in range(0, 2 * tiles):  # twice over the codes: first the mean, then what needs it
        first = (i % tiles) * b_k
        if tl.load(p_largest + i_n * tiles + i % tiles) >= skip:
            o_k = first + tl.arange(0, b_k)
            m_k = o_k < K
            e = tl.load(p_e + o_k.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0)
            rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
            noise = 0.0
            if noisy:
                noise = noise_tile(seed, first, o_row, level, STREAM, b_k)
            products = tl.dot(r, tl.trans(e), input_precision="ieee")
            log_p = log2_softmax(products, scale_r[:, None], rnorm_e[None, :], noise, inv_tau, lse[:, None], noisy)
            p = tl.where(m_k[None, :], tl.exp2(log_p), 0.0)
            c = tl.dot(unit, tl.trans(e), input_precision="ieee") * norm[:, None]
            if p_dusage is not None:
                c += tl.load(p_dusage + o_k, mask=m_k, other=0.0)[None, :]
            if i < tiles:
                mean += tl.sum(p * c, axis=1)
                mass += tl.sum(p, axis=1)
            else:
                w = p * (c - mean[:, None])
                dtau += tl.sum(w * log_p, axis=1)
                w *= (gain / bound)[:, None] * rnorm_e[None, :]
                o = tl.dot(w.to(e.dtype), e, o, input_precision="ieee")
        if i == tiles - 1:  # what the tiles left out hold of the mass is not to weigh on the mean
            mean = tl.where(mass > 0.0, mean / mass, mean)
            tl.store(p_mean + o_n, mean, mask=m_n)
            if p_dlse is not None:
                mean -= tl.load(p_dlse + o_n * stride_m, mask=m_n, other=0.0)
    o *= (tl.where(rnorm == 0.0, 1.0, rnorm) * bound / gain)[:, None]
    tl.store(p_out + o_n[:, None] * D + o_d[None, :], o, mask=m_nd)
    tl.store(p_dtau + o_n, dtau, mask=m_n)


@triton.jit(do_not_specialize=VARYING)
def code_gradient_kernel(p_r, p_e, p_rnorm, p_rnorm_e, p_seed, p_scale, p_tau, p_lse, p_sampled, p_order, p_largest, p_unit,
                         p_norm, p_dusage, p_shift, p_key_scale, p_value_scale, p_key, p_value, N, K, D, stride_d, stride_m,
                         level, row_offset, skip, mode: tl.constexpr, noisy: tl.constexpr, b_n: tl.constexpr,
                         b_k: tl.constexpr, b_d: tl.constexpr):
    """-> key (splits, K, D) = re_k sum_n w r^_n, value (splits, K, D) = sum_n y z_n; y is p, or the one-hot of ``sampled``.

    shift (N,) is mean - L; key_scale and value_scale (N,) are rr_n and |z_n|, times what keeps float16 in range.
    """
    i_k = tl.program_id(0)
    i_split = tl.program_id(1)
    o_k = i_k * b_k + tl.arange(0, b_k)
    m_k = o_k < K
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    m_kd = m_k[:, None] & m_d[None, :]
    e = tl.load(p_e + o_k.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_kd, other=0.0)
    rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
    scale_e = rnorm_e * (tl.load(p_scale) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    seed = tl.load(p_seed)
    key = tl.zeros((b_k, b_d), tl.float32)
    value = tl.zeros((b_k, b_d), tl.float32)
    for first in range(i_split * b_n, N, tl.num_programs(1) * b_n):
        if tl.load(p_largest + (first // b_n) * tl.num_programs(0) + i_k) >= skip:
            o_slot = first + tl.arange(0, b_n)
            m_n = o_slot < N
            o_n = tl.load(p_order + o_slot, mask=m_n, other=0)
            m_nd = m_n[:, None] & m_d[None, :]
            r = tl.load(p_r + o_n[:, None] * stride_d + o_d[None, :], mask=m_nd, other=0.0)
            unit = tl.load(p_unit + o_n[:, None] * D + o_d[None, :], mask=m_nd, other=0.0)
            rnorm = tl.load(p_rnorm + o_n * stride_m, mask=m_n, other=0.0)
            lse = tl.load(p_lse + o_n * stride_m, mask=m_n, other=float("inf"))
            norm = tl.load(p_norm + o_n, mask=m_n, other=0.0)
            shift = tl.load(p_shift + o_n, mask=m_n, other=0.0)
            noise = 0.0
            if noisy:
                noise = noise_tile_by_code(seed, i_k * b_k, (o_n + row_offset).to(tl.uint32), level, STREAM, b_k)
            products = tl.dot(e, tl.trans(r), input_precision="ieee")
            p = tl.exp2(log2_softmax(products, scale_e[:, None], rnorm[None, :], noise, inv_tau, lse[None, :], noisy))
            c = tl.dot(e, tl.trans(unit), input_precision="ieee") * norm[None, :] - shift[None, :]
            if p_dusage is not None:
                c += tl.load(p_dusage + o_k, mask=m_k, other=0.0)[:, None]
            key_scale = tl.load(p_key_scale + o_n, mask=m_n, other=0.0)
            key = tl.dot((p * c * key_scale[None, :]).to(r.dtype), r, key, input_precision="ieee")
            if mode == STRAIGHT_THROUGH:
                sampled = tl.load(p_sampled + o_n * stride_m, mask=m_n, other=-1)
                p = (o_k[:, None] == sampled[None, :]).to(tl.float32)
            value_scale = tl.load(p_value_scale + o_n, mask=m_n, other=0.0)
            value = tl.dot((p * value_scale[None, :]).to(r.dtype), unit, value, input_precision="ieee")
    p_part = (i_split.to(tl.int64) * K + o_k[:, None]) * D + o_d[None, :]
    tl.store(p_key + p_part, key * tl.where(rnorm_e == 0.0, 1.0, rnorm_e)[:, None], mask=m_kd)
    tl.store(p_value + p_part, value, mask=m_kd)


@triton.jit(do_not_specialize=["N", "splits"])
def finish_kernel(p_sum, p_x, p_rnorm, p_factor, p_gain, p_add, p_add_gain, p_out, p_radial, splits, N, D, stride_d, stride_m,
                  eps, b_n: tl.constexpr, b_d: tl.constexpr):
    """sum (splits, N, D) = rx times a gradient of x^ -> out (N, D) = factor rx (I - x^ x^T) (...) + add / add_gain.

    ``add`` (splits, N, D) may be ``out`` itself: every element is read by who writes it. radial (N,) = x^ . (...).
    """
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    o_d = tl.arange(0, b_d)
    m_n = o_n < N
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    total = tl.zeros((b_n, b_d), tl.float32)
    added = tl.zeros((b_n, b_d), tl.float32)
    for i in range(splits):
        part = (i * N + o_n[:, None]) * D + o_d[None, :]
        total += tl.load(p_sum + part, mask=m_nd, other=0.0)
        added += tl.load(p_add + part, mask=m_nd, other=0.0)
    if p_gain is not None:
        total /= tl.load(p_gain)
    if p_add_gain is not None:
        added /= tl.load(p_add_gain)
    x = tl.load(p_x + o_n[:, None] * stride_d + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    rnorm = tl.load(p_rnorm + o_n * stride_m, mask=m_n, other=0.0)
    radial = tl.sum(total * x, axis=1)
    free = tl.where(rnorm >= 1.0 / eps, 0.0, radial * rnorm * rnorm)  # a norm below eps is a constant: nothing to project out
    total -= free[:, None] * x
    factor = tl.where(rnorm == 0.0, 1.0 / eps, 1.0) * tl.load(p_factor)
    tl.store(p_out + o_n[:, None] * D + o_d[None, :], added + total * factor[:, None], mask=m_nd)
    if p_radial is not None:
        tl.store(p_radial + o_n, radial, mask=m_n)
