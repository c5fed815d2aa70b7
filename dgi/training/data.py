"""Items and interactions as the encoder reads them, and the batches of training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dgi.data import Catalog, Interactions
from dgi.data.batches import Batch, make_batch
from dgi.model.dgi_model import DualEncoder
from dgi.model.encoding import Requests


@dataclass(frozen=True)
class TrainingData:
    """Items and interactions as the encoder reads them, prepared once, on the CPU.

    Attributes:
        item_features: (num_items, ...).
        requests: n queries and histories.
        targets: (n,) int64 catalog rows of the items chosen.
    """

    item_features: Tensor
    requests: Requests
    targets: Tensor

    @classmethod
    def prepare(cls, model: DualEncoder, catalog: Catalog, interactions: Interactions) -> TrainingData:
        return cls(
            model.encoder.prepare_items(catalog), Requests.of(model, interactions), torch.from_numpy(interactions.items)
        )

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, rows: Tensor, candidates: Tensor | None = None) -> Batch:
        """The interactions ``rows`` (B,), and the items ``candidates`` (C,) to rank with theirs."""
        queries = None if self.requests.query_features is None else self.requests.query_features[rows]
        return make_batch(self.item_features, self.requests.histories[rows], self.targets[rows], queries, candidates)

    def sha256(self) -> str:
        """Tells one data set from another, so that no run is resumed on other data."""
        digest = hashlib.sha256()
        for tensor in (self.item_features, self.requests.histories, self.requests.query_features, self.targets):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()
