"""Training on whole sequences: a row is a user, and every item a request for the next one.

A causal encoder (``ModelConfig.causal``) takes one pass over a row where expanded examples take one for each item, and
the items are as many requests as there were examples: the loss of a batch is that of the same examples one by one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dgi.data import Catalog, SequenceRows
from dgi.data.batches import Batch, make_sequence_batch
from dgi.model.dgi_model import DualEncoder
from dgi.model.encoding import Requests
from dgi.training.data import TrainingData
from dgi.training.trainer import Trainer


@dataclass(frozen=True)
class SequenceData(TrainingData):
    """As :class:`TrainingData`; ``requests`` are left empty, and ``targets`` are those of all rows, one after another.

    Attributes:
        rows: (n, H) histories and the targets of their items.
    """

    rows: SequenceRows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor, candidates: Tensor | None = None) -> Batch:
        """The sequences ``rows`` (B,), each item with a target a request, and the items ``candidates`` (C,)."""
        picked = rows.numpy()
        histories, targets = self.rows.histories[picked], self.rows.targets[picked]
        return make_sequence_batch(
            self.item_features, torch.from_numpy(histories), torch.from_numpy(targets), candidates
        )

    def sha256(self) -> str:
        digest = hashlib.sha256(super().sha256().encode())
        for array in (self.rows.histories, self.rows.targets):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class SequenceTrainer(Trainer):
    """A :class:`Trainer` whose ``interactions`` are :class:`dgi.data.SequenceRows`; ``batch_size`` counts rows.

    Raises:
        ValueError: as :class:`Trainer`; or the model is not causal.
    """

    def prepare(self, model: DualEncoder, catalog: Catalog, interactions: SequenceRows) -> TrainingData:
        if not model.config.causal:
            raise ValueError("model must be causal to train on sequences; see ModelConfig.causal")
        return SequenceData(
            model.encoder.prepare_items(catalog),
            Requests(torch.full((0, 1), -1), None),
            torch.from_numpy(interactions.targets[interactions.targets >= 0]),
            interactions,
        )
