"""Triton kernels of a level of residual quantization: flash form, forward for D <= 128; the formulas of all forms.

    l_nk = (s_nk + sigma_n g_nk) / tau,    p = softmax(l),    z~_n = sum_k p_nk e_k,    r'_n = r_n - z~_n
    s_nk = scale r^_n . e^_k + b_k,  x^ = rx x   (rx = 1 / ||x||, b = 0)
    c_nk = z_n . e_k + v_k   (z: gradient of z~ at the row, v: gradient of usage / N)
    w_nk = p_nk (c_nk - sum_k p_nk c_nk + L_n) = dl_nk   (L: gradient of the log-normalizer)
    dr_n = scale / tau rr_n (I - r^ r^T) sum_k w_nk e^_k
    de_k = scale / tau re_k (I - e^ e^T) sum_n w_nk r^_n + sum_n p_nk z_n
    dscale = sum_n r^_n . (sum_k w_nk e^_k) / tau,    dtau = -sum_nk w_nk l_nk / tau

A dot product has rx = 1 and none of the projections (I - x^ x^T). The Euclidean metric has rr = 2, re = 1 and
b = -scale ||e||^2, with r and e relative to the mean of the codes; -scale ||r||^2 is the same for all codes, and not in
the softmax. The gradient of b, sum_n w_nk / tau, is a separate result, and torch differentiates what b is made of.

This is attention with the residual as query and the codebook as key and as value, with noise made inside.

- Operands of products are the stored vectors; a tile of products is scaled by ``scale rr_n re_k``. The residual is
  carried from level to level in float32 and rounded only as an operand: N x D numbers against N x K of work, so each
  level is launches of its own and the residuals, which are an output, are written once and read once.
- A chunk of rows at a time keeps its p, in the operands' dtype: noise is made once forward, where the sum of p over
  the rows is read off it, and once backward, and nothing of size N x K is kept between the two. ``w`` needs sum_k p c
  before the first product with it (p c and its mean cancel where p is peaked, so rounded operands cannot be corrected
  afterwards). It is z . z~ + sum_k p v, which is known but for the rounding of z~. What that leaves of sum_k w - L is
  taken off later: see weight_kernel.
- No atomics: a program owns its rows or its codes; splits write partials that are added in a fixed order.
- float16 keeps its range: z_n enters products with norm 1, p and weights are scaled by bounds of theirs.

Logits, noise and log-normalizers are in base 2 inside the kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.gumbel.triton_noise import BASE, noise_less_base
from dgi_kernels.noise import STREAM_RESIDUAL_QUANTIZE
from dgi_kernels.quantize.triton_columns import (
    best_of,
    blocks_of_threads,
    by_code,
    by_column,
    by_thread,
    codes_of_columns,
    codes_of_threads,
    first_code,
    largest_in_row,
    largest_of,
    of_threads,
    over_codes,
    over_rows,
    sum_in_row,
    sum_of,
)
from dgi_kernels.triton_common import LN2, LOG2E, NONE, SLACK, code_bias, present, reciprocal_norm

STREAM = tl.constexpr(STREAM_RESIDUAL_QUANTIZE)
# No code of their own for the value 1 or a multiple of 16: it would be no faster, and each level would wait for one.
VARYING = ["N", "level", "row_offset"]
PER_ROW = ["p_rnorm", "p_codes", "p_sampled", "p_index", "p_lse", "p_dlse", "p_norm", "p_mean", "p_dtau"]
PER_ROW += ["p_sigma", "p_dsigma", "p_expected", "p_residue", "p_share"]


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PER_ROW)
def emit_kernel(
    p_before,  # (N, D), rows stride_b apart: z, or what was left of it
    p_rest,  # (N, D) float32 out, maybe p_before itself: what is left, or None where nobody asks
    p_mean,  # (N, D) z~, or None: it is the codebook's rows
    p_e,  # (K, D) of the level that ends, or None before the first
    p_index,  # (N,) int64, elements stride_m apart: the row's code, or None
    p_lse,  # (N,), elements stride_m apart, or None; where it is NaN, z~ is
    p_quantized,  # (N, D) out, rows stride_d apart: z~, or None before the first level
    p_residual,  # (N, D) out, rows stride_d apart: rest, rounded for the next level, or None after the last
    p_rnorm,  # (N,) out, elements stride_m apart: 1 / ||rest||, or a constant
    p_centre,  # (D,) of the level that ends, or None: what its p_mean is relative to
    p_next_centre,  # (D,) of the next level, or None: what p_residual is made relative to
    N,
    D,
    stride_b,
    stride_d,
    stride_m,
    eps,
    constant: tl.constexpr,  # the rows' factor, or 0: 1 / ||rest||
    b_n: tl.constexpr,
    b_d: tl.constexpr,
):
    """The seam of two levels: rest = before - z~, and its rounding and factor for the next level. b_d >= D."""
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    o_d = tl.arange(0, b_d)
    m_n = o_n < N
    m_nd = m_n[:, None] & (o_d < D)[None, :]
    rest = tl.load(p_before + o_n[:, None] * stride_b + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
    if p_quantized is not None:
        if p_mean is not None:
            quantized = tl.load(p_mean + o_n[:, None] * D + o_d[None, :], mask=m_nd, other=0.0)
            if p_centre is not None:
                quantized += tl.load(p_centre + o_d, mask=o_d < D, other=0.0)[None, :]
        else:
            index = tl.load(p_index + o_n * stride_m, mask=m_n, other=0)
            quantized = tl.load(p_e + index[:, None] * D + o_d[None, :], mask=m_nd, other=0.0).to(tl.float32)
            if p_lse is not None:
                lse = tl.load(p_lse + o_n * stride_m, mask=m_n, other=0.0)
                quantized = tl.where((lse == lse)[:, None], quantized, float("nan"))
        tl.store(
            p_quantized + o_n[:, None] * stride_d + o_d[None, :], quantized.to(p_quantized.dtype.element_ty), mask=m_nd
        )
        rest -= quantized
        if p_rest is not None:
            tl.store(p_rest + o_n[:, None] * D + o_d[None, :], rest, mask=m_nd)
    if p_residual is not None:
        if p_next_centre is not None:
            rest -= tl.load(p_next_centre + o_d, mask=o_d < D, other=0.0)[None, :]
        tl.store(p_residual + o_n[:, None] * stride_d + o_d[None, :], rest.to(p_residual.dtype.element_ty), mask=m_nd)
        if constant == 0.0:
            rnorm = reciprocal_norm(tl.sum(rest * rest, axis=1), eps)
        else:
            rnorm = tl.full((b_n,), constant, tl.float32)
        tl.store(p_rnorm + o_n * stride_m, rnorm, mask=m_n)


@triton.jit
def noise_of_tile(seed, first, o_row, level, p_sigma, o_n, m_n, b_k: tl.constexpr, threads: tl.constexpr):
    """What noise adds to the scores of a tile, by thread, beside sigma BASE, which is alike for all codes of a row and
    is :func:`base_of`."""
    o_block = over_codes((first // 4 + blocks_of_threads(b_k, threads)).to(tl.uint32))
    noise = noise_less_base(seed, o_block, over_rows(o_row, threads), level, STREAM)
    if threads == 1:
        noise = tl.reshape(noise, (o_row.shape[0], b_k))
    else:
        noise = tl.reshape(noise, (o_row.shape[0], 4, b_k // 4))
    if p_sigma is not None:
        noise *= over_rows(tl.load(p_sigma + o_n, mask=m_n, other=0.0), threads)
    return noise


@triton.jit
def base_of(p_sigma, o_n, m_n):
    return BASE if p_sigma is None else BASE * tl.load(p_sigma + o_n, mask=m_n, other=0.0)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PER_ROW)
def level_kernel(
    p_r,  # (N, D), rows stride_d apart: the residual
    p_e,  # (K, D): the codebook
    p_rnorm,  # (N,) rr, elements stride_m apart
    p_rnorm_e,  # (K,) re, with the sign of the scale
    p_bias,  # (K,) b, or None where it is 0
    p_sigma,  # (N,) what multiplies a row's noise, or None: 1
    p_seed,  # (1,) int64
    p_scale,  # ()
    p_tau,  # ()
    p_mean,  # (N, D) out, soft: p E
    p_codes,  # (N,) int64 out, elements stride_m apart: argmax s
    p_sampled,  # (N,) int64 out, elements stride_m apart: argmax s + g
    p_lse,  # (N,) out, elements stride_m apart, natural
    p_kept,  # (N, stride_k) out: 2^(l - top) of the tile's top, 0 beyond K, or None
    p_top,  # (code tiles, N) out, or None
    N,
    K,
    D,
    stride_d,
    stride_m,
    stride_k,
    level,
    row_offset,
    log2_gain,
    soft: tl.constexpr,
    noisy: tl.constexpr,
    whole: tl.constexpr,
    threads: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """A program owns b_n rows. ``whole``: K is a multiple of b_k.

    In registers: the mean (b_n, b_d); of each row its maximum, and its sum and best two codes of each of the threads
    that share it (:mod:`dgi_kernels.quantize.triton_columns`). r lies in shared memory.
    """
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    r = tl.load(p_r + o_n[:, None] * stride_d + o_d[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0)
    scale_r = tl.load(p_rnorm + o_n * stride_m, mask=m_n, other=0.0) * (tl.abs(tl.load(p_scale)) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    seed = tl.load(p_seed)
    o_row = (o_n + row_offset).to(tl.uint32)

    best_item = of_threads(0, tl.int32, b_n, threads)
    best_noisy_item = of_threads(0, tl.int32, b_n, threads)
    best = of_threads(float("-inf"), tl.float32, b_n, threads)
    best_noisy = of_threads(float("-inf"), tl.float32, b_n, threads)
    total = of_threads(0.0, tl.float32, b_n, threads)
    top = tl.full((b_n,), float("-inf"), tl.float32)  # less log2_gain
    mean = tl.zeros((b_n, b_d), tl.float32)
    o_column = codes_of_columns(b_k, threads)
    o_own = codes_of_threads(b_k, threads)
    o_tile = o_column[:, None] * D + o_d[None, :]
    if p_kept is not None:
        p_kept += o_n[:, None] * stride_k + tl.arange(0, b_k)[None, :]
    for first in range(0, K, b_k):
        o_k = first + o_own
        m_k = present(o_k, K, whole)
        if noisy:
            noise = noise_of_tile(seed, first, o_row, level, p_sigma, o_n, m_n, b_k, threads)
        e = tl.load(p_e + o_tile, mask=present(first + o_column, K, whole)[:, None] & m_d[None, :], other=0.0)
        p_e += b_k * D
        rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
        s = by_thread(tl.dot(r, tl.trans(e), input_precision="ieee"), threads) * over_codes(rnorm_e)
        if p_bias is not None:
            s = s * over_rows(scale_r, threads) + over_codes(code_bias(p_bias, o_k, m_k))
        elif not whole:
            s = tl.where(over_codes(m_k), s, float("-inf"))
        highest, item = best_of(s)
        is_better = highest > best
        best_item = tl.where(is_better, first // threads + item, best_item)
        best = tl.where(is_better, highest, best)
        y = s if p_bias is not None else s * over_rows(scale_r, threads)
        if p_bias is None and not whole:  # a row of norm 0
            y = tl.where(over_codes(m_k), y, float("-inf"))
        if noisy:
            y += noise
            highest, item = best_of(y)
            is_better = highest > best_noisy
            best_noisy_item = tl.where(is_better, first // threads + item, best_noisy_item)
            best_noisy = tl.where(is_better, highest, best_noisy)
        else:
            highest = largest_of(y)
        highest_of_row = largest_in_row(highest) * inv_tau - log2_gain
        rise = highest_of_row - top
        if tl.max((rise > SLACK).to(tl.int32)) > 0:
            raised = tl.where(rise > 0.0, highest_of_row, top)
            shrink = tl.exp2(top - raised)
            top = raised
            total *= shrink if threads == 1 else shrink[:, None]
            if soft:
                mean *= shrink[:, None]
        p = tl.exp2(y * inv_tau - over_rows(top, threads))
        total += sum_of(p)
        kept = p.to(e.dtype)
        if p_kept is not None:
            tl.store(p_kept, by_code(kept), mask=m_n[:, None])
            p_kept += b_k
            tl.store(p_top + tl.cast(first // b_k, tl.int64) * N + o_n, top, mask=m_n)
        if soft:
            mean = tl.dot(by_column(kept), e, mean, input_precision="ieee")

    code = first_code(best, best_item)
    sampled = code
    if noisy:
        sampled = first_code(best_noisy, best_noisy_item)
        top += base_of(p_sigma, o_n, m_n) * inv_tau
    mass = sum_in_row(total)
    tl.store(p_codes + o_n * stride_m, code.to(tl.int64), mask=m_n)
    tl.store(p_sampled + o_n * stride_m, sampled.to(tl.int64), mask=m_n)
    tl.store(p_lse + o_n * stride_m, (top + tl.log2(mass)) * LN2, mask=m_n)
    if soft:
        tl.store(p_mean + o_n[:, None] * D + o_d[None, :], mean / mass[:, None], mask=m_n[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["N", "adds"], do_not_specialize_on_alignment=PER_ROW)
def usage_kernel(
    p_kept,  # (N, stride_k): 2^(l - top)
    p_top,  # (code tiles, N)
    p_lse,  # (N,), elements stride_m apart, natural; inf where a row does not count
    p_sigma,  # (N,) or None
    p_tau,  # ()
    p_partial,  # (splits, K) out: sum_n p_nk, and what it has held, if it ``adds``
    N,
    K,
    stride_m,
    stride_k,
    adds,
    noisy: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
):
    """A program owns the b_k codes of one of level_kernel's tiles, and every splits-th tile of b_n rows."""
    i_k = tl.program_id(0)
    o_k = i_k * b_k + tl.arange(0, b_k)
    inv_tau = 1.0 / tl.load(p_tau)
    usage = tl.zeros((b_n, b_k), tl.float32)
    p_top += i_k.to(tl.int64) * N
    for first in range(tl.program_id(1) * b_n, N, tl.num_programs(1) * b_n):
        o_n = first + tl.arange(0, b_n)
        m_n = o_n < N
        o_row = o_n.to(tl.int64)
        kept = tl.load(p_kept + o_row[:, None] * stride_k + o_k[None, :], mask=m_n[:, None], other=0.0)
        lse = tl.load(p_lse + o_row * stride_m, mask=m_n, other=float("inf")) * LOG2E
        top = tl.load(p_top + o_n, mask=m_n, other=0.0)
        if noisy:
            top += base_of(p_sigma, o_n, m_n) * inv_tau
        usage += kept.to(tl.float32) * tl.exp2(top - lse)[:, None]
    p_partial += tl.program_id(1) * K + o_k
    before = tl.load(p_partial, mask=(o_k < K) & (adds != 0), other=0.0)
    tl.store(p_partial, before + tl.sum(usage, axis=0), mask=o_k < K)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=PER_ROW)
def nearest_kernel(
    p_r,  # (N, D), rows stride_d apart: the residual, relative to the centre
    p_e,  # (K, D): the codebook, relative to the centre
    p_bias,  # (K,) b
    p_scale,  # ()
    p_rest,  # (N, D) float32: the residual itself
    p_vectors,  # (K, D): the codebook itself
    p_longest,  # () the largest ||e||
    p_codes,  # (N,) int64 out, elements stride_m apart: the nearest code
    N,
    K,
    D,
    stride_d,
    stride_m,
    slack,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
    b_d: tl.constexpr,
):
    """The nearest code of every row, by exact differences with all codes whose scores are within rounding of the best.

    A program owns b_n rows and takes, tile by tile, the candidates of all its rows side by side.
    """
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    o_d = tl.arange(0, b_d)
    m_d = o_d < D
    m_nd = m_n[:, None] & m_d[None, :]
    r = tl.load(p_r + o_n[:, None] * stride_d + o_d[None, :], mask=m_nd, other=0.0)
    scale = tl.load(p_scale)
    scale_r = tl.full((b_n,), 2.0 * LOG2E, tl.float32) * scale
    within = rounding_of_scores(tl.sum(r.to(tl.float32) * r.to(tl.float32), axis=1), tl.load(p_longest), scale, slack)
    code = tl.zeros((b_n,), tl.int32)
    distance = tl.full((b_n,), float("inf"), tl.float32)
    best = tl.full((b_n,), float("-inf"), tl.float32)
    o_tile = tl.arange(0, b_k)[:, None] * D + o_d[None, :]
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        m_k = o_k < K
        e = tl.load(p_e + tl.cast(first, tl.int64) * D + o_tile, mask=m_k[:, None] & m_d[None, :], other=0.0)
        products = tl.dot(r, tl.trans(e), input_precision="ieee")
        y = products * scale_r[:, None] + code_bias(p_bias, o_k, m_k)[None, :]
        best = tl.maximum(best, tl.max(y, axis=1))
        cut = tl.where(m_n, best - within, float("inf"))
        candidate = tl.where(y >= cut[:, None], o_k[None, :], NONE)
        k = tl.min(candidate, axis=1)
        while tl.min(k, axis=0) < NONE:
            m_near = (k < NONE)[:, None] & m_d[None, :]
            own = tl.load(p_vectors + k.to(tl.int64)[:, None] * D + o_d[None, :], mask=m_near, other=0.0).to(tl.float32)
            difference = tl.load(p_rest + o_n[:, None] * D + o_d[None, :], mask=m_near, other=0.0) - own
            squares = tl.sum(difference * difference, axis=1)
            squares = tl.where(scale < 0.0, -squares, squares)
            squares = tl.where(k < NONE, squares, float("inf"))
            code = tl.where(squares < distance, k, code)
            distance = tl.minimum(distance, squares)
            candidate = tl.where(o_k[None, :] == k[:, None], NONE, candidate)
            k = tl.min(candidate, axis=1)
    tl.store(p_codes + o_n * stride_m, code.to(tl.int64), mask=m_n)


@triton.jit
def rounding_of_scores(squares, longest, scale, slack):
    """What rounding may make of the difference of two scores of a row with ||r||^2 = squares, in base 2."""
    reach = tl.sqrt(squares) + longest
    within = slack * LOG2E * tl.abs(scale) * reach * reach
    return tl.where(scale == 0.0, float("-inf"), within)  # all alike: there are no candidates, and code 0 is left
