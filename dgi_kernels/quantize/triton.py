"""Launchers of residual quantization in Triton, as operators that torch.compile keeps whole.

Formulas, what is kept and what is made again: :mod:`dgi_kernels.quantize.triton_kernels`. The codebooks come as one
tensor (sum K_j, D) and a list of sizes. Grids depend on shapes alone and nothing is read back, so a CUDA graph can hold
a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor, library

from dgi_kernels import checks
from dgi_kernels import tiles as measured
from dgi_kernels import triton_common as common
from dgi_kernels.enums import METRICS, MODES
from dgi_kernels.quantize import triton_chunks as chunks
from dgi_kernels.quantize import triton_kernels as kernels
from dgi_kernels.quantize.options import Operands, QuantizeOptions
from dgi_kernels.quantize.result import ResidualQuantization
from dgi_kernels.triton_common import (
    CHUNK_BYTES,
    HALF,
    LN2,
    ORDER_FROM,
    Tiles,
    add_product,
    finish_block,
    gain_of,
    multiprocessors,
    norms,
    or_one,
    product,
)

SOFT, STRAIGHT_THROUGH, HARD = map(MODES.index, ("soft", "straight_through", "hard"))
COSINE, DOT, EUCLIDEAN = map(METRICS.index, ("cosine", "dot", "euclidean"))

# Tiles of codes whose p are all below this part of their row are left out: what is lost of a row's mass, at most K
# times as much, stays below the rounding of 16-bit weights.
LOG2_SKIP = {torch.float32: -24.0, torch.float16: -22.0, torch.bfloat16: -20.0}


class FlashConfig(NamedTuple):
    """Tiles of the passes that own rows, forward and backward, and of the two that own codes.

    What matters is noted for tiles of ``codes.step`` rows and ``codes.owned`` codes: multiples of these are what
    ``gradient`` owns, and divisors what it steps by.
    """

    forward: Tiles
    gradient: Tiles
    codes: Tiles


_WIDE = FlashConfig(Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2))
_NARROW = FlashConfig(Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2), Tiles(128, 16, 8, 2))
_SMALL = FlashConfig(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1))

# Architecture -> dimensions up to -> tiles: all that the launchers can choose, each compiled by bench/gpu_code.py. They
# are the largest that spill at most two words; which of these is fastest is to be measured, and is then kept by GPU
# model in dgi_kernels/tiles. Others than 9 and 10 take those of 8.
FLASH = {
    8: {64: _WIDE, 128: _NARROW},
    9: {64: _WIDE, 128: _WIDE._replace(codes=_NARROW.codes)},
    10: {64: _WIDE, 128: _SMALL},
}
FLASH_LARGEST = 128
CHUNK_STEP = 1024  # codes of one pass of the chunked epilogues


def uses_flash(dim: int, dtype: torch.dtype) -> bool:
    """Flash or chunked form: the one place that chooses.

    float32 is chunked: Triton's exact float32 product does not reach cuBLAS's. So are D > 128: for each (row, code) the
    flash form makes 11 products of length D and the noise 5 times, the chunked form 7 and 2 times, but moves 38 bytes
    through the L2. By the counts (0.17 ms a product at D = 256, 0.4 ms a noise with its softmax, 2 ms of traffic for N
    = 65536, K = 4096 on one H200) they meet near D = 200, and at 256 the flash form's backward spills. To be measured.
    """
    return dtype in HALF and dim <= FLASH_LARGEST


def flash_config(dim: int, device: torch.device) -> tuple[int, FlashConfig]:
    """Dimensions of a tile, and the tiles, for vectors of ``dim`` dimensions."""
    table = FLASH.get(common.architecture(device), FLASH[8])
    b_d = min(largest for largest in table if dim <= largest)
    config = FlashConfig(
        *(measured.pick(f"quantize.{name}", b_d, tiles, device) for name, tiles in table[b_d]._asdict().items())
    )
    if config.gradient.owned % config.codes.step or config.codes.owned % config.gradient.step:
        raise ValueError(
            f"tiles of the quantizer for D <= {b_d} do not fit: gradient must own a multiple of the rows "
            f"that codes steps by, and step by a divisor of the codes that it owns; got {config}"
        )
    return b_d, config


def residual_quantize(operands: Operands, options: QuantizeOptions) -> ResidualQuantization:
    """All of one dtype -> ResidualQuantization, without values."""
    z, codebooks, scale, tau, sigma, _, seed, padding = operands
    sizes = [len(codebook) for codebook in codebooks]
    dim = z.shape[1]
    more = max(16, (dim + 15) // 16 * 16) - dim  # rows are read 16 bytes at a time
    z, weight = F.pad(z, (0, more)), F.pad(torch.cat(list(codebooks)), (0, more))
    scale, tau = (checks.scalar_tensor(value, torch.float32, z.device) for value in (scale, tau))
    bias = centres = vectors = None
    if options.metric == "euclidean":
        vectors = weight.detach()
        centres = torch.stack([part.float().mean(0) for part in vectors.split(sizes)])
        weight = torch.cat([part.float() - own for part, own in zip(weight.split(sizes), centres, strict=True)])
        weight = weight.to(z.dtype)
        bias = -scale * weight.float().square().sum(1)
    with_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad
        for x in (z, weight, scale, tau, sigma)  # bias: of the others
    )
    noisy = seed is not None
    seed = torch.zeros(1, dtype=torch.int64, device=z.device) if seed is None else seed
    quantized, codes, sampled, usage, residuals, log_normalizer, *_ = _forward(
        z,
        weight,
        sizes,
        scale,
        tau,
        seed,
        padding,
        None if sigma is None else sigma.contiguous(),
        bias,
        centres,
        vectors,
        options.row_offset,
        options.eps,
        options.mode_number,
        options.metric_number,
        noisy,
        with_grad,
    )
    if centres is not None:
        squares = residuals.float().square().sum(-1)
        log_normalizer = log_normalizer - scale * squares / tau  # the row's own part of its scores
        residuals = (residuals.float() + centres).to(z.dtype)
    return ResidualQuantization(
        quantized[..., :dim], codes, sampled, list(usage.split(sizes)), residuals[..., :dim], log_normalizer
    )


@dataclass(frozen=True)
class Level:
    """One level's share of what the operators take and keep: views, each kernel's common arguments."""

    index: int
    e: Tensor  # (K, D), of the Euclidean metric relative to the centre
    vectors: Tensor  # (K, D), what is emitted
    centre: Tensor | None  # (D,)
    rnorm_e: Tensor  # (K,)
    bias: Tensor | None  # (K,)
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
    padding: Tensor | None  # (N,) bool
    sigma: Tensor | None  # (N,)
    row_offset: int
    eps: float
    mode: int
    metric: int
    noisy: bool

    @property
    def row_factor(self) -> float:
        """rr where it is a constant, as are the codes' factors then, without gradients; 0: 1 / ||r||."""
        return {COSINE: 0.0, DOT: 1.0, EUCLIDEAN: 2.0}[self.metric]

    @property
    def plain(self) -> bool:
        """Whether the factors of rows and codes are constants."""
        return self.metric != COSINE

    def counted(self, rows: int) -> int | Tensor:
        """Rows that usage is the mean of."""
        return rows if self.padding is None else rows - self.padding.sum().clamp(max=rows - 1)

    def of_rows(self, own: slice) -> Sampling:
        return self if self.sigma is None else replace(self, sigma=self.sigma[own])

    def arguments(self, level: Level) -> dict[str, Tensor | int | bool | None]:
        """Those that all kernels have, flash or chunked, but for the residual's and the rows' numbers."""
        return {
            "p_rnorm_e": level.rnorm_e,
            "p_bias": level.bias,
            "p_sigma": self.sigma,
            "p_seed": self.seed,
            "p_scale": self.scale,
            "p_tau": self.tau,
            "K": len(level.e),
            "stride_m": level.lse.stride(0),
            "level": level.index,
            "noisy": self.noisy,
        }

    def flash_arguments(self, level: Level) -> dict[str, Tensor | int | bool | None]:
        rows, dim = level.residual.shape
        return {
            **self.arguments(level),
            "p_rnorm": level.rnorm,
            "N": rows,
            "D": dim,
            "stride_d": level.residual.stride(0),
            "row_offset": self.row_offset,
        }


def _levels(
    sizes: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    centres: Tensor | None,
    vectors: Tensor | None,
    rnorm_e: Tensor,
    residuals: Tensor,
    codes: Tensor,
    sampled: Tensor,
    lse: Tensor,
    rnorm: Tensor,
    order: Tensor,
    largest: Tensor,
) -> Iterator[Level]:
    starts = [sum(sizes[:j]) for j in range(len(sizes))]
    tiles = _tile_counts(residuals, sizes)
    for j, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        own = slice(start, start + size)
        yield Level(
            j,
            weight[own],
            (weight if vectors is None else vectors)[own],
            None if centres is None else centres[j],
            rnorm_e[own],
            None if bias is None else bias[own],
            residuals[:, j],
            codes[:, j],
            sampled[:, j],
            lse[:, j],
            rnorm[:, j],
            order[j],
            largest[sum(tiles[:j]) : sum(tiles[: j + 1])],
        )


def _tile_counts(x: Tensor, sizes: Sequence[int]) -> list[int]:
    """How many tiles :func:`kernels.usage_kernel` has for each level: none in the chunked form."""
    if not uses_flash(x.shape[-1], x.dtype):
        return [0] * len(sizes)
    tiles = flash_config(x.shape[-1], x.device)[1].codes
    return [triton.cdiv(len(x), tiles.step) * triton.cdiv(size, tiles.owned) for size in sizes]


@library.custom_op("dgi_kernels::residual_quantize_triton", mutates_args=())
def _forward(
    z: Tensor,
    weight: Tensor,
    sizes: list[int],
    scale: Tensor,
    tau: Tensor,
    seed: Tensor,
    padding: Tensor | None,
    sigma: Tensor | None,
    bias: Tensor | None,
    centres: Tensor | None,
    vectors: Tensor | None,
    row_offset: int,
    eps: float,
    mode: int,
    metric: int,
    noisy: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> quantized, codes, sampled, usage, residuals, log_normalizer; for backward rnorm, rnorm_e, order, largest.

    ``weight`` (sum K_j, D) is relative to ``centres`` (m, D), where there are any, and ``vectors`` (sum K_j, D) are the
    codebooks; so are the residuals, and log_normalizer lacks the row's own part of the scores.
    """
    outputs = _empty_outputs(z, weight, sizes)
    quantized, codes, sampled, usage, residuals, lse, rnorm, rnorm_e, order, largest = outputs
    rows = z.shape[0]
    if rows == 0:
        usage.zero_()
        return outputs
    weight = weight.contiguous()
    sampling = Sampling(scale, tau, seed, padding, sigma, row_offset, eps, mode, metric, noisy)
    rest = torch.empty_like(z, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(z)
    usages = usage.split(sizes)
    with torch.cuda.device_of(z):
        if sampling.plain:
            rnorm_e.fill_(1.0)
        else:
            norms(weight, eps, rnorm_e)
        shared = (sizes, weight, bias, centres, vectors, rnorm_e)
        levels = list(_levels(*shared, residuals, codes, sampled, lse, rnorm, order, largest))
        _emit(rest, None, None, None, levels[0], sampling)
        for level, after in zip(levels, [*levels[1:], None], strict=True):
            run = _flash_level if uses_flash(weight.shape[1], weight.dtype) else _chunked_level
            mean = run(level, sampling, rest, usages[level.index], with_grad)
            _emit(rest, mean, level, quantized[:, level.index], after, sampling)
            if mode == HARD:
                uses = torch.ones_like(level.codes) if padding is None else (~padding).long()
                usages[level.index].copy_(uses.new_zeros(len(level.e)).index_add_(0, level.codes, uses))
    usage.div_(sampling.counted(rows))
    return outputs


def _empty_outputs(
    z: Tensor, weight: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, dim), levels, codes = z.shape, len(sizes), weight.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return z.new_empty(shape, dtype=dtype)

    return (
        empty(rows, levels, dim, dtype=z.dtype),
        empty(rows, levels, dtype=torch.int64),
        empty(rows, levels, dtype=torch.int64),
        empty(codes),
        empty(rows, levels, dim, dtype=z.dtype),
        empty(rows, levels),
        empty(rows, levels),
        empty(codes),
        empty(levels, rows if uses_flash(dim, z.dtype) else 0, dtype=torch.int64),
        empty(sum(_tile_counts(z, sizes))),
    )


@_forward.register_fake
def _(z, weight, sizes, *_):
    return _empty_outputs(z, weight, sizes)


def _emit(
    rest: Tensor,
    mean: Tensor | None,
    level: Level | None,
    quantized: Tensor | None,
    after: Level | None,
    sampling: Sampling,
) -> None:
    """From ``level``, None before the first, to the one after, None after the last."""
    rows, dim = rest.shape
    e = index = lse = residual = rnorm = centre = next_centre = None
    if level is not None:
        centre = level.centre
        e, index = level.vectors, level.codes if sampling.mode == HARD else level.sampled
        lse = level.lse if sampling.mode == STRAIGHT_THROUGH else None
    if after is not None:
        residual, rnorm, next_centre = after.residual, after.rnorm, after.centre
    near = after or level
    assert near is not None
    b_n, b_d = finish_block(dim)
    kernels.emit_kernel[(triton.cdiv(rows, b_n),)](
        rest,
        p_mean=mean,
        p_e=e,
        p_index=index,
        p_lse=lse,
        p_quantized=quantized,
        p_residual=residual,
        p_rnorm=rnorm,
        p_centre=centre,
        p_next_centre=next_centre,
        N=rows,
        D=dim,
        stride_d=near.residual.stride(0),
        stride_m=near.lse.stride(0),
        eps=sampling.eps,
        constant=sampling.row_factor,
        b_n=b_n,
        b_d=b_d,
        num_warps=4,
    )


def _blocks(b_d: int, tiles: Tiles, *, own: str, step: str) -> dict[str, int]:
    return {own: tiles.owned, step: tiles.step, "b_d": b_d, "num_warps": tiles.warps, "num_stages": tiles.stages}


def _flash_level(level: Level, sampling: Sampling, rest: Tensor, usage: Tensor, with_grad: bool) -> Tensor | None:
    """Fill codes, sampled, lse and ``usage``, a sum still; return p E in soft mode. ``rest`` is the residual."""
    (rows, dim), codes, soft = level.residual.shape, len(level.e), sampling.mode == SOFT
    b_d, config = flash_config(dim, level.e.device)
    shared = sampling.flash_arguments(level)
    mean = level.lse.new_empty(rows, dim) if soft else None
    kernels.level_kernel[(triton.cdiv(rows, config.forward.owned),)](
        level.residual,
        level.e,
        **shared,
        p_mean=mean,
        p_codes=level.codes,
        p_sampled=level.sampled,
        p_lse=level.lse,
        log2_skip=LOG2_SKIP[level.e.dtype],
        soft=soft,
        **_blocks(b_d, config.forward, own="b_n", step="b_k"),
    )
    if level.bias is not None:
        kernels.nearest_kernel[(triton.cdiv(rows, config.gradient.owned),)](
            level.residual,
            level.e,
            **_near_arguments(level, sampling, rest),
            N=rows,
            **_blocks(b_d, config.gradient, own="b_n", step="b_k"),
        )
        _sample_the_nearest(level, sampling)
    if sampling.mode == HARD:
        return None
    _leave_out_padding(level, sampling)
    if with_grad and rows >= ORDER_FROM[0] and codes >= ORDER_FROM[1]:
        level.order.copy_(torch.sort(level.sampled, stable=True).indices)
    else:
        torch.arange(rows, out=level.order)
    tiles, splits = _splits(config.codes, level)
    partial = level.lse.new_empty(splits, codes)
    kernels.usage_kernel[(tiles, splits)](
        level.residual,
        level.e,
        **shared,
        p_lse=level.lse,
        p_sampled=level.sampled,
        p_order=level.order,
        p_partial=partial,
        p_largest=level.largest,
        **_blocks(b_d, config.codes, own="b_k", step="b_n"),
    )
    torch.sum(partial, 0, out=usage)
    return mean


def _near_arguments(level: Level, sampling: Sampling, rest: Tensor) -> dict[str, Tensor | int | float | None]:
    """What both kernels that look for the nearest code have."""
    dim = rest.shape[1]
    unit = {torch.float32: 0.0, torch.float16: 2.0**-12, torch.bfloat16: 2.0**-9}[level.e.dtype]
    if level.e.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        unit = 2.0**-11
    return {
        "p_bias": level.bias,
        "p_scale": sampling.scale,
        "p_rest": rest,
        "p_vectors": level.vectors,
        "p_longest": torch.linalg.vector_norm(level.e, dim=1, dtype=torch.float32).amax(),
        "p_codes": level.codes,
        "K": len(level.e),
        "D": dim,
        "stride_d": level.residual.stride(0),
        "stride_m": level.codes.stride(0),
        # ||r - e||^2 of rounded vectors, twice, and the rounding of its sums
        "slack": 4 * unit + (4 + dim**0.5) * 2.0**-22,
    }


def _sample_the_nearest(level: Level, sampling: Sampling) -> None:
    """Where there is no noise."""
    if not sampling.noisy:
        level.sampled.copy_(level.codes)
    elif sampling.sigma is not None:
        level.sampled.copy_(torch.where(sampling.sigma == 0, level.codes, level.sampled))


def _leave_out_padding(level: Level, sampling: Sampling) -> None:
    """Padding has p = 0 for all that comes after: it is not counted, and its rows pass on no gradient."""
    if sampling.padding is not None:
        level.lse.masked_fill_(sampling.padding, float("inf"))


def _splits(tiles: Tiles, level: Level) -> tuple[int, int]:
    """Tiles of codes, and into how many parts their rows are split so that the GPU is full."""
    count = triton.cdiv(len(level.e), tiles.owned)
    return count, max(1, min(triton.cdiv(len(level.residual), tiles.step), 2 * multiprocessors(level.e) // count))


def _chunked_level(level: Level, sampling: Sampling, rest: Tensor, usage: Tensor, with_grad: bool) -> Tensor | None:
    """What :func:`_flash_level` does."""
    e, weights = level.e, sampling.mode != HARD
    log2_gain = 10.0 if e.dtype == torch.float16 else 0.0  # small p stay normal numbers
    mean = level.lse.new_empty(level.residual.shape) if sampling.mode == SOFT else None
    usage.zero_()
    for own, s in _chunks(level, 1):
        p = _weights(s, e) if weights else None
        product(level.residual[own], e.T, s)
        nearest = level.codes.new_empty(len(s)) if level.bias is not None else None
        if nearest is not None:
            near = _near_arguments(level, sampling, rest[own])
            chunks.chunk_nearest_kernel[(len(s),)](
                s,
                level.residual[own],
                **{**near, "p_codes": nearest, "stride_m": 1},
                b_k=CHUNK_STEP,
                b_d=finish_block(rest.shape[1])[1],
                num_warps=4,
            )
        chunks.chunk_level_kernel[(len(s),)](
            s,
            p,
            **sampling.of_rows(own).arguments(level),
            p_rnorm=level.rnorm[own],
            p_codes=level.codes[own],
            p_sampled=level.sampled[own],
            p_lse=level.lse[own],
            row_offset=sampling.row_offset + own.start,
            log2_gain=log2_gain,
            b_k=CHUNK_STEP,
            num_warps=4,
        )
        if nearest is not None:
            level.codes[own] = nearest
        if p is not None:
            if sampling.padding is not None:
                p.masked_fill_(sampling.padding[own].unsqueeze(1), 0.0)
            usage.add_(p.sum(0, dtype=torch.float32), alpha=2.0**-log2_gain)
        if mean is not None and p is not None:
            product(p, e, mean[own])
    if level.bias is not None:
        _sample_the_nearest(level, sampling)
    if weights:
        _leave_out_padding(level, sampling)
    return None if mean is None else mean.mul_(2.0**-log2_gain)


def _chunks(level: Level, buffers: int) -> Iterator[tuple]:
    """Slices of rows, each with float32 buffers (rows, K) for products: the same memory for all."""
    budget = measured.number("quantize.chunk_bytes", CHUNK_BYTES, level.e.device)
    memory = None
    for own in common.chunks(len(level.residual), len(level.e), buffers, level.e.dtype, budget):
        if memory is None:
            memory = level.rnorm_e.new_empty(buffers, own.stop, len(level.e))
        yield own, *memory[:, : own.stop - own.start]


def _weights(products: Tensor, e: Tensor) -> Tensor:
    """Where weights in the dtype of ``e`` go: into the place of their products where they fit."""
    return products if e.dtype == torch.float32 else torch.empty_like(products, dtype=e.dtype)


@library.custom_op("dgi_kernels::residual_quantize_triton_backward", mutates_args=())
def _backward(
    dquantized: Tensor | None,
    dusage: Tensor | None,
    dresiduals: Tensor | None,
    dlse: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    tau: Tensor,
    seed: Tensor,
    padding: Tensor | None,
    sigma: Tensor | None,
    bias: Tensor | None,
    codes: Tensor,
    sampled: Tensor,
    residuals: Tensor,
    lse: Tensor,
    rnorm: Tensor,
    rnorm_e: Tensor,
    order: Tensor,
    largest: Tensor,
    sizes: list[int],
    row_offset: int,
    eps: float,
    mode: int,
    metric: int,
    noisy: bool,
    wants_sigma: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dz, dweight, dscale, dtau; dsigma and dbias, which are empty where they are not wanted."""
    rows, _, dim = residuals.shape
    flow = residuals.new_zeros(rows, dim, dtype=torch.float32)  # the gradient of r_j, then of r_{j-1}
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dscale, dtau = torch.zeros_like(scale), torch.zeros_like(tau)
    dbias = scale.new_zeros(0 if bias is None else len(weight))
    dsigma = scale.new_zeros(rows if wants_sigma else 0)
    if rows == 0:
        return flow.to(residuals.dtype), dweight, dscale, dtau, dsigma, dbias
    weight = weight.contiguous()
    sampling = Sampling(scale, tau, seed, padding, sigma, row_offset, eps, mode, metric, noisy)
    parts = dweight.split(sizes)
    dusages = (dusage.float() / sampling.counted(rows)).split(sizes) if dusage is not None else [None] * len(sizes)
    run = _flash_gradients if uses_flash(dim, weight.dtype) else _chunked_gradients
    with torch.cuda.device_of(residuals):
        shared = (sizes, weight, bias, None, None, rnorm_e)
        levels = list(_levels(*shared, residuals, codes, sampled, lse, rnorm, order, largest))
        bias_parts = [None] * len(sizes) if bias is None else dbias.split(sizes)
        for j, level in reversed(list(enumerate(levels))):
            upstream = _upstream(
                level,
                sampling,
                None if dquantized is None else dquantized[:, j],
                flow,
                dusages[j],
                None if dlse is None else dlse.contiguous()[:, j],
            )
            if dresiduals is not None:
                flow.add_(dresiduals[:, j])
            of_sigma = torch.empty_like(dsigma) if wants_sigma else None
            radial, of_tau = run(level, sampling, upstream, flow, parts[j], bias_parts[j], of_sigma)
            if of_sigma is not None:
                dsigma.add_(of_sigma, alpha=LN2.value)
            dscale += radial.sum()
            dtau -= of_tau.sum() * LN2.value
            if upstream.dlse is not None:
                dtau -= torch.where(upstream.dlse == 0, 0.0, level.lse * upstream.dlse).sum()
    return flow.to(residuals.dtype), dweight, dscale / tau, dtau / tau, dsigma.div_(tau), dbias.div_(tau)


@_backward.register_fake
def _(
    dquantized,
    dusage,
    dresiduals,
    dlse,
    weight,
    scale,
    tau,
    seed,
    padding,
    sigma,
    bias,
    codes,
    sampled,
    residuals,
    lse,
    rnorm,
    rnorm_e,
    order,
    largest,
    sizes,
    row_offset,
    eps,
    mode,
    metric,
    noisy,
    wants_sigma,
):
    rows, _, dim = residuals.shape
    return (
        residuals.new_empty(rows, dim),
        weight.new_empty(weight.shape),
        torch.empty_like(scale),
        torch.empty_like(tau),
        scale.new_empty(rows if wants_sigma else 0),
        scale.new_empty(0 if bias is None else len(weight)),
    )


def _save(ctx, inputs, output) -> None:
    _, weight, ctx.sizes, scale, tau, seed, padding, sigma, bias, _, _, *ctx.options, _ = inputs
    _, codes, sampled, _, residuals, lse, rnorm, rnorm_e, order, largest = output
    saved = (codes, sampled, residuals, lse, rnorm, rnorm_e, order, largest)
    ctx.save_for_backward(weight, scale, tau, seed, padding, sigma, bias, *saved)
    ctx.has_bias = bias is not None
    ctx.mark_non_differentiable(codes, sampled, rnorm, rnorm_e, order, largest)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dquantized, _codes, _sampled, dusage, dresiduals, dlse, *_):
    wants_sigma = ctx.needs_input_grad[7]
    dz, dweight, dscale, dtau, dsigma, dbias = _backward(
        dquantized, dusage, dresiduals, dlse, *ctx.saved_tensors, ctx.sizes, *ctx.options, wants_sigma
    )
    dsigma, dbias = dsigma if wants_sigma else None, dbias if ctx.has_bias else None
    return dz, dweight, None, dscale, dtau, None, None, dsigma, dbias, *([None] * 8)


_forward.register_autograd(_differentiate, setup_context=_save)


class Upstream(NamedTuple):
    """The gradients that enter one level: z = norm x unit, v, L, and a bound of what they can make of a logit's."""

    unit: Tensor  # (N, D) in the dtype of the operands
    norm: Tensor  # (N,)
    bound: Tensor  # (N,)
    dusage: Tensor | None  # (K,)
    dlse: Tensor | None  # (N,), elements m apart


def _upstream(
    level: Level,
    sampling: Sampling,
    dquantized: Tensor | None,
    flow: Tensor,
    dusage: Tensor | None,
    dlse: Tensor | None,
) -> Upstream:
    gradient = -flow if dquantized is None else dquantized.float() - flow  # r_j = r_{j-1} - z~_j
    norm = torch.linalg.vector_norm(gradient, dim=1)
    unit = (gradient / norm.clamp(min=1e-30)[:, None]).to(level.e.dtype)
    if sampling.plain:
        largest = torch.linalg.vector_norm(level.e, dim=1, dtype=torch.float32).amax()
    else:
        largest = torch.where(level.rnorm_e > 0, 1 / level.rnorm_e, 0.0).amax()
    bound = 2 * norm * largest
    if dusage is not None:
        bound = bound + 2 * dusage.abs().amax()
    if dlse is not None:
        bound = bound + dlse.abs()
    return Upstream(unit, norm, bound.clamp(min=1e-30), dusage, dlse)


def _flash_gradients(
    level: Level,
    sampling: Sampling,
    upstream: Upstream,
    flow: Tensor,
    de: Tensor,
    dbias: Tensor | None,
    dsigma: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add a level's gradient of r to ``flow``, fill ``de`` and ``dbias``, which lacks 1 / tau; return each row's parts
    of those of the scale and tau."""
    (rows, dim), codes, dtype = flow.shape, len(level.e), level.e.dtype
    b_d, config = flash_config(dim, flow.device)
    shared = {
        **sampling.flash_arguments(level),
        "p_lse": level.lse,
        "p_order": level.order,
        "p_largest": level.largest,
        "p_unit": upstream.unit,
        "p_norm": upstream.norm,
        "p_dusage": upstream.dusage,
        "skip": 2.0 ** LOG2_SKIP[dtype],
    }
    mean, of_tau, total = torch.empty_like(upstream.norm), torch.empty_like(upstream.norm), torch.empty_like(flow)
    kernels.row_gradient_kernel[(triton.cdiv(rows, config.gradient.owned),)](
        level.residual,
        level.e,
        **shared,
        p_bound=upstream.bound,
        p_dlse=upstream.dlse,
        p_gain=gain_of(level.rnorm_e, dtype),
        p_mean=mean,
        p_out=total,
        p_dtau=of_tau,
        p_dsigma=dsigma,
        g_n=config.codes.step,
        g_k=config.codes.owned,
        **_blocks(b_d, config.gradient, own="b_n", step="b_k"),
    )

    factor = (
        torch.where(level.rnorm_e == 0, 1 / sampling.eps, level.rnorm_e).amax() * (sampling.scale / sampling.tau).abs()
    )
    gain = gain_of(torch.maximum(upstream.bound * level.rnorm * factor, upstream.norm), dtype)
    tiles, splits = _splits(config.codes, level)
    partial, radial_e = flow.new_empty(splits, codes, dim), flow.new_empty(splits, codes)
    kernels.code_gradient_kernel[(tiles, splits)](
        level.residual,
        level.e,
        **shared,
        p_sampled=level.sampled,
        p_shift=mean if upstream.dlse is None else mean - upstream.dlse,
        p_gain=gain,
        p_partial=partial,
        p_radial=radial_e,
        eps=sampling.eps,
        straight_through=sampling.mode == STRAIGHT_THROUGH,
        **_blocks(b_d, config.codes, own="b_k", step="b_n"),
    )
    b_k, b_d = finish_block(dim)
    kernels.finish_codes_kernel[(triton.cdiv(codes, b_k),)](
        partial,
        p_radial=radial_e,
        p_e=level.e,
        p_rnorm_e=level.rnorm_e,
        p_gain=gain,
        p_out=de,
        splits=splits,
        K=codes,
        D=dim,
        eps=sampling.eps,
        plain=sampling.plain,
        b_k=b_k,
        b_d=b_d,
        num_warps=4,
    )
    if dbias is not None:
        torch.sum(radial_e, 0, out=dbias)

    radial = torch.empty_like(upstream.norm)
    _finish(total, level.residual, level.rnorm, level.order, sampling, None, flow, None, flow, radial)
    return radial, of_tau


def _chunked_gradients(
    level: Level,
    sampling: Sampling,
    upstream: Upstream,
    flow: Tensor,
    de: Tensor,
    dbias: Tensor | None,
    dsigma: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What :func:`_flash_gradients` does. Products of a chunk are made again, not kept."""
    e, dtype = level.e, level.e.dtype
    key_gain = gain_of(upstream.bound * or_one(level.rnorm) * or_one(level.rnorm_e).amax(), dtype)
    value_gain = gain_of(upstream.norm, dtype)
    key = torch.zeros_like(e, dtype=torch.float32)
    value = torch.zeros_like(key)
    radial, of_tau = torch.empty_like(upstream.norm), torch.empty_like(upstream.norm)
    for own, s, c in _chunks(level, 2):
        w, y = _weights(s, e), _weights(c, e)
        product(level.residual[own], e.T, s)
        product(upstream.unit[own], e.T, c)
        chunks.chunk_gradient_kernel[(len(s),)](
            s,
            c,
            w,
            y,
            **sampling.of_rows(own).arguments(level),
            p_rnorm=level.rnorm[own],
            p_lse=level.lse[own],
            p_sampled=level.sampled[own],
            p_norm=upstream.norm[own],
            p_dusage=upstream.dusage,
            p_dlse=None if upstream.dlse is None else upstream.dlse[own],
            p_gain=key_gain,
            p_value_gain=value_gain,
            p_dtau=of_tau[own],
            p_dsigma=None if dsigma is None else dsigma[own],
            row_offset=sampling.row_offset + own.start,
            straight_through=sampling.mode == STRAIGHT_THROUGH,
            b_k=CHUNK_STEP,
            num_warps=4,
        )
        if dbias is not None:
            dbias.add_(w.sum(0, dtype=torch.float32))
        add_product(w.T, level.residual[own], key)
        add_product(y.T, upstream.unit[own], value)
        total = torch.empty_like(flow[own])
        product(w, e, total)
        _finish(
            total,
            level.residual[own],
            level.rnorm[own],
            None,
            sampling,
            key_gain,
            flow[own],
            None,
            flow[own],
            radial[own],
        )
    if dbias is not None:
        dbias.div_(sampling.row_factor if key_gain is None else sampling.row_factor * key_gain)
    _finish(key, e, level.rnorm_e, None, sampling, key_gain, value, value_gain, de, None)
    return radial, of_tau


def _finish(
    total: Tensor,
    x: Tensor,
    rnorm: Tensor,
    order: Tensor | None,
    sampling: Sampling,
    gain: Tensor | None,
    add: Tensor,
    add_gain: Tensor | None,
    out: Tensor,
    radial: Tensor | None,
) -> None:
    rows, dim = total.shape
    b_n, b_d = finish_block(dim)
    kernels.finish_kernel[(triton.cdiv(rows, b_n),)](
        total,
        p_x=x,
        p_rnorm=rnorm,
        p_order=order,
        p_factor=sampling.scale / sampling.tau,
        p_gain=gain,
        p_add=add,
        p_add_gain=add_gain,
        p_out=out,
        p_radial=radial,
        N=rows,
        D=dim,
        stride_d=x.stride(0),
        stride_m=rnorm.stride(0),
        eps=sampling.eps,
        plain=sampling.plain,
        b_n=b_n,
        b_d=b_d,
        num_warps=4,
    )
