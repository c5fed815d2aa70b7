"""The options of the cosine losses: what is neither a tensor nor the scale.  Every backend takes them whole."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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
