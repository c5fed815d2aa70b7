"""Triton kernels of residual quantization's gradients, flash form, and what ends the gradients of both forms.

Formulas, what is kept and what is made again: :mod:`dgi_kernels.quantize.triton_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.gumbel.triton_noise import noise_tile, noise_tile_by_code
from dgi_kernels.quantize.triton_kernels import PER_ROW, STREAM, VARYING, scaled
from dgi_kernels.triton_common import LOG2E, code_bias, radial_part, scores


@triton.jit(do_not_specialize=["N"])
def upstream_kernel(
    p_flow,  # (N, D) float32: the gradient of r_j
    p_dquantized,  # (N, D), rows stride_q apart: the gradient of z~_j, or None: 0
    p_unit,  # (N, D) out: z / ||z||
    p_norm,  # (N,) out: ||z||
    N,
    D,
    stride_q,
    b_n: tl.constexpr,
    b_d: tl.constexpr,
):
    """z = dz~ - dr, since r_j = r_{j-1} - z~_j, as a direction and a norm. Squares are of what is divided by the row's
    largest, so that none overflows or vanishes. b_d >= D."""
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    o_d = tl.arange(0, b_d)
    m_n = o_n < N
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    z = -tl.load(p_flow + o_n[:, None] * D + o_d[None, :], mask=m_nd, other=0.0)
    if p_dquantized is not None:
        z += tl.load(p_dquantized + o_n[:, None] * stride_q + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(z), axis=1), 1e-30)
    z = z / largest[:, None]
    norm = tl.sqrt_rn(tl.sum(z * z, axis=1))
    unit = z / tl.maximum(norm, 1e-30, propagate_nan=tl.PropagateNan.ALL)[:, None]
    tl.store(p_unit + o_n[:, None] * D + o_d[None, :], unit.to(p_unit.dtype.element_ty), mask=m_nd)
    tl.store(p_norm + o_n, norm * largest, mask=m_n)


@triton.jit
def gradient_tile(
    r,  # (b_n, b_d)
    unit,  # (b_n, b_d)
    e,  # (b_k, b_d)
    scale_r,  # (b_n,)
    lse,  # (b_n,) in base 2
    norm,  # (b_n,)
    p_rnorm_e,  # (K,)
    p_bias,  # (K,) or None
    p_dusage,  # (K,) or None
    p_sigma,  # (N,) or None
    seed,
    inv_tau,
    o_row,
    o_n,
    m_n,
    first,
    K,
    level,
    noisy: tl.constexpr,
    b_k: tl.constexpr,
):
    """log2 p (-inf beyond K) and c of the codes first ... first + b_k - 1, (b_n, b_k), their rnorm (b_k,), and the
    noise, where there is any."""
    o_k = first + tl.arange(0, b_k)
    m_k = o_k < K
    rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
    y = scores(
        tl.dot(r, tl.trans(e), input_precision="ieee"),
        scale_r[:, None],
        rnorm_e[None, :],
        None if p_bias is None else code_bias(p_bias, o_k, m_k)[None, :],
    )
    g = y
    if noisy:
        g = noise_tile(seed, first, o_row, level, STREAM, b_k)
        y += scaled(g, p_sigma, o_n, m_n, 1)
    log_p = tl.where(m_k[None, :], y * inv_tau - lse[:, None], float("-inf"))
    c = tl.dot(unit, tl.trans(e), input_precision="ieee") * norm[:, None]
    if p_dusage is not None:
        c += tl.load(p_dusage + o_k, mask=m_k, other=0.0)[None, :]
    return log_p, c, rnorm_e, g


@triton.jit
def matters(p_largest, i_first, parts: tl.constexpr, row_tiles, code_tiles, i_k, skip):
    """Whether one of ``parts`` row tiles from ``i_first`` on has a p that counts for the codes of tile i_k."""
    i_n = i_first + tl.arange(0, parts)
    return tl.max(tl.load(p_largest + i_n * code_tiles + i_k, mask=i_n < row_tiles, other=0.0)) >= skip


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PER_ROW)
def row_gradient_kernel(
    p_r,  # (N, D), rows stride_d apart: the residual
    p_e,  # (K, D): the codebook
    p_rnorm,  # (N,) rr, elements stride_m apart
    p_rnorm_e,  # (K,) re
    p_bias,  # (K,) b, or None where it is 0
    p_sigma,  # (N,) what multiplies a row's noise, or None: 1
    p_seed,  # (1,) int64
    p_scale,  # ()
    p_tau,  # ()
    p_lse,  # (N,), elements stride_m apart, natural
    p_order,  # (N,) int64: the row that a slot holds
    p_largest,  # of tiles of g_n rows and g_k codes: multiples of a program's rows and of its step
    p_unit,  # (N, D) z / |z|
    p_norm,  # (N,) |z|
    p_bound,  # (N,) of |c - mean + L|
    p_dusage,  # (K,) v, or None where it is 0
    p_dlse,  # (N,) L, elements stride_m apart, or None
    p_gain,  # () or None: keeps float16 weights in range
    p_mean,  # (N,) out, by row: sum_k p c
    p_out,  # (N, D) out, by slot: rr_n sum_k w e^_k
    p_dtau,  # (N,) out, by slot: sum_k w log2 p
    p_dsigma,  # (N,) out, by row: sum_k w g, in base 2, or None
    N,
    K,
    D,
    stride_d,
    stride_m,
    level,
    row_offset,
    skip,
    noisy: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
    g_n: tl.constexpr,
    g_k: tl.constexpr,
):
    """The gradient of the rows, in two passes over the codes."""
    i_n = tl.program_id(0)
    o_slot = i_n * b_n + tl.arange(0, b_n)
    m_n = o_slot < N
    o_n = tl.load(p_order + o_slot, mask=m_n, other=0)
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    r = tl.load(p_r + o_n[:, None] * stride_d + o_d[None, :], mask=m_nd, other=0.0)
    unit = tl.load(p_unit + o_n[:, None] * D + o_d[None, :], mask=m_nd, other=0.0)
    rnorm = tl.load(p_rnorm + o_n * stride_m, mask=m_n, other=0.0)
    lse = tl.load(p_lse + o_n * stride_m, mask=m_n, other=float("inf")) * LOG2E
    norm = tl.load(p_norm + o_n, mask=m_n, other=0.0)
    scale_r = rnorm * (tl.load(p_scale) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    seed = tl.load(p_seed)
    o_row = (o_n + row_offset).to(tl.uint32)
    row_tiles = tl.cdiv(N, g_n)
    code_tiles = tl.cdiv(K, g_k)
    o_tile = tl.arange(0, b_k)[:, None] * D + o_d[None, :]

    mean = tl.zeros((b_n,), tl.float32)
    mass = tl.zeros((b_n,), tl.float32)
    for first in range(0, K, b_k):
        if matters(p_largest, i_n * (b_n // g_n), b_n // g_n, row_tiles, code_tiles, first // g_k, skip):
            m_e = (first + tl.arange(0, b_k) < K)[:, None] & m_d[None, :]
            e = tl.load(p_e + tl.cast(first, tl.int64) * D + o_tile, mask=m_e, other=0.0)
            log_p, c, _, _ = gradient_tile(
                r, unit, e, scale_r, lse, norm, p_rnorm_e, p_bias, p_dusage, p_sigma, seed, inv_tau, o_row, o_n, m_n,
                first, K, level, noisy, b_k
            )  # fmt: skip
            p = tl.exp2(log_p)
            mean += tl.sum(p * c, axis=1)
            mass += tl.sum(p, axis=1)
    mean = tl.where(
        mass == 0.0, 0.0, mean / mass
    )  # what the tiles left out would add to the mass is not to weigh on it
    tl.store(p_mean + o_n, mean, mask=m_n)
    if p_dlse is not None:
        mean -= tl.load(p_dlse + o_n * stride_m, mask=m_n, other=0.0)

    bound = tl.load(p_bound + o_n, mask=m_n, other=1.0)
    if p_gain is not None:
        bound /= tl.load(p_gain)
    inv_bound = 1.0 / bound
    dtau = tl.zeros((b_n,), tl.float32)
    dsigma = tl.zeros((b_n,), tl.float32)
    out = tl.zeros((b_n, b_d), tl.float32)
    for first in range(0, K, b_k):
        if matters(p_largest, i_n * (b_n // g_n), b_n // g_n, row_tiles, code_tiles, first // g_k, skip):
            m_e = (first + tl.arange(0, b_k) < K)[:, None] & m_d[None, :]
            e = tl.load(p_e + tl.cast(first, tl.int64) * D + o_tile, mask=m_e, other=0.0)
            log_p, c, rnorm_e, g = gradient_tile(
                r, unit, e, scale_r, lse, norm, p_rnorm_e, p_bias, p_dusage, p_sigma, seed, inv_tau, o_row, o_n, m_n,
                first, K, level, noisy, b_k
            )  # fmt: skip
            p = tl.exp2(log_p)
            w = p * (c - mean[:, None])
            dtau += tl.sum(tl.where(p > 0.0, w * log_p, p), axis=1)
            if p_dsigma is not None:
                dsigma += tl.sum(w * g, axis=1)
            w = w * inv_bound[:, None] * rnorm_e[None, :]
            out = tl.dot(w.to(e.dtype), e, out, input_precision="ieee")
    out *= (tl.where(rnorm == 0.0, 1.0, rnorm) * bound)[:, None]
    tl.store(p_out + o_slot.to(tl.int64)[:, None] * D + o_d[None, :], out, mask=m_nd)
    tl.store(p_dtau + o_slot, dtau, mask=m_n)
    if p_dsigma is not None:
        tl.store(p_dsigma + o_n, dsigma, mask=m_n)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PER_ROW)
def code_gradient_kernel(
    p_r,  # (N, D), rows stride_d apart: the residual
    p_e,  # (K, D): the codebook
    p_rnorm,  # rr by slot, as are lse, sampled, norm and shift: whole tiles, made by slots_kernel
    p_rnorm_e,  # (K,) re
    p_bias,  # (K,) b, or None where it is 0
    p_sigma,  # (N,) what multiplies a row's noise, or None: 1
    p_seed,  # (1,) int64
    p_scale,  # ()
    p_tau,  # ()
    p_lse,  # in base 2
    p_sampled,  # int32
    p_order,  # (N,) int64: the row that a slot holds
    p_largest,  # (row tiles, code tiles) of usage_kernel, whose tiles these are
    p_unit,  # (N, D) z / |z|
    p_norm,  # |z|
    p_dusage,  # (K,) v, or None where it is 0
    p_shift,  # mean - L
    p_gain,  # () or None: keeps float16 in range, and is left in the results
    p_partial,  # (splits, K, D) out: scale / tau re_k sum_n w r^_n + sum_n y z_n
    p_radial,  # (splits, K) out: e . the first part of it; where there is a bias sum_n w
    N,
    K,
    D,
    stride_d,
    stride_m,
    level,
    row_offset,
    skip,
    eps,
    straight_through: tl.constexpr,
    noisy: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """The gradient of the codes. A program owns b_k of one split; y is p, or the one-hot of ``sampled``."""
    i_k = tl.program_id(0)
    i_split = tl.program_id(1)
    o_k = i_k * b_k + tl.arange(0, b_k)
    m_k = o_k < K
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    m_kd = m_k[:, None] & m_d[None, :]
    e = tl.load(p_e + o_k.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_kd, other=0.0)
    rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
    scale = tl.load(p_scale)
    inv_tau = 1.0 / tl.load(p_tau)
    scale_e = rnorm_e * (scale * LOG2E)
    factor = tl.where(rnorm_e == 0.0, 1.0 / eps, rnorm_e) * (scale * inv_tau)
    gain = 1.0 if p_gain is None else tl.load(p_gain)
    seed = tl.load(p_seed)
    bias = code_bias(p_bias, o_k, m_k)
    total = tl.zeros((b_k, b_d), tl.float32)
    radial = tl.zeros((b_k,), tl.float32)
    for first in range(i_split * b_n, N, tl.num_programs(1) * b_n):
        if tl.load(p_largest + (first // b_n) * tl.num_programs(0) + i_k) >= skip:
            o_slot = first + tl.arange(0, b_n)
            m_n = o_slot < N
            o_n = tl.load(p_order + o_slot, mask=m_n, other=0)
            m_nd = m_n[:, None] & m_d[None, :]
            r = tl.load(p_r + o_n[:, None] * stride_d + o_d[None, :], mask=m_nd, other=0.0)
            rnorm, lse = tl.load(p_rnorm + o_slot), tl.load(p_lse + o_slot)
            products = tl.dot(e, tl.trans(r), input_precision="ieee")
            y = scores(products, scale_e[:, None], rnorm[None, :], None if p_bias is None else bias[:, None])
            if noisy:
                g = noise_tile_by_code(seed, i_k * b_k, (o_n + row_offset).to(tl.uint32), level, STREAM, b_k)
                y += scaled(g, p_sigma, o_n, m_n, 0)
            p = tl.exp2(y * inv_tau - lse[None, :])
            unit = tl.load(p_unit + o_n[:, None] * D + o_d[None, :], mask=m_nd, other=0.0)
            norm, shift = tl.load(p_norm + o_slot), tl.load(p_shift + o_slot)
            c = tl.dot(e, tl.trans(unit), input_precision="ieee") * norm[None, :] - shift[None, :]
            if p_dusage is not None:
                c += tl.load(p_dusage + o_k, mask=m_k, other=0.0)[:, None]
            w = (p * c * factor[:, None] * (rnorm * gain)[None, :]).to(r.dtype)
            if p_bias is None:
                radial += tl.sum(w.to(tl.float32) * products, axis=1)
            else:  # rounded as in the products, from which it is nearly taken off again where a code is near its rows
                made_of = factor[:, None] * (rnorm * gain)[None, :]
                radial += tl.sum(tl.where(made_of == 0.0, p * c, w.to(tl.float32) / made_of), axis=1)
            total = tl.dot(w, r, total, input_precision="ieee")
            if straight_through:
                sampled = tl.load(p_sampled + o_slot)
                p = (o_k[:, None] == sampled[None, :]).to(tl.float32)
            total = tl.dot((p * (norm * gain)[None, :]).to(r.dtype), unit, total, input_precision="ieee")
    tl.store(p_partial + (i_split.to(tl.int64) * K + o_k[:, None]) * D + o_d[None, :], total, mask=m_kd)
    tl.store(p_radial + i_split * K + o_k, radial, mask=m_k)


@triton.jit(do_not_specialize=["splits"])
def finish_codes_kernel(
    p_partial,  # (splits, K, D) of code_gradient_kernel
    p_radial,  # (splits, K)
    p_e,  # (K, D)
    p_rnorm_e,  # (K,)
    p_gain,  # () or None: what the partials are too large by
    p_out,  # (K, D) out: the gradient of the codebook
    splits,
    K,
    D,
    eps,
    plain: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """The partials, added up, less what is radial of cosines'. b_d >= D."""
    o_k = tl.program_id(0) * b_k + tl.arange(0, b_k)
    o_d = tl.arange(0, b_d)
    m_k = o_k < K
    m_kd = m_k[:, None] & (o_d < D)[None, :]
    o_kd = o_k.to(tl.int64)[:, None] * D + o_d[None, :]
    total = tl.zeros((b_k, b_d), tl.float32)
    radial = tl.zeros((b_k,), tl.float32)
    for i in range(splits):
        total += tl.load(p_partial + o_kd, mask=m_kd, other=0.0)
        radial += tl.load(p_radial + i * K + o_k, mask=m_k, other=0.0)
        p_partial += K * D
    e = tl.load(p_e + o_kd, mask=m_kd, other=0.0).to(tl.float32)
    rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
    if not plain:
        total -= radial_part(radial, rnorm_e, eps)[:, None] * e
    if p_gain is not None:
        total /= tl.load(p_gain)
    tl.store(p_out + o_kd, total.to(p_out.dtype.element_ty), mask=m_kd)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["p_rnorm", "p_radial"])
def finish_kernel(
    p_sum,  # (N, D) rx times a gradient of x^; by slot where there is an order
    p_x,  # (N, D), rows stride_d apart
    p_rnorm,  # (N,) rx, elements stride_m apart
    p_order,  # (N,) int64: the row that a slot holds, or None
    p_factor,  # () scale / tau
    p_gain,  # () or None: what sum is too large by
    p_add,  # (N, D), added; may be p_out itself
    p_add_gain,  # () or None: what p_add is too large by
    p_out,  # (N, D) out: factor rx (I - x^ x^T) (...) + add / add_gain
    p_radial,  # (N,) out, by row: x^ . (...), or None
    N,
    D,
    stride_d,
    stride_m,
    eps,
    plain: tl.constexpr,
    b_n: tl.constexpr,
    b_d: tl.constexpr,
):
    """The end of a gradient of vectors, less what is radial of cosines'. b_d >= D."""
    o_slot = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    o_d = tl.arange(0, b_d)
    m_n = o_slot < N
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    o_n = o_slot if p_order is None else tl.load(p_order + o_slot, mask=m_n, other=0)
    o_nd = o_n[:, None] * D + o_d[None, :]
    total = tl.load(p_sum + o_slot[:, None] * D + o_d[None, :], mask=m_nd, other=0.0)
    added = tl.load(p_add + o_nd, mask=m_nd, other=0.0)
    if p_gain is not None:
        total /= tl.load(p_gain)
    if p_add_gain is not None:
        added /= tl.load(p_add_gain)
    x = tl.load(p_x + o_n[:, None] * stride_d + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    rnorm = tl.load(p_rnorm + o_n * stride_m, mask=m_n, other=0.0)
    radial = tl.sum(total * x, axis=1)
    if not plain:
        total -= radial_part(radial, rnorm, eps)[:, None] * x
    factor = tl.where(rnorm == 0.0, 1.0 / eps, 1.0) * tl.load(p_factor)
    tl.store(p_out + o_nd, (added + total * factor[:, None]).to(p_out.dtype.element_ty), mask=m_nd)
    if p_radial is not None:
        tl.store(p_radial + o_n, radial, mask=m_n)
