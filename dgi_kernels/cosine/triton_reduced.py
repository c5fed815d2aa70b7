"""The cosine cross-entropy with ``reduction="mean"`` or ``"sum"`` in the chunked form: gradients made with the loss.

All rows weigh alike then, so that what backward adds is one number: forward makes the logits once, and of a chunk's
weights both gradients but for their ends (:mod:`dgi_kernels.cosine.triton_products` has formulas and kernels).  Between
forward and backward lie dh, unfinished, in the place where the gradient of h will be, and dw in float32.

Beside them a chunk's weights are the only memory that grows with K: KEPT_BYTES, less dw's, which is 2 % of the float32
logits of 65,536 rows and 4,096 columns.  Fewer launches of more rows would be faster, and take more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor, library

from dgi_kernels import checks
from dgi_kernels import tiles as measured
from dgi_kernels.cosine import triton_fused as fused
from dgi_kernels.cosine import triton_products as products
from dgi_kernels.cosine.options import LossOptions
from dgi_kernels.cosine.triton_launch import IN_RANGE as IN_RANGE
from dgi_kernels.cosine.triton_launch import finish, meet_targets, tiled, tiled_dim, weighted_sum
from dgi_kernels.cosine.triton_saved import may_replace
from dgi_kernels.triton_common import add_product, norms

KEPT_BYTES = 20 << 20  # a chunk's weights and dw's sums
SUMS_BLOCK, ROWS_BLOCK = 32, 32  # tiles of columns whose sums, and dimensions of rows that are read at once
SUM_ROWS = 2048  # of a part of the loss


class Made(NamedTuple):
    """What forward returns beside the loss."""

    dh: Tensor  # (N, tiled D) sum_k E_nk w^_k, or empty
    dweight: Tensor  # (K, tiled D) float32: rw_k sum_n h^_n g_nk, but for what is e / K, or empty
    inverse: Tensor  # (N,) 1 / sum_k E_nk, 0 for a row without a target
    counted: Tensor  # () int64, what the loss is divided by, at least 1
    centre: Tensor  # (D,) e mean_k w^_k
    rnorm_h: Tensor  # (N,)
    rnorm_w: Tensor  # (K,)
    label: Tensor  # (N,) int32


def cosine_cross_entropy(
    h: Tensor, weight: Tensor, target: Tensor, scale: float | Tensor, options: LossOptions
) -> Tensor:
    """(N, D), (K, D), (N,) int64 -> loss () float32, of N >= 1 rows and K >= 1 columns."""
    scale = checks.scalar_tensor(scale, torch.float32, h.device)
    need_h = h.requires_grad or scale.requires_grad
    mean = options.reduction == "mean"
    return _forward(
        h,
        weight,
        target,
        scale,
        options.ignore_index,
        options.label_smoothing,
        options.eps,
        mean,
        need_h,
        weight.requires_grad,
    )[0]


@library.custom_op("dgi_kernels::cosine_loss_triton_reduced", mutates_args=())
def _forward(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: Tensor,
    ignore_index: int,
    smoothing: float,
    eps: float,
    mean: bool,
    need_h: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss, and the parts of :class:`Made`."""
    loss, made = _empty(h, weight, need_h, need_weight)
    h, weight = tiled(h), tiled(weight)
    loss_of_row, logit, extra = (torch.empty_like(made.rnorm_h) for _ in range(3))
    with torch.cuda.device_of(h):
        norms(weight, eps, made.rnorm_w)
        weighted_sum(weight, made.rnorm_w, smoothing / len(weight), made.centre)
        meet_targets(
            h,
            weight,
            {"p_target": target.contiguous(), "p_scale": scale, "p_centre": made.centre},
            {"p_bias": None, "p_bias_centre": None},
            {
                "p_rnorm": made.rnorm_h,
                "p_logit": logit,
                "p_extra": extra,
                "p_label": made.label,
            },
            ignore_index,
            eps,
            smoothing,
        )
        of_row = {"p_logit": logit, "p_extra": extra, "p_scale": scale, "p_loss": loss_of_row}
        _chunks(h, weight, made, of_row, smoothing)
        _sum_losses(loss_of_row, made.label, loss, made.counted, mean)
    return loss, *made


def _sum_losses(of_row: Tensor, label: Tensor, loss: Tensor, counted: Tensor, mean: bool) -> None:
    """Fill the loss () and what it is divided by: in one launch, or in two where rows are many."""
    rows, parts = len(of_row), triton.cdiv(len(of_row), SUM_ROWS)
    options = {"mean": mean, "b_n": SUM_ROWS, "num_warps": 4}
    if parts == 1:
        products.sum_loss_kernel[(1,)](of_row, label, loss, counted, rows, of_rows=True, of_all=True, **options)
        return
    sums, numbers = of_row.new_empty(parts), label.new_empty(parts)
    products.sum_loss_kernel[(parts,)](of_row, label, sums, numbers, rows, of_rows=True, of_all=False, **options)
    products.sum_loss_kernel[(1,)](sums, numbers, loss, counted, parts, of_rows=False, of_all=True, **options)


def _empty(h: Tensor, weight: Tensor, need_h: bool, need_weight: bool) -> tuple[Tensor, Made]:
    (rows, dim), codes = (h.shape[0], tiled_dim(h.shape[1])), weight.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return h.new_empty(shape, dtype=dtype)

    return empty(), Made(
        empty(rows if need_h else 0, dim, dtype=h.dtype),
        empty(codes if need_weight else 0, dim),
        empty(rows),
        empty(dtype=torch.int64),
        empty(dim),
        empty(rows),
        empty(codes),
        empty(rows, dtype=torch.int32),
    )


@_forward.register_fake
def _(h, weight, target, scale, ignore_index, smoothing, eps, mean, need_h, need_weight):
    loss, made = _empty(h, weight, need_h, need_weight)
    return loss, *made


def _chunks(h: Tensor, weight: Tensor, made: Made, of_row: dict[str, Tensor], smoothing: float) -> None:
    """Fill ``of_row``'s loss and ``made``'s dh, dweight and inverse, chunk by chunk of the rows."""
    (rows, dim), codes = h.shape, len(weight)
    tiles = fused.fitting_tiles(dim, codes, h.device, plain=True)
    lse = torch.empty_like(made.rnorm_h)
    of_large = {"p_rnorm_h": made.rnorm_h, "p_label": made.label, **of_row}
    results = {"p_loss": of_large.pop("p_loss"), "p_lse": lse, "p_residue": made.inverse}
    columns = {"p_rnorm_w": made.rnorm_w, "p_bias": None, "p_group": None}
    fused.loss_of_rows(h, weight, columns, of_large, results, smoothing, smooth_apart=False, large_alone=True)

    size = min(rows, chunk_rows(codes, dim, tiles.owned, h.device))
    g = h.new_empty(size, codes)
    sums = made.rnorm_h.new_empty(triton.cdiv(codes, tiles.step), size)
    arrived = made.label.new_zeros(triton.cdiv(size, tiles.owned))
    spare = h.new_empty(0 if len(made.dh) or not len(made.dweight) else size, dim)
    for first in range(0, rows, size):
        own = slice(first, min(first + size, rows))
        count = own.stop - first
        chunk = g[:count]
        # The place of a chunk's dh serves the rows that dw is made of, until dh is.
        scaled = (made.dh[own] if len(made.dh) else spare[:count]) if len(made.dweight) else None
        products.product_weights_kernel[(len(sums), triton.cdiv(count, tiles.owned))](
            h,
            weight,
            chunk,
            sums,
            arrived,
            **of_row,
            p_rnorm_h=made.rnorm_h,
            p_rnorm_w=made.rnorm_w,
            p_lse=lse,
            p_label=made.label,
            p_inverse=made.inverse,
            p_rows=scaled,
            first=first,
            rows=count,
            K=codes,
            D=dim,
            stride_h=h.stride(0),
            stride_w=weight.stride(0),
            stride_rows=dim,
            smoothing=smoothing,
            ragged=codes % tiles.step > 0,
            b_t=SUMS_BLOCK,
            b_r=ROWS_BLOCK,
            **fused.blocks(tiles),
        )
        if scaled is not None:
            add_product(chunk.T, scaled, made.dweight, begins=first == 0)
        if len(made.dh):
            torch.mm(chunk, weight, out=made.dh[own])


def chunk_rows(codes: int, dim: int, owned: int, device: torch.device) -> int:
    """Rows of a chunk: a power of two of tiles, which fills the GPU's waves as well as any other number or better."""
    budget = measured.number("cosine.kept_bytes", KEPT_BYTES, device) - 4 * codes * dim
    tiles = max(1, budget // (2 * codes * owned))
    return max(fused.LEAST_ROWS, owned << (tiles.bit_length() - 1))


@library.custom_op("dgi_kernels::cosine_loss_triton_reduced_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    h: Tensor,
    weight: Tensor,
    scale: Tensor,
    dh: Tensor,
    dweight: Tensor,
    inverse: Tensor,
    counted: Tensor,
    centre: Tensor,
    rnorm_h: Tensor,
    rnorm_w: Tensor,
    label: Tensor,
    smoothing: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dh, dweight (empty where they are not made), dscale."""
    made = Made(dh, dweight, inverse, counted, centre, rnorm_h, rnorm_w, label)
    return _gradients(h.new_empty(h.shape if len(dh) else (0, 0)), upstream, h, weight, scale, made, smoothing, eps)


@_backward.register_fake
def _(upstream, h, weight, scale, dh, dweight, *others):
    return (
        h.new_empty(h.shape if len(dh) else (0, 0)),
        weight.new_empty(weight.shape if len(dweight) else (0, 0)),
        torch.empty_like(scale),
    )


def _gradients(
    out: Tensor,
    upstream: Tensor,
    h: Tensor,
    weight: Tensor,
    scale: Tensor,
    made: Made,
    smoothing: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> ``out``, filled (it may be ``made.dh`` itself), dweight, dscale."""
    of_weight = weight.new_empty(weight.shape if len(made.dweight) else (0, 0))
    h, weight = tiled(h), tiled(weight)
    upstream = upstream / made.counted
    factor = scale * upstream
    of_rows = of_columns = None  # what is e / K of all weights
    with torch.cuda.device_of(h):
        if smoothing:
            of_rows, of_columns = made.centre, torch.empty_like(made.centre)
            weighted_sum(h, made.rnorm_h * (made.label >= 0), smoothing / len(weight), of_columns)
        radial_w, radial_h = torch.empty_like(made.rnorm_w), torch.empty_like(made.rnorm_h)
        if len(made.dweight):
            part, rnorm = made.dweight[None], made.rnorm_w
            finish(part, None, weight, rnorm, None, of_columns, factor, eps, True, of_weight, radial_w)
        if len(made.dh):
            part, rnorm = made.dh[None], made.rnorm_h
            finish(part, made.inverse[None], h, rnorm, None, of_rows, factor, eps, False, out, radial_h, made.label)
    cosines = torch.dot(radial_h, made.rnorm_h) if len(made.dh) else radial_w.sum()
    return out, of_weight, cosines * upstream


def _save(ctx, inputs, output) -> None:
    h, weight, target, scale, *ctx.options = inputs
    ctx.save_for_backward(target, h, weight, scale, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dh_is_gone = False


def _differentiate(ctx, upstream: Tensor | None, *_):
    """By the operator, unless dh may be finished where it lies."""
    if upstream is None:
        return (None,) * 10
    target, h, weight, scale, *parts = ctx.saved_tensors
    _, smoothing, eps, *_ = ctx.options
    if ctx.dh_is_gone:
        parts = _forward(h, weight, target, scale, *ctx.options)[1:]
    dh = parts[0]
    if may_replace(dh, h):
        ctx.dh_is_gone = True
        found = _gradients(dh, upstream, h, weight, scale, Made(*parts), smoothing, eps)
    else:
        found = _backward(upstream, h, weight, scale, *parts, smoothing, eps)
    need_h, need_weight, _, need_scale = ctx.needs_input_grad[:4]
    return (
        found[0] if need_h else None,
        found[1] if need_weight else None,
        None,
        found[2] if need_scale else None,
        *(None,) * 6,
    )


_forward.register_autograd(_differentiate, setup_context=_save)
