"""What every system of a comparison has: ``fit`` on a data set, then ``search`` of its requests."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi.data import Catalog, Dataset, Interactions

if TYPE_CHECKING:
    from typing_extensions import Self


class Found(NamedTuple):
    """The best items of n requests, best first.

    Attributes:
        items: (n, k) int64 catalog rows, -1 where there are fewer.
        scores: (n, k) float32, -inf where there are fewer; comparable within a request only.
    """

    items: Tensor
    scores: Tensor


class Retriever(abc.ABC):
    """A system of a comparison.

    Attributes:
        settings: what ``fit`` has chosen, on the validation set alone, by name.
        curve: rows with ``step`` and what was measured then, in training; empty where there is none.
    """

    def __init__(self) -> None:
        self.settings: dict[str, float] = {}
        self.curve: list[dict[str, float]] = []

    @abc.abstractmethod
    def fit(self, data: Dataset) -> Self:
        """Build or train the system on ``data.train``, with choices made on ``data.validation``."""

    @abc.abstractmethod
    def search(self, queries: Interactions, k: int, *, exclude_history: bool = False) -> Found:
        """The k best items for the query and history of each interaction; the item chosen is not read.

        Args:
            exclude_history: leave the items of a request's history out of its results.
        """

    @property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return 0

    def item_vectors(self) -> Tensor | None:
        """(N, d) vectors of the items with their lengths, where the system has some."""
        return None

    def nearest(self, queries: Interactions, k: int, *, exclude_history: bool = False) -> Tensor | None:
        """(n, k) catalog rows by exact cosine of the system's own vectors, where its search only approximates that."""
        return None


class ScoringRetriever(Retriever):
    """A system that has a score for every item; subclasses have :meth:`scores`."""

    @abc.abstractmethod
    def scores(self, queries: Interactions) -> Tensor:
        """(n, N) float32, -inf for an item that is no result."""

    def batches(self, queries: Interactions, size: int = 256) -> Iterator[Interactions]:
        """The requests in parts, so that no more than ``size`` × N scores are held at once."""
        for start in range(0, len(queries), size):
            yield queries.take(np.arange(start, min(start + size, len(queries))))

    def search(self, queries: Interactions, k: int, *, exclude_history: bool = False) -> Found:
        parts = [
            best_items(self.scores(part), k, torch.from_numpy(part.histories) if exclude_history else None)
            for part in self.batches(queries)
        ]
        items, scores = map(torch.cat, zip(*parts, strict=True))
        return Found(items, scores)


def best_items(scores: Tensor, k: int, exclude: Tensor | None = None) -> Found:
    """The k best of (n, N) scores, which are changed.

    Args:
        exclude: (n, E) int64 rows to leave out, -1 for none.
    """
    if exclude is not None:
        scores[(exclude >= 0).nonzero()[:, 0], exclude[exclude >= 0]] = -torch.inf
    best = scores.topk(min(k, scores.shape[1]), dim=1)
    items = best.indices.masked_fill(best.values == -torch.inf, -1)
    missing = k - items.shape[1]
    return Found(F.pad(items, (0, missing), value=-1), F.pad(best.values.float(), (0, missing), value=-torch.inf))


def request_texts(queries: Interactions, catalog: Catalog, recent: int = 3) -> list[str]:
    """Each request as one text: its query, and the texts of the latest ``recent`` items of its history."""
    texts = []
    for query, history in zip(queries.queries, queries.histories[:, -recent:].tolist(), strict=True):
        texts.append(" ".join([query, *(catalog.texts[item] for item in history if item >= 0)]).strip())
    return texts
