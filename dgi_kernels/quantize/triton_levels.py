"""Launches of one level of residual quantization: what it gets, its forward in both forms, and the seam to the next.

Formulas: :mod:`dgi_kernels.quantize.triton_kernels`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from dgi_kernels import tiles as measured
from dgi_kernels.enums import METRICS, MODES
from dgi_kernels.quantize import triton_chunks as chunks
from dgi_kernels.quantize import triton_forms as forms
from dgi_kernels.quantize import triton_kernels as kernels
from dgi_kernels.quantize.triton_forms import blocks
from dgi_kernels.triton_common import finish_block, multiprocessors, product

USAGE_ROWS, USAGE_BLOCKS = 64, 8  # rows of a tile of p that is summed; blocks on a multiprocessor
# In base 2, so that small p stay normal numbers: of those relative to a running maximum, up to 2^SLACK, and of others.
KEPT_GAIN = {torch.float32: 0.0, torch.float16: 6.0, torch.bfloat16: 0.0}
LOG2_GAIN = {torch.float32: 0.0, torch.float16: 10.0, torch.bfloat16: 0.0}
SOFT, STRAIGHT_THROUGH, HARD = map(MODES.index, ("soft", "straight_through", "hard"))
COSINE, DOT, EUCLIDEAN = map(METRICS.index, ("cosine", "dot", "euclidean"))


@dataclass(frozen=True)
class Level:
    """One level's share of what the operators take and keep: views, each kernel's common arguments."""

    index: int
    e: Tensor  # (K, D), of the Euclidean metric relative to the centre
    vectors: Tensor  # (K, D), what is emitted
    centre: Tensor | None  # (D,)
    rnorm_e: Tensor  # (K,)
    factor_e: Tensor  # (K,): forward rnorm_e with the sign of the scale, backward 1 where it is 0
    bias: Tensor | None  # (K,)
    residual: Tensor  # (N, D), its rows m D apart; the others' elements m apart
    codes: Tensor
    sampled: Tensor
    lse: Tensor
    rnorm: Tensor
    quantized: Tensor | None  # (N, D), its rows m D apart: z~, where gradients are made
    values: Tensor | None  # (K, V), of the chunked form alone
    mixture: Tensor | None  # (N, V), its rows m V apart: p V

    def of_rows(self, own: slice) -> Level:
        """Views of some rows, but for those of z~ and the mixture."""
        names = ("residual", "codes", "sampled", "lse", "rnorm")
        return replace(self, **{name: getattr(self, name)[own] for name in names})


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

    @functools.cached_property
    def factor(self) -> Tensor:
        """Of a gradient of logits, times tau, in that of vectors of length 1."""
        return self.scale / self.tau

    def counted(self, rows: int) -> int | Tensor:
        """Rows that usage is the mean of."""
        return rows if self.padding is None else rows - self.padding.sum().clamp(max=rows - 1)

    def of_rows(self, own: slice) -> Sampling:
        """What is of some rows, which draw the noise that they draw among all."""
        padding, sigma = (None if x is None else x[own] for x in (self.padding, self.sigma))
        return replace(self, padding=padding, sigma=sigma, row_offset=self.row_offset + own.start)

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
            "row_offset": self.row_offset,
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
        }


def levels_of(
    sizes: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    centres: Tensor | None,
    vectors: Tensor | None,
    rnorm_e: Tensor,
    factor_e: Tensor,
    residuals: Tensor,
    codes: Tensor,
    sampled: Tensor,
    lse: Tensor,
    rnorm: Tensor,
    quantized: Tensor | None,
    values: Tensor | None,
    mixtures: Tensor | None,
) -> Iterator[Level]:
    starts = [sum(sizes[:j]) for j in range(len(sizes))]
    for j, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        own = slice(start, start + size)
        yield Level(
            j,
            weight[own],
            (weight if vectors is None else vectors)[own],
            None if centres is None else centres[j],
            rnorm_e[own],
            factor_e[own],
            None if bias is None else bias[own],
            residuals[:, j],
            codes[:, j],
            sampled[:, j],
            lse[:, j],
            rnorm[:, j],
            None if quantized is None else quantized[:, j],
            None if values is None else values[own],
            None if values is None or mixtures is None else mixtures[:, j],
        )


def flash(rows: int, x: Tensor, values: Tensor | None) -> bool:
    """Whether a call takes the flash form, which mixes no values."""
    return values is None and forms.is_flash(rows, x.shape[-1], x.dtype)


def flash_forward(rows: int, x: Tensor, values: Tensor | None) -> bool:
    """Whether its means fit the registers, too."""
    return flash(rows, x, values) and forms.flash_config(x.shape[-1], x.device)[1].forward is not None


def emit(
    before: Tensor,
    rest: Tensor | None,
    mean: Tensor | None,
    level: Level | None,
    quantized: Tensor | None,
    after: Level | None,
    sampling: Sampling,
) -> None:
    """From ``level``, None before the first, to the one after, None after the last."""
    rows, dim = before.shape
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
        before,
        p_rest=rest,
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
        stride_b=before.stride(0),
        stride_d=near.residual.stride(0),
        stride_m=near.lse.stride(0),
        eps=sampling.eps,
        constant=sampling.row_factor,
        b_n=b_n,
        b_d=b_d,
        num_warps=4,
    )


def flash_level(level: Level, sampling: Sampling, rest: Tensor, usage: Tensor) -> Tensor | None:
    """Fill codes, sampled, lse and ``usage``, a sum still; return p E in soft mode. ``rest`` is the residual."""
    (rows, dim), codes, soft = level.residual.shape, len(level.e), sampling.mode == SOFT
    b_d, config = forms.flash_config(dim, level.e.device)
    tiles = config.forward
    assert tiles is not None
    mean = level.lse.new_empty(rows, dim) if soft else None
    partial = None
    for own, *kept in flash_chunks(level, 0 if sampling.mode == HARD else 1):
        part, of_part = level.of_rows(own), sampling.of_rows(own)
        count = own.stop - own.start
        top = level.lse.new_empty(triton.cdiv(codes, tiles.step), count) if kept else None
        kernels.level_kernel[(triton.cdiv(count, tiles.owned),)](
            part.residual,
            part.e,
            **of_part.flash_arguments(part) | {"p_rnorm_e": part.factor_e},
            p_mean=None if mean is None else mean[own],
            p_codes=part.codes,
            p_sampled=part.sampled,
            p_lse=part.lse,
            p_kept=kept[0] if kept else None,
            p_top=top,
            stride_k=kept[0].stride(0) if kept else 0,
            log2_gain=KEPT_GAIN[level.e.dtype],
            soft=soft,
            threads=forms.threads_of_row(level.e.device),
            whole=codes % tiles.step == 0,
            **blocks(b_d, tiles, own="b_n", step="b_k"),
        )
        if top is not None:
            _leave_out_padding(part, of_part)
            partial = _sum_usage(part, of_part, kept[0], top, tiles.step, partial)
    if level.bias is not None:
        near = config.probabilities
        kernels.nearest_kernel[(triton.cdiv(rows, near.owned),)](
            level.residual,
            level.e,
            **_near_arguments(level, sampling, rest),
            N=rows,
            **blocks(b_d, near, own="b_n", step="b_k"),
        )
    _sample_the_nearest(level, sampling)
    if partial is not None:
        torch.sum(partial, 0, out=usage)
    return mean


def _sum_usage(level: Level, sampling: Sampling, kept: Tensor, top: Tensor, step: int, before: Tensor | None) -> Tensor:
    """Partial sums of p over some rows and those ``before``, (splits, K), in the place of the latter."""
    rows, codes = kept.shape
    tiles = triton.cdiv(codes, step)
    splits = max(1, min(triton.cdiv(rows, USAGE_ROWS), USAGE_BLOCKS * multiprocessors(kept) // tiles))
    partial = level.lse.new_empty(splits, codes) if before is None else before
    kernels.usage_kernel[(tiles, len(partial))](
        kept,
        p_top=top,
        p_lse=level.lse,
        p_sigma=sampling.sigma,
        p_tau=sampling.tau,
        p_partial=partial,
        N=rows,
        K=codes,
        stride_m=level.lse.stride(0),
        stride_k=kept.stride(0),
        adds=int(before is not None),
        noisy=sampling.noisy,
        b_n=USAGE_ROWS,
        b_k=step,
        num_warps=4,
        num_stages=3,
    )
    return partial


def flash_chunks(level: Level, buffers: int) -> Iterator[tuple]:
    """Slices of rows, each with buffers (rows, K) in the dtype of the operands: the same memory for all. Their rows are
    as far apart as whole tiles of codes are long, so that none of what is loaded and stored has an end."""
    rows, e = len(level.residual), level.e
    if buffers == 0:
        yield (slice(0, rows),)
        return
    longest = max(tiles.step for tiles in forms.flash_config(e.shape[1], e.device)[1] if tiles is not None)
    pitch = triton.cdiv(len(e), longest) * longest
    size = rows_of_chunk(level, pitch * buffers * e.element_size())
    memory = e.new_empty(buffers, size, pitch)
    if pitch > len(e):
        memory[:, :, len(e) :] = 0.0
    yield from _slices(rows, memory[:, :, : len(e)])


def _slices(rows: int, memory: Tensor) -> Iterator[tuple]:
    """Slices of rows, each with its part of the buffers (buffers, size, ...)."""
    size = memory.shape[1]
    for start in range(0, rows, size):
        own = slice(start, min(start + size, rows))
        yield own, *memory[:, : own.stop - own.start]


def rows_of_chunk(level: Level, each: int) -> int:
    """So many that ``each`` bytes a row fit the budget, and that the GPU is full if it can be: by 64 rows of a
    flash form's tile on each multiprocessor, or by tiles of 128 rows and a third of 768 columns."""
    budget = measured.number("quantize.chunk_bytes", forms.CHUNK_BYTES, level.e.device)
    size = max(1, budget // each)
    for unit in (64 * multiprocessors(level.e), 128 * (multiprocessors(level.e) // 3), 128):
        if 0 < unit <= size:
            size = size // unit * unit
            break
    return min(len(level.residual), size)


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
    """Where there is no noise: of equal scores the rounding of noisy ones might take another."""
    if not sampling.noisy and level.bias is not None:
        level.sampled.copy_(level.codes)
    elif sampling.noisy and sampling.sigma is not None:
        level.sampled.copy_(torch.where(sampling.sigma == 0, level.codes, level.sampled))


def _leave_out_padding(level: Level, sampling: Sampling) -> None:
    """Padding has p = 0 for all that comes after: it is not counted, and its rows pass on no gradient."""
    if sampling.padding is not None:
        level.lse.masked_fill_(sampling.padding, float("inf"))


def chunked_level(level: Level, sampling: Sampling, rest: Tensor, usage: Tensor) -> Tensor | None:
    """What :func:`flash_level` does."""
    e, weights = level.e, sampling.mode != HARD
    log2_gain = LOG2_GAIN[e.dtype]
    mean = level.lse.new_empty(level.residual.shape) if sampling.mode == SOFT else None
    partial = None
    for own, s in chunks_of(level, 1):
        p = weights_of(s, e) if weights else None
        product(level.residual[own], e.T, s)
        nearest = level.codes.new_empty(len(s)) if level.bias is not None else None
        if nearest is not None:
            near = _near_arguments(level, sampling, rest[own])
            chunks.chunk_nearest_kernel[(len(s),)](
                s,
                level.residual[own],
                **{**near, "p_codes": nearest, "stride_m": 1},
                b_k=2 * forms.CHUNK_STEP,
                b_d=finish_block(rest.shape[1])[1],
                num_warps=4,
            )
        part, of_part = level.of_rows(own), sampling.of_rows(own)
        partial = _chunk(part, of_part, s, p, log2_gain, partial)
        if nearest is not None:
            level.codes[own] = nearest
        if mean is not None and p is not None:
            product(p, e, mean[own])
            if level.values is not None and level.mixture is not None:
                mixture = mean.new_empty(len(p), level.values.shape[1])
                product(p, level.values, mixture)
                level.mixture[own] = mixture.mul_(2.0**-log2_gain)
    _sample_the_nearest(level, sampling)
    if level.values is not None and level.mixture is not None and mean is None:
        is_lost = level.lse.isnan().unsqueeze(1)
        level.mixture.copy_(level.values[level.sampled].masked_fill(is_lost, float("nan")))
    if partial is not None:
        _leave_out_padding(level, sampling)
        torch.sum(partial, 0, out=usage)
    return mean if mean is None or log2_gain == 0 else mean.mul_(2.0**-log2_gain)


def _chunk(
    level: Level, sampling: Sampling, s: Tensor, p: Tensor | None, log2_gain: float, before: Tensor | None
) -> Tensor | None:
    """Fill codes, sampled and lse of some rows, and p 2^log2_gain, where it is given; return partial sums of p over
    them and those ``before``, (programs, K), in the place of the latter."""
    rows, codes = s.shape
    shared = {
        **sampling.arguments(level),
        "p_rnorm": level.rnorm,
        "p_codes": level.codes,
        "p_sampled": level.sampled,
        "p_lse": level.lse,
        "log2_gain": log2_gain,
    }
    if codes <= forms.ROW_LARGEST:
        b_k, warps = row_block(codes, forms.ROW_CODES)
        programs = min(rows, max(1, forms.ROW_WARPS // warps) * multiprocessors(s))
        partial = before
        if p is not None and before is None:
            partial = s.new_empty(programs, codes)
        chunks.row_level_kernel[(programs if partial is None else len(partial),)](
            s,
            p,
            **shared | {"p_rnorm_e": level.factor_e},
            p_padding=sampling.padding,
            p_partial=partial,
            N=rows,
            stride_p=0 if p is None else p.stride(0),
            adds=int(before is not None),
            whole=codes == b_k,
            b_k=b_k,
            num_warps=warps,
            num_stages=2,
            maxnreg=forms.ROW_REGISTERS,
        )
        return partial
    chunks.chunk_level_kernel[(rows,)](s, p, **shared, b_k=forms.CHUNK_STEP, num_warps=forms.CHUNK_WARPS)
    if p is None:
        return None
    if sampling.padding is not None:
        p.masked_fill_(sampling.padding.unsqueeze(1), 0.0)
    partial = p.sum(0, keepdim=True, dtype=torch.float32).mul_(2.0**-log2_gain)
    return partial if before is None else before.add_(partial)


def row_block(codes: int, of_thread: int) -> tuple[int, int]:
    """Codes of a tile that is a whole row, and warps, whose threads have ``of_thread`` codes each, or less."""
    b_k = max(32, triton.next_power_of_2(codes))
    return b_k, max(1, b_k // (32 * of_thread))


def chunks_of(level: Level, buffers: int) -> Iterator[tuple]:
    """Slices of rows, each with float32 buffers (rows, K) for products: the same memory for all."""
    rows, e = len(level.residual), level.e
    size = rows_of_chunk(level, len(e) * buffers * (4 if in_place(e) else 6))
    yield from _slices(rows, level.rnorm_e.new_empty(buffers, size, len(e)))


def in_place(e: Tensor) -> bool:
    """Whether weights can take the place of the products that they are made of: a program has read its whole row."""
    return e.dtype == torch.float32 or len(e) <= forms.ROW_LARGEST


def weights_of(products: Tensor, e: Tensor) -> Tensor:
    """Where weights in the dtype of ``e`` go: their rows may be further apart than they are long."""
    return products.view(e.dtype)[:, : len(e)] if in_place(e) else torch.empty_like(products, dtype=e.dtype)
