"""Launches of the gradients of one level of residual quantization, in both forms.

Formulas: :mod:`dgi_kernels.quantize.triton_kernels`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dgi_kernels.quantize import triton_chunks as chunks
from dgi_kernels.quantize import triton_forms as forms
from dgi_kernels.quantize import triton_gradient_kernels as kernels
from dgi_kernels.quantize.triton_forms import blocks
from dgi_kernels.quantize.triton_levels import (
    LOG2_GAIN,
    STRAIGHT_THROUGH,
    Level,
    Sampling,
    chunks_of,
    flash_chunks,
    row_block,
    weights_of,
)
from dgi_kernels.triton_common import add_product, finish_block, gain_of, or_one, product

PROBABILITY_CODES = 256  # of one program, at least: more programs leave fewer multiprocessors idle


class Upstream(NamedTuple):
    """The gradients that enter one level: z = norm x unit, v, L, and a bound of what they can make of a logit's.

    With values z is what enters at z~ and at the mixture, side by side, as are the vectors that it is multiplied by.
    Only float16 needs norms and bounds: other dtypes hold z itself.
    """

    unit: Tensor  # (N, D) in the dtype of the operands
    unit_of_mixture: Tensor | None  # (N, V)
    norm: Tensor | None  # (N,), or None: 1
    bound: Tensor | None  # (N,)
    expected: Tensor | None  # (N,) z . (z~ - centre), in soft mode without values
    dusage: Tensor | None  # (K,)
    dlse: Tensor | None  # (N,), elements m apart

    def of_rows(self, own: slice) -> Upstream:
        names = ("unit", "unit_of_mixture", "norm", "bound", "expected", "dlse")
        parts = {name: x[own] for name in names if (x := getattr(self, name)) is not None}
        return self._replace(**parts)


class Off(NamedTuple):
    """What is to be taken off the sums of a level's weights and codes, by the names of finish_kernel's arguments."""

    p_residue: Tensor | None = None  # (N,)
    p_mixed: Tensor | None = None  # (N, D)
    p_mixed_centre: Tensor | None = None  # (D,)
    p_share: Tensor | None = None  # (N,)
    p_code: Tensor | None = None  # (N,)
    p_e: Tensor | None = None  # (K, D)


NOTHING = Off()


class Entry(NamedTuple):
    """What enters a level, and what it is made of beside the gradient of what the level leaves, by the names of
    enter_level's arguments."""

    p_dquantized: Tensor | None  # (N, D)
    p_quantized: Tensor | None  # (N, D)
    p_centre: Tensor | None  # (D,)
    p_unit: Tensor | None  # (N, D) out
    p_norm: Tensor | None  # (N,) out
    p_expected: Tensor | None  # (N,) out

    def of_rows(self, own: slice) -> Entry:
        names = ("p_dquantized", "p_quantized", "p_unit", "p_norm", "p_expected")
        return self._replace(**{name: x[own] for name in names if (x := getattr(self, name)) is not None})

    def strides(self) -> dict[str, int]:
        return {
            "stride_dq": 0 if self.p_dquantized is None else self.p_dquantized.stride(0),
            "stride_q": 0 if self.p_quantized is None else self.p_quantized.stride(0),
        }


NO_ENTRY = Entry(None, None, None, None, None, None)


class RowSums(NamedTuple):
    """Where a level's gradients of each row go."""

    out: Tensor  # (N, D) out: the gradient of the residual
    comes: Tensor | None  # (N, D) float32, maybe ``out``: what is added to it
    of_scale: Tensor  # (N,) out
    of_tau: Tensor | None  # (N,) out, in base 2
    of_sigma: Tensor | None  # (N,) out, in base 2
    entry: Entry  # of the level before, which takes ``out`` off


def entry_of(level: Level, dquantized: Tensor | None) -> Entry:
    """Room for what enters a level, and its part of the gradient of z~."""
    rows, dim = level.residual.shape
    if dquantized is not None and dquantized.stride(1) != 1:
        dquantized = dquantized.contiguous()
    return Entry(
        dquantized,
        level.quantized,
        level.centre,
        level.e.new_empty(rows, dim),
        level.lse.new_empty(rows) if level.e.dtype == torch.float16 else None,
        None if level.quantized is None else level.lse.new_empty(rows),
    )


def enter_last(entry: Entry) -> None:
    """Fill what enters the last level, which leaves nothing that has a gradient."""
    assert entry.p_unit is not None
    rows, dim = entry.p_unit.shape
    b_n, b_d = finish_block(dim)
    kernels.upstream_kernel[(triton.cdiv(rows, b_n),)](
        **entry._asdict(), **entry.strides(), N=rows, D=dim, b_n=b_n, b_d=b_d, num_warps=4
    )


def upstream_of(level: Level, sampling: Sampling, entry: Entry, dusage: Tensor | None, dlse: Tensor | None) -> Upstream:
    """Of what has entered."""
    assert entry.p_unit is not None
    bound = _bound(level, sampling, entry.p_norm, dusage, dlse, mixes=False)
    return Upstream(entry.p_unit, None, entry.p_norm, bound, entry.p_expected, dusage, dlse)


def upstream_with_mixture(
    level: Level,
    sampling: Sampling,
    dquantized: Tensor | None,
    flow: Tensor | None,
    dusage: Tensor | None,
    dlse: Tensor | None,
    dmixture: Tensor,
) -> Upstream:
    """Of a level with values, where the gradient of the mixture enters, too."""
    gradient = level.lse.new_zeros(level.residual.shape) if dquantized is None else dquantized.float()
    if flow is not None:
        gradient = gradient - flow  # r_j = r_{j-1} - z~_j
    norm = torch.linalg.vector_norm(torch.cat([gradient, dmixture.float()], 1), dim=1)
    inverse = (1 / norm.clamp(min=1e-30))[:, None]
    unit, unit_of_mixture = ((part * inverse).to(level.e.dtype) for part in (gradient, dmixture))
    bound = _bound(level, sampling, norm, dusage, dlse, mixes=True)
    return Upstream(unit, unit_of_mixture, norm, bound, None, dusage, dlse)


def _bound(
    level: Level, sampling: Sampling, norm: Tensor | None, dusage: Tensor | None, dlse: Tensor | None, *, mixes: bool
) -> Tensor | None:
    """Of the gradient of a row's logits, (N,); None where the dtype needs none."""
    if norm is None or level.e.dtype != torch.float16:
        return None
    if sampling.plain:
        largest = torch.linalg.vector_norm(level.e, dim=1, dtype=torch.float32).amax()
    else:
        largest = torch.where(level.rnorm_e > 0, 1 / level.rnorm_e, 0.0).amax()
    if level.values is not None and mixes:
        largest = torch.hypot(largest, torch.linalg.vector_norm(level.values, dim=1, dtype=torch.float32).amax())
    bound = 2 * norm * largest
    if dusage is not None:
        bound = bound + 2 * dusage.abs().amax()
    if dlse is not None:
        bound = bound + dlse.abs()
    return bound.clamp(min=1e-30)


def _gains(level: Level, upstream: Upstream) -> tuple[Tensor | None, Tensor | None]:
    """Of weights, and of z: what keeps float16 in range."""
    if upstream.bound is None or upstream.norm is None:
        return None, None
    weights = upstream.bound * or_one(level.rnorm) * or_one(level.rnorm_e).amax()
    return gain_of(weights, level.e.dtype), gain_of(upstream.norm, level.e.dtype)


def flash_gradients(
    level: Level,
    sampling: Sampling,
    upstream: Upstream,
    rows_of: RowSums,
    de: Tensor,
    dbias: Tensor | None,
    dvalues: Tensor | None,
) -> None:
    """Fill ``rows_of``, ``de`` and ``dbias``, which lacks 1 / tau. There are no values and no gradient of sigma."""
    (rows, dim), e = level.residual.shape, level.e
    key_gain, value_gain = _gains(level, upstream)
    total, rest = level.lse.new_empty(rows, dim), level.lse.new_empty(2, rows)
    in_registers, mean_rnorm_e = dim <= forms.SUMS_LARGEST, level.factor_e.mean()
    mixed = level.quantized
    if mixed is None:  # straight through: z~ is a code, and no mixture
        mixed = level.lse.new_empty(rows, dim)
    key, value = torch.empty_like(e, dtype=torch.float32), torch.empty_like(e, dtype=torch.float32)
    z = upstream.unit
    if upstream.norm is not None and value_gain is not None:
        z = (z * (upstream.norm * value_gain)[:, None]).to(e.dtype)
    for own, kept, w in flash_chunks(level, 2):
        part, of_part = level.of_rows(own), sampling.of_rows(own)
        of_rows = upstream.of_rows(own)
        expected, of_usage = _probabilities(part, of_part, of_rows, kept, mixed[own])
        of_tau = None if rows_of.of_tau is None else rows_of.of_tau[own]
        sums = total[own] if in_registers else None
        _weights(
            part, of_part, of_rows, kept, expected, of_usage, mean_rnorm_e, key_gain, w, sums, rest[:, own], of_tau
        )
        if sums is None:
            product(w, e, total[own])
        add_product(w.T, part.residual, key, begins=own.start == 0)
        add_product(kept.T, z[own], value, begins=own.start == 0)
        if dbias is not None:
            dbias.add_(w.sum(0, dtype=torch.float32))
    if dbias is not None:
        dbias.div_(sampling.row_factor if key_gain is None else sampling.row_factor * key_gain)
    off = Off(rest[0], mixed, None if level.quantized is None else level.centre)
    if not in_registers:
        off = off._replace(p_share=rest[1], p_code=level.sampled, p_e=e)
    _finish(
        total,
        level.residual,
        level.rnorm,
        sampling,
        key_gain,
        rows_of.comes,
        None,
        rows_of.out,
        rows_of.of_scale,
        off,
        rows_of.entry,
    )
    log2_gain = LOG2_GAIN[e.dtype]
    value_gain = None if value_gain is None else value_gain * 2.0**log2_gain
    _finish(key, e, level.rnorm_e, sampling, key_gain, value, value_gain, de, None)


def _probabilities(
    level: Level, sampling: Sampling, upstream: Upstream, kept: Tensor, mixed: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Fill ``kept`` with p of some rows once more; return sum_k p c but for what usage adds, (N,), and what adds up to
    that, (parts, N). ``mixed`` is p E, or, straight through, filled with it."""
    (rows, codes), e = kept.shape, level.e
    b_d, config = forms.flash_config(e.shape[1], e.device)
    tiles = config.probabilities
    splits = max(1, codes // PROBABILITY_CODES)
    of_usage = None if upstream.dusage is None else level.lse.new_empty(splits, rows)
    kernels.probability_kernel[(triton.cdiv(rows, tiles.owned), splits)](
        level.residual,
        e,
        **sampling.flash_arguments(level),
        p_lse=level.lse,
        p_dusage=upstream.dusage,
        p_kept=kept,
        p_expected=of_usage,
        stride_k=kept.stride(0),
        log2_gain=LOG2_GAIN[e.dtype],
        threads=forms.threads_of_row(level.e.device),
        whole=codes % tiles.step == 0,
        **blocks(b_d, tiles, own="b_n", step="b_k"),
    )
    if upstream.expected is not None:
        return upstream.expected, of_usage
    product(kept, e, mixed)
    if LOG2_GAIN[e.dtype]:
        mixed *= 2.0 ** -LOG2_GAIN[e.dtype]
    expected = (upstream.unit * mixed).sum(1)
    return expected if upstream.norm is None else expected * upstream.norm, of_usage


def _weights(
    level: Level,
    sampling: Sampling,
    upstream: Upstream,
    kept: Tensor,
    expected: Tensor,
    of_usage: Tensor | None,
    mean_rnorm_e: Tensor,
    gain: Tensor | None,
    w: Tensor,
    sums: Tensor | None,
    rest: Tensor,
    of_tau: Tensor | None,
) -> None:
    """Fill ``w`` with the weights of some rows' gradients, ``sums``, where they are given, with w E, and ``rest`` with
    what is to be taken off them; ``kept`` becomes what z is multiplied by in the gradient of the codes."""
    (rows, codes), e = kept.shape, level.e
    straight_through = sampling.mode == STRAIGHT_THROUGH
    b_d, config = forms.flash_config(e.shape[1], e.device)
    tiles = config.weights
    if straight_through or of_tau is not None or upstream.dlse is not None:  # these take registers of their own
        tiles = tiles._replace(step=min(tiles.step, 32))
    kernels.weight_kernel[(triton.cdiv(rows, tiles.owned),)](
        upstream.unit,
        e,
        kept,
        p_norm=upstream.norm,
        p_expected=expected,
        p_expected_usage=of_usage,
        p_dlse=upstream.dlse,
        p_dusage=upstream.dusage,
        p_rnorm=level.rnorm,
        p_rnorm_e=level.factor_e,
        p_mean_rnorm_e=mean_rnorm_e,
        p_sampled=level.sampled,
        p_gain=gain,
        p_w=w,
        p_out=sums,
        p_residue=rest[0],
        p_share=rest[1] if sums is None else None,
        p_dtau=of_tau,
        N=rows,
        K=codes,
        D=e.shape[1],
        stride_m=level.lse.stride(0),
        stride_k=kept.stride(0),
        parts=0 if of_usage is None else len(of_usage),
        log2_gain=LOG2_GAIN[e.dtype],
        straight_through=straight_through,
        whole=codes % tiles.step == 0,
        **blocks(b_d, tiles, own="b_n", step="b_k"),
    )


def chunked_gradients(
    level: Level,
    sampling: Sampling,
    upstream: Upstream,
    rows_of: RowSums,
    de: Tensor,
    dbias: Tensor | None,
    dvalues: Tensor | None,
) -> None:
    """What :func:`flash_gradients` does, and fill ``dvalues``. Products of a chunk are made again, not kept."""
    out, comes, of_scale, of_tau, of_sigma, entry = rows_of
    e = level.e
    key_gain, value_gain = _gains(level, upstream)
    key, value = torch.empty_like(e, dtype=torch.float32), torch.empty_like(e, dtype=torch.float32)
    mixed = None if dvalues is None else torch.empty_like(dvalues, dtype=torch.float32)
    for own, s, c in chunks_of(level, 2):
        w, y = weights_of(s, e), weights_of(c, e)
        product(level.residual[own], e.T, s)
        product(upstream.unit[own], e.T, c)
        if upstream.unit_of_mixture is not None and level.values is not None:
            add_product(upstream.unit_of_mixture[own], level.values.T, c)
        in_registers = len(e) <= forms.ROW_LARGEST
        kernel = chunks.row_gradient_kernel if in_registers else chunks.chunk_gradient_kernel
        b_k, warps = (
            row_block(len(e), forms.ROW_GRADIENT_CODES) if in_registers else (forms.CHUNK_STEP, forms.CHUNK_WARPS)
        )
        strides = {"stride_w": w.stride(0)} if in_registers else {}
        kernel[(len(s),)](
            s,
            c,
            w,
            y,
            **sampling.of_rows(own).arguments(level),
            p_rnorm=level.rnorm[own],
            p_lse=level.lse[own],
            p_sampled=level.sampled[own],
            p_norm=None if upstream.norm is None else upstream.norm[own],
            p_dusage=upstream.dusage,
            p_dlse=None if upstream.dlse is None else upstream.dlse[own],
            p_gain=key_gain,
            p_value_gain=value_gain,
            p_dtau=None if of_tau is None else of_tau[own],
            p_dsigma=None if of_sigma is None else of_sigma[own],
            straight_through=sampling.mode == STRAIGHT_THROUGH,
            **strides,
            b_k=b_k,
            num_warps=warps,
        )
        if dbias is not None:
            dbias.add_(w.sum(0, dtype=torch.float32))
        add_product(w.T, level.residual[own], key, begins=own.start == 0)
        add_product(y.T, upstream.unit[own], value, begins=own.start == 0)
        if upstream.unit_of_mixture is not None and mixed is not None:
            add_product(y.T, upstream.unit_of_mixture[own], mixed, begins=own.start == 0)
        total = level.lse.new_empty(len(s), e.shape[1])
        product(w, e, total)
        _finish(
            total,
            level.residual[own],
            level.rnorm[own],
            sampling,
            key_gain,
            None if comes is None else comes[own],
            None,
            out[own],
            of_scale[own],
            entry=entry.of_rows(own),
        )
    if dbias is not None:
        dbias.div_(sampling.row_factor if key_gain is None else sampling.row_factor * key_gain)
    if dvalues is not None and mixed is not None:
        dvalues.copy_(mixed if value_gain is None else mixed.div_(value_gain))
    _finish(key, e, level.rnorm_e, sampling, key_gain, value, value_gain, de, None)


def _finish(
    total: Tensor,
    x: Tensor,
    rnorm: Tensor,
    sampling: Sampling,
    gain: Tensor | None,
    add: Tensor | None,
    add_gain: Tensor | None,
    out: Tensor,
    radial: Tensor | None,
    off: Off = NOTHING,
    entry: Entry = NO_ENTRY,
) -> None:
    rows, dim = total.shape
    b_n, b_d = finish_block(dim)
    kernels.finish_kernel[(triton.cdiv(rows, b_n),)](
        total,
        **off._asdict(),
        p_x=x,
        p_rnorm=rnorm,
        p_factor=sampling.factor,
        p_gain=gain,
        p_add=add,
        p_add_gain=add_gain,
        p_out=out,
        p_radial=radial,
        **entry._asdict(),
        N=rows,
        D=dim,
        stride_d=x.stride(0),
        stride_m=rnorm.stride(0),
        stride_z=dim if off.p_mixed is None else off.p_mixed.stride(0),
        **entry.strides(),
        eps=sampling.eps,
        plain=sampling.plain,
        b_n=b_n,
        b_d=b_d,
        num_warps=4,
    )
