"""Calls into the compiled extension: scaled cosine logits and their cross-entropy in C++ (``csrc/cpu/cosine``).

The loss' gradients are made together with it, so that backward only scales them by one number; with
``reduction="none"`` the rows' weights are not known before backward, which then works the tiles again.  Gradients of
gradients are those of the reference, which every function here is given for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgi_kernels.enums import REDUCTIONS

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def cosine_logits(h: Tensor, weight: Tensor, scale: float | Tensor, eps: float,
                  reference: Callable[..., Tensor]) -> Tensor:
    """(..., D), (K, D) of one dtype -> (..., K) of that dtype."""
    scale = _scale_tensor(scale, h)
    if not _wants_gradients(h, weight, scale):
        return _logits(h, weight, scale, eps)
    return _CosineLogits.apply(h, weight, scale, eps, reference)


def cosine_cross_entropy(h: Tensor, weight: Tensor, target: Tensor, scale: float | Tensor, ignore_index: int,
                         reduction: str, label_smoothing: float, eps: float,
                         reference: Callable[..., Tensor]) -> Tensor:
    """(..., D), (K, D) of one dtype, (...) int64 -> () or (...); a target out of range gives NaN for its row."""
    scale = _scale_tensor(scale, h)
    options = (ignore_index, reduction, label_smoothing, eps)
    if not _wants_gradients(h, weight, scale):
        return _loss(h, weight, target, scale, None, options, (False, False, False))[0]
    return _CosineCrossEntropy.apply(h, weight, scale, target, options, reference)


def _scale_tensor(scale: float | Tensor, h: Tensor) -> Tensor:
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    return scale.to(dtype) if isinstance(scale, Tensor) else torch.tensor(scale, dtype=dtype)


def _wants_gradients(h: Tensor, weight: Tensor, scale: Tensor) -> bool:
    return torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad or scale.requires_grad)


def _rows(x: Tensor) -> Tensor:
    """(..., D) -> (N, D) without gaps."""
    return (x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])).contiguous()


def _logits(h: Tensor, weight: Tensor, scale: Tensor, eps: float) -> Tensor:
    logits = torch.ops.dgi_kernels.cosine_logits(_rows(h), weight.contiguous(), scale, eps)
    return logits if h.ndim == 2 else logits.view(*h.shape[:-1], weight.shape[0])


def _loss(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, upstream: Tensor | None,
          options: tuple[int, str, float, float], wanted: Sequence[bool]) -> tuple[Tensor, Gradients]:
    ignore_index, reduction, label_smoothing, eps = options
    loss, *gradients = torch.ops.dgi_kernels.cosine_cross_entropy(
        _rows(h), weight.contiguous(), target.reshape(-1).contiguous(), scale, upstream, ignore_index,
        REDUCTIONS.index(reduction), label_smoothing, eps, *wanted)
    if reduction == "none" and target.ndim != 1:
        loss = loss.view(target.shape)
    return loss, _present(h, gradients, wanted)


def _present(h: Tensor, gradients: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
    dh, dweight, dscale = (g if want else None for g, want in zip(gradients, wanted, strict=True))
    return dh if dh is None else dh.view(h.shape), dweight, dscale


def _of_reference(loss: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor,
                  wanted: Sequence[bool]) -> Gradients:
    """Gradients that can be differentiated themselves."""
    with torch.enable_grad():
        compute = inputs[2].dtype  # of the scale
        output = loss(*(x.to(compute) for x in inputs))
        leaves = [x for x, want in zip(inputs, wanted, strict=True) if want]
        gradients = iter(torch.autograd.grad(output, leaves, upstream.to(output.dtype), create_graph=True))
    dh, dweight, dscale = (next(gradients) if want else None for want in wanted)
    return dh, dweight, dscale


def _create_graph() -> bool:
    """Whether backward runs with ``create_graph=True``; what is compiled cannot."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class _CosineLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, scale: Tensor, eps: float,
                reference: Callable[..., Tensor]) -> Tensor:
        ctx.save_for_backward(h, weight, scale)
        ctx.eps, ctx.reference = eps, reference
        return _logits(h, weight, scale, eps)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, scale = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if _create_graph():
            gradients = _of_reference(lambda *inputs: ctx.reference(*inputs, ctx.eps), (h, weight, scale), upstream,
                                      wanted)
        else:
            gradients = _present(h, torch.ops.dgi_kernels.cosine_logits_backward(
                _rows(upstream), _rows(h), weight.contiguous(), scale, ctx.eps, *wanted), wanted)
        return *gradients, None, None


class _CosineCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, scale: Tensor, target: Tensor,
                options: tuple[int, str, float, float], reference: Callable[..., Tensor]) -> Tensor:
        ctx.options, ctx.reference = options, reference
        wanted = ctx.needs_input_grad[:3] if options[1] != "none" else (False, False, False)
        loss, gradients = _loss(h, weight, target, scale, None, options, wanted)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(h, weight, scale, target, *gradients)
        else:
            ctx.save_for_backward(h, weight, scale, target)
            ctx.gradients = gradients
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, scale, target, *gradients = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if _create_graph():
            ignore_index, reduction, label_smoothing, eps = ctx.options

            def loss(h: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
                return ctx.reference(_rows(h), weight, target.reshape(-1), scale, ignore_index, reduction,
                                     label_smoothing, eps).view(upstream.shape)

            return *_of_reference(loss, (h, weight, scale), upstream, wanted), None, None, None
        if ctx.options[1] == "none":
            gradients = _loss(h, weight, target, scale, upstream.reshape(-1).contiguous(), ctx.options, wanted)[1]
        elif gradients:
            gradients = [g if g is None else g * upstream for g in gradients]
        else:
            gradients = _take_gradients(ctx, h, weight, scale, target, upstream)
        return *gradients, None, None, None


def _take_gradients(ctx: Any, h: Tensor, weight: Tensor, scale: Tensor, target: Tensor, upstream: Tensor) -> Gradients:
    """The gradients made in forward, times ``upstream``, in place: a second copy could be larger than all else.

    They are gone then, and a second backward through the same graph makes them again.
    """
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        gradients = _loss(h, weight, target, scale, None, ctx.options, ctx.needs_input_grad[:3])[1]
    if upstream.item() != 1:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(upstream)
    return gradients
