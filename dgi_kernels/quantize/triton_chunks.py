"""Epilogues of residual quantization's chunked form: products of a chunk of rows come from cuBLAS and stay in the L2.

The formulas are those of :mod:`dgi_kernels.quantize.triton_kernels`. One row a program; each kernel passes over its row
twice, and what the second pass needs lies where the products lay, so that noise is made once forward and once backward.
Per (row, code) the L2 sees, for 16-bit operands, 14 bytes forward (products written and read, l written and read by way
of the L1, p written and read) and 24 backward.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.gumbel.triton_noise import noise_tile
from dgi_kernels.quantize.triton_kernels import LN2, LOG2E, PER_ROW, STREAM, VARYING


@triton.jit
def row_noise(p_seed, i_n, row_offset, level, first, b_k: tl.constexpr):
    o_row = (i_n + row_offset + tl.zeros((1,), tl.int64)).to(tl.uint32)
    return tl.reshape(noise_tile(tl.load(p_seed), first, o_row, level, STREAM, b_k), (b_k,))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PER_ROW)
def chunk_level_kernel(p_s, p_p, p_rnorm, p_rnorm_e, p_seed, p_scale, p_tau, p_codes, p_sampled, p_lse, K, stride_m,
                       level, row_offset, log2_gain, noisy: tl.constexpr, b_k: tl.constexpr):
    """Products s (rows, K) -> codes, sampled, lse (rows,); p 2^log2_gain (rows, K), maybe in place of s, or None."""
    i_n = tl.program_id(0).to(tl.int64)
    scale_r = tl.load(p_rnorm + i_n * stride_m) * (tl.load(p_scale) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    p_s += i_n * K
    code = tl.full((), 0, tl.int32)
    sampled = tl.full((), 0, tl.int32)
    best = tl.full((), float("-inf"), tl.float32)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        m_k = o_k < K
        y = tl.load(p_s + o_k, mask=m_k, other=0.0) * scale_r * tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
        y = tl.where(m_k, y, float("-inf"))
        highest, where = tl.max(y, axis=0, return_indices=True)
        code = tl.where(highest > best, first + where, code)
        best = tl.maximum(best, highest)
        if noisy:
            y += row_noise(p_seed, i_n, row_offset, level, first, b_k)
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


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=PER_ROW)
def chunk_gradient_kernel(p_s, p_c, p_w, p_y, p_rnorm, p_rnorm_e, p_seed, p_scale, p_tau, p_lse, p_sampled, p_norm,
                          p_dusage, p_dlse, p_gain, p_value_gain, p_dtau, K, stride_m, level, row_offset,
                          straight_through: tl.constexpr, noisy: tl.constexpr, b_k: tl.constexpr):
    """Products s = r . e and c = unit . e (rows, K) -> w rr_n re_k and y |z_n|, ready for products.

    They may be s and c themselves. y is p, or the one-hot of ``sampled``. dtau (rows,) = sum_k w log2 p.
    """
    i_n = tl.program_id(0).to(tl.int64)
    rnorm = tl.load(p_rnorm + i_n * stride_m)
    scale_r = rnorm * (tl.load(p_scale) * LOG2E)
    inv_tau = 1.0 / tl.load(p_tau)
    lse = tl.load(p_lse + i_n * stride_m) * LOG2E
    norm = tl.load(p_norm + i_n)
    p_s += i_n * K
    p_c += i_n * K
    mean = tl.full((), 0.0, tl.float32)
    mass = tl.full((), 0.0, tl.float32)
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        m_k = o_k < K
        y = tl.load(p_s + o_k, mask=m_k, other=0.0) * scale_r * tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
        if noisy:
            y += row_noise(p_seed, i_n, row_offset, level, first, b_k)
        log_p = y * inv_tau - lse
        c = tl.load(p_c + o_k, mask=m_k, other=0.0) * norm
        if p_dusage is not None:
            c += tl.load(p_dusage + o_k, mask=m_k, other=0.0)
        p = tl.where(m_k, tl.exp2(log_p), 0.0)
        mean += tl.sum(p * c, axis=0)
        mass += tl.sum(p, axis=0)
        tl.store(p_s + o_k, log_p, mask=m_k)
    tl.debug_barrier()
    shift = mean / mass
    if p_dlse is not None:
        shift -= tl.load(p_dlse + i_n * stride_m)
    sampled = tl.load(p_sampled + i_n * stride_m)
    gain = tl.where(rnorm == 0.0, 1.0, rnorm) * (1.0 if p_gain is None else tl.load(p_gain))
    value_gain = norm * (1.0 if p_value_gain is None else tl.load(p_value_gain))
    dtau = tl.full((), 0.0, tl.float32)
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        m_k = o_k < K
        log_p = tl.load(p_s + o_k, mask=m_k, other=0.0)
        c = tl.load(p_c + o_k, mask=m_k, other=0.0) * norm
        if p_dusage is not None:
            c += tl.load(p_dusage + o_k, mask=m_k, other=0.0)
        rnorm_e = tl.load(p_rnorm_e + o_k, mask=m_k, other=0.0)
        p = tl.where(m_k, tl.exp2(log_p), 0.0)
        w = p * (c - shift)
        dtau += tl.sum(tl.where(p > 0.0, w * log_p, p), axis=0)
        w *= gain * tl.where(rnorm_e == 0.0, 1.0, rnorm_e)
        tl.store(p_w + i_n * K + o_k, w.to(p_w.dtype.element_ty), mask=m_k)
        if straight_through:
            p = (o_k == sampled).to(tl.float32)
        tl.store(p_y + i_n * K + o_k, (p * value_gain).to(p_y.dtype.element_ty), mask=m_k)
    tl.store(p_dtau + i_n, dtau)
