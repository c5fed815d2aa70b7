"""Launchers of residual quantization in Triton, as operators that torch.compile keeps whole.

Formulas, what is kept and what is made again: :mod:`dgi_kernels.gumbel.triton_kernels`. The codebooks come as one tensor
(sum K_j, D) and a list of sizes. Grids depend on shapes alone and nothing is read back, so a CUDA graph can hold a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from dgi_kernels.cosine.triton import HALF, _add_product, _multiprocessors, _norms, _product, finish_block
from dgi_kernels.gumbel import triton_chunks as chunks
from dgi_kernels.gumbel import triton_kernels as kernels
from dgi_kernels.gumbel.reference import ResidualQuantization

MODES = ("soft", "straight_through", "hard")  # the numbers of the kernels
SOFT, STRAIGHT_THROUGH, HARD = range(3)

# Tiles of codes whose p are all below this part of their row are left out: what is lost of a row's mass, at most K times as
# much, stays below the rounding of 16-bit weights.
LOG2_SKIP = {torch.float32: -24.0, torch.float16: -22.0, torch.bfloat16: -20.0}


class FlashConfig(NamedTuple):
    """Tiles of the flash form for D <= b_d: the same rows by codes in every kernel, so that backward knows what to skip."""

    b_d: int
    rows: int
    codes: int
    warps: int
    stages: int


# All that the launchers can choose: bench/gpu_code.py compiles each for every architecture. Leads, not yet measured.
FLASH = (
    FlashConfig(b_d=64, rows=64, codes=64, warps=4, stages=2),
    FlashConfig(b_d=128, rows=64, codes=64, warps=8, stages=2),
    FlashConfig(b_d=256, rows=64, codes=64, warps=8, stages=1),
)
CHUNK_BYTES = 32 << 20  # products and weights of one chunk: they stay in the L2 of an H100 or H200 (50 MB)
CHUNK_STEP = 1024  # codes of one pass of the chunked epilogues
ORDER_FROM = (4096, 512)  # rows and codes from which sorting rows costs less than the tiles it can save


def flash_config(dim: int, dtype: torch.dtype) -> FlashConfig | None:
    """The flash form's tiles, or None for the chunked form: float32, and beyond D = 256, as for the cosine cross-entropy."""
    if dtype not in HALF:
        return None
    return next((config for config in FLASH if dim <= config.b_d), None)


def residual_quantize(z: Tensor, codebooks: Sequence[Tensor], scale: float | Tensor, tau: float | Tensor, mode: str,
                      seed: Tensor | None, row_offset: int, eps: float) -> ResidualQuantization:
    """(N, D), m of (K_j, D), all of one dtype -> ResidualQuantization. ``seed`` None: no noise."""
    sizes = [len(codebook) for codebook in codebooks]
    dim = z.shape[1]
    padding = max(16, (dim + 15) // 16 * 16) - dim  # rows are read 16 bytes at a time
    z, weight = F.pad(z, (0, padding)), F.pad(torch.cat(list(codebooks)), (0, padding))
    scale, tau = _scalar(scale, z), _scalar(tau, z)
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (z, weight, scale, tau))
    noisy = seed is not None
    seed = torch.zeros(1, dtype=torch.int64, device=z.device) if seed is None else seed
    quantized, codes, sampled, usage, residuals, log_normalizer, *_ = _forward(
        z, weight, sizes, scale, tau, seed, row_offset, eps, MODES.index(mode), noisy, with_grad)
    return ResidualQuantization(quantized[..., :dim], codes, sampled, list(usage.split(sizes)), residuals[..., :dim],
                                log_normalizer)


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    return value.float() if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float32, device=like.device)


@dataclass(frozen=True)
class Level:
    """One level's share of what the operators take and keep: views, each kernel's common arguments."""

    index: int
    e: Tensor  # (K, D)
    rnorm_e: Tensor  # (K,)
    residual: Tensor  # (N, D), its rows m D apart; the others' elements m apart
    codes: Tensor
    sampled: Tensor
    lse: Tensor
    rnorm: Tensor
    order: Tensor  # (N,), empty in the chunked form
    largest: Tensor  # (row tiles, code tiles), empty in the chunked form


@dataclass(frozen=True)
class Sampling:
    """What all levels share."""

    scale: Tensor
    tau: Tensor
    seed: Tensor
    row_offset: int
    eps: float
    mode: int
    noisy: bool


def _levels(sizes: Sequence[int], weight: Tensor, rnorm_e: Tensor, residuals: Tensor, codes: Tensor, sampled: Tensor,
            lse: Tensor, rnorm: Tensor, order: Tensor, largest: Tensor) -> Iterator[Level]:
    starts = [sum(sizes[:j]) for j in range(len(sizes))]
    tiles = _tile_counts(residuals.shape[0], sizes, flash_config(weight.shape[1], weight.dtype))
    for j, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        own = slice(start, start + size)
        yield Level(j, weight[own], rnorm_e[own], residuals[:, j], codes[:, j], sampled[:, j], lse[:, j], rnorm[:, j],
                    order[j], largest[sum(tiles[:j]):sum(tiles[:j + 1])])


def _tile_counts(rows: int, sizes: Sequence[int], config: FlashConfig | None) -> list[int]:
    if config is None:
        return [0] * len(sizes)
    return [triton.cdiv(rows, config.rows) * triton.cdiv(size, config.codes) for size in sizes]


@torch.library.custom_op("dgi_kernels::residual_quantize_triton", mutates_args=())
def _forward(z: Tensor, weight: Tensor, sizes: list[int], scale: Tensor, tau: Tensor, seed: Tensor, row_offset: int,
             eps: float, mode: int, noisy: bool, with_grad: bool) -> tuple[
                 Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> quantized, codes, sampled, usage, residuals, log_normalizer; for backward rnorm, rnorm_e, order, largest."""
    outputs = _empty_outputs(z, weight, sizes)
    quantized, codes, sampled, usage, residuals, lse, rnorm, rnorm_e, order, largest = outputs
    rows = z.shape[0]
    if rows == 0:
        usage.zero_()
        return outputs
    weight = weight.contiguous()
    config = flash_config(weight.shape[1], weight.dtype)
    sampling = Sampling(scale, tau, seed, row_offset, eps, mode, noisy)
    rest = torch.empty_like(z, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(z)
    usages = usage.split(sizes)
    with torch.cuda.device_of(z):
        _norms(weight, eps, rnorm_e)
        for level in _levels(sizes, weight, rnorm_e, residuals, codes, sampled, lse, rnorm, order, largest):
            out = usages[level.index]
            if config is None:
                _chunked_level(level, sampling, rest, quantized[:, level.index], out)
            else:
                _flash_level(config, level, sampling, rest, quantized[:, level.index], out, with_grad)
            if mode == HARD:
                ones = torch.ones_like(level.codes)
                out.copy_(torch.zeros_like(out, dtype=torch.int64).index_add_(0, level.codes, ones))
            out.div_(rows)
    return outputs


def _empty_outputs(z: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[
        Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, dim), levels, codes = z.shape, len(sizes), weight.shape[0]
    config = flash_config(dim, weight.dtype)
    tiles = sum(_tile_counts(rows, sizes, config))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return z.new_empty(shape, dtype=dtype)

    return (empty(rows, levels, dim, dtype=z.dtype), empty(rows, levels, dtype=torch.int64),
            empty(rows, levels, dtype=torch.int64), empty(codes), empty(rows, levels, dim, dtype=z.dtype),
            empty(rows, levels), empty(rows, levels), empty(codes),
            empty(levels, rows if config else 0, dtype=torch.int64), empty(tiles))


@_forward.register_fake
def _(z, weight, sizes, scale, tau, seed, row_offset, eps, mode, noisy, with_grad):  # type: ignore[no-untyped-def]
    return _empty_outputs(z, weight, sizes)


def _flash_level(config: FlashConfig, level: Level, sampling: Sampling, rest: Tensor, quantized: Tensor, usage: Tensor,
                 with_grad: bool) -> None:
    rows, dim = rest.shape
    codes = len(level.e)
    blocks = {"b_n": config.rows, "b_k": config.codes, "b_d": config.b_d, "num_warps": config.warps,
              "num_stages": config.stages}
    kernels.level_kernel[(triton.cdiv(rows, config.rows),)](
        rest, level.e, level.rnorm_e, sampling.seed, sampling.scale, sampling.tau, level.residual, quantized, level.codes,
        level.sampled, level.lse, level.rnorm, rows, codes, dim, quantized.stride(0), level.lse.stride(0), level.index,
        sampling.row_offset, sampling.eps, LOG2_SKIP[level.e.dtype], mode=sampling.mode, noisy=sampling.noisy, **blocks)
    if sampling.mode == HARD:
        return
    if with_grad and rows >= ORDER_FROM[0] and codes >= ORDER_FROM[1]:
        level.order.copy_(torch.sort(level.sampled, stable=True).indices)
    else:
        torch.arange(rows, out=level.order)
    tiles, splits = _splits(config, rest, codes)
    partial = rest.new_empty(splits, codes)
    kernels.usage_kernel[(tiles, splits)](
        level.residual, level.e, level.rnorm, level.rnorm_e, sampling.seed, sampling.scale, sampling.tau, level.lse,
        level.sampled, level.order, partial, level.largest, rows, codes, dim, level.residual.stride(0), level.lse.stride(0),
        level.index, sampling.row_offset, noisy=sampling.noisy, **blocks)
    torch.sum(partial, 0, out=usage)


def _splits(config: FlashConfig, x: Tensor, codes: int) -> tuple[int, int]:
    """Tiles of codes, and into how many parts their rows are split so that the GPU is full."""
    tiles = triton.cdiv(codes, config.codes)
    return tiles, max(1, min(triton.cdiv(len(x), config.rows), 2 * _multiprocessors(x) // tiles))


def _chunked_level(level: Level, sampling: Sampling, rest: Tensor, quantized: Tensor, usage: Tensor) -> None:
    e, codes, soft = level.e, len(level.e), sampling.mode != HARD
    level.residual.copy_(rest)
    norm = torch.linalg.vector_norm(rest, dim=1)
    level.rnorm.copy_(torch.where(norm == 0, 0.0, 1 / norm.clamp(min=sampling.eps)))
    log2_gain = 10.0 if e.dtype == torch.float16 else 0.0  # small p stay normal numbers
    usage.zero_()
    for own, s in _chunks(level, 1):
        p = _weights(s, e) if soft else s
        _product(level.residual[own], e.T, s)
        chunks.chunk_level_kernel[(len(s),)](
            s, p, level.rnorm[own], level.rnorm_e, sampling.seed, sampling.scale, sampling.tau, level.codes[own],
            level.sampled[own], level.lse[own], codes, level.lse.stride(0), level.index, sampling.row_offset + own.start,
            log2_gain, noisy=sampling.noisy, soft=soft, b_k=CHUNK_STEP, num_warps=4)
        if soft:
            usage.add_(p.sum(0, dtype=torch.float32), alpha=2.0**-log2_gain)
        if sampling.mode == SOFT:
            emitted = torch.empty_like(rest[own])
            _product(p, e, emitted)
            emitted.mul_(2.0**-log2_gain)
        else:
            emitted = e.index_select(0, (level.sampled if soft else level.codes)[own]).float()
            if soft:
                emitted.masked_fill_(level.lse[own].isnan()[:, None], torch.nan)
        quantized[own].copy_(emitted)
        rest[own].sub_(emitted)


def _chunks(level: Level, buffers: int) -> Iterator[tuple]:
    """Slices of rows, each with float32 buffers (rows, K) for products: the same memory for all."""
    rows, codes = len(level.residual), len(level.e)
    size = max(1, CHUNK_BYTES // (codes * buffers * (4 if level.e.dtype == torch.float32 else 6)))
    size = min(rows, size if size < 128 else size // 128 * 128)
    memory = level.rnorm_e.new_empty(buffers, size, codes)
    for start in range(0, rows, size):
        end = min(start + size, rows)
        yield slice(start, end), *memory[:, :end - start]


def _weights(products: Tensor, e: Tensor) -> Tensor:
    """Where weights in the dtype of ``e`` go: into the place of their products where they fit."""
    return products if e.dtype == torch.float32 else torch.empty_like(products, dtype=e.dtype)


@torch.library.custom_op("dgi_kernels::residual_quantize_triton_backward", mutates_args=())
def _backward(dquantized: Tensor | None, dusage: Tensor | None, dresiduals: Tensor | None, dlse: Tensor | None,
              weight: Tensor, scale: Tensor, tau: Tensor, seed: Tensor, codes: Tensor, sampled: Tensor, residuals: Tensor,
              lse: Tensor, rnorm: Tensor, rnorm_e: Tensor, order: Tensor, largest: Tensor, sizes: list[int], row_offset: int,
              eps: float, mode: int, noisy: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dz, dweight, dscale, dtau."""
    rows, _, dim = residuals.shape
    flow = residuals.new_zeros(rows, dim, dtype=torch.float32)  # the gradient of r_j, then of r_{j-1}
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dscale, dtau = torch.zeros_like(scale), torch.zeros_like(tau)
    if rows == 0:
        return flow.to(residuals.dtype), dweight, dscale, dtau
    weight = weight.contiguous()
    sampling = Sampling(scale, tau, seed, row_offset, eps, mode, noisy)
    parts = dweight.split(sizes)
    dusages = (dusage.float() / rows).split(sizes) if dusage is not None else [None] * len(sizes)
    config = flash_config(dim, weight.dtype)
    with torch.cuda.device_of(residuals):
        levels = list(_levels(sizes, weight, rnorm_e, residuals, codes, sampled, lse, rnorm, order, largest))
        for j, level in reversed(list(enumerate(levels))):
            upstream = _upstream(level, None if dquantized is None else dquantized[:, j], flow, dusages[j],
                                 None if dlse is None else dlse.contiguous()[:, j])
            if dresiduals is not None:
                flow.add_(dresiduals[:, j])
            run = _chunked_gradients if config is None else _flash_gradients
            radial, of_tau = run(level, sampling, upstream, flow, parts[j])
            dscale += radial.sum()
            dtau -= of_tau.sum() * kernels.LN2.value
            if upstream.dlse is not None:
                dtau -= torch.where(upstream.dlse == 0, 0.0, level.lse * upstream.dlse).sum()
    return flow.to(residuals.dtype), dweight, dscale / tau, dtau / tau


@_backward.register_fake
def _(dquantized, dusage, dresiduals, dlse, weight, scale, tau, seed, codes, sampled, residuals, lse, rnorm,  # type: ignore
      rnorm_e, order, largest, sizes, row_offset, eps, mode, noisy):
    rows, _, dim = residuals.shape
    return (residuals.new_empty(rows, dim), weight.new_empty(weight.shape), torch.empty_like(scale), torch.empty_like(tau))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, weight, ctx.sizes, scale, tau, seed, ctx.row_offset, ctx.eps, ctx.mode, ctx.noisy, _ = inputs
    _, codes, sampled, _, residuals, lse, rnorm, rnorm_e, order, largest = output
    ctx.save_for_backward(weight, scale, tau, seed, codes, sampled, residuals, lse, rnorm, rnorm_e, order, largest)
    ctx.mark_non_differentiable(codes, sampled, rnorm, rnorm_e, order, largest)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dquantized, _codes, _sampled, dusage, dresiduals, dlse, *_):  # type: ignore[no-untyped-def]
    dz, dweight, dscale, dtau = _backward(dquantized, dusage, dresiduals, dlse, *ctx.saved_tensors, ctx.sizes,
                                          ctx.row_offset, ctx.eps, ctx.mode, ctx.noisy)
    return dz, dweight, None, dscale, dtau, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


class Upstream(NamedTuple):
    """The gradients that enter one level: z = norm x unit, v, L, and a bound of what they can make of a logit's."""

    unit: Tensor  # (N, D) in the dtype of the operands
    norm: Tensor  # (N,)
    bound: Tensor  # (N,)
    dusage: Tensor | None  # (K,)
    dlse: Tensor | None  # (N,), elements m apart


def _upstream(level: Level, dquantized: Tensor | None, flow: Tensor, dusage: Tensor | None,
              dlse: Tensor | None) -> Upstream:
    gradient = -flow if dquantized is None else dquantized.float() - flow  # r_j = r_{j-1} - z~_j
    norm = torch.linalg.vector_norm(gradient, dim=1)
    unit = (gradient / norm.clamp(min=1e-30)[:, None]).to(level.e.dtype)
    bound = 2 * norm * torch.where(level.rnorm_e > 0, 1 / level.rnorm_e, 0.0).amax()
    if dusage is not None:
        bound = bound + 2 * dusage.abs().amax()
    if dlse is not None:
        bound = bound + dlse.abs()
    return Upstream(unit, norm, bound.clamp(min=1e-30), dusage, dlse)


def _gain(largest: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What brings weights of up to ``largest`` near the top of float16's range; other dtypes need nothing."""
    return 2.0**14 / largest.amax().clamp(min=1e-30) if dtype == torch.float16 else None


def _or_one(rnorm: Tensor) -> Tensor:
    return torch.where(rnorm == 0, 1.0, rnorm)


def _flash_gradients(level: Level, sampling: Sampling, upstream: Upstream, flow: Tensor,
                     de: Tensor) -> tuple[Tensor, Tensor]:
    """Add a level's gradient of r to ``flow``, fill ``de``; return each row's parts of those of the scale and tau."""
    rows, dim = flow.shape
    codes, dtype = len(level.e), level.e.dtype
    config = flash_config(dim, dtype)
    assert config is not None
    blocks = {"b_n": config.rows, "b_k": config.codes, "b_d": config.b_d, "num_warps": config.warps,
              "num_stages": config.stages}
    strides = (level.residual.stride(0), level.lse.stride(0))
    common = (level.residual, level.e, level.rnorm, level.rnorm_e, sampling.seed, sampling.scale, sampling.tau, level.lse)
    skip = 2.0 ** LOG2_SKIP[dtype]
    mean, of_tau, total = torch.empty_like(upstream.norm), torch.empty_like(upstream.norm), torch.empty_like(flow)
    kernels.row_gradient_kernel[(triton.cdiv(rows, config.rows),)](
        *common, level.order, level.largest, upstream.unit, upstream.norm, upstream.bound, upstream.dusage, upstream.dlse,
        _gain(level.rnorm_e, dtype), mean, total, of_tau, rows, codes, dim, *strides, level.index, sampling.row_offset, skip,
        noisy=sampling.noisy, **blocks)

    shift = mean if upstream.dlse is None else mean - upstream.dlse
    key_gain, value_gain = _gain(upstream.bound * level.rnorm, dtype), _gain(upstream.norm, dtype)
    tiles, splits = _splits(config, flow, codes)
    key = flow.new_empty(splits, codes, dim)
    value = torch.empty_like(key)
    kernels.code_gradient_kernel[(tiles, splits)](
        *common, level.sampled, level.order, level.largest, upstream.unit, upstream.norm, upstream.dusage, shift,
        _times(level.rnorm, key_gain).contiguous(), _times(upstream.norm, value_gain), key, value, rows, codes, dim, *strides,
        level.index, sampling.row_offset, skip, mode=sampling.mode, noisy=sampling.noisy, **blocks)

    radial = torch.empty_like(upstream.norm)
    _finish(total[None], level.residual, level.rnorm, sampling, None, flow[None], None, flow, radial)
    _finish(key, level.e, level.rnorm_e, sampling, key_gain, value, value_gain, de, None)
    return radial, of_tau


def _times(x: Tensor, gain: Tensor | None) -> Tensor:
    return x if gain is None else x * gain


def _chunked_gradients(level: Level, sampling: Sampling, upstream: Upstream, flow: Tensor,
                       de: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`_flash_gradients` does. Products of a chunk are made again, not kept."""
    e, codes, dtype = level.e, len(level.e), level.e.dtype
    key_gain = _gain(upstream.bound * _or_one(level.rnorm) * _or_one(level.rnorm_e).amax(), dtype)
    value_gain = _gain(upstream.norm, dtype)
    key = torch.zeros_like(e, dtype=torch.float32)
    value = torch.zeros_like(key)
    radial, of_tau = torch.empty_like(upstream.norm), torch.empty_like(upstream.norm)
    for own, s, c in _chunks(level, 2):
        w, y = _weights(s, e), _weights(c, e)
        _product(level.residual[own], e.T, s)
        _product(upstream.unit[own], e.T, c)
        chunks.chunk_gradient_kernel[(len(s),)](
            s, c, w, y, level.rnorm[own], level.rnorm_e, sampling.seed, sampling.scale, sampling.tau, level.lse[own],
            level.sampled[own], upstream.norm[own], upstream.dusage, None if upstream.dlse is None else upstream.dlse[own],
            key_gain, value_gain, of_tau[own], codes, level.lse.stride(0), level.index, sampling.row_offset + own.start,
            mode=sampling.mode, noisy=sampling.noisy, b_k=CHUNK_STEP, num_warps=4)
        _add_product(w.T, level.residual[own], key)
        _add_product(y.T, upstream.unit[own], value)
        total = torch.empty_like(flow[own])
        _product(w, e, total)
        _finish(total[None], level.residual[own], level.rnorm[own], sampling, key_gain, flow[own][None], None, flow[own],
                radial[own])
    _finish(key[None], e, level.rnorm_e, sampling, key_gain, value[None], value_gain, de, None)
    return radial, of_tau


def _finish(total: Tensor, x: Tensor, rnorm: Tensor, sampling: Sampling, gain: Tensor | None, add: Tensor,
            add_gain: Tensor | None, out: Tensor, radial: Tensor | None) -> None:
    splits, rows, dim = total.shape
    b_n, b_d = finish_block(dim)
    kernels.finish_kernel[(triton.cdiv(rows, b_n),)](
        total, x, rnorm, sampling.scale / sampling.tau, gain, add, add_gain, out, radial, splits, rows, dim, x.stride(0),
        rnorm.stride(0), sampling.eps, b_n=b_n, b_d=b_d, num_warps=4)
