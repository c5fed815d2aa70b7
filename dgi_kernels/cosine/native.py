"""Calls into the compiled extension: scaled cosine logits and their cross-entropy in C++ (``csrc/cpu/cosine``).

The loss' gradients are made together with it, so that backward only scales them by one number; with
``reduction="none"``, or where the log normalizers are returned too, the rows' weights are not known before backward,
which then works the tiles again.  Gradients of gradients are those of the reference, which every function here is given
for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels._extension import fake_kernel
from dgi_kernels.backend import tracing
from dgi_kernels.cosine.options import Columns, LossOptions
from dgi_kernels.enums import REDUCTIONS
from dgi_kernels.native_common import create_graph, gradients_of, wants_gradients

Gradients = tuple[Tensor | None, ...]
Reference = Callable[..., Any]


def cosine_logits(h: Tensor, weight: Tensor, scale: float | Tensor, eps: float, reference: Reference) -> Tensor:
    """(..., D), (K, D) of one dtype -> (..., K) of that dtype."""
    scale = checks.scalar_tensor(scale, checks.compute_dtype(h.dtype), h.device)
    if not wants_gradients(h, weight, scale):
        return _logits(h, weight, scale, eps)
    return _CosineLogits.apply(h, weight, scale, eps, reference)


def cosine_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float | Tensor,
    columns: Columns,
    options: LossOptions,
    reference: Reference,
) -> tuple[Tensor, Tensor | None]:
    """(..., D), (K, D) of one dtype, (...) int64 -> loss () or (...), log normalizer (...) if wanted.

    A target out of range gives NaN for its row.
    """
    scale = checks.scalar_tensor(scale, checks.compute_dtype(h.dtype), h.device)
    columns = columns.within(scale.dtype)
    bias, same_as = columns.bias, columns.same_as
    by_row = options.per_row() if options.return_log_normalizer else options
    if wants_gradients(h, weight, scale, *(() if bias is None else (bias,))):
        loss, log_normalizer = _CosineCrossEntropy.apply(h, weight, scale, bias, target, same_as, by_row, reference)
    else:
        loss, log_normalizer = _loss((h, weight, scale, bias), target, same_as, None, None, by_row, _NONE)[0]
    if not options.return_log_normalizer:
        return loss, None
    return options.reduce(loss, target), log_normalizer


_NONE = (False, False, False, False)  # no gradient is wanted


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D) without gaps."""
    return (x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])).contiguous()


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1).contiguous()


def _logits(h: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    logits = torch.ops.dgi_kernels.cosine_logits(_rows(h), weight.contiguous(), scale, eps)
    return logits if h.ndim == 2 else logits.view(*h.shape[:-1], weight.shape[0])


def _loss(
    operands: Sequence[Any],
    target: Tensor,
    same_as: Tensor | None,
    upstream: Tensor | None,
    upstream_log_normalizer: Tensor | None,
    options: LossOptions,
    wanted: Sequence[bool],
) -> tuple[tuple[Tensor, Tensor | None], Gradients]:
    """``operands`` are h, weight, scale and bias -> loss and log normalizer, and the gradients that are ``wanted``."""
    h, weight, scale, bias = operands
    loss, log_normalizer, *gradients = torch.ops.dgi_kernels.cosine_cross_entropy(
        _rows(h),
        weight.contiguous(),
        _flat(target),
        scale,
        _flat(bias),
        _flat(same_as),
        _flat(upstream),
        _flat(upstream_log_normalizer),
        options.ignore_index,
        REDUCTIONS.index(options.reduction),
        options.label_smoothing,
        options.eps,
        options.return_log_normalizer,
        *wanted,
    )
    if options.reduction == "none" and target.ndim != 1:
        loss = loss.view(target.shape)
    if options.return_log_normalizer:
        return (loss, log_normalizer.view(target.shape)), _present(h, gradients, wanted)
    return (loss, None), _present(h, gradients, wanted)


def _present(h: Tensor, gradients: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
    dh, *others = (g if want else None for g, want in zip(gradients, wanted, strict=True))
    return dh if dh is None else dh.view(h.shape), *others


def _of_reference(
    function: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients that can be differentiated themselves."""
    with torch.enable_grad():
        compute = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
        outputs = function(*(x.to(compute) for x in inputs))
        return gradients_of(outputs, [None if g is None else g.to(compute) for g in upstream], inputs, wanted)


class _CosineLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, scale: Tensor, eps: float, reference: Reference) -> Tensor:
        ctx.save_for_backward(h, weight, scale)
        ctx.eps, ctx.reference = eps, reference
        return _logits(h, weight, scale, eps)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, scale = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if create_graph():
            return (
                *_of_reference(
                    lambda *inputs: (ctx.reference(*inputs, ctx.eps),), (h, weight, scale), (upstream,), wanted
                ),
                None,
                None,
            )
        return (
            *_present(
                h,
                torch.ops.dgi_kernels.cosine_logits_backward(
                    _rows(upstream), _rows(h), weight.contiguous(), scale, ctx.eps, *wanted
                ),
                wanted,
            ),
            None,
            None,
        )


class _CosineCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        target: Tensor,
        same_as: Tensor | None,
        options: LossOptions,
        reference: Reference,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.options, ctx.reference = options, reference
        ctx.set_materialize_grads(False)
        wanted = ctx.needs_input_grad[:4] if options.reduction != "none" else _NONE
        outputs, gradients = _loss((h, weight, scale, bias), target, same_as, None, None, options, wanted)
        if tracing():
            ctx.save_for_backward(h, weight, scale, bias, target, same_as, *gradients)
        else:
            ctx.save_for_backward(h, weight, scale, bias, target, same_as)
            ctx.gradients = gradients
        return outputs

    @staticmethod
    def backward(
        ctx: Any, upstream: Tensor | None, upstream_log_normalizer: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        h, weight, scale, bias, target, same_as, *gradients = ctx.saved_tensors
        operands, wanted = (h, weight, scale, bias), ctx.needs_input_grad[:4]
        if upstream is None and upstream_log_normalizer is None:
            return (None,) * 8
        if create_graph():

            def outputs(h: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> list[Tensor]:
                columns = Columns(bias, same_as)
                both = ctx.reference(_rows(h), weight, target.reshape(-1), scale, columns, ctx.options)
                by_row = ctx.options.reduction == "none"
                return [x.view(target.shape) if by_row else x for x in both if x is not None]

            given = [x for x in operands if x is not None]
            upstreams = (upstream, upstream_log_normalizer) if ctx.options.return_log_normalizer else (upstream,)
            found = _of_reference(outputs, given, upstreams, wanted[: len(given)])
            return *found, *(None for _ in range(8 - len(found)))
        if ctx.options.reduction == "none":
            if upstream is None:
                upstream = torch.zeros(target.shape, dtype=scale.dtype)
            gradients = _loss(operands, target, same_as, upstream, upstream_log_normalizer, ctx.options, wanted)[1]
        elif gradients:
            gradients = [g if g is None else g * upstream for g in gradients]
        else:
            gradients = _take_gradients(ctx, operands, target, same_as, upstream)
        return *gradients, None, None, None, None


def _take_gradients(
    ctx: Any, operands: Sequence[Any], target: Tensor, same_as: Tensor | None, upstream: Any
) -> Gradients:
    """The gradients made in forward, times ``upstream``, in place: a second copy could be larger than all else.

    They are gone then, and a second backward through the same graph makes them again.
    """
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        gradients = _loss(operands, target, same_as, None, None, ctx.options, ctx.needs_input_grad[:4])[1]
    if upstream.item() != 1:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream)
    return gradients


@fake_kernel("cosine_logits")
def _(h: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    return h.new_empty((h.shape[0], weight.shape[0]))


def _fake_gradients(inputs: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    return tuple(
        torch.empty_like(x) if want else x.new_empty(0, dtype=torch.float32)
        for x, want in zip(inputs, wanted, strict=True)
    )


@fake_kernel("cosine_logits_backward")
def _(dlogits: Tensor, h: Tensor, weight: Tensor, scale: Tensor, eps: float, *wanted: bool) -> tuple[Tensor, ...]:
    return _fake_gradients((h, weight, scale), wanted)


@fake_kernel("cosine_cross_entropy")
def _(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    same_as: Tensor | None,
    upstream: Tensor | None,
    upstream_log_normalizer: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    eps: float,
    wants_log_normalizer: bool,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    rows = h.shape[0]
    return (
        scale.new_empty((rows,) if REDUCTIONS[reduction] == "none" else ()),
        scale.new_empty(rows if wants_log_normalizer else 0),
        *_fake_gradients((h, weight, scale, scale.new_empty(weight.shape[0])), wanted),
    )
