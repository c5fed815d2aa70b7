"""Scaled cosine logits and their cross-entropy (paper eq. 10, 13).

    s_k = scale * h^ . w^_k,    x^ = x / max(||x||_2, eps),    P(k | h) = softmax_k(s_k)

The logits depend on directions only, so no stored vector wins by its norm, and the gradient of a stored vector has no
radial part (eq. 15, 22): ``w . dL/dw = 0``.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.backend import choose
from dgi_kernels.cosine import native, reference
from dgi_kernels.cosine.options import Columns, LossOptions
from dgi_kernels.enums import REDUCTIONS
from dgi_kernels.types import Backend, Reduction

__all__ = ["cosine_cross_entropy", "cosine_logits"]

LARGEST_SCALE = 2.0**30


def cosine_logits(
    h: Tensor, weight: Tensor, scale: float | Tensor, *, eps: float = 1e-12, backend: Backend = "auto"
) -> Tensor:
    """Scaled cosine similarity of every vector of ``h`` with every row of ``weight`` (paper eq. 10, 13).

    Equal to ``scale * F.normalize(h, dim=-1, eps=eps) @ F.normalize(weight, dim=-1, eps=eps).T``, computed in float32
    (float64 for float64 inputs).

    Args:
        h: (..., D) float32, bfloat16, float16 or float64; any strides.
        weight: (K, D), the dtype of ``h``. Under ``torch.autocast`` the dtypes may differ: both are converted to the
            autocast dtype, as ``F.linear`` does (float64 is left as it is).
        scale: the logit scale (gamma), a finite float or a 0-d tensor, which receives its gradient.
        eps: lower bound of the norms; a zero vector has cosine 0 with everything.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        (..., K) logits in the dtype of ``h`` and ``weight``, the autocast dtype under autocast.

    Raises:
        ValueError: a shape or device does not fit, or ``scale`` or ``eps`` is out of range.
        TypeError: an argument has the wrong type or dtype.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> h, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [-6.0, -8.0]])
        >>> dgi_kernels.cosine_logits(h, weight, 10.0)
        tensor([[  6.,   8., -10.]])
    """
    h, weight, scale, eps = check_operands(h, weight, scale, eps)
    chosen = choose("cosine_logits", backend, h.device, h.dtype)
    if chosen == "native":
        return native.cosine_logits(h, weight, scale, eps, reference.cosine_logits)
    if chosen == "triton":
        from dgi_kernels.cosine import triton_logits

        with torch.autocast(h.device.type, enabled=False):
            return triton_logits.cosine_logits(h, weight, scale, eps)
    dtype = torch.promote_types(h.dtype, weight.dtype)
    compute = checks.compute_dtype(dtype)
    with torch.autocast(h.device.type, enabled=False):
        logits = reference.cosine_logits(h.to(compute), weight.to(compute), checks.to_dtype(scale, compute), eps)
    return logits.to(dtype)


@overload
def cosine_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    same_as: Tensor | None = None,
    return_log_normalizer: Literal[False] = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> Tensor: ...


@overload
def cosine_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    same_as: Tensor | None = None,
    return_log_normalizer: bool,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> Any: ...


def cosine_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float | Tensor,
    *,
    bias: Tensor | None = None,
    same_as: Tensor | None = None,
    return_log_normalizer: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> Any:
    """Cross-entropy of scaled cosine logits (the ``ntp`` loss, paper eq. 13, 16; InfoNCE with a batch as ``weight``).

    Equal to ``F.cross_entropy(scale * F.normalize(h) @ F.normalize(weight).T + bias, target, ...)`` with its
    ``ignore_index``, ``reduction`` and ``label_smoothing``, over the last dimension. Class weights and targets that are
    probabilities are not taken.

    Args:
        h: (..., D) float32, bfloat16, float16 or float64; any strides.
        weight: (K, D), the dtype of ``h``; mixed dtypes under ``torch.autocast`` as in :func:`cosine_logits`.
        target: (...) integers, ``h.shape[:-1]``: the correct row of ``weight``, or ``ignore_index``.
        scale: the logit scale (gamma), a finite float or a 0-d tensor, which receives its gradient.
        bias: (K,) of any float dtype, added to the logits: minus the log probability that a candidate was sampled
            (logQ correction), the log of a class prior, or a parameter, which receives its gradient. It is converted
            to float32 (float64 for float64 inputs). -inf takes a class out of the softmax; NaN gives NaN.
        same_as: (K,) integers, what item each row of ``weight`` stands for. Rows with the item of the target, but not
            the target itself, leave that row's softmax, and label smoothing spreads over the others: an item twice in
            a batch is no negative of itself.
        return_log_normalizer: return the log-sum-exp of every row's logits too, with its gradient (z-loss, entropy,
            calibration).
        ignore_index: targets with this value have loss and gradient 0 and do not count in the mean.
        reduction: ``"mean"`` over the targets that are not ignored (NaN where there is none, as ``F.cross_entropy``),
            ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1], the share of the target's probability that is spread over all K rows.
        eps: lower bound of the norms.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        The loss: () for ``"mean"`` and ``"sum"``, (...) for ``"none"``; float32 (float64 for float64 inputs). With
        ``return_log_normalizer`` a pair of the loss and the log normalizers (...), which are 0 where the target is
        ignored and have no part in ``reduction``.

    Raises:
        ValueError: a shape or device does not fit, a value is out of range, ``reduction`` is unknown, or a target is
            outside of [0, K) and not ``ignore_index``. On CUDA targets are checked inside ``dgi_kernels.debug()`` only;
            elsewhere such a target gives NaN for its row.
        TypeError: an argument has the wrong type or dtype.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> h, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0], [-6.0, -8.0]])
        >>> dgi_kernels.cosine_cross_entropy(h, weight, torch.tensor([1]), 10.0)
        tensor(0.1269)
    """
    h, weight, scale, eps = check_operands(h, weight, scale, eps)
    options = check_loss(h, target, ignore_index, reduction, label_smoothing, eps, return_log_normalizer)
    columns = Columns.check(weight, bias=bias, same_as=same_as)
    target = checks.index("target", target.long(), 0, weight.shape[0], also=options.ignore_index)
    dtype = torch.promote_types(h.dtype, weight.dtype)
    chosen = choose("cosine_cross_entropy", backend, h.device, dtype)
    if chosen == "native":
        loss, log_normalizer = native.cosine_cross_entropy(
            h, weight, target, scale, columns, options, reference.cosine_cross_entropy
        )
        return loss if log_normalizer is None else (loss, log_normalizer)
    shape, compute = target.shape, checks.compute_dtype(dtype)
    h, target = h.reshape(target.numel(), h.shape[-1]), target.flatten()
    with torch.autocast(h.device.type, enabled=False):
        scale, factor = _within_range(scale, compute)
        if chosen == "triton":
            from dgi_kernels.cosine import triton

            loss, log_normalizer = triton.cosine_cross_entropy(h, weight, target, scale, columns, options)
        else:
            loss, log_normalizer = reference.cosine_cross_entropy(
                h.to(compute),
                weight.to(compute),
                target,
                checks.to_dtype(scale, compute),
                columns.within(compute, factor),
                options,
            )
        if factor is not None:
            loss, log_normalizer = loss * factor, None if log_normalizer is None else log_normalizer * factor
    loss = loss.reshape(shape) if options.reduction == "none" else loss
    return loss if log_normalizer is None else (loss, log_normalizer.reshape(shape))


def _within_range(scale: float | Tensor, compute: torch.dtype) -> tuple[float | Tensor, float | Tensor | None]:
    """Split a scale whose logits float32 would not tell apart, or not hold, into one that it does and a factor.

    Beyond it the loss grows in proportion to the scale: its softmax is decided by the rounding of the cosines. The
    kernels of the extension do the same.
    """
    if compute == torch.float64:
        return scale, None
    if isinstance(scale, Tensor):
        factor = (scale.detach().abs() / LARGEST_SCALE).clamp(min=1)
        return scale / factor, factor
    if abs(scale) <= LARGEST_SCALE:
        return scale, None
    return scale / (abs(scale) / LARGEST_SCALE), abs(scale) / LARGEST_SCALE


def check_operands(
    h: Tensor, weight: Tensor, scale: float | Tensor, eps: float
) -> tuple[Tensor, Tensor, float | Tensor, float]:
    """The arguments that all ops share: checked, ``h`` and ``weight`` in the dtype that autocast gives them."""
    checks.float_tensor("h", h, min_ndim=1)
    checks.float_tensor("weight", weight, ndim=2, like=h)
    checks.shape("weight", weight, (None, h.shape[-1]), "(K, D)")
    checks.same_dtype("weight", weight, "h", h)
    scale = checks.scalar("scale", scale, h)
    eps = checks.number("eps", eps, positive=True)
    return checks.autocast_operand(h), checks.autocast_operand(weight), scale, eps


def check_loss(
    h: Tensor,
    target: Tensor,
    ignore_index: int,
    reduction: Reduction,
    label_smoothing: float,
    eps: float,
    return_log_normalizer: bool,
) -> LossOptions:
    """The options of losses, and ``target`` but for its values: checked."""
    checks.tensor("target", target, dtypes=checks.INDEX_DTYPES, like=h)
    checks.shape("target", target, tuple(h.shape[:-1]), "h.shape[:-1]")
    checks.choice("reduction", reduction, REDUCTIONS)
    if not isinstance(return_log_normalizer, bool):
        raise TypeError(f"return_log_normalizer must be a bool; got {type(return_log_normalizer).__name__}")
    return LossOptions(
        checks.integer("ignore_index", ignore_index, low=-(2**63), high=2**63 - 1),
        reduction,
        checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0),
        eps,
        return_log_normalizer,
    )
