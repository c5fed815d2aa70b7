"""Modules: scaled cosine logits instead of ``nn.Linear``, and their loss instead of ``nn.CrossEntropyLoss``.

The scale gamma is kept as its logarithm: it stays positive whatever the optimizer does.  The logarithm is a tensor of
one element and not a 0-d one, which FSDP cannot shard.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dgi_kernels import checks
from dgi_kernels.cosine import cosine_cross_entropy, cosine_logits
from dgi_kernels.enums import REDUCTIONS
from dgi_kernels.types import Backend, Reduction

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from dgi_kernels.cosine.options import ColumnOptions


class CosineLinear(nn.Module):
    """Logits ``gamma * h^ . w^_k`` (paper eq. 13): an output layer without bias, in which no class wins by its norm.

    Args:
        in_features: width D of the vectors.
        out_features: number K of logits.
        scale: initial gamma, positive.
        learnable_scale: whether gamma is trained.
        weight: a (K, D) parameter to share, an embedding's or a codebook's; None for a new one.
        log_scale: a parameter of shape (1,) holding log gamma to share, instead of ``scale`` and ``learnable_scale``.
        max_scale: upper bound of gamma, positive; None for none. At the bound only gradients that lower gamma pass.
        eps: lower bound of the norms.
        backend: backend of the ops.
        device, dtype: of the parameters made here.

    Attributes:
        weight: (K, D) parameter, drawn from a normal distribution such that norms are about 1.
        log_scale: parameter of shape (1,), log gamma. Files in which it is 0-d can be loaded.

    Raises:
        ValueError: a size, ``scale``, ``eps`` or the shape of a shared parameter is out of range.
        TypeError: an argument has the wrong type.

    Examples:
        >>> head = dgi_kernels.CosineLinear(64, 1000)
        >>> head(torch.randn(2, 64)).shape
        torch.Size([2, 1000])
        >>> head.loss(torch.randn(2, 64), torch.tensor([3, 5])).backward()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scale: float = 30.0,
        learnable_scale: bool = True,
        weight: nn.Parameter | None = None,
        log_scale: nn.Parameter | None = None,
        max_scale: float | None = None,
        eps: float = 1e-12,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checks.integer("in_features", in_features, low=1)
        self.out_features = checks.integer("out_features", out_features, low=1)
        self.eps = checks.number("eps", eps, positive=True)
        self.backend = backend
        if weight is None:
            self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
            self.reset_parameters()
        else:
            self.weight = _shared("weight", weight, (out_features, in_features))
        self.max_scale = check_max_scale(max_scale)
        self.log_scale = (
            log_scale_parameter(scale, learnable_scale, device, dtype)
            if log_scale is None
            else _shared("log_scale", log_scale, (1,))
        )
        self.register_load_state_dict_pre_hook(read_0d_log_scale)

    def reset_parameters(self) -> None:
        """Draw the weight again."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    @property
    def scale(self) -> Tensor:
        """0-d gamma, with its gradient."""
        return scale_of(self.log_scale, self.max_scale)

    @property
    def vectors(self) -> Tensor:
        """The (K, D) vectors that logits are computed with: the weight, unless a subclass overrides this."""
        return self.weight

    def forward(self, h: Tensor) -> Tensor:
        """Logits (..., K) of ``h`` (..., D); see :func:`dgi_kernels.cosine_logits`."""
        return cosine_logits(h, self.vectors, self.scale, eps=self.eps, backend=self.backend)

    def loss(
        self,
        h: Tensor,
        target: Tensor,
        *,
        return_log_normalizer: bool = False,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        **columns: Unpack[ColumnOptions],
    ) -> Any:
        """``F.cross_entropy(self(h) + bias, target, ...)`` that never forms the logits; see
        :func:`dgi_kernels.cosine_cross_entropy`, whose ``bias`` and ``same_as`` are ``columns`` here."""
        return cosine_cross_entropy(
            h,
            self.vectors,
            target,
            self.scale,
            return_log_normalizer=return_log_normalizer,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            eps=self.eps,
            backend=self.backend,
            **columns,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {scale_repr(self.log_scale)}"


class ScaledLoss(nn.Module):
    """What the modules of losses share: the scale, its bound, the reduction, and how the op is called."""

    def __init__(
        self,
        scale: float,
        learnable_scale: bool,
        max_scale: float | None,
        reduction: Reduction,
        eps: float,
        backend: Backend,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.max_scale = check_max_scale(max_scale)
        self.log_scale = log_scale_parameter(scale, learnable_scale, device, dtype)
        self.register_load_state_dict_pre_hook(read_0d_log_scale)
        checks.choice("reduction", reduction, REDUCTIONS)
        self.reduction: Reduction = reduction
        self.eps = checks.number("eps", eps, positive=True)
        self.backend = backend

    @property
    def scale(self) -> Tensor:
        """0-d gamma, with its gradient."""
        return scale_of(self.log_scale, self.max_scale)


class CosineCrossEntropyLoss(ScaledLoss):
    """Cross-entropy of scaled cosine logits against vectors given with every call, such as a batch's items (InfoNCE).

    For a fixed set of vectors that are parameters, use :meth:`CosineLinear.loss`.

    Args:
        scale: initial gamma, positive; for InfoNCE 1 / temperature.
        learnable_scale: whether gamma is trained.
        max_scale: upper bound of gamma, as in :class:`CosineLinear`.
        ignore_index, reduction, label_smoothing: as in ``nn.CrossEntropyLoss``.
        eps: lower bound of the norms.
        backend: backend of the op.
        device, dtype: of the scale.

    Attributes:
        log_scale: parameter of shape (1,), log gamma. Files in which it is 0-d can be loaded.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.

    Examples:
        >>> infonce = dgi_kernels.CosineCrossEntropyLoss(scale=1 / 0.05)
        >>> queries, items = torch.eye(3), torch.eye(3)
        >>> infonce(queries, items, torch.arange(3)) < 1e-6
        tensor(True)
    """

    def __init__(
        self,
        scale: float = 30.0,
        *,
        learnable_scale: bool = False,
        max_scale: float | None = None,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        label_smoothing: float = 0.0,
        eps: float = 1e-12,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(scale, learnable_scale, max_scale, reduction, eps, backend, device, dtype)
        self.ignore_index = checks.integer("ignore_index", ignore_index)
        self.label_smoothing = checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)

    def forward(
        self,
        h: Tensor,
        weight: Tensor,
        target: Tensor,
        *,
        return_log_normalizer: bool = False,
        **columns: Unpack[ColumnOptions],
    ) -> Any:
        """The loss of ``h`` (..., D) against ``weight`` (K, D) with ``target`` (...).

        The options are those of :func:`dgi_kernels.cosine_cross_entropy`, ``columns`` its ``bias`` and ``same_as``.
        """
        return cosine_cross_entropy(
            h,
            weight,
            target,
            self.scale,
            return_log_normalizer=return_log_normalizer,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            eps=self.eps,
            backend=self.backend,
            **columns,
        )

    def extra_repr(self) -> str:
        return (
            f"{scale_repr(self.log_scale)}, ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
            f"label_smoothing={self.label_smoothing}"
        )


def log_scale_parameter(
    scale: float, learnable: bool, device: torch.device | str | None, dtype: torch.dtype | None
) -> nn.Parameter:
    """Log gamma as a parameter of shape (1,)."""
    value = math.log(checks.number("scale", scale, positive=True))
    return nn.Parameter(torch.full((1,), value, device=device, dtype=dtype), requires_grad=learnable)


def check_max_scale(max_scale: float | None) -> float | None:
    return None if max_scale is None else checks.number("max_scale", max_scale, positive=True)


def scale_of(log_scale: Tensor, max_scale: float | None) -> Tensor:
    """0-d gamma of the parameter of shape (1,), at most ``max_scale``, with its gradient."""
    if max_scale is not None:
        log_scale = _AtMost.apply(log_scale, math.log(max_scale))
    return log_scale.exp().squeeze(0)


def read_0d_log_scale(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load what was saved while ``log_scale`` was 0-d; a hook for ``register_load_state_dict_pre_hook``."""
    saved = state.get(f"{prefix}log_scale")
    if isinstance(saved, Tensor) and saved.ndim == 0:
        state[f"{prefix}log_scale"] = saved.reshape(1)


class _AtMost(torch.autograd.Function):
    """min(x, bound), whose gradient passes at the bound where a step along it makes x less: no x is stuck there."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp(max=bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where((x < ctx.bound) | (upstream > 0), upstream, 0.0), None


def _shared(name: str, value: object, shape: tuple[int, ...]) -> nn.Parameter:
    if not isinstance(value, nn.Parameter):
        raise TypeError(f"{name} must be a torch.nn.Parameter, which is then shared; got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
    return value


def scale_repr(log_scale: Tensor) -> str:
    scale = "?" if log_scale.is_meta else f"{log_scale.detach().exp().item():.4g}"
    return f"scale={scale}" + ("" if log_scale.requires_grad else " (fixed)")
