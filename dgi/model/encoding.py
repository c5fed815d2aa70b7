"""A model over many items or requests: batch by batch, in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dgi.data import Interactions
from dgi.data.batches import Batch, make_batch
from dgi.model.dgi_model import DualEncoder
from dgi.progress import Progress


@dataclass(frozen=True, eq=False)
class Requests:
    """n requests as the encoder reads them, on the CPU.

    Attributes:
        histories: (n, H) int64 catalog rows, oldest first, -1 where there is none.
        query_features: (n, ...), or None where no request has a query.
    """

    histories: Tensor
    query_features: Tensor | None

    @classmethod
    def prepare(
        cls, model: DualEncoder, queries: Sequence[str], histories: np.ndarray, query_vectors: np.ndarray | None
    ) -> Requests:
        """Keep the latest items of each history, as many as the model reads, and prepare the queries.

        Raises:
            ValueError: there are query texts, but the model reads query vectors, and none are given.
        """
        features = model.encoder.prepare_queries(queries, query_vectors)
        if features is None and any(queries):
            raise ValueError("the model reads query vectors, not texts: give query_vectors with the queries")
        first = max(0, histories.shape[1] - model.config.max_history)
        return cls(torch.from_numpy(histories[:, first:]), features)

    @classmethod
    def of(cls, model: DualEncoder, interactions: Interactions) -> Requests:
        """The requests of recorded interactions; what was chosen then is not looked at."""
        return cls.prepare(model, interactions.queries, interactions.histories, interactions.query_vectors)

    def __len__(self) -> int:
        return len(self.histories)

    def batches(self, item_features: Tensor, batch_size: int) -> Iterator[tuple[slice, Batch]]:
        """The requests in order, with the rows that each batch holds."""
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            queries = None if self.query_features is None else self.query_features[rows]
            yield rows, make_batch(item_features, self.histories[rows], None, queries)


@torch.no_grad()
def encode_items(
    model: DualEncoder, item_features: Tensor, *, batch_size: int = 1024, progress: bool = False
) -> Tensor:
    """z (N, d) of items in batches, in evaluation mode, from the features that the encoder prepared.

    Raises:
        ValueError: there are no items.
    """
    if len(item_features) == 0:
        raise ValueError("the catalog must hold at least one item; got none")
    device = device_of(model)
    with evaluating(model), Progress(len(item_features), "encoding items", shown=progress) as bar:
        parts = []
        for features in item_features.split(batch_size):
            parts.append(model.encoder.encode_items(features.to(device)))
            bar.update(len(features))
    return torch.cat(parts)


@torch.no_grad()
def encode_requests(model: DualEncoder, requests: Requests, item_features: Tensor, *, batch_size: int = 256) -> Tensor:
    """z_q (n, d) of requests in batches, in evaluation mode; ``item_features`` are those of the whole catalog."""
    device = device_of(model)
    with evaluating(model):
        return torch.cat(
            [model.encode_queries(batch.to(device)).vector for _, batch in requests.batches(item_features, batch_size)]
        )


@contextlib.contextmanager
def evaluating(model: DualEncoder) -> Iterator[None]:
    """Evaluation mode within the block, the mode before after it."""
    if not _trains(model):  # to set the mode of every module twice would take a fifth of the search of one request
        yield
        return
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _trains(module: nn.Module) -> bool:
    """Whether a module, or any that it holds, is in training mode."""
    return module.training or any(_trains(part) for part in module._modules.values() if part is not None)


def device_of(model: DualEncoder) -> torch.device:
    """The device that a model is on."""
    return next(model.parameters()).device
