"""Modules: scaled cosine logits instead of ``nn.Linear``, and their loss instead of ``nn.CrossEntropyLoss``.

The scale gamma is kept as its logarithm: it stays positive whatever the optimizer does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dgi_kernels import checks
from dgi_kernels.cosine import cosine_cross_entropy, cosine_logits
from dgi_kernels.enums import REDUCTIONS
from dgi_kernels.types import Backend, Reduction


class CosineLinear(nn.Module):
    """Logits ``gamma * h^ . w^_k`` (paper eq. 13): an output layer without bias, in which no class wins by its norm.

    Args:
        in_features: width D of the vectors.
        out_features: number K of logits.
        scale: initial gamma, positive.
        learnable_scale: whether gamma is trained.
        weight: a (K, D) parameter to share, an embedding's or a codebook's; None for a new one.
        log_scale: a 0-d parameter holding log gamma to share, instead of ``scale`` and ``learnable_scale``.
        eps: lower bound of the norms.
        backend: backend of the ops.
        device, dtype: of the parameters made here.

    Attributes:
        weight: (K, D) parameter, drawn from a normal distribution such that norms are about 1.
        log_scale: 0-d parameter, log gamma.

    Raises:
        ValueError: a size, ``scale``, ``eps`` or the shape of a shared parameter is out of range.
        TypeError: an argument has the wrong type.

    Examples:
        >>> head = dgi_kernels.CosineLinear(64, 1000)
        >>> head(torch.randn(2, 64)).shape
        torch.Size([2, 1000])
        >>> head.loss(torch.randn(2, 64), torch.tensor([3, 5])).backward()
    """

    def __init__(self, in_features: int, out_features: int, *, scale: float = 30.0, learnable_scale: bool = True,
                 weight: nn.Parameter | None = None, log_scale: nn.Parameter | None = None, eps: float = 1e-12,
                 backend: Backend = "auto", device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
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
        self.log_scale = (_log_scale(scale, learnable_scale, device, dtype) if log_scale is None
                          else _shared("log_scale", log_scale, ()))

    def reset_parameters(self) -> None:
        """Draw the weight again."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    @property
    def scale(self) -> Tensor:
        """0-d gamma, with its gradient."""
        return self.log_scale.exp()

    @property
    def vectors(self) -> Tensor:
        """The (K, D) vectors that logits are computed with: the weight, unless a subclass overrides this."""
        return self.weight

    def forward(self, h: Tensor) -> Tensor:
        """Logits (..., K) of ``h`` (..., D); see :func:`dgi_kernels.cosine_logits`."""
        return cosine_logits(h, self.vectors, self.scale, eps=self.eps, backend=self.backend)

    def loss(self, h: Tensor, target: Tensor, *, ignore_index: int = -100, reduction: Reduction = "mean",
             label_smoothing: float = 0.0) -> Tensor:
        """``F.cross_entropy(self(h), target, ...)`` that never forms the logits; see
        :func:`dgi_kernels.cosine_cross_entropy`."""
        return cosine_cross_entropy(h, self.vectors, target, self.scale, ignore_index=ignore_index, reduction=reduction,
                                    label_smoothing=label_smoothing, eps=self.eps, backend=self.backend)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {_scale_repr(self.log_scale)}"


class CosineCrossEntropyLoss(nn.Module):
    """Cross-entropy of scaled cosine logits against vectors given with every call, such as a batch's items (InfoNCE).

    For a fixed set of vectors that are parameters, use :meth:`CosineLinear.loss`.

    Args:
        scale: initial gamma, positive; for InfoNCE 1 / temperature.
        learnable_scale: whether gamma is trained.
        ignore_index, reduction, label_smoothing: as in ``nn.CrossEntropyLoss``.
        eps: lower bound of the norms.
        backend: backend of the op.
        device, dtype: of the scale.

    Attributes:
        log_scale: 0-d parameter, log gamma.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.

    Examples:
        >>> infonce = dgi_kernels.CosineCrossEntropyLoss(scale=1 / 0.05)
        >>> queries, items = torch.eye(3), torch.eye(3)
        >>> infonce(queries, items, torch.arange(3)) < 1e-6
        tensor(True)
    """

    def __init__(self, scale: float = 30.0, *, learnable_scale: bool = False, ignore_index: int = -100,
                 reduction: Reduction = "mean", label_smoothing: float = 0.0, eps: float = 1e-12,
                 backend: Backend = "auto", device: torch.device | str | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.log_scale = _log_scale(scale, learnable_scale, device, dtype)
        self.ignore_index = checks.integer("ignore_index", ignore_index)
        checks.choice("reduction", reduction, REDUCTIONS)
        self.reduction: Reduction = reduction
        self.label_smoothing = checks.number("label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.eps = checks.number("eps", eps, positive=True)
        self.backend = backend

    @property
    def scale(self) -> Tensor:
        """0-d gamma, with its gradient."""
        return self.log_scale.exp()

    def forward(self, h: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """The loss of ``h`` (..., D) against ``weight`` (K, D) with ``target`` (...)."""
        return cosine_cross_entropy(h, weight, target, self.scale, ignore_index=self.ignore_index,
                                    reduction=self.reduction, label_smoothing=self.label_smoothing, eps=self.eps,
                                    backend=self.backend)

    def extra_repr(self) -> str:
        return (f"{_scale_repr(self.log_scale)}, ignore_index={self.ignore_index}, reduction={self.reduction!r}, "
                f"label_smoothing={self.label_smoothing}")


def _log_scale(scale: float, learnable: bool, device: torch.device | str | None,
               dtype: torch.dtype | None) -> nn.Parameter:
    value = math.log(checks.number("scale", scale, positive=True))
    return nn.Parameter(torch.full((), value, device=device, dtype=dtype), requires_grad=learnable)


def _shared(name: str, value: object, shape: tuple[int, ...]) -> nn.Parameter:
    if not isinstance(value, nn.Parameter):
        raise TypeError(f"{name} must be a torch.nn.Parameter, which is then shared; got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(value.shape)}")
    return value


def _scale_repr(log_scale: Tensor) -> str:
    scale = "?" if log_scale.is_meta else f"{log_scale.detach().exp().item():.4g}"
    return f"scale={scale}" + ("" if log_scale.requires_grad else " (fixed)")
