"""Launchers of the cosine cross-entropy in Triton, as operators that torch.compile keeps whole.

The forward operator returns the loss of every row, without reduction, and what backward needs; formulas, counts and
predictions are in :mod:`dgi_kernels.cosine.triton_kernels`. Grids depend on shapes alone and nothing is read back, so a
CUDA graph can hold a training step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dgi_kernels.cosine import triton_kernels as kernels

HALF = (torch.float16, torch.bfloat16)

# Weights below this part of their row's mass need no product: what float32 sums drop, and for 16-bit operands the square of
# their rounding, a 2^-9th (bfloat16) or 2^-11th (float16) of what rounding the weights themselves does to a flat row.
LOG2_SKIP = {torch.float32: -24.0, torch.float16: -22.0, torch.bfloat16: -18.0}


class FlashConfig(NamedTuple):
    """Tiles of the flash form for D <= b_d: rows owned, or columns, by rows or columns passed in one step."""

    b_d: int
    owned: int
    step: int
    warps: int
    stages: int


# All that the launchers can choose: bench/gpu_code.py compiles each for every architecture. Leads, not yet measured.
FLASH = (
    FlashConfig(b_d=64, owned=128, step=64, warps=4, stages=3),
    FlashConfig(b_d=128, owned=128, step=64, warps=8, stages=3),
    FlashConfig(b_d=256, owned=128, step=64, warps=8, stages=2),
)
CHUNK_BYTES = 32 << 20  # products and weights of one chunk: they stay in the L2 of an H100 or H200 (50 MB)
CHUNK_STEP = 2048  # columns of one pass of the chunked epilogues
NORM_BLOCK = (16, 128)  # rows, dimensions
SUM_BLOCK = (32, 64)
SUM_PROGRAMS = 64
ORDER_FROM = (4096, 512)  # rows and columns from which sorting rows costs less than the products it can save


def flash_config(dim: int, dtype: torch.dtype) -> FlashConfig | None:
    """The flash form's tiles, or None for the chunked form: the one place where the form is chosen.

    float32 is chunked: Triton's exact float32 product does not reach cuBLAS's. Beyond D = 256 the float32 accumulators of a
    tile of whole rows do not fit the registers. Both crossovers are to be measured on a GPU.
    """
    if dtype not in HALF:
        return None
    return next((config for config in FLASH if dim <= config.b_d), None)


def cosine_cross_entropy(h: Tensor, weight: Tensor, target: Tensor, scale: float | Tensor, ignore_index: int,
                         reduction: str, label_smoothing: float, eps: float) -> Tensor:
    """(N, D), (K, D), (N,) int64 -> () or (N,) float32; a target out of range gives NaN for its row."""
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=h.device)
    with_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad or scale.requires_grad)
    loss = _forward(h, weight, target, scale.float(), ignore_index, label_smoothing, eps, with_grad)[0]
    if reduction == "mean":
        return loss.sum() / (target != ignore_index).sum()
    return loss.sum() if reduction == "sum" else loss


@torch.library.custom_op("dgi_kernels::cosine_loss_triton", mutates_args=())
def _forward(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, ignore_index: int, smoothing: float, eps: float,
             with_grad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, lse, residue, radial, unit, rnorm_h, rnorm_w, label, order (those that no backward will read: empty)."""
    outputs = _empty_outputs(h, weight, with_grad)
    loss, lse, residue, radial, unit, rnorm_h, rnorm_w, label, order = outputs
    (rows, dim), codes = h.shape, weight.shape[0]
    if rows == 0:
        return outputs
    h, weight = _inner_contiguous(h), _inner_contiguous(weight)
    with torch.cuda.device_of(h):
        _norms(weight, eps, rnorm_w)
        centre = _weighted_sum(weight, rnorm_w, smoothing / max(codes, 1))
        logit, extra = torch.empty_like(loss), torch.empty_like(loss)
        key = torch.empty_like(label)
        b_n, b_d = NORM_BLOCK
        kernels.target_kernel[(triton.cdiv(rows, b_n),)](
            h, weight, target.contiguous(), scale, centre, rnorm_h, logit, extra, label, key, rows, codes, dim, h.stride(0),
            weight.stride(0), ignore_index, eps, smoothing, b_n=b_n, b_d=b_d, num_warps=4)
        config = flash_config(dim, h.dtype)
        if config is None:
            _chunked_loss(h, weight, scale, rnorm_h, rnorm_w, logit, extra, label, smoothing, loss, lse, residue)
            return outputs
        if rows >= ORDER_FROM[0] and codes >= ORDER_FROM[1]:
            order.copy_(torch.sort(key, stable=True).indices)
        else:
            torch.arange(rows, out=order)
        gain = 2.0**6 / rnorm_w.amax() if h.dtype == torch.float16 and codes else None
        kernels.flash_forward_kernel[(triton.cdiv(rows, config.owned),)](
            h, weight, rnorm_h, rnorm_w, logit, extra, label, order, scale, gain, centre, loss, lse, residue, radial, unit,
            rows, codes, dim, h.stride(0), weight.stride(0), smoothing, eps, LOG2_SKIP[h.dtype], with_grad=with_grad,
            b_n=config.owned, b_k=config.step, b_d=config.b_d, num_warps=config.warps, num_stages=config.stages)
    return outputs


def _empty_outputs(h: Tensor, weight: Tensor, with_grad: bool) -> tuple[Tensor, ...]:
    rows, codes = h.shape[0], weight.shape[0]
    flash = flash_config(h.shape[1], h.dtype) is not None
    kept = rows if with_grad or not flash else 0
    unit = rows if flash and with_grad else 0
    return (h.new_empty(rows, dtype=torch.float32), h.new_empty(kept, dtype=torch.float32),
            h.new_empty(kept, dtype=torch.float32), h.new_empty(unit, dtype=torch.float32),
            h.new_empty(unit, h.shape[1]), h.new_empty(rows, dtype=torch.float32),
            h.new_empty(codes, dtype=torch.float32), h.new_empty(rows, dtype=torch.int32),
            h.new_empty(rows if flash else 0, dtype=torch.int64))


@_forward.register_fake
def _(h, weight, target, scale, ignore_index, smoothing, eps, with_grad):  # type: ignore[no-untyped-def]
    return _empty_outputs(h, weight, with_grad)


@torch.library.custom_op("dgi_kernels::cosine_loss_triton_backward", mutates_args=())
def _backward(upstream: Tensor, h: Tensor, weight: Tensor, scale: Tensor, lse: Tensor, residue: Tensor, radial: Tensor,
              unit: Tensor, rnorm_h: Tensor, rnorm_w: Tensor, label: Tensor, order: Tensor, smoothing: float,
              eps: float, need_h: bool, need_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> dh, dweight (empty where not needed), dscale."""
    dh = h.new_empty(h.shape if need_h else 0)
    dweight = weight.new_empty(weight.shape if need_weight else 0)
    if h.shape[0] == 0:
        return dh, dweight.zero_(), torch.zeros_like(scale)
    upstream = torch.where(label >= 0, upstream, 0.0)
    h, weight = _inner_contiguous(h), _inner_contiguous(weight)
    config = flash_config(h.shape[1], h.dtype)
    with torch.cuda.device_of(h):
        if config is None:
            dscale = _chunked_gradients(upstream, h, weight, scale, lse, residue, rnorm_h, rnorm_w, label, smoothing, eps,
                                        dh, dweight)
            return dh, dweight, dscale
        if need_h:
            factor = scale * upstream * torch.where(rnorm_h == 0, 1 / eps, rnorm_h)
            _scale_rows(unit, factor, dh)
        if need_weight:
            _flash_weight(config, upstream * rnorm_h, h, weight, scale, lse, residue, rnorm_h, rnorm_w, label, order,
                          smoothing, eps, dweight)
    return dh, dweight, (upstream * radial).sum()


@_backward.register_fake
def _(upstream, h, weight, scale, lse, residue, radial, unit, rnorm_h, rnorm_w, label, order, smoothing, eps,  # type: ignore
      need_h, need_weight):
    return (h.new_empty(h.shape if need_h else 0), weight.new_empty(weight.shape if need_weight else 0),
            torch.empty_like(scale))


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    h, weight, _, scale, _, ctx.smoothing, ctx.eps, _ = inputs
    ctx.save_for_backward(h, weight, scale, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, upstream: Tensor, *_: None):  # type: ignore[no-untyped-def]
    need_h, need_weight, _, need_scale = ctx.needs_input_grad[:4]
    dh, dweight, dscale = _backward(upstream, *ctx.saved_tensors, ctx.smoothing, ctx.eps, need_h, need_weight)
    return (dh if need_h else None, dweight if need_weight else None, None, dscale if need_scale else None,
            None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)


def _flash_weight(config: FlashConfig, upstream: Tensor, h: Tensor, weight: Tensor, scale: Tensor, lse: Tensor,
                  residue: Tensor, rnorm_h: Tensor, rnorm_w: Tensor, label: Tensor, order: Tensor, smoothing: float,
                  eps: float, dweight: Tensor) -> None:
    (rows, dim), codes = h.shape, weight.shape[0]
    centre = _weighted_sum(h, upstream, smoothing / max(codes, 1))
    gain = _gain(upstream, h.dtype)
    tiles = triton.cdiv(codes, config.owned)
    splits = max(1, min(triton.cdiv(rows, config.step), _multiprocessors(h) // max(tiles, 1)))
    partial = h.new_empty(splits, codes, dim, dtype=torch.float32)
    if codes == 0:
        return
    kernels.flash_weight_kernel[(tiles, splits)](
        h, weight, rnorm_h, rnorm_w, lse, residue, upstream if gain is None else upstream * gain, label, order, scale,
        partial, rows, codes, dim, h.stride(0), weight.stride(0), 2.0 ** LOG2_SKIP[h.dtype], b_k=config.owned,
        b_n=config.step, b_d=config.b_d, num_warps=config.warps, num_stages=config.stages)
    _finish(partial, weight, rnorm_w, scale, gain, centre, eps, False, dweight, None)


def _chunked_loss(h: Tensor, weight: Tensor, scale: Tensor, rnorm_h: Tensor, rnorm_w: Tensor, logit: Tensor, extra: Tensor,
                  label: Tensor, smoothing: float, loss: Tensor, lse: Tensor, residue: Tensor) -> None:
    codes = weight.shape[0]
    for rows, s in _chunks(h, weight):
        _product(h[rows], weight.T, s)
        kernels.chunk_loss_kernel[(len(s),)](
            s, rnorm_h[rows], rnorm_w, logit[rows], extra[rows], label[rows], scale, loss[rows], lse[rows], residue[rows],
            codes, smoothing, b_k=CHUNK_STEP, num_warps=8)


def _chunked_gradients(upstream: Tensor, h: Tensor, weight: Tensor, scale: Tensor, lse: Tensor, residue: Tensor,
                       rnorm_h: Tensor, rnorm_w: Tensor, label: Tensor, smoothing: float, eps: float, dh: Tensor,
                       dweight: Tensor) -> Tensor:
    """Fill dh and dweight where they have elements; return dscale. The products of a chunk are made again, not kept."""
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
        _product(h[rows], weight.T, s)
        kernels.chunk_gradient_kernel[(len(s), triton.cdiv(codes, CHUNK_STEP))](
            s, g, rnorm_h[rows], rnorm_w, lse[rows], residue[rows], per_row[rows], label[rows], scale, codes,
            smoothing / max(codes, 1), b_k=CHUNK_STEP, num_warps=8)
        if dweight.numel():
            _add_product(g.T, h[rows], total)
        row_total = s.new_empty(1, len(s), dim)
        _product(g, weight, row_total[0])
        out = dh[rows] if dh.numel() else torch.empty_like(h[rows], memory_format=torch.contiguous_format)
        _finish(row_total, h[rows], rnorm_h[rows], scale, gain, nothing, eps, True, out, radial[rows])
    if dweight.numel():
        _finish(total[None], weight, rnorm_w, scale, gain, nothing, eps, True, dweight, None)
    return radial.sum()


def _chunks(h: Tensor, weight: Tensor):  # type: ignore[no-untyped-def]
    """Slices of rows, each with a float32 buffer for its products (one memory for all); none without codes."""
    rows, codes = h.shape[0], weight.shape[0]
    size = max(1, CHUNK_BYTES // (max(codes, 1) * (4 if h.dtype == torch.float32 else 6)))
    size = min(rows, size if size < 128 else size // 128 * 128)
    buffer = h.new_empty(size, codes, dtype=torch.float32)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows)), buffer[:rows - start]


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (float32) = a @ b, through cuBLAS with float32 accumulation and result (TF32 as torch's setting says)."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def _add_product(a: Tensor, b: Tensor, total: Tensor) -> None:
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:  # addmm takes no float32 sum of 16-bit products before torch 2.11
        product = torch.empty_like(total)
        _product(a, b, product)
        total.add_(product)


def _gain(per_row: Tensor, dtype: torch.dtype, per_column: Tensor | None = None) -> Tensor | None:
    """What brings weights of up to per_row x per_column near the top of float16's range; other dtypes need nothing."""
    if dtype != torch.float16 or per_row.numel() == 0:
        return None
    largest = per_row.abs().amax()
    if per_column is not None and per_column.numel():
        largest = largest * torch.where(per_column == 0, 1.0, per_column).amax()
    return 2.0**14 / largest.clamp(min=1e-30)


def _norms(x: Tensor, eps: float, rnorm: Tensor) -> None:
    b_n, b_d = NORM_BLOCK
    if len(x):
        kernels.norm_kernel[(triton.cdiv(len(x), b_n),)](x, rnorm, *x.shape, x.stride(0), eps, b_n=b_n, b_d=b_d, num_warps=4)


def _weighted_sum(x: Tensor, weight: Tensor, factor: float) -> Tensor:
    """factor sum_n weight_n x_n, (D,) float32; zeros at no cost for the factor 0 of an unsmoothed loss."""
    rows, dim = x.shape
    if factor == 0 or rows == 0 or dim == 0:
        return x.new_zeros(dim, dtype=torch.float32)
    b_n, b_d = SUM_BLOCK
    rows_each = triton.cdiv(triton.cdiv(rows, SUM_PROGRAMS), b_n) * b_n
    partial = x.new_empty(triton.cdiv(rows, rows_each), dim, dtype=torch.float32)
    kernels.weighted_sum_kernel[(len(partial), triton.cdiv(dim, b_d))](
        x, weight, partial, rows, dim, x.stride(0), rows_each, b_n=b_n, b_d=b_d, num_warps=4)
    return partial.sum(0) * factor


def _scale_rows(x: Tensor, factor: Tensor, out: Tensor) -> None:
    rows, dim = x.shape
    if dim:
        b_n, b_d = finish_block(dim)
        kernels.scale_rows_kernel[(triton.cdiv(rows, b_n),)](x, factor, out, rows, dim, b_n=b_n, b_d=b_d, num_warps=4)


def _finish(partial: Tensor, x: Tensor, rnorm: Tensor, scale: Tensor, gain: Tensor | None, centre: Tensor, eps: float,
            scaled: bool, out: Tensor, product: Tensor | None) -> None:
    splits, rows, dim = partial.shape
    b_n, b_d = finish_block(dim)
    kernels.finish_kernel[(triton.cdiv(rows, b_n),)](
        partial, x, rnorm, scale, gain, centre, out, product, splits, rows, dim, x.stride(0), eps, scaled=scaled, b_n=b_n,
        b_d=b_d, num_warps=4)


def finish_block(dim: int) -> tuple[int, int]:
    """Rows and dimensions of a tile of whole rows with about 2048 elements."""
    b_d = max(16, triton.next_power_of_2(dim))
    return max(1, 2048 // b_d), b_d


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def _inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()
