"""The options of the cosine losses: those of the loss, and those of its columns.  Every backend takes them whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.types import Reduction


@dataclass(frozen=True)
class LossOptions:
    """Options of :func:`dgi_kernels.cosine_cross_entropy`, checked."""

    ignore_index: int = -100
    reduction: Reduction = "mean"
    label_smoothing: float = 0.0
    eps: float = 1e-12
    return_log_normalizer: bool = False

    def per_row(self) -> LossOptions:
        """The same without a reduction."""
        return LossOptions(self.ignore_index, "none", self.label_smoothing, self.eps, self.return_log_normalizer)

    def reduce(self, loss: Tensor, target: Tensor) -> Tensor:
        """The losses of the rows, 0 where ignored, as ``reduction`` says."""
        if self.reduction == "mean":
            return loss.sum() / (target != self.ignore_index).sum()
        return loss.sum() if self.reduction == "sum" else loss


class ColumnOptions(TypedDict, total=False):
    """The keywords of :class:`Columns`, for functions that only hand them on to the op."""

    bias: Tensor | None
    same_as: Tensor | None


@dataclass(frozen=True)
class Columns:
    """What the columns of a loss have beside their vectors; None where they have it not."""

    bias: Tensor | None = None  # (K,) float, added to the logits
    same_as: Tensor | None = None  # (K,) int64, the item of each

    @staticmethod
    def check(weight: Tensor, *, bias: Tensor | None = None, same_as: Tensor | None = None) -> Columns:
        """Options of the rows of ``weight`` (K, D), by the names that the ops give them."""
        if bias is not None:
            checks.float_tensor("bias", bias, like=weight)
            checks.shape("bias", bias, (weight.shape[0],), "(K,)")
        if same_as is not None:
            checks.tensor("same_as", same_as, dtypes=checks.INDEX_DTYPES, like=weight)
            checks.shape("same_as", same_as, (weight.shape[0],), "(K,)")
            same_as = same_as.long()
        return Columns(bias, same_as)

    @staticmethod
    def neutral(weight: Tensor) -> Columns:
        """Every option of the rows of ``weight`` (K, D), changing nothing; those with a gradient ask for it."""
        count, device = len(weight), weight.device
        return Columns(torch.zeros(count, device=device, requires_grad=True), torch.arange(count, device=device))

    def within(self, dtype: torch.dtype, factor: float | Tensor | None = None) -> Columns:
        """In the compute dtype, for logits that are divided by ``factor``."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return Columns(bias if bias is None or factor is None else bias / factor, self.same_as)

    @property
    def given(self) -> dict[str, bool]:
        """Which options there are, by name."""
        return {name: value is not None for name, value in vars(self).items()}
