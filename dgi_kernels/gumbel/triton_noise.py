"""The noise of ``docs/method.md`` in Triton, and the kernels that need no codebook: gumbel_noise and gumbel_softmax.

    u = (x + 1/2) 2^-32,    E = -log1p(-u),    g = -log E,    x = word k % 4 of Philox4x32-10 at (k // 4, n, level,
    stream)

Everything here is in base 2, G = g / ln 2 = BASE - log2 E_2 with E_2 = E / ln 2, so that both logarithms and the
softmax's exponential are one instruction of the GPU each. ``lg2.approx`` errs by 2^-22, absolutely where its argument
is within (1/2, 2) and relatively elsewhere (PTX ISA). Near u = 0, where E_2 = -log2(1 - u) loses what 1 - u has rounded
away, a parabola in x takes its place below x = SMALL, u = 0.0137: then the error of g is below 2e-5 for every word:
8e-6 from the parabola, or 12e-6 from the logarithm and 4e-6 from the rounding of 1 - u, and up to 5e-6 from log2 E_2,
whose largest is 32 (a test adds them up over both ends and a sample). One conversion serves both sides: it takes x for
small u and ~x, which is 1 - u, for the rest.

A tile computes one Philox block for four neighbouring codes and uses all four words. A row's and a code's parts of the
first two rounds stay vectors of b_n and b_k / 4 elements by broadcasting, so that eight rounds are paid for.

A kernel's parameter is not called ``stream``: Triton refuses a launch that names one so, where a GPU is.

Instructions an element in the machine code for sm_90 (Triton 3.7, bench/gpu_code.py), where 35 were aimed at: 19 for
the noise in the loop of the quantizer's probability_kernel (noisy less noiseless), 18 in level_kernel's, with a second
argmax. Not yet run on a GPU.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from dgi_kernels.triton_common import LN2, LOG2E

BASE = tl.constexpr(0.5287663729448977)  # -log2(ln 2)
SMALL = tl.constexpr(0x03800000)

if os.environ.get("TRITON_INTERPRET") == "1":  # the interpreter has no inline assembly

    @triton.jit
    def gumbel_less_base(word):
        """Uniform uint32 -> G - BASE = -log2 E_2 of an E ~ Exp(1). The parabola is a fit of -log2(1 - u) that errs
        relatively by 7.9e-6."""
        small = word < SMALL
        # Not ~word: the interpreter of Triton 3.7 cannot invert unsigned words.
        f = tl.where(small, word, word ^ 0xFFFFFFFF).to(tl.float32)
        parabola = f * (f * 3.946412786535432e-20 + 3.359009737025076e-10) + 1.679504868512538e-10
        return -tl.log2(tl.abs(tl.where(small, parabola, tl.log2(f * 2.0**-32 + 2.0**-33))))

    @triton.jit
    def halves_of_product(x, factor):
        return tl.umulhi(x, factor), x * factor

    @triton.jit
    def fast_log2(x):
        return tl.log2(x)
else:

    @triton.jit
    def gumbel_less_base(word):
        """As above. In assembly, since with its predicates the choices are no instructions of their own, and nor are
        the signs of both logarithms."""
        return tl.inline_asm_elementwise(
            """{
            .reg .pred large;
            .reg .b32 word;
            .reg .f32 f, e;
            setp.ge.u32 large, $1, 0x03800000;
            mov.b32 word, $1;
            @large not.b32 word, word;
            cvt.rn.f32.u32 f, word;
            fma.rn.f32 e, f, 0f1F3A5D34, 0f2FB8A9DC;
            fma.rn.f32 e, e, f, 0f2F38A9DC;
            @large fma.rn.f32 e, f, 0f2F800000, 0f2F000000;
            @large lg2.approx.ftz.f32 e, e;
            abs.f32 e, e;
            lg2.approx.ftz.f32 e, e;
            neg.f32 $0, e;
            }""",
            "=f,r",
            [word],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def halves_of_product(x, factor):
        return tl.inline_asm_elementwise(
            "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }",
            "=r,=r,r,r",
            [x, factor],
            dtype=(tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def fast_log2(x):
        """One instruction, where tl.log2 makes twenty."""
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Philox4x32-10 of the counter (c0, c1, c2, c3) uint32 with the key ``seed`` int64.

    tl.philox makes the two halves of a product by two multiplications, where the GPU has one for both.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = halves_of_product(c0, tl.full((), 0xD2511F53, tl.uint32))
        high1, low1 = halves_of_product(c2, tl.full((), 0xCD9E8D57, tl.uint32))
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += tl.full((), 0x9E3779B9, tl.uint32)
        k1 += tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def noise_less_base(seed, o_block, o_row, level, stream):
    """G - BASE of the four codes from 4 o_block, for the rows ``o_row``, both uint32 tensors -> (..., 2, 2) after the
    dimensions that they broadcast to. Where it is added to something, BASE can be left to what is of a row."""
    level, stream = tl.cast(level, tl.uint32), tl.cast(stream, tl.uint32)
    w0, w1, w2, w3 = philox(seed, o_block, o_row, level, stream)
    even = tl.join(gumbel_less_base(w0), gumbel_less_base(w2))
    odd = tl.join(gumbel_less_base(w1), gumbel_less_base(w3))
    return tl.join(even, odd)


@triton.jit
def noise_tile(seed, first_code, o_row, level, stream, b_k: tl.constexpr):
    """G of b_k codes from ``first_code``, a multiple of 4, for the rows ``o_row`` (b_n,) uint32 -> (b_n, b_k)."""
    o_block = (first_code // 4 + tl.arange(0, b_k // 4)).to(tl.uint32)
    noise = noise_less_base(seed, o_block[None, :], o_row[:, None], level, stream)
    return tl.reshape(noise, (o_row.shape[0], b_k)) + BASE


@triton.jit(do_not_specialize=["N", "K", "level", "noise_stream", "row_offset"])
def noise_kernel(
    p_seed,  # (1,) int64
    p_out,  # (N, K) float32 out: g
    N,
    K,
    level,
    noise_stream,
    row_offset,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
):
    """Nothing is read but the seed; 4 bytes an element are written.

    Tiles are numbered in one dimension, row by row: there may be more than 65,535 in either, which only x takes.
    """
    code_tiles = tl.cdiv(K, b_k)
    o_n = (tl.program_id(0) // code_tiles).to(tl.int64) * b_n + tl.arange(0, b_n)
    first = (tl.program_id(0) % code_tiles).to(tl.int64) * b_k
    noise = noise_tile(tl.load(p_seed), first, (o_n + row_offset).to(tl.uint32), level, noise_stream, b_k) * LN2
    o_k = first + tl.arange(0, b_k)
    tl.store(p_out + o_n[:, None] * K + o_k[None, :], noise, mask=(o_n < N)[:, None] & (o_k < K)[None, :])


@triton.jit
def noisy_tile(p_x, seed, inv_tau, o_n, m_n, first, K, stream: tl.constexpr, b_k: tl.constexpr):
    """One tile of (x + g) / (tau ln 2), -inf beyond K."""
    o_k = first + tl.arange(0, b_k)
    x = tl.load(p_x + o_n[:, None] * K + o_k[None, :], mask=m_n[:, None] & (o_k < K)[None, :], other=float("-inf"))
    return (x.to(tl.float32) * LOG2E + noise_tile(seed, first, o_n.to(tl.uint32), 0, stream, b_k)) * inv_tau


@triton.jit
def softmax_kernel(
    p_x,  # (N, K) logits
    p_seed,  # (1,) int64
    p_tau,  # ()
    p_out,  # (N, K) out: softmax((x + g) / tau), or its one-hot (hard)
    p_lse,  # (N,) out, in base 2
    N,
    K,
    noise_stream: tl.constexpr,
    hard: tl.constexpr,
    one_tile: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
):
    """A program owns b_n rows. Where a row does not fit one tile, its noise is made twice rather than its softmax
    stored once."""
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    seed = tl.load(p_seed)
    inv_tau = 1.0 / tl.load(p_tau)
    top = tl.full((b_n,), float("-inf"), tl.float32)
    total = tl.zeros((b_n,), tl.float32)
    index = tl.zeros((b_n,), tl.int64)
    if one_tile:
        y = noisy_tile(p_x, seed, inv_tau, o_n, m_n, 0, K, noise_stream, b_k)
        top, total, index = extend(y, 0, top, total, index)
    else:
        for first in range(0, K, b_k):
            y = noisy_tile(p_x, seed, inv_tau, o_n, m_n, first, K, noise_stream, b_k)
            top, total, index = extend(y, first, top, total, index)
    lse = tl.where(top == float("-inf"), 0.0, top) + tl.log2(total)  # log2(0): -inf for a row of -inf alone
    tl.store(p_lse + o_n, lse, mask=m_n)
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        if hard:
            p = tl.where(o_k[None, :] == index[:, None], 1.0, 0.0) + (lse - lse)[:, None]  # NaN without a softmax
        else:
            if not one_tile:
                y = noisy_tile(p_x, seed, inv_tau, o_n, m_n, first, K, noise_stream, b_k)
            p = tl.exp2(y - lse[:, None])
        tl.store(p_out + o_n[:, None] * K + o_k[None, :], p, mask=m_n[:, None] & (o_k < K)[None, :])


@triton.jit
def extend(y, first, top, total, index):
    """Maximum, sum of exp2(y - maximum) and argmax of a row by one more tile; -inf counts as nothing."""
    highest, where = tl.max(y, axis=1, return_indices=True)
    index = tl.where(highest > top, first + where, index)
    raised = tl.maximum(top, highest)
    anchor = tl.where(raised == float("-inf"), 0.0, raised)
    total = total * tl.exp2(top - anchor) + tl.sum(tl.exp2(y - anchor[:, None]), axis=1)
    return raised, total, index


@triton.jit
def softmax_backward_kernel(
    p_x,  # (N, K) logits
    p_seed,  # (1,) int64
    p_tau,  # ()
    p_lse,  # (N,) in base 2
    p_upstream,  # (N, K) u
    p_out,  # (N, K) out: p (u - p . u) / tau
    p_dtau,  # (N,) out: each row's part of the gradient of tau, -sum_k out_k log p_k
    N,
    K,
    noise_stream: tl.constexpr,
    one_tile: tl.constexpr,
    b_n: tl.constexpr,
    b_k: tl.constexpr,
):
    """The gradient of the logits; p is made again."""
    o_n = tl.program_id(0).to(tl.int64) * b_n + tl.arange(0, b_n)
    m_n = o_n < N
    seed = tl.load(p_seed)
    inv_tau = 1.0 / tl.load(p_tau)
    lse = tl.load(p_lse + o_n, mask=m_n, other=0.0)
    mean = tl.zeros((b_n,), tl.float32)
    dtau = tl.zeros((b_n,), tl.float32)
    mass = tl.zeros((b_n,), tl.float32)  # 1, but for the rounding of lse, which must not tilt what cancels in u - mean
    for first in range(0, K, b_k):
        o_k = first + tl.arange(0, b_k)
        m_nk = m_n[:, None] & (o_k < K)[None, :]
        y = noisy_tile(p_x, seed, inv_tau, o_n, m_n, first, K, noise_stream, b_k) - lse[:, None]
        u = tl.load(p_upstream + o_n[:, None] * K + o_k[None, :], mask=m_nk, other=0.0).to(tl.float32)
        mean += tl.sum(tl.exp2(y) * u, axis=1)
        mass += tl.sum(tl.exp2(y), axis=1)
        if one_tile:
            dtau = gradient_tile(y, u, mean / mass, inv_tau, p_out + o_n[:, None] * K + o_k[None, :], m_nk)
    if not one_tile:
        for first in range(0, K, b_k):
            o_k = first + tl.arange(0, b_k)
            m_nk = m_n[:, None] & (o_k < K)[None, :]
            y = noisy_tile(p_x, seed, inv_tau, o_n, m_n, first, K, noise_stream, b_k) - lse[:, None]
            u = tl.load(p_upstream + o_n[:, None] * K + o_k[None, :], mask=m_nk, other=0.0).to(tl.float32)
            dtau += gradient_tile(y, u, mean / mass, inv_tau, p_out + o_n[:, None] * K + o_k[None, :], m_nk)
    tl.store(p_dtau + o_n, dtau, mask=m_n)


@triton.jit
def gradient_tile(y, u, mean, inv_tau, p_out, m_nk):
    dx = tl.exp2(y) * (u - mean[:, None]) * inv_tau
    tl.store(p_out, dx, mask=m_nk)
    return -tl.sum(tl.where(y > float("-inf"), dx * y, 0.0), axis=1) * LN2
