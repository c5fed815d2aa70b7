"""Launchers of the cosine cross-entropy in Triton, as operators that torch.compile keeps whole.

The forward operator returns the loss of every row, without reduction, and what backward needs; formulas, counts and
predictions are in :mod:`dgi_kernels.cosine.triton_kernels`. Grids depend on shapes alone and nothing is read back, so a
CUDA graph can hold a training step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor, library

from dgi_kernels import tiles as measured
from dgi_kernels import triton_common as common
from dgi_kernels.cosine import triton_kernels as kernels
from dgi_kernels.cosine.options import LossOptions
from dgi_kernels.triton_common import (
    HALF,
    NORM_BLOCK,
    Tiles,
    add_product,
    finish_block,
    multiprocessors,
    norms,
    product,
)

# Base-2 logarithm of the part of its row's mass below which a weight needs no product: what float32 sums drop, and for
# 16-bit operands the square of the rounding (2^-9 in bfloat16, 2^-11 in float16) that every weight suffers anyway.
LOG2_SKIP = {torch.float32: -24.0, torch.float16: -22.0, torch.bfloat16: -18.0}


class FlashConfig(NamedTuple):
    """Tiles of the pass that keeps a mean of w for every row, and of the two others: for dw, and for the loss alone."""

    forward: Tiles
    weight: Tiles


# Architecture -> dimensions up to -> tiles: all that the launchers can choose, each compiled by bench/gpu_code.py. They
# are the largest tried that spill no registers; which are the fastest is to be measured, and is then kept by GPU model
# in dgi_kernels/tiles. Others than 9 and 10 take those of 8, which need at most 99 KB of shared memory.
FLASH = {
    8: {64: FlashConfig(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
        128: FlashConfig(Tiles(128, 32, 8, 3), Tiles(128, 64, 8, 2)),
        256: FlashConfig(Tiles(64, 64, 8, 2), Tiles(128, 32, 8, 2))},
    9: {64: FlashConfig(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
        128: FlashConfig(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
        256: FlashConfig(Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 2))},
    10: {64: FlashConfig(Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 3)),
         128: FlashConfig(Tiles(128, 32, 8, 3), Tiles(64, 64, 8, 3)),
         256: FlashConfig(Tiles(64, 64, 8, 2), Tiles(128, 32, 8, 2))},
}
FLASH_LARGEST = 256
CHUNK_BYTES = 32 << 20  # products and weights of one chunk: they stay in the L2 of an H100 or H200 (50 MB)
CHUNK_STEP = 2048  # columns of one pass of the chunked epilogues
SUM_BLOCK = (32, 64)
SUM_PROGRAMS = 64
ORDER_FROM = (4096, 512)  # rows and columns from which sorting rows costs less than the products it can save


def uses_flash(dim: int, dtype: torch.dtype) -> bool:
    """Flash or chunked form: the one place that chooses.

    float32 is chunked: Triton's exact float32 product does not reach cuBLAS's. Beyond D = 256 the float32 accumulators
    of a tile of whole rows do not fit the registers. Both crossovers are to be measured on a GPU.
    """
    return dtype in HALF and dim <= FLASH_LARGEST


def flash_config(dim: int, device: torch.device) -> tuple[int, FlashConfig]:
    """Dimensions of a tile, and the tiles, for vectors of ``dim`` dimensions."""
    table = FLASH.get(common.architecture(device), FLASH[8])
    b_d = min(largest for largest in table if dim <= largest)
    return b_d, FlashConfig(*(measured.pick(f"cosine.{name}", b_d, tiles, device)
                              for name, tiles in table[b_d]._asdict().items()))


def cosine_cross_entropy(h: Tensor, weight: Tensor, target: Tensor, scale: float | Tensor,
                         options: LossOptions) -> Tensor:
    """(N, D), (K, D), (N,) int64 -> () or (N,) float32; a target out of range gives NaN for its row."""
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=h.device)
    keep_mean = torch.is_grad_enabled() and h.requires_grad
    loss = _forward(h, weight, target, scale.float(), options.ignore_index, options.label_smoothing, options.eps,
                    keep_mean)[0]
    return options.reduce(loss, target)


@library.custom_op("dgi_kernels::cosine_loss_triton", mutates_args=())
def _forward(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, ignore_index: int, smoothing: float, eps: float,
             keep_mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, lse, residue, mean, centre, rnorm_h, rnorm_w, label, order; mean (N, D) is what dh is made of.

    The chunked form has neither mean nor order: they are empty, as is the mean that nobody asks for.
    """
    outputs = _empty_outputs(h, weight, keep_mean)
    loss, lse, residue, mean, centre, rnorm_h, rnorm_w, label, order = outputs
    if h.shape[0] == 0:
        return outputs
    h, weight = _tiled(h), _tiled(weight)
    (rows, dim), codes = h.shape, weight.shape[0]
    with torch.cuda.device_of(h):
        norms(weight, eps, rnorm_w)
        _weighted_sum(weight, rnorm_w, smoothing / max(codes, 1), centre)
        logit, extra = torch.empty_like(loss), torch.empty_like(loss)
        key = torch.empty_like(label)
        b_n, b_d = NORM_BLOCK
        kernels.target_kernel[(triton.cdiv(rows, b_n),)](
            h, weight, target.contiguous(), scale, centre, rnorm_h, logit, extra, label, key, rows, codes, dim,
            h.stride(0), weight.stride(0), ignore_index, eps, smoothing, b_n=b_n, b_d=b_d, num_warps=4)
        if not uses_flash(dim, h.dtype):
            _chunked_loss(h, weight, scale, rnorm_h, rnorm_w, logit, extra, label, smoothing, loss, lse, residue)
            return outputs
        if rows >= ORDER_FROM[0] and codes >= ORDER_FROM[1]:
            order.copy_(torch.sort(key, stable=True).indices)
        else:
            torch.arange(rows, out=order)
        gain = 2.0**6 / rnorm_w.amax() if h.dtype == torch.float16 and codes else None
        b_d, config = flash_config(dim, h.device)
        tiles = config.forward if keep_mean else config.weight
        kernels.flash_forward_kernel[(triton.cdiv(rows, tiles.owned),)](
            h, weight, rnorm_h, rnorm_w, logit, extra, label, order, scale, gain, loss, lse, residue, mean, rows, codes,
            dim, h.stride(0), weight.stride(0), smoothing, LOG2_SKIP[h.dtype], with_mean=keep_mean,
            b_n=tiles.owned, b_k=tiles.step, b_d=b_d, num_warps=tiles.warps, num_stages=tiles.stages)
    return outputs


def _empty_outputs(h: Tensor, weight: Tensor, keep_mean: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                                                       Tensor, Tensor, Tensor]:
    rows, codes, dim = h.shape[0], weight.shape[0], _tiled_dim(h.shape[1])
    flash = uses_flash(dim, h.dtype)
    loss, lse, residue, rnorm_h = (h.new_empty(rows, dtype=torch.float32) for _ in range(4))
    return (loss, lse, residue, h.new_empty(rows if flash and keep_mean else 0, dim),
            h.new_empty(dim, dtype=torch.float32), rnorm_h, h.new_empty(codes, dtype=torch.float32),
            h.new_empty(rows, dtype=torch.int32), h.new_empty(rows if flash else 0, dtype=torch.int64))


@_forward.register_fake
def _(h, weight, target, scale, ignore_index, smoothing, eps, keep_mean):
    return _empty_outputs(h, weight, keep_mean)


@library.custom_op("dgi_kernels::cosine_loss_triton_backward", mutates_args=())
def _backward(upstream: Tensor, h: Tensor, weight: Tensor, scale: Tensor, lse: Tensor, residue: Tensor, mean: Tensor,
              centre: Tensor, rnorm_h: Tensor, rnorm_w: Tensor, label: Tensor, order: Tensor, smoothing: float,
              eps: float, need_h: bool, need_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> dh, dweight (empty where not needed), dscale."""
    dh = h.new_empty(h.shape if need_h else (0, 0))
    return _gradients(dh, need_weight, upstream, h, weight, scale, lse, residue, mean, centre, rnorm_h, rnorm_w, label,
                      order, smoothing, eps)


@_backward.register_fake
def _(upstream, h, weight, scale, lse, residue, mean, centre, rnorm_h, rnorm_w, label, order, smoothing, eps,
      need_h, need_weight):
    return (h.new_empty(h.shape if need_h else (0, 0)), weight.new_empty(weight.shape if need_weight else (0, 0)),
            torch.empty_like(scale))


def _gradients(dh: Tensor, need_weight: bool, upstream: Tensor, h: Tensor, weight: Tensor, scale: Tensor, lse: Tensor,
               residue: Tensor, mean: Tensor, centre: Tensor, rnorm_h: Tensor, rnorm_w: Tensor, label: Tensor,
               order: Tensor, smoothing: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """-> dh, filled where it has elements (it may be ``mean`` itself), dweight (or empty), dscale."""
    dweight = weight.new_empty(weight.shape if need_weight else (0, 0))
    if h.shape[0] == 0:
        return dh, dweight.zero_(), torch.zeros_like(scale)
    upstream = torch.where(label >= 0, upstream, 0.0)
    h, weight = _tiled(h), _tiled(weight)
    with torch.cuda.device_of(h):
        if not uses_flash(h.shape[1], h.dtype):
            return dh, dweight, _chunked_gradients(upstream, h, weight, scale, lse, residue, rnorm_h, rnorm_w, label,
                                                   smoothing, eps, dh, dweight).sum()
        by_row = len(mean) > 0
        if need_weight or not by_row:
            radial = _flash_weight(upstream * rnorm_h, h, weight, scale, lse, residue, rnorm_h, rnorm_w, label, order,
                                   smoothing, eps, dweight)
        if by_row:
            radial = _flash_hidden(upstream, h, weight, scale, residue, mean, centre, rnorm_h, rnorm_w, label,
                                   smoothing, eps, dh)
    return dh, dweight, radial.sum()


def _save(ctx, inputs, output) -> None:
    h, weight, target, scale, ctx.ignore_index, ctx.smoothing, ctx.eps, ctx.keeps_mean = inputs
    ctx.save_for_backward(target, h, weight, scale, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.mean_is_gone = False


def _differentiate(ctx, upstream: Tensor, *_: None):
    """The first backward turns the mean into dh where it lies: a second (N, D) could be larger than all else.

    The mean is gone then, and a later backward through the same graph makes it again.  What is traced (its tensors are
    no plain ones) or may be differentiated once more calls the operator, which leaves it as it is.
    """
    target, h, weight, scale, lse, residue, mean, *others = ctx.saved_tensors
    need_h, need_weight, _, need_scale = ctx.needs_input_grad[:4]
    if (need_h and not ctx.keeps_mean) or (ctx.mean_is_gone and (need_h or need_scale)):
        mean = _forward(h, weight, target, scale, ctx.ignore_index, ctx.smoothing, ctx.eps, True)[3]
    arguments = [upstream, h, weight, scale, lse, residue, mean, *others, ctx.smoothing, ctx.eps]
    if need_h and mean.shape == h.shape and type(mean) is Tensor and not torch.is_grad_enabled():
        ctx.mean_is_gone = True
        dh, dweight, dscale = _gradients(mean, need_weight, *arguments)
    else:
        dh, dweight, dscale = _backward(*arguments, need_h, need_weight)
    return (dh if need_h else None, dweight if need_weight else None, None, dscale if need_scale else None,
            None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


def _flash_hidden(upstream: Tensor, h: Tensor, weight: Tensor, scale: Tensor, residue: Tensor, mean: Tensor,
                  centre: Tensor, rnorm_h: Tensor, rnorm_w: Tensor, label: Tensor, smoothing: float, eps: float,
                  dh: Tensor) -> Tensor:
    """Fill dh where it has elements; return each row's part of dscale."""
    rows, dim = h.shape
    radial = torch.empty_like(upstream)
    b_n, b_d = finish_block(dim)
    kernels.flash_hidden_kernel[(triton.cdiv(rows, b_n),)](
        mean, h, weight, rnorm_h, rnorm_w, residue, upstream, label, scale, centre, dh, radial, rows, dim,
        dh.shape[1], h.stride(0), weight.stride(0), smoothing, eps, b_n=b_n, b_d=b_d, num_warps=4)
    return radial


def _flash_weight(upstream: Tensor, h: Tensor, weight: Tensor, scale: Tensor, lse: Tensor,
                  residue: Tensor, rnorm_h: Tensor, rnorm_w: Tensor, label: Tensor, order: Tensor, smoothing: float,
                  eps: float, dweight: Tensor) -> Tensor:
    """Fill dweight where it has elements; return each column's part of dscale."""
    (rows, dim), codes = h.shape, weight.shape[0]
    if codes == 0:
        return rnorm_w
    radial = torch.empty_like(rnorm_w)
    centre = torch.empty_like(h[0], dtype=torch.float32)
    _weighted_sum(h, upstream, smoothing / codes, centre)
    gain = _gain(upstream, h.dtype)
    b_d, (_, tiles) = flash_config(dim, h.device)
    programs = triton.cdiv(codes, tiles.owned)
    splits = max(1, min(triton.cdiv(rows, tiles.step), multiprocessors(h) // programs))
    # 16 bits and a factor for each column: what they round is an eighth of what bfloat16 gradients are rounded by, and
    # in 32 bits the partials would be the largest of all that is kept (1.6 % of 65,536 rows' logits at D = 256).
    partial = h.new_empty(splits, codes, dim, dtype=torch.float16 if h.dtype in HALF else torch.float32)
    largest = h.new_empty(splits, codes, dtype=torch.float32)
    kernels.flash_weight_kernel[(programs, splits)](
        h, weight, rnorm_h, rnorm_w, lse, residue, upstream if gain is None else upstream * gain, label, order, scale,
        partial, largest, rows, codes, dim, h.stride(0), weight.stride(0), 2.0 ** LOG2_SKIP[h.dtype], b_k=tiles.owned,
        b_n=tiles.step, b_d=b_d, num_warps=tiles.warps, num_stages=tiles.stages)
    _finish(partial, largest, weight, rnorm_w, scale, gain, centre, eps, False, dweight, radial)
    return radial.mul_(rnorm_w)


def _chunked_loss(h: Tensor, weight: Tensor, scale: Tensor, rnorm_h: Tensor, rnorm_w: Tensor, logit: Tensor,
                  extra: Tensor, label: Tensor, smoothing: float, loss: Tensor, lse: Tensor, residue: Tensor) -> None:
    codes = weight.shape[0]
    for rows, s in _chunks(h, weight):
        product(h[rows], weight.T, s)
        kernels.chunk_loss_kernel[(len(s),)](
            s, rnorm_h[rows], rnorm_w, logit[rows], extra[rows], label[rows], scale, loss[rows], lse[rows],
            residue[rows], codes, smoothing, b_k=CHUNK_STEP, num_warps=8)


def _chunked_gradients(upstream: Tensor, h: Tensor, weight: Tensor, scale: Tensor, lse: Tensor, residue: Tensor,
                       rnorm_h: Tensor, rnorm_w: Tensor, label: Tensor, smoothing: float, eps: float, dh: Tensor,
                       dweight: Tensor) -> Tensor:
    """Fill dh and dweight where they have elements; return each row's part of dscale."""
    (_, dim), codes = h.shape, weight.shape[0]
    per_row = upstream * torch.where(rnorm_h == 0, 1.0, rnorm_h)
    gain = _gain(per_row, h.dtype, rnorm_w)
    if gain is not None:
        per_row = per_row * gain
    total = weight.new_zeros(codes, dim, dtype=torch.float32)
    nothing = total.new_zeros(dim)
    radial = torch.empty_like(upstream)
    for rows, s in _chunks(h, weight):
        g = s if h.dtype == torch.float32 else s.new_empty(s.shape, dtype=h.dtype)
        product(h[rows], weight.T, s)
        kernels.chunk_gradient_kernel[(len(s), triton.cdiv(codes, CHUNK_STEP))](
            s, g, rnorm_h[rows], rnorm_w, lse[rows], residue[rows], per_row[rows], label[rows], scale, codes,
            smoothing / max(codes, 1), b_k=CHUNK_STEP, num_warps=8)
        if dweight.numel():
            add_product(g.T, h[rows], total)
        row_total = s.new_empty(1, len(s), dim)
        product(g, weight, row_total[0])
        _finish(row_total, None, h[rows], rnorm_h[rows], scale, gain, nothing, eps, True, dh[rows], radial[rows])
    if dweight.numel():
        _finish(total[None], None, weight, rnorm_w, scale, gain, nothing, eps, True, dweight, None)
    return radial


def _chunks(h: Tensor, weight: Tensor):
    """Slices of rows, each with a float32 buffer for its products (one memory for all); none without codes."""
    rows, codes = h.shape[0], weight.shape[0]
    budget = measured.number("cosine.chunk_bytes", CHUNK_BYTES, h.device)
    size = max(1, budget // (max(codes, 1) * (4 if h.dtype == torch.float32 else 6)))
    size = min(rows, size if size < 128 else size // 128 * 128)
    buffer = h.new_empty(size, codes, dtype=torch.float32)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows)), buffer[:rows - start]


def _gain(per_row: Tensor, dtype: torch.dtype, per_column: Tensor | None = None) -> Tensor | None:
    """What brings weights of up to per_row x per_column near the top of float16's range; other dtypes need nothing."""
    if dtype != torch.float16 or per_row.numel() == 0:
        return None
    largest = per_row.abs().amax()
    if per_column is not None and per_column.numel():
        largest = largest * torch.where(per_column == 0, 1.0, per_column).amax()
    return 2.0**14 / largest.clamp(min=1e-30)


def _weighted_sum(x: Tensor, weight: Tensor, factor: float, out: Tensor) -> None:
    """out (D,) = factor sum_n weight_n x_n; no pass over x for the factor 0 of a loss without smoothing."""
    rows, dim = x.shape
    if factor == 0 or rows == 0:
        out.zero_()
        return
    b_n, b_d = SUM_BLOCK
    rows_each = triton.cdiv(triton.cdiv(rows, SUM_PROGRAMS), b_n) * b_n
    partial = x.new_empty(triton.cdiv(rows, rows_each), dim, dtype=torch.float32)
    kernels.weighted_sum_kernel[(len(partial), triton.cdiv(dim, b_d))](
        x, weight, partial, rows, dim, x.stride(0), rows_each, b_n=b_n, b_d=b_d, num_warps=4)
    torch.mul(partial.sum(0), factor, out=out)


def _finish(partial: Tensor, largest: Tensor | None, x: Tensor, rnorm: Tensor, scale: Tensor, gain: Tensor | None,
            centre: Tensor, eps: float, scaled: bool, out: Tensor, product: Tensor | None) -> None:
    """out (rows, width), or nothing at all, from partial (splits, rows, dim), times largest (splits, rows)."""
    splits, rows, dim = partial.shape
    width = out.shape[1] if out.numel() else 0
    b_n, b_d = finish_block(dim)
    kernels.finish_kernel[(triton.cdiv(rows, b_n),)](
        partial, largest, x, rnorm, scale, gain, centre, out, product, splits, rows, dim, width, x.stride(0), eps,
        scaled=scaled, b_n=b_n, b_d=b_d, num_warps=4)


def _tiled(x: Tensor) -> Tensor:
    """x (rows, D), padded with zeros to a multiple of 16 dimensions where rows cannot be read 16 bytes at a time."""
    if x.stride(1) == 1 and x.shape[1] and x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(len(x), _tiled_dim(x.shape[1]))
    padded[:, :x.shape[1]] = x
    return padded


def _tiled_dim(dim: int) -> int:
    return max(16, (dim + 15) // 16 * 16)
