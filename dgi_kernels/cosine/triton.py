"""Launchers of the cosine cross-entropy in Triton, as operators that torch.compile keeps whole.

The forward operator returns the loss of every row, without reduction, and what backward needs; formulas, counts and
predictions are in :mod:`dgi_kernels.cosine.triton_kernels`. Grids depend on shapes alone and nothing is read back, so a
CUDA graph can hold a training step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
from torch import Tensor, library

from dgi_kernels import checks
from dgi_kernels import tiles as measured
from dgi_kernels import triton_common as common
from dgi_kernels.cosine import triton_chunks as chunks
from dgi_kernels.cosine import triton_fused as fused
from dgi_kernels.cosine import triton_kernels as kernels
from dgi_kernels.cosine import triton_reduced as reduced
from dgi_kernels.cosine.options import Columns, LossOptions
from dgi_kernels.cosine.triton_launch import (
    FLASH as FLASH,
)
from dgi_kernels.cosine.triton_launch import (
    FLASH_ROWS,
    chunk_gain,
    finish,
    flash_config,
    flash_forward,
    flash_hidden,
    meet_targets,
    tiled,
    tiled_dim,
    uses_flash,
    weighted_sum,
    with_columns,
)
from dgi_kernels.cosine.triton_launch import (
    FlashConfig as FlashConfig,
)
from dgi_kernels.cosine.triton_saved import Saved, Upstream, column_terms, may_replace, upstream_of
from dgi_kernels.triton_common import (
    CHUNK_BYTES,
    HALF,
    LN2,
    add_product,
    gain_of,
    multiprocessors,
    norms,
    or_one,
    product,
)
from dgi_kernels.triton_common import (
    Tiles as Tiles,
)

CHUNK_STEP = 2048  # columns of one pass of the chunked epilogues
BIAS_BLOCK = (32, 64)  # rows, columns


def cosine_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float | Tensor,
    columns: Columns,
    options: LossOptions,
) -> tuple[Tensor, Tensor | None]:
    """(N, D), (K, D), (N,) int64 -> loss () or (N,) float32, log normalizer (N,) float32 if wanted.

    A target out of range gives NaN for its row.
    """
    scale = checks.scalar_tensor(scale, torch.float32, h.device)
    if _makes_gradients(h, weight, scale, columns, options):
        return reduced.cosine_cross_entropy(h, weight, target, scale, options), None
    keep_mean = torch.is_grad_enabled() and h.requires_grad
    loss, lse, *_ = _forward(
        h,
        weight,
        target,
        scale,
        columns.within(torch.float32).bias,
        None if columns.same_as is None else _groups(columns.same_as),
        options.ignore_index,
        options.label_smoothing,
        options.eps,
        keep_mean,
        options.return_log_normalizer,
    )
    ignored = target == options.ignore_index
    log_normalizer = None
    if options.return_log_normalizer:
        in_range = (target >= 0) & (target < weight.shape[0])
        log_normalizer = torch.where(ignored, 0.0, torch.where(in_range, lse * LN2.value, torch.nan))
    return options.reduce(loss, target), log_normalizer


def _makes_gradients(h: Tensor, weight: Tensor, scale: Tensor, columns: Columns, options: LossOptions) -> bool:
    """Whether the gradients are made together with the loss."""
    return (
        torch.is_grad_enabled()
        and (h.requires_grad or weight.requires_grad or scale.requires_grad)
        and options.reduction != "none"
        and not options.return_log_normalizer
        and not any(columns.given.values())
        and h.dtype in reduced.IN_RANGE
        and h.shape[0] > 0
        and weight.shape[0] > 0
        and not _is_flash(h.shape[0], tiled_dim(h.shape[1]), h.dtype, None, 0.0)
    )


def _groups(same_as: Tensor) -> Tensor:
    """same_as (K,) int64 -> (2, K) int32: a number that equal ids share, and how many columns share it."""
    ordered = same_as.sort().values
    first, last = (torch.searchsorted(ordered, same_as, out_int32=True, right=right) for right in (False, True))
    return torch.stack((first, last - first))


@library.custom_op("dgi_kernels::cosine_loss_triton", mutates_args=())
def _forward(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    groups: Tensor | None,
    ignore_index: int,
    smoothing: float,
    eps: float,
    keep_mean: bool,
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, lse, residue, mean, centre, rnorm_h, rnorm_w, label; mean (N, D) is what dh is made of.

    The chunked form has no mean: it is empty, as is the mean that nobody asks for.
    """
    outputs = _empty_outputs(h, weight, groups, smoothing, keep_mean)
    loss, lse, residue, mean, centre, rnorm_h, rnorm_w, label = outputs
    flash = _is_flash(h.shape[0], tiled_dim(h.shape[1]), h.dtype, groups, smoothing)
    if h.shape[0] == 0:
        return outputs
    h, weight = tiled(h), tiled(weight)
    bias = None if bias is None else bias.contiguous()
    dim, codes = h.shape[1], weight.shape[0]
    smooth_apart = groups is not None and smoothing > 0  # the chunks' epilogue adds up the scores that count itself
    with torch.cuda.device_of(h):
        norms(weight, eps, rnorm_w)
        weighted_sum(weight, rnorm_w, 0.0 if smooth_apart else smoothing / max(codes, 1), centre)
        bias_centre = None
        if bias is not None and smoothing > 0:
            bias_centre = bias.new_zeros(()) if smooth_apart else bias.mean() * smoothing
        logit, extra = torch.empty_like(loss), torch.empty_like(loss)
        meet_targets(
            h,
            weight,
            {"p_target": target.contiguous(), "p_scale": scale, "p_centre": centre},
            {"p_bias": bias, "p_bias_centre": bias_centre},
            {"p_rnorm": rnorm_h, "p_logit": logit, "p_extra": extra, "p_label": label},
            ignore_index,
            eps,
            smoothing,
        )
        terms = column_terms(bias, groups)
        rows_of = {"p_rnorm_h": rnorm_h, "p_logit": logit, "p_extra": extra, "p_label": label}
        if not flash and h.dtype in HALF:
            columns = {"p_rnorm_w": rnorm_w, **terms}
            results = {"p_loss": loss, "p_lse": lse, "p_residue": residue}
            fused.loss_of_rows(h, weight, columns, rows_of | {"p_scale": scale}, results, smoothing, smooth_apart)
            return outputs
        if not flash:
            for own, s in _chunks(h, weight):
                product(h[own], weight.T, s)
                chunks.chunk_loss_kernel[(len(s),)](
                    s,
                    p_rnorm_h=rnorm_h[own],
                    p_rnorm_w=rnorm_w,
                    **terms,
                    p_logit=logit[own],
                    p_extra=extra[own],
                    p_label=label[own],
                    p_scale=scale,
                    p_loss=loss[own],
                    p_lse=lse[own],
                    p_residue=residue[own],
                    K=codes,
                    smoothing=smoothing,
                    b_k=CHUNK_STEP,
                    num_warps=8,
                )
            return outputs
        gain = 2.0**6 / rnorm_w.amax() if h.dtype == torch.float16 and codes else None
        b_d, config = flash_config(dim, h.device)
        tiles = config.forward if keep_mean else config.weight
        if bias is not None or groups is not None:
            tiles = with_columns(tiles, b_d)
        results = {"p_loss": loss, "p_lse": lse, "p_residue": residue, "p_mean": mean}
        shared = {"p_rnorm_w": rnorm_w, **terms, "p_scale": scale, "p_gain": gain}
        flash_forward(h, weight, {**rows_of, **shared, **results}, smoothing, keep_mean, tiles, b_d)
    return outputs


def _is_flash(rows: int, dim: int, dtype: torch.dtype, groups: Tensor | None, smoothing: float) -> bool:
    """Smoothing over all columns but those left out is no vector that all rows share: only chunks have it. So do few
    rows, which the chunked form spreads over the GPU by their columns."""
    return uses_flash(dim, dtype) and rows >= FLASH_ROWS and (groups is None or smoothing == 0)


def _empty_outputs(
    h: Tensor,
    weight: Tensor,
    groups: Tensor | None,
    smoothing: float,
    keep_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, codes, dim = h.shape[0], weight.shape[0], tiled_dim(h.shape[1])
    flash = _is_flash(rows, dim, h.dtype, groups, smoothing)
    loss, lse, residue, rnorm_h = (h.new_empty(rows, dtype=torch.float32) for _ in range(4))
    return (
        loss,
        lse,
        residue,
        h.new_empty(rows if flash and keep_mean else 0, dim),
        h.new_empty(dim, dtype=torch.float32),
        rnorm_h,
        h.new_empty(codes, dtype=torch.float32),
        h.new_empty(rows, dtype=torch.int32),
    )


@_forward.register_fake
def _(h, weight, target, scale, bias, groups, ignore_index, smoothing, eps, keep_mean, with_lse):
    return _empty_outputs(h, weight, groups, smoothing, keep_mean)


@library.custom_op("dgi_kernels::cosine_loss_triton_backward", mutates_args=())
def _backward(
    of_loss: Tensor | None,
    of_lse: Tensor | None,
    h: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    groups: Tensor | None,
    lse: Tensor,
    residue: Tensor,
    mean: Tensor,
    centre: Tensor,
    rnorm_h: Tensor,
    rnorm_w: Tensor,
    label: Tensor,
    smoothing: float,
    eps: float,
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dh, dweight, dbias (empty where not needed), dscale."""
    saved = Saved(h, weight, scale, bias, groups, lse, residue, mean, centre, rnorm_h, rnorm_w, label, smoothing, eps)
    return _gradients(h.new_empty(h.shape if need_h else (0, 0)), of_loss, of_lse, saved, need_weight, need_bias)


@_backward.register_fake
def _(of_loss, of_lse, h, weight, scale, *others):
    need_h, need_weight, need_bias = others[-3:]
    return (
        h.new_empty(h.shape if need_h else (0, 0)),
        weight.new_empty(weight.shape if need_weight else (0, 0)),
        h.new_empty(len(weight) if need_bias else 0, dtype=torch.float32),
        torch.empty_like(scale),
    )


def _gradients(
    dh: Tensor, of_loss: Tensor | None, of_lse: Tensor | None, saved: Saved, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> dh, filled where it has elements (it may be ``mean`` itself), dweight and dbias (or empty), dscale."""
    h, weight = saved.h, saved.weight
    dweight = weight.new_empty(weight.shape if need_weight else (0, 0))
    dbias = saved.rnorm_w.new_zeros(len(weight) if need_bias else 0)
    if h.shape[0] == 0:
        return dh, dweight.zero_(), dbias, torch.zeros_like(saved.scale)
    upstream = upstream_of(of_loss, of_lse, saved, need_bias)
    saved = replace(
        saved, h=tiled(h), weight=tiled(weight), bias=None if saved.bias is None else saved.bias.contiguous()
    )
    with torch.cuda.device_of(h):
        if not _is_flash(len(h), saved.h.shape[1], h.dtype, saved.groups, saved.smoothing):
            radial = _chunked_gradients(upstream, saved, dh, dweight, dbias)
            return dh, dweight, dbias, radial.sum()
        by_row = len(saved.mean) > 0
        if need_weight or need_bias or not by_row:
            radial = _flash_weight(upstream, saved, dweight, dbias)
        if by_row:
            rows = {
                "p_rnorm_h": saved.rnorm_h,
                "p_rnorm_w": saved.rnorm_w,
                "p_residue": saved.residue,
                "p_upstream": upstream.loss,
                "p_both": upstream.both,
                "p_own": upstream.own,
                "p_label": saved.label,
            }
            h, weight = saved.h, saved.weight
            radial = flash_hidden(
                h, weight, saved.mean, saved.centre, saved.scale, rows, saved.smoothing, saved.eps, dh
            )
    return dh, dweight, dbias, radial.sum()


def _save(ctx, inputs, output) -> None:
    h, weight, target, scale, bias, groups, *ctx.options, ctx.keeps_mean, ctx.with_lse = inputs
    _, lse, residue, mean, centre, rnorm_h, rnorm_w, label = output
    ctx.save_for_backward(target, h, weight, scale, bias, groups, lse, residue, mean, centre, rnorm_h, rnorm_w, label)
    ctx.mark_non_differentiable(residue, mean, centre, rnorm_h, rnorm_w, label)
    ctx.set_materialize_grads(False)
    ctx.mean_is_gone = False


def _differentiate(ctx, of_loss: Tensor | None, of_lse: Tensor | None, *_):
    """By the operator, unless dh may take the place of the mean that forward kept for it."""
    target, h, weight, scale, bias, groups, lse, residue, mean, *others = ctx.saved_tensors
    ignore_index, smoothing, eps = ctx.options
    need_h, need_weight, _, need_scale, need_bias = ctx.needs_input_grad[:5]
    if of_loss is None and of_lse is None:
        return (None,) * 11
    if (need_h and not ctx.keeps_mean) or (ctx.mean_is_gone and (need_h or need_scale)):
        mean = _forward(h, weight, target, scale, bias, groups, ignore_index, smoothing, eps, True, ctx.with_lse)[3]
    operands = (h, weight, scale, bias, groups, lse, residue, mean, *others, smoothing, eps)
    if need_h and may_replace(mean, h):
        ctx.mean_is_gone = True
        dh, dweight, dbias, dscale = _gradients(mean, of_loss, of_lse, Saved(*operands), need_weight, need_bias)
    else:
        dh, dweight, dbias, dscale = _backward(of_loss, of_lse, *operands, need_h, need_weight, need_bias)
    return (
        dh if need_h else None,
        dweight if need_weight else None,
        None,
        dscale if need_scale else None,
        dbias if need_bias else None,
        *(None,) * 6,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def _flash_weight(upstream: Upstream, saved: Saved, dweight: Tensor, dbias: Tensor) -> Tensor:
    """Fill dweight and dbias where they have elements; return each column's part of dscale."""
    h, weight = saved.h, saved.weight
    (rows, dim), codes = h.shape, weight.shape[0]
    if codes == 0:
        return saved.rnorm_w
    radial = torch.empty_like(saved.rnorm_w)
    centre = torch.empty_like(h[0], dtype=torch.float32)
    weighted_sum(h, upstream.loss * saved.rnorm_h, saved.smoothing / codes, centre)
    gain = gain_of((upstream.largest() * saved.rnorm_h).abs(), h.dtype)
    per_row = upstream.loss * saved.rnorm_h if upstream.both is None else None
    b_d, (_, tiles) = flash_config(dim, h.device)
    if upstream.both is not None or saved.bias is not None:
        tiles = with_columns(tiles, b_d)
    programs = triton.cdiv(codes, tiles.owned)
    at_once = 2 if tiles.warps <= 4 else 1  # blocks of a multiprocessor
    splits = max(1, min(triton.cdiv(rows, tiles.step), at_once * multiprocessors(h) // programs))
    # 16 bits and a factor for each column: what they round is an eighth of what bfloat16 gradients are rounded by, and
    # in 32 bits the partials would be the largest of all that is kept (1.6 % of 65,536 rows' logits at D = 256).
    partial = h.new_empty(splits, codes, dim, dtype=torch.float16 if h.dtype in HALF else torch.float32)
    largest = h.new_empty(splits, codes, dtype=torch.float32)
    of_bias = torch.empty_like(largest) if dbias.numel() else None
    kernels.flash_weight_kernel[(programs, splits)](
        h,
        weight,
        **saved.shared(),
        p_rnorm_h=saved.rnorm_h,
        p_lse=saved.lse,
        p_residue=None if per_row is None else saved.residue,
        p_upstream=per_row if gain is None or per_row is None else per_row * gain,
        p_both=upstream.both,
        p_own=upstream.own,
        p_gain=None if upstream.both is None else gain,
        p_label=saved.label,
        p_partial=partial,
        p_largest=largest,
        p_dbias=of_bias,
        N=rows,
        D=dim,
        stride_h=h.stride(0),
        stride_w=weight.stride(0),
        whole=rows % tiles.step == 0,
        b_k=tiles.owned,
        b_n=tiles.step,
        b_d=b_d,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    if of_bias is not None:
        torch.sum(of_bias, 0, out=dbias)
        dbias -= upstream.loss.sum() * (saved.smoothing / codes)
    finish(partial, largest, weight, saved.rnorm_w, gain, centre, saved.scale, saved.eps, False, dweight, radial)
    return radial.mul_(saved.rnorm_w)


def _chunked_gradients(upstream: Upstream, saved: Saved, dh: Tensor, dweight: Tensor, dbias: Tensor) -> Tensor:
    """Fill dh, dweight and dbias where they have elements; return each row's part of dscale."""
    h, weight, rnorm_h, rnorm_w = saved.h, saved.weight, saved.rnorm_h, saved.rnorm_w
    scale, eps = saved.scale, saved.eps
    (_, dim), codes = h.shape, weight.shape[0]
    gain = chunk_gain(upstream.largest() * or_one(rnorm_h), rnorm_w, h.dtype)
    per_row = (upstream.loss if upstream.both is None else 1.0) * or_one(rnorm_h)
    if gain is not None:
        per_row = per_row * gain
    if h.dtype in HALF:
        return fused.gradients(upstream, saved, per_row, gain, dh, dweight, dbias)
    total = weight.new_zeros(codes, dim, dtype=torch.float32)
    radial = torch.empty_like(upstream.loss)
    b_n, b_k = BIAS_BLOCK
    splits = max(1, 4 * multiprocessors(h) // max(1, triton.cdiv(codes, b_k)))
    of_bias = total.new_zeros(splits, codes) if dbias.numel() else None
    for own, s in _chunks(h, weight):
        g = s if h.dtype == torch.float32 else s.new_empty(s.shape, dtype=h.dtype)
        product(h[own], weight.T, s)
        both, target, even = (None if x is None else x[own] for x in (upstream.both, upstream.own, upstream.even))
        shared = {
            **saved.shared(),
            "p_rnorm_h": rnorm_h[own],
            "p_lse": saved.lse[own],
            "p_label": saved.label[own],
            "p_both": both,
            "p_own": target,
            "p_even": even,
        }
        if of_bias is not None:
            chunks.chunk_bias_kernel[(triton.cdiv(codes, b_k), splits)](
                s, p_dbias=of_bias, **shared, N=len(s), b_n=b_n, b_k=b_k, num_warps=4
            )
        chunks.chunk_gradient_kernel[(len(s), triton.cdiv(codes, CHUNK_STEP))](
            s,
            g,
            p_residue=saved.residue[own],
            p_upstream=per_row[own],
            **shared,
            centre=saved.smoothing / max(codes, 1),
            b_k=CHUNK_STEP,
            num_warps=8,
        )
        if dweight.numel():
            add_product(g.T, h[own], total)
        row_total = s.new_empty(1, len(s), dim)
        product(g, weight, row_total[0])
        finish(row_total, None, h[own], rnorm_h[own], gain, None, scale, eps, True, dh[own], radial[own])
    if dweight.numel():
        finish(total[None], None, weight, rnorm_w, gain, None, scale, eps, True, dweight, None)
    if of_bias is not None:
        torch.sum(of_bias, 0, out=dbias)
    return radial


def _chunks(h: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows, each with a float32 buffer for its products: the same memory for all."""
    buffer = None
    budget = measured.number("cosine.chunk_bytes", CHUNK_BYTES, h.device)
    for own in common.chunks(len(h), len(weight), 1, h.dtype, budget):
        if buffer is None:
            buffer = h.new_empty(own.stop, len(weight), dtype=torch.float32)
        yield own, buffer[: own.stop - own.start]
