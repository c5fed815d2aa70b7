"""What the launchers of the cosine cross-entropy's backward get: of forward, and the gradients that enter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgi_kernels.triton_common import LN2


def column_terms(bias: Tensor | None, groups: Tensor | None) -> dict[str, Tensor | None]:
    """What a column has beside its vector, as every kernel takes it."""
    return {"p_bias": bias, "p_group": None if groups is None else groups[0]}


def may_replace(kept: Tensor, h: Tensor) -> bool:
    """Whether dh may take the place of what forward kept for it, so that a step needs no second tensor of its size.

    It is gone then, and a later backward through the same graph makes it again. What is traced (its tensors are no
    plain ones) or may be differentiated once more leaves it as it is.
    """
    return kept.shape == h.shape and type(kept) is Tensor and not torch.is_grad_enabled()


@dataclass(frozen=True)
class Saved:
    """What backward gets of forward: its operands, and what it kept of each row and column."""

    h: Tensor  # (N, D)
    weight: Tensor  # (K, D)
    scale: Tensor  # ()
    bias: Tensor | None  # (K,)
    groups: Tensor | None  # (2, K) of _groups
    lse: Tensor  # (N,) in base 2
    residue: Tensor  # (N,) p_t - (1 - e)
    mean: Tensor  # (N, D), or empty
    centre: Tensor  # (D,)
    rnorm_h: Tensor  # (N,)
    rnorm_w: Tensor  # (K,)
    label: Tensor  # (N,) int32
    smoothing: float
    eps: float

    def shared(self) -> dict[str, Tensor | int | None]:
        """The arguments that both kernels of gradients by tiles have, flash or chunked."""
        return {
            "p_rnorm_w": self.rnorm_w,
            **column_terms(self.bias, self.groups),
            "p_scale": self.scale,
            "K": len(self.weight),
        }


@dataclass(frozen=True)
class Upstream:
    """The gradients that enter, 0 in rows without a target. Where only u matters, ``both`` and the rest are None."""

    loss: Tensor  # (N,) u
    both: Tensor | None  # (N,) u + v: the weight of p
    own: Tensor | None  # (N,) t of the target, but for its e / K
    even: Tensor | None  # (N,) u e / K, K less the columns that are left out

    def largest(self) -> Tensor:
        """(N,) a bound of a row's weights."""
        if self.both is None or self.own is None:
            return self.loss
        return torch.maximum(self.both.abs(), self.own.abs())


def upstream_of(of_loss: Tensor | None, of_lse: Tensor | None, saved: Saved, need_bias: bool) -> Upstream:
    """``of_lse`` is the gradient of the log-normalizer in base 2."""
    known = saved.label >= 0
    u = torch.zeros_like(saved.lse) if of_loss is None else torch.where(known, of_loss, 0.0)
    if of_lse is None and saved.groups is None and not need_bias:
        return Upstream(u, None, None, None)
    v = torch.zeros_like(u) if of_lse is None else torch.where(known, of_lse / LN2.value, 0.0)
    counted: int | Tensor = max(len(saved.weight), 1)
    if saved.groups is not None and len(saved.weight):
        counted = counted + 1 - saved.groups[1][saved.label.clamp(min=0)]
    own = torch.where(known, u * saved.residue + v * (1 - saved.smoothing + saved.residue), 0.0)
    return Upstream(u, u + v, own, u * saved.smoothing / counted)
