"""Candidates of InfoNCE: which items a step ranks beside the clicked ones, and how probable each of them was."""

from __future__ import annotations

import torch
from torch import Tensor

from dgi.config import ContrastiveKind


class Candidates:
    """The candidates of every step of a training run, by the items that its interactions chose.

    Args:
        kind: ``TrainConfig.contrastive``.
        targets: (n,) int64 catalog rows of the items chosen in training.
        num_items: size of the catalog.
        batch_size: interactions of a step, over all processes.
        samples: items that ``sampled`` draws in a step.

    Attributes:
        log_q: (num_items,) float32: of being drawn by one draw (``sampled``), or of being among the items of a batch
            (``in_batch``); None for ``all_items``. -inf for items that were never chosen.
    """

    def __init__(
        self, kind: ContrastiveKind, targets: Tensor, num_items: int, *, batch_size: int, samples: int
    ) -> None:
        self.kind = kind
        self.targets = targets
        self.num_items = num_items
        self.samples = samples
        share = torch.bincount(targets, minlength=num_items).double() / max(1, len(targets))
        self.log_q: Tensor | None = None
        if kind == "sampled":
            self.log_q = share.log().float()
        elif kind == "in_batch":
            self.log_q = log_inclusion(share, batch_size).float()

    def draw(self, generator: torch.Generator) -> Tensor | None:
        """Catalog rows (C,) of a step's candidates; None where they are the items of the batch alone."""
        if self.kind == "all_items":
            return torch.arange(self.num_items)
        if self.kind == "sampled":  # the items of clicks drawn evenly are drawn as often as they are clicked
            return self.targets[torch.randint(len(self.targets), (self.samples,), generator=generator)]
        return None


def log_inclusion(share: Tensor, draws: int) -> Tensor:
    """log(1 - (1 - p)^n): of the items of n draws, how probable it is that one of probability p is among them."""
    return (-torch.expm1(draws * torch.log1p(-share))).log()
