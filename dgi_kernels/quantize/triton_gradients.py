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
    STRAIGHT_THROUGH,
    Level,
    Sampling,
    by_slot,
    chunks_of,
    splits_of,
    weights_of,
)
from dgi_kernels.triton_common import add_product, finish_block, gain_of, or_one, product


class Upstream(NamedTuple):
    """The gradients that enter one level: z = norm x unit, v, L, and a bound of what they can make of a logit's.

    With values z is what enters at z~ and at the mixture, side by side, as are the vectors that it is multiplied by.
    """

    unit: Tensor  # (N, D) in the dtype of the operands
    unit_of_mixture: Tensor | None  # (N, V)
    norm: Tensor  # (N,)
    bound: Tensor  # (N,)
    dusage: Tensor | None  # (K,)
    dlse: Tensor | None  # (N,), elements m apart


def _unit_and_norm(level: Level, dquantized: Tensor | None, flow: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of z~ as norm x unit; r_j = r_{j-1} - z~_j takes ``flow`` off it."""
    rows, dim = flow.shape
    unit, norm = flow.new_empty(rows, dim, dtype=level.e.dtype), flow.new_empty(rows)
    if dquantized is not None and dquantized.stride(1) != 1:
        dquantized = dquantized.contiguous()
    b_n, b_d = finish_block(dim)
    kernels.upstream_kernel[(triton.cdiv(rows, b_n),)](
        flow,
        p_dquantized=dquantized,
        p_unit=unit,
        p_norm=norm,
        N=rows,
        D=dim,
        stride_q=dim if dquantized is None else dquantized.stride(0),
        b_n=b_n,
        b_d=b_d,
        num_warps=4,
    )
    return unit, norm


def upstream_of(
    level: Level,
    sampling: Sampling,
    dquantized: Tensor | None,
    flow: Tensor,
    dusage: Tensor | None,
    dlse: Tensor | None,
    dmixture: Tensor | None,
) -> Upstream:
    unit_of_mixture = None
    if dmixture is None:
        unit, norm = _unit_and_norm(level, dquantized, flow)
    else:
        gradient = -flow if dquantized is None else dquantized.float() - flow  # r_j = r_{j-1} - z~_j
        norm = torch.linalg.vector_norm(torch.cat([gradient, dmixture.float()], 1), dim=1)
        inverse = (1 / norm.clamp(min=1e-30))[:, None]
        unit, unit_of_mixture = ((part * inverse).to(level.e.dtype) for part in (gradient, dmixture))
    if sampling.plain:
        largest = torch.linalg.vector_norm(level.e, dim=1, dtype=torch.float32).amax()
    else:
        largest = torch.where(level.rnorm_e > 0, 1 / level.rnorm_e, 0.0).amax()
    if level.values is not None and dmixture is not None:
        largest = torch.hypot(largest, torch.linalg.vector_norm(level.values, dim=1, dtype=torch.float32).amax())
    bound = 2 * norm * largest
    if dusage is not None:
        bound = bound + 2 * dusage.abs().amax()
    if dlse is not None:
        bound = bound + dlse.abs()
    return Upstream(unit, unit_of_mixture, norm, bound.clamp(min=1e-30), dusage, dlse)


def flash_gradients(
    level: Level,
    sampling: Sampling,
    upstream: Upstream,
    flow: Tensor,
    de: Tensor,
    dbias: Tensor | None,
    dsigma: Tensor | None,
    dvalues: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Add a level's gradient of r to ``flow``, fill ``de`` and ``dbias``, which lacks 1 / tau; return each row's parts
    of those of the scale and tau. There are no values."""
    (rows, dim), codes, dtype = flow.shape, len(level.e), level.e.dtype
    b_d, config = forms.flash_config(dim, flow.device)
    shared = {
        **sampling.flash_arguments(level),
        "p_lse": level.lse,
        "p_order": level.order,
        "p_largest": level.largest,
        "p_unit": upstream.unit,
        "p_norm": upstream.norm,
        "p_dusage": upstream.dusage,
        "skip": 2.0 ** forms.LOG2_SKIP[dtype],
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
        **blocks(b_d, config.gradient, own="b_n", step="b_k"),
    )

    factor = (
        torch.where(level.rnorm_e == 0, 1 / sampling.eps, level.rnorm_e).amax() * (sampling.scale / sampling.tau).abs()
    )
    gain = gain_of(torch.maximum(upstream.bound * level.rnorm * factor, upstream.norm), dtype)
    shift = mean if upstream.dlse is None else mean - upstream.dlse
    tiles, splits = splits_of(config.codes, level)
    partial, radial_e = flow.new_empty(splits, codes, dim), flow.new_empty(splits, codes)
    kernels.code_gradient_kernel[(tiles, splits)](
        level.residual,
        level.e,
        **shared | by_slot(level, config.codes.step, upstream.norm, shift),
        p_gain=gain,
        p_partial=partial,
        p_radial=radial_e,
        eps=sampling.eps,
        straight_through=sampling.mode == STRAIGHT_THROUGH,
        **blocks(b_d, config.codes, own="b_k", step="b_n"),
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


def chunked_gradients(
    level: Level,
    sampling: Sampling,
    upstream: Upstream,
    flow: Tensor,
    de: Tensor,
    dbias: Tensor | None,
    dsigma: Tensor | None,
    dvalues: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What :func:`flash_gradients` does, and fill ``dvalues``. Products of a chunk are made again, not kept."""
    e, dtype = level.e, level.e.dtype
    key_gain = gain_of(upstream.bound * or_one(level.rnorm) * or_one(level.rnorm_e).amax(), dtype)
    value_gain = gain_of(upstream.norm, dtype)
    key = torch.zeros_like(e, dtype=torch.float32)
    value = torch.zeros_like(key)
    mixed = None if dvalues is None else torch.zeros_like(dvalues, dtype=torch.float32)
    radial, of_tau = torch.empty_like(upstream.norm), torch.empty_like(upstream.norm)
    for own, s, c in chunks_of(level, 2):
        w, y = weights_of(s, e), weights_of(c, e)
        product(level.residual[own], e.T, s)
        product(upstream.unit[own], e.T, c)
        if upstream.unit_of_mixture is not None and level.values is not None:
            add_product(upstream.unit_of_mixture[own], level.values.T, c)
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
            b_k=forms.CHUNK_STEP,
            num_warps=forms.CHUNK_WARPS,
        )
        if dbias is not None:
            dbias.add_(w.sum(0, dtype=torch.float32))
        add_product(w.T, level.residual[own], key)
        add_product(y.T, upstream.unit[own], value)
        if upstream.unit_of_mixture is not None and mixed is not None:
            add_product(y.T, upstream.unit_of_mixture[own], mixed)
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
    if dvalues is not None and mixed is not None:
        dvalues.copy_(mixed if value_gain is None else mixed.div_(value_gain))
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
        p_factor=sampling.factor,
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
