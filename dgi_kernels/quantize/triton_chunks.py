"""Epilogues of residual quantization's chunked form: products of a chunk of rows come from cuBLAS and stay in the L2.

The formulas are those of :mod:`dgi_kernels.quantize.triton_kernels`. A program takes whole rows. Where a row fits its
registers (K <= ROW_LARGEST) it is read once; else a kernel passes over it twice, and what the second pass needs lies
where the products lay, so that noise is made once forward and once backward either way (backward in the second pass
once more, for a gradient of sigma).
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.gumbel.triton_noise import BASE, noise_less_base, noise_tile
from dgi_kernels.quantize.triton_columns import best_of
from dgi_kernels.quantize.triton_kernels import PER_ROW, STREAM, VARYING, rounding_of_scores
from dgi_kernels.triton_common import LN2, LOG2E, NONE, code_bias, present, scores


@triton.jit
def row_noise(p_seed, i_n, row_offset, level, first, b_k: tl.constexpr):
    o_row = (i_n + row_offset + tl.zeros((1,), tl.int64)).to(tl.uint32)
    return tl.reshape(noise_tile(tl.load(p_seed), first, o_row, level, STREAM, b_k), (b_k,))


@triton.jit
def best_of_row(y, b_k: tl.constexpr):
    """The maximum of a row (b_k,), -inf of NaN alone, and the first of the codes that reaches it, 0 of -inf. Every
    thread finds the best of its own codes first, which are blocks of eight."""
    # As many as the launcher's ROW_CODES leave; with another number the results are the same, but codes move.
    threads: tl.constexpr = b_k // 32 if b_k >= 1024 else 32 if b_k >= 256 else b_k // 8
    own = tl.permute(tl.reshape(y, (b_k // (8 * threads), threads, 8)), (1, 0, 2))
    largest, item = best_of(tl.reshape(own, (1, threads, b_k // threads)))
    largest, item = tl.reshape(largest, (threads,)), tl.reshape(item, (threads,))
    code = (item // 8 * threads + tl.arange(0, threads)) * 8 + item % 8
    largest = tl.where(largest == largest, largest, float("-inf"))
    # As integers in the same order, whose maximum of a warp is one instruction.
    highest = tl.max(in_order(tl.cast(largest, tl.int32, bitcast=True)), axis=0)
    highest = tl.cast(in_order(highest), tl.float32, bitcast=True)
    first = tl.min(tl.where(largest == highest, code, NONE), axis=0)
    return highest, tl.where(highest > float("-inf"), first, 0)


@triton.jit
def in_order(bits):
    """Of a float32's bits the integer that is ordered as it is, and the other way round."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=[*VARYING, "adds"], do_not_specialize_on_alignment=PER_ROW)
def row_level_kernel(
    p_s,  # (N, K) float32: products
    p_p,  # (N, K) out, rows stride_p apart: p 2^log2_gain, maybe in place of s, or None
    p_rnorm,  # (N,) rr, elements stride_m apart
    p_rnorm_e,  # (K,) re, with the sign of the scale
    p_bias,  # (K,) b, or None where it is 0
    p_sigma,  # (N,) what multiplies a row's noise, or None: 1
    p_padding,  # (N,) bool: rows whose p is 0, or None
    p_seed,  # (1,) int64
    p_scale,  # ()
    p_tau,  # ()
    p_codes,  # (N,) int64 out, elements stride_m apart: argmax s
    p_sampled,  # (N,) int64 out, elements stride_m apart: argmax s + g
    p_lse,  # (N,) out, elements stride_m apart, natural
    p_partial,  # (programs, K) out: sum_n p_nk of a program's rows, and what it has held, if it ``adds``; or None
    N,
    K,
    stride_p,
    stride_m,
    level,
    row_offset,
    log2_gain,
    adds,
    noisy: tl.constexpr,
    whole: tl.constexpr,
    b_k: tl.constexpr,
):
    """What a level needs of a chunk's products. A program takes every programs-th row; b_k >= K, ``whole``: =."""
    o_k = tl.arange(0, b_k)
    m_k = present(o_k, K, whole)
    scale = tl.abs(tl.load(p_scale)) * LOG2E
    inv_tau = 1.0 / tl.load(p_tau)
    seed = tl.load(p_seed)
    usage = tl.zeros((b_k,), tl.float32)
    o_block = tl.arange(0, b_k // 4).to(tl.uint32)
    for row in range(tl.program_id(0), N, tl.num_programs(0)):
        i_n = tl.cast(row, tl.int64)
        scale_r = tl.load(p_rnorm + i_n * stride_m) * scale
        rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
        s = tl.load(p_s + i_n * K + o_k, mask=m_k, other=0.0) * rnorm_e
        if p_bias is not None:
            s = s * scale_r + code_bias(p_bias, o_k, m_k)
        elif not whole:
            s = tl.where(m_k, s, float("-inf"))
        best, code = best_of_row(s, b_k)
        y = s if p_bias is not None else s * scale_r
        base = 0.0
        if p_bias is None and not whole:  # 0 times infinity of a row of norm 0
            y = tl.where(m_k, y, float("-inf"))
        sampled = code
        if noisy:
            o_row = (i_n + row_offset + tl.zeros((1,), tl.int64)).to(tl.uint32)
            noise = tl.reshape(noise_less_base(seed, o_block, o_row, level, STREAM), (b_k,))
            base = BASE
            if p_sigma is not None:
                sigma = tl.load(p_sigma + i_n)
                noise *= sigma
                base *= sigma
            y += noise
            best, sampled = best_of_row(y, b_k)
        elif p_bias is None:
            best = tl.max(y, axis=0)
        top = best * inv_tau
        p = tl.exp2(y * inv_tau - top)
        total = tl.sum(p, axis=0)
        tl.store(p_codes + i_n * stride_m, code.to(tl.int64))
        tl.store(p_sampled + i_n * stride_m, sampled.to(tl.int64))
        tl.store(p_lse + i_n * stride_m, (top + base * inv_tau + tl.log2(total)) * LN2)
        if p_p is not None:
            if p_padding is not None:
                p = tl.where(tl.load(p_padding + i_n), 0.0, p)
            p *= tl.exp2(log2_gain) / total
            usage += p
            tl.debug_barrier()  # in place of what other threads have read
            tl.store(p_p + i_n * stride_p + o_k, p.to(p_p.dtype.element_ty), mask=m_k)
    if p_partial is not None:
        p_partial += tl.program_id(0) * K + o_k
        before = tl.load(p_partial, mask=m_k & (adds != 0), other=0.0)
        tl.store(p_partial, before + usage * tl.exp2(-log2_gain), mask=m_k)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PER_ROW)
def chunk_level_kernel(
    p_s,  # (rows, K) float32: products
    p_p,  # (rows, K) out: p 2^log2_gain, maybe in place of s, or None
    p_rnorm,  # (rows,) rr, elements stride_m apart
    p_rnorm_e,  # (K,) re
    p_bias,  # (K,) b, or None where it is 0
    p_sigma,  # (rows,) what multiplies a row's noise, or None: 1
    p_seed,  # (1,) int64
    p_scale,  # ()
    p_tau,  # ()
    p_codes,  # (rows,) int64 out, elements stride_m apart: argmax s
    p_sampled,  # (rows,) int64 out, elements stride_m apart: argmax s + g
    p_lse,  # (rows,) out, elements stride_m apart, natural
    K,
    stride_m,
    level,
    row_offset,
    log2_gain,
    noisy: tl.constexpr,
    b_k: tl.constexpr,
):
    """What a level needs of a chunk's products."""
    i_n = tl.program_id(0).to(tl.int64)
    scale_r = tl.load(p_rnorm + i_n * stride_m) * (tl.load(p_scale) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    sigma = 1.0 if p_sigma is None else tl.load(p_sigma + i_n)
    p_s += i_n * K
    code = tl.full((), 0, tl.int32)
    sampled = tl.full((), 0, tl.int32)
    best = tl.full((), float("-inf"), tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        m_k = o_k < K
        rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
        y = scores(tl.load(p_s + o_k, mask=m_k, other=0.0), scale_r, rnorm_e, code_bias(p_bias, o_k, m_k))
        y = tl.where(m_k, y, float("-inf"))
        highest, where = tl.max(y, axis=0, return_indices=True)
        code = tl.where(highest > best, first + where, code)
        best = tl.maximum(best, highest)
        if noisy:
            y += row_noise(p_seed, i_n, row_offset, level, first, b_k) * sigma
            highest, where = tl.max(y, axis=0, return_indices=True)
        sampled = tl.where(highest > top, first + where, sampled)
        raised = tl.maximum(top, highest)
        total = total * tl.exp2((top - raised) * inv_tau) + tl.sum(tl.exp2((y - raised) * inv_tau), axis=0)
        top = raised
        if p_p is not None:
            tl.store(p_s + o_k, y, mask=m_k)
    lse = top * inv_tau + tl.log2(total)
    tl.store(p_codes + i_n * stride_m, code.to(tl.int64))
    tl.store(p_sampled + i_n * stride_m, sampled.to(tl.int64))
    tl.store(p_lse + i_n * stride_m, lse * LN2)
    if p_p is not None:
        tl.debug_barrier()
        for first in range(0, K, b_k):
            o_k = first + tl.arange(0, b_k)
            p = tl.exp2(tl.load(p_s + o_k, mask=o_k < K, other=0.0) * inv_tau - (lse - log2_gain))
            tl.store(p_p + i_n * K + o_k, p.to(p_p.dtype.element_ty), mask=o_k < K)


@triton.jit(do_not_specialize_on_alignment=PER_ROW)
def chunk_nearest_kernel(
    p_s,  # (rows, K) float32: products, of what is relative to the centre
    p_r,  # (rows, D), rows stride_d apart: the residual, relative to the centre
    p_bias,  # (K,) b
    p_scale,  # ()
    p_rest,  # (rows, D) float32: the residual itself
    p_vectors,  # (K, D): the codebook itself
    p_longest,  # () the largest ||e||
    p_codes,  # (rows,) int64 out, elements stride_m apart: the nearest code
    K,
    D,
    stride_d,
    stride_m,
    slack,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """The nearest code of every row, by exact differences with all codes whose scores are within rounding of the best.
    b_d >= D."""
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    r = tl.load(p_r + i_n * stride_d + o_d, mask=m_d, other=0.0).to(tl.float32)
    rest = tl.load(p_rest + i_n * D + o_d, mask=m_d, other=0.0)
    scale = tl.load(p_scale)
    within = rounding_of_scores(tl.sum(r * r, axis=0), tl.load(p_longest), scale, slack)
    p_s += i_n * K
    code = tl.full((), 0, tl.int32)
    distance = tl.full((), float("inf"), tl.float32)
    best = tl.full((), float("-inf"), tl.float32)
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        m_k = o_k < K
        y = tl.load(p_s + o_k, mask=m_k, other=0.0) * (2.0 * LOG2E * scale) + code_bias(p_bias, o_k, m_k)
        best = tl.maximum(best, tl.max(y, axis=0))
        candidate = tl.where(y >= best - within, o_k, NONE)
        k = tl.min(candidate, axis=0)
        while k < NONE:
            difference = rest - tl.load(p_vectors + k.to(tl.int64) * D + o_d, mask=m_d, other=0.0).to(tl.float32)
            squares = tl.sum(difference * difference, axis=0)
            squares = tl.where(scale < 0.0, -squares, squares)
            code = tl.where(squares < distance, k, code)
            distance = tl.minimum(distance, squares)
            candidate = tl.where(o_k == k, NONE, candidate)
            k = tl.min(candidate, axis=0)
    tl.store(p_codes + i_n * stride_m, code.to(tl.int64))


@triton.jit
def log_p_of(
    p_s, p_rnorm_e, p_bias, p_seed, scale_r, inv_tau, sigma, lse, i_n, row_offset, level, first, K,
    noisy: tl.constexpr, b_k: tl.constexpr,
):  # fmt: skip
    """log2 p of the codes first ... first + b_k - 1 of a row, and their noise, where there is any."""
    o_k = first + tl.arange(0, b_k)
    m_k = o_k < K
    rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
    y = scores(tl.load(p_s + o_k, mask=m_k, other=0.0), scale_r, rnorm_e, code_bias(p_bias, o_k, m_k))
    g = y
    if noisy:
        g = row_noise(p_seed, i_n, row_offset, level, first, b_k)
        y += g * sigma
    return y * inv_tau - lse, g


@triton.jit
def c_of(p_c, p_dusage, norm, o_k, m_k):
    c = tl.load(p_c + o_k, mask=m_k, other=0.0) * norm
    if p_dusage is not None:
        c += tl.load(p_dusage + o_k, mask=m_k, other=0.0)
    return c


@triton.jit
def store_weights(p_w, p_y, w, p, gain, value_gain, p_rnorm_e, sampled, o_k, m_k, straight_through: tl.constexpr):
    """What both gradients' products need of w and of p."""
    rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
    w *= gain * tl.where(rnorm_e == 0.0, 1.0, rnorm_e)
    tl.store(p_w + o_k, w.to(p_w.dtype.element_ty), mask=m_k)
    if straight_through:
        p = (o_k == sampled).to(tl.float32)
    tl.store(p_y + o_k, (p * value_gain).to(p_y.dtype.element_ty), mask=m_k)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PER_ROW)
def chunk_gradient_kernel(
    p_s,  # (rows, K) float32: products r . e
    p_c,  # (rows, K) float32: products z / |z| . e
    p_w,  # (rows, K) out: w rr_n re_k gain, ready for products; maybe s itself
    p_y,  # (rows, K) out: y |z_n| value_gain, maybe c itself; y is p, or the one-hot of ``sampled``
    p_rnorm,  # (rows,) rr, elements stride_m apart
    p_rnorm_e,  # (K,) re
    p_bias,  # (K,) b, or None where it is 0
    p_sigma,  # (rows,) what multiplies a row's noise, or None: 1
    p_seed,  # (1,) int64
    p_scale,  # ()
    p_tau,  # ()
    p_lse,  # (rows,), elements stride_m apart, natural
    p_sampled,  # (rows,) int64, elements stride_m apart
    p_norm,  # (rows,) |z|, or None: 1
    p_dusage,  # (K,) v, or None where it is 0
    p_dlse,  # (rows,) L, elements stride_m apart, or None
    p_gain,  # () or None
    p_value_gain,  # () or None
    p_dtau,  # (rows,) out: sum_k w log2 p, or None
    p_dsigma,  # (rows,) out: sum_k w g, in base 2, or None
    K,
    stride_m,
    level,
    row_offset,
    straight_through: tl.constexpr,
    noisy: tl.constexpr,
    b_k: tl.constexpr,
):
    """The weights of a chunk's gradients, of the rows and of the codes."""
    i_n = tl.program_id(0).to(tl.int64)
    rnorm = tl.load(p_rnorm + i_n * stride_m)
    scale_r = rnorm * (tl.load(p_scale) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    sigma = 1.0 if p_sigma is None else tl.load(p_sigma + i_n)
    lse = tl.load(p_lse + i_n * stride_m) * LOG2E
    norm = 1.0 if p_norm is None else tl.load(p_norm + i_n)
    p_s += i_n * K
    p_c += i_n * K
    mean = tl.full((), 0.0, tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        m_k = o_k < K
        log_p, _ = log_p_of(
            p_s, p_rnorm_e, p_bias, p_seed, scale_r, inv_tau, sigma, lse, i_n, row_offset, level, first, K, noisy, b_k
        )
        c = c_of(p_c, p_dusage, norm, o_k, m_k)
        p = tl.where(m_k, tl.exp2(log_p), 0.0)
        mean += tl.sum(p * c, axis=0)
        mass += tl.sum(p, axis=0)
        tl.store(p_s + o_k, log_p, mask=m_k)
    tl.debug_barrier()
    shift = tl.where(mass == 0.0, 0.0, mean / mass)  # of padding
    if p_dlse is not None:
        shift -= tl.load(p_dlse + i_n * stride_m)
    sampled = tl.load(p_sampled + i_n * stride_m)
    gain = tl.where(rnorm == 0.0, 1.0, rnorm) * (1.0 if p_gain is None else tl.load(p_gain))
    value_gain = norm * (1.0 if p_value_gain is None else tl.load(p_value_gain))
    dtau = tl.full((), 0.0, tl.float32)
    dsigma = tl.full((), 0.0, tl.float32)
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        m_k = o_k < K
        log_p = tl.load(p_s + o_k, mask=m_k, other=0.0)
        c = c_of(p_c, p_dusage, norm, o_k, m_k)
        p = tl.where(m_k, tl.exp2(log_p), 0.0)
        w = p * (c - shift)
        if p_dtau is not None:
            dtau += tl.sum(tl.where(p > 0.0, w * log_p, p), axis=0)
        if p_dsigma is not None:
            dsigma += tl.sum(w * row_noise(p_seed, i_n, row_offset, level, first, b_k), axis=0)
        store_weights(
            p_w + i_n * K, p_y + i_n * K, w, p, gain, value_gain, p_rnorm_e, sampled, o_k, m_k, straight_through
        )
    if p_dtau is not None:
        tl.store(p_dtau + i_n, dtau)
    if p_dsigma is not None:
        tl.store(p_dsigma + i_n, dsigma)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PER_ROW)
def row_gradient_kernel(
    p_s,  # (N, K) float32: products r . e
    p_c,  # (N, K) float32: products z / |z| . e
    p_w,  # (N, K) out, rows stride_w apart, as y's: w rr_n re_k gain, ready for products; maybe in place of s
    p_y,  # (N, K) out: y |z_n| value_gain, maybe in place of c; y is p, or the one-hot of ``sampled``
    p_rnorm,  # (N,) rr, elements stride_m apart
    p_rnorm_e,  # (K,) re
    p_bias,  # (K,) b, or None where it is 0
    p_sigma,  # (N,) what multiplies a row's noise, or None: 1
    p_seed,  # (1,) int64
    p_scale,  # ()
    p_tau,  # ()
    p_lse,  # (N,), elements stride_m apart, natural
    p_sampled,  # (N,) int64, elements stride_m apart
    p_norm,  # (N,) |z|, or None: 1
    p_dusage,  # (K,) v, or None where it is 0
    p_dlse,  # (N,) L, elements stride_m apart, or None
    p_gain,  # () or None
    p_value_gain,  # () or None
    p_dtau,  # (N,) out: sum_k w log2 p, or None
    p_dsigma,  # (N,) out: sum_k w g, in base 2, or None
    K,
    stride_w,
    stride_m,
    level,
    row_offset,
    straight_through: tl.constexpr,
    noisy: tl.constexpr,
    b_k: tl.constexpr,
):
    """:func:`chunk_gradient_kernel` of a row that is one tile: b_k >= K."""
    i_n = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, b_k)
    m_k = o_k < K
    rnorm = tl.load(p_rnorm + i_n * stride_m)
    scale_r = rnorm * (tl.load(p_scale) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    sigma = 1.0 if p_sigma is None else tl.load(p_sigma + i_n)
    lse = tl.load(p_lse + i_n * stride_m) * LOG2E
    norm = 1.0 if p_norm is None else tl.load(p_norm + i_n)
    log_p, g = log_p_of(
        p_s + i_n * K, p_rnorm_e, p_bias, p_seed, scale_r, inv_tau, sigma, lse, i_n, row_offset, level, 0, K, noisy, b_k
    )
    c = c_of(p_c + i_n * K, p_dusage, norm, o_k, m_k)
    p = tl.where(m_k, tl.exp2(log_p), 0.0)
    mass = tl.sum(p, axis=0)
    shift = tl.where(mass == 0.0, 0.0, tl.sum(p * c, axis=0) / mass)  # 0 of padding
    if p_dlse is not None:
        shift -= tl.load(p_dlse + i_n * stride_m)
    w = p * (c - shift)
    if p_dtau is not None:
        tl.store(p_dtau + i_n, tl.sum(tl.where(p > 0.0, w * log_p, p), axis=0))
    if p_dsigma is not None:
        tl.store(p_dsigma + i_n, tl.sum(w * g, axis=0))
    gain = tl.where(rnorm == 0.0, 1.0, rnorm) * (1.0 if p_gain is None else tl.load(p_gain))
    value_gain = norm * (1.0 if p_value_gain is None else tl.load(p_value_gain))
    sampled = tl.load(p_sampled + i_n * stride_m)
    p_w += i_n * stride_w
    p_y += i_n * stride_w
    tl.debug_barrier()  # in place of what other threads have read
    store_weights(p_w, p_y, w, p, gain, value_gain, p_rnorm_e, sampled, o_k, m_k, straight_through)
