"""Triton kernels of residual quantization's gradients: flash form, for D <= 256, and both ends of those of all forms.

Formulas, what is kept and what is made again: :mod:`dgi_kernels.quantize.triton_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.gumbel.triton_noise import fast_log2
from dgi_kernels.quantize.triton_columns import (
    by_code,
    by_thread,
    codes_of_columns,
    codes_of_threads,
    of_threads,
    over_codes,
    over_rows,
    sum_in_row,
    sum_of,
)
from dgi_kernels.quantize.triton_kernels import PER_ROW, VARYING, base_of, noise_of_tile
from dgi_kernels.triton_common import LOG2E, code_bias, present, radial_part, scores


@triton.jit
def enter_level(
    flow, p_dquantized, p_quantized, p_centre, p_unit, p_norm, p_expected, o_n, o_d, m_n, D, stride_dq, stride_q
):
    """What enters a level, of some rows: z = dz~ - flow (b_n, b_d), since r_j = r_{j-1} - z~_j, as a direction and a
    norm. Squares are of what is divided by the row's largest, so that none overflows or vanishes. b_d >= D."""
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    z = -flow
    if p_dquantized is not None:
        z += tl.load(p_dquantized + o_n[:, None] * stride_dq + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    if p_norm is not None:
        largest = tl.maximum(tl.max(tl.abs(z), axis=1), 1e-30)
        z = z / largest[:, None]
        norm = tl.sqrt_rn(tl.sum(z * z, axis=1))
        z = z / tl.maximum(norm, 1e-30, propagate_nan=tl.PropagateNan.ALL)[:, None]
        norm *= largest
        tl.store(p_norm + o_n, norm, mask=m_n)
    unit = z.to(p_unit.dtype.element_ty)
    tl.store(p_unit + o_n[:, None] * D + o_d[None, :], unit, mask=m_nd)
    if p_quantized is not None:
        quantized = tl.load(p_quantized + o_n[:, None] * stride_q + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
        if p_centre is not None:
            quantized -= tl.load(p_centre + o_d, mask=o_d < D, other=0.0)[None, :]
        expected = tl.sum(unit.to(tl.float32) * quantized, axis=1)
        tl.store(p_expected + o_n, expected if p_norm is None else expected * norm, mask=m_n)


@triton.jit(do_not_specialize=["N"])
def upstream_kernel(
    p_dquantized,  # (N, D), rows stride_dq apart: the gradient of z~, or None: 0
    p_quantized,  # (N, D), rows stride_q apart: z~, or None
    p_centre,  # (D,) what the codes are relative to, or None: 0
    p_unit,  # (N, D) out: z / ||z||, or z where there is no p_norm
    p_norm,  # (N,) out: ||z||, or None
    p_expected,  # (N,) out, where z~ is given: z . (z~ - centre)
    N,
    D,
    stride_dq,
    stride_q,
    b_n: tl.constexpr,
    b_d: tl.constexpr,
):
    """What enters the last level; for the others finish_kernel does so."""
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    o_d = tl.arange(0, b_d)
    flow = tl.zeros((b_n, b_d), tl.float32)
    enter_level(
        flow, p_dquantized, p_quantized, p_centre, p_unit, p_norm, p_expected, o_n, o_d, o_n < N, D, stride_dq, stride_q
    )


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PER_ROW)
def probability_kernel(
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
    p_dusage,  # (K,) v, or None where it is 0
    p_kept,  # (N, stride_k) out: p 2^log2_gain, 0 beyond K
    p_expected,  # (splits, N) out: sum_k p v of a split's codes, or None
    N,
    K,
    D,
    stride_d,
    stride_m,
    stride_k,
    level,
    row_offset,
    log2_gain,
    noisy: tl.constexpr,
    whole: tl.constexpr,
    threads: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """The softmax once more: a program owns b_n rows and every splits-th tile of b_k codes."""
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    r = tl.load(p_r + o_n[:, None] * stride_d + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
    scale_r = tl.load(p_rnorm + o_n * stride_m, mask=m_n, other=0.0) * (tl.load(p_scale) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    seed = tl.load(p_seed)
    lse = tl.load(p_lse + o_n * stride_m, mask=m_n, other=float("inf")) * LOG2E - log2_gain
    if noisy:
        lse -= base_of(p_sigma, o_n, m_n) * inv_tau
    o_row = (o_n + row_offset).to(tl.uint32)
    o_column = codes_of_columns(b_k, threads)
    o_own = codes_of_threads(b_k, threads)
    o_tile = o_column[:, None] * D + o_d[None, :]
    p_kept += o_n[:, None] * stride_k + tl.arange(0, b_k)[None, :]
    expected = of_threads(0.0, tl.float32, b_n, threads)
    for first in range(tl.program_id(1) * b_k, K, tl.num_programs(1) * b_k):
        o_k = first + o_own
        m_k = present(o_k, K, whole)
        m_kd = present(first + o_column, K, whole)[:, None] & m_d[None, :]
        e = tl.load(p_e + tl.cast(first, tl.int64) * D + o_tile, mask=m_kd, other=0.0)
        rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
        products = by_thread(tl.dot(r, tl.trans(e), input_precision="ieee"), threads)
        bias = None if p_bias is None else over_codes(code_bias(p_bias, o_k, m_k))
        y = scores(products, over_codes(rnorm_e), over_rows(scale_r, threads), bias)
        if noisy:
            y += noise_of_tile(seed, first, o_row, level, p_sigma, o_n, m_n, b_k, threads)
        p = tl.exp2(y * inv_tau - over_rows(lse, threads))
        if not whole:
            p = tl.where(over_codes(m_k), p, 0.0)
        if p_expected is not None:
            expected += sum_of(p * over_codes(tl.load(p_dusage + o_k, mask=m_k, other=0.0)))
        tl.store(p_kept + first, by_code(p.to(p_kept.dtype.element_ty)), mask=m_n[:, None])
    if p_expected is not None:
        expected = sum_in_row(expected) * tl.exp2(-log2_gain)
        tl.store(p_expected + tl.program_id(1).to(tl.int64) * N + o_n, expected, mask=m_n)


@triton.jit(do_not_specialize=["N", "parts"], do_not_specialize_on_alignment=PER_ROW)
def weight_kernel(
    p_unit,  # (N, D) z / |z|, or z itself
    p_e,  # (K, D): the codebook
    p_kept,  # (N, stride_k): p 2^log2_gain, 0 beyond K; out, if ``straight_through``: the one-hot of the sampled code
    p_norm,  # (N,) |z|, or None: 1
    p_expected,  # (N,) sum_k p c, but for what usage adds
    p_expected_usage,  # (parts, N) that add up to sum_k p v, or None
    p_dlse,  # (N,) L, elements stride_m apart, or None where it is 0
    p_dusage,  # (K,) v, or None where it is 0
    p_rnorm,  # (N,) rr, elements stride_m apart
    p_rnorm_e,  # (K,) re, 1 where it is 0
    p_mean_rnorm_e,  # () their mean
    p_sampled,  # (N,) int64, elements stride_m apart
    p_gain,  # () or None: keeps float16 weights in range
    p_w,  # (N, stride_k) out: w rr_n re_k gain
    p_out,  # (N, D) out: rr_n gain sum_k w e^_k, of weights before their largest changed, or None
    p_residue,  # (N,) out: rr_n gain (sum_k w - L) sum_k p re_k, the mean standing for all re but the sampled code's
    p_share,  # (N,) out: what the weight of the sampled code has lost, or None where these sums do not know it
    p_dtau,  # (N,) out: sum_k w log2 p, or None
    N,
    K,
    D,
    stride_m,
    stride_k,
    parts,
    log2_gain,
    straight_through: tl.constexpr,
    whole: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """The weights of the gradients. A program owns b_n rows.

    sum_k w = L but for the rounding of ``expected``. What is left is to be taken off the weights in proportion to p.
    finish_kernel does so to the rows' sums, in which it is nearly a multiple of z~. For the gradient of the codes only
    the sampled code's weight, of the largest p, loses its share: where that is not nearly all, it is no matter.
    """
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    unit = tl.load(p_unit + o_n[:, None] * D + o_d[None, :], mask=m_nd, other=0.0)
    rnorm = tl.load(p_rnorm + o_n * stride_m, mask=m_n, other=0.0)
    factor = tl.where(rnorm == 0.0, 1.0, rnorm) * tl.exp2(-log2_gain)
    if p_gain is not None:
        factor *= tl.load(p_gain)
    shift = tl.load(p_expected + o_n, mask=m_n, other=0.0)
    if p_expected_usage is not None:
        for i in range(0, parts):
            shift += tl.load(p_expected_usage + tl.cast(i, tl.int64) * N + o_n, mask=m_n, other=0.0)
    dlse = 0.0 if p_dlse is None else tl.load(p_dlse + o_n * stride_m, mask=m_n, other=0.0)
    shift = (shift - dlse) * factor
    norm = factor if p_norm is None else factor * tl.load(p_norm + o_n, mask=m_n, other=0.0)
    p_tile = p_e + tl.arange(0, b_k)[:, None] * D + o_d[None, :]
    o_nk = o_n[:, None] * stride_k + tl.arange(0, b_k)[None, :]
    code = tl.load(p_sampled + o_n * stride_m, mask=m_n, other=0)
    largest = tl.load(p_kept + o_n * stride_k + code, mask=m_n, other=1.0).to(tl.float32)
    tl.debug_barrier()  # other threads write where this one has read
    entropy = tl.zeros((b_n,), tl.float32)
    residue = tl.zeros((b_n,), tl.float32)
    mass = tl.zeros((b_n,), tl.float32)
    dtau = tl.zeros((b_n,), tl.float32)
    out = tl.zeros((b_n, b_d), tl.float32)
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        m_k = present(o_k, K, whole)
        e = tl.load(p_tile, mask=m_k[:, None] & m_d[None, :], other=0.0)
        p_tile += b_k * D
        kept = tl.load(p_kept + o_nk, mask=m_n[:, None], other=0.0).to(tl.float32)
        rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
        c = tl.dot(unit, tl.trans(e), input_precision="ieee") * norm[:, None] - shift[:, None]
        if p_dusage is not None:
            c += tl.load(p_dusage + o_k, mask=m_k, other=0.0)[None, :] * factor[:, None]
        w = kept * c
        residue += tl.sum(w, axis=1)
        if p_dlse is not None:
            mass += tl.sum(kept, axis=1)
        if p_dtau is not None:
            log_p = tl.maximum(fast_log2(kept), -150.0)
            dtau += tl.sum(w * log_p, axis=1)
            entropy += tl.sum(kept * log_p, axis=1)
        w = (w * rnorm_e[None, :]).to(e.dtype)
        tl.store(p_w + o_nk, w, mask=m_n[:, None])
        if straight_through:
            one_hot = tl.where(o_k[None, :] == code[:, None], tl.exp2(log2_gain), 0.0)
            tl.store(p_kept + o_nk, one_hot.to(e.dtype), mask=m_n[:, None])
        o_nk += b_k
        if p_out is not None:
            out = tl.dot(w, e, out, input_precision="ieee")

    if p_dlse is not None:
        residue -= dlse * mass * factor
    if p_dtau is not None:
        # sum_k w log2 p, where so far p is 2^log2_gain too large, and w by the factor of the row
        dtau -= residue * entropy * tl.exp2(-log2_gain)
        if p_dlse is not None:
            dtau -= log2_gain * dlse * mass * factor
        tl.store(p_dtau + o_n, dtau / factor * tl.exp2(-log2_gain), mask=m_n)
    largest *= tl.exp2(-log2_gain)
    share = residue * largest * tl.load(p_rnorm_e + code, mask=m_n, other=0.0)
    tl.store(p_residue + o_n, share + residue * (1.0 - largest) * tl.load(p_mean_rnorm_e), mask=m_n)
    if p_share is not None:
        tl.store(p_share + o_n, share, mask=m_n)
    tl.debug_barrier()  # other threads have written these weights
    w = tl.load(p_w + o_n * stride_k + code, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_w + o_n * stride_k + code, (w - share).to(p_w.dtype.element_ty), mask=m_n)
    if p_out is not None:
        tl.store(p_out + o_n[:, None] * D + o_d[None, :], out, mask=m_nd)


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["p_rnorm", "p_radial", "p_residue", "p_share", "p_code", "p_norm", "p_expected"],
)
def finish_kernel(
    p_sum,  # (N, D) rx times a gradient of x^
    p_residue,  # (N,) of weight_kernel, or None, as are those that follow
    p_mixed,  # (N, D), rows stride_z apart: z~
    p_mixed_centre,  # (D,) what the codes are relative to, or None: 0
    p_share,  # (N,) of weight_kernel, or None: not in the sum
    p_code,  # (N,) int64, elements stride_m apart: the sampled code
    p_e,  # (K, D)
    p_x,  # (N, D), rows stride_d apart
    p_rnorm,  # (N,) rx, elements stride_m apart
    p_factor,  # () scale / tau
    p_gain,  # () or None: what sum is too large by
    p_add,  # (N, D), added; may be p_out itself, or None: 0
    p_add_gain,  # () or None: what p_add is too large by
    p_out,  # (N, D) out: factor rx (I - x^ x^T) (...) + add / add_gain
    p_radial,  # (N,) out: x^ . (...), or None
    p_dquantized,  # of upstream_kernel for the level before, as are those that follow
    p_quantized,
    p_centre,
    p_unit,  # or None: nothing enters another level
    p_norm,
    p_expected,
    N,
    D,
    stride_d,
    stride_m,
    stride_z,
    stride_dq,
    stride_q,
    eps,
    plain: tl.constexpr,
    b_n: tl.constexpr,
    b_d: tl.constexpr,
):
    """The end of a gradient of vectors, less what is radial of cosines'; that of a residual enters the level before,
    and is not read again for it. b_d >= D."""
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    o_d = tl.arange(0, b_d)
    m_n = o_n < N
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    o_nd = o_n[:, None] * D + o_d[None, :]
    total = tl.load(p_sum + o_nd, mask=m_nd, other=0.0)
    if p_residue is not None:
        mixed = tl.load(p_mixed + o_n[:, None] * stride_z + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
        if p_mixed_centre is not None:
            mixed -= tl.load(p_mixed_centre + o_d, mask=o_d < D, other=0.0)[None, :]
        total -= tl.load(p_residue + o_n, mask=m_n, other=0.0)[:, None] * mixed
        if p_share is not None:
            code = tl.load(p_code + o_n * stride_m, mask=m_n, other=0)
            e = tl.load(p_e + code[:, None] * D + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
            total += tl.load(p_share + o_n, mask=m_n, other=0.0)[:, None] * e
    added = tl.zeros((b_n, b_d), tl.float32) if p_add is None else tl.load(p_add + o_nd, mask=m_nd, other=0.0)
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
    out = added + total * factor[:, None]
    tl.store(p_out + o_nd, out.to(p_out.dtype.element_ty), mask=m_nd)
    if p_radial is not None:
        tl.store(p_radial + o_n, radial, mask=m_n)
    if p_unit is not None:
        enter_level(
            out,
            p_dquantized,
            p_quantized,
            p_centre,
            p_unit,
            p_norm,
            p_expected,
            o_n,
            o_d,
            m_n,
            D,
            stride_dq,
            stride_q,
        )
