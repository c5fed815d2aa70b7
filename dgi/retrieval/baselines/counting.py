"""What a retriever has to beat: the most popular items for everyone, and items drawn at random."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi.data import Dataset, Interactions, train_counts
from dgi.retrieval.baselines.protocol import ScoringRetriever
from dgi.retrieval.index import first_allowed

if TYPE_CHECKING:
    from typing_extensions import Self


def rank_by_popularity(train_counts: np.ndarray, n: int, k: int, *, exclude: Tensor | None = None) -> Tensor:
    """The k items chosen most often in training, for each of n requests.

    Args:
        train_counts: (num_items,) how often each item was chosen in training.
        exclude: (n, E) int64 rows to leave out of each ranking, -1 for none.

    Returns:
        (n, k) int64 rows, best first, ties to the lower row; -1 where there are fewer than k.
    """
    if exclude is None:
        exclude = torch.full((n, 1), -1)
    wanted = k + exclude.shape[1]
    order = torch.from_numpy(np.argsort(-train_counts, kind="stable")[:wanted].copy())
    items = F.pad(order, (0, wanted - len(order)), value=-1).expand(n, -1)
    places, exist = first_allowed(items, exclude, k)
    return items.gather(1, places).masked_fill(~exist, -1)


class Popularity(ScoringRetriever):
    """Items by how often they were chosen in training, the same for every request."""

    counts: Tensor

    def fit(self, data: Dataset) -> Self:
        self.counts = torch.from_numpy(train_counts(data.train, len(data.catalog))).float()
        return self

    def scores(self, queries: Interactions) -> Tensor:
        return self.counts.repeat(len(queries), 1)


class Cooccurrence(ScoringRetriever):
    """Items by how often they were chosen after those of the history, the latest of it counting most.

    ``score(n) = Σ_r C[h_r, n] / r`` over the history h_1 (the latest), h_2, …, where ``C[a, n]`` adds up 1 / r over the
    training requests that chose n with a at place r. Items that never followed come after all others, by popularity.
    """

    follows: list[tuple[np.ndarray, np.ndarray]]

    def fit(self, data: Dataset) -> Self:
        size = len(data.catalog)
        counts = train_counts(data.train, size)
        rows, places = np.nonzero(data.train.histories >= 0)
        before, after = data.train.histories[rows, places], data.train.items[rows]
        pairs, inverse = np.unique(before * size + after, return_inverse=True)
        sums = np.bincount(inverse, 1.0 / (data.train.histories.shape[1] - places), len(pairs))
        ends = np.searchsorted(pairs // size, np.arange(size + 1))
        self.follows = [(pairs[a:b] % size, sums[a:b]) for a, b in pairwise(ends.tolist())]
        # Less than any item that followed once can have.
        self.fallback = counts / (1 + counts.max(initial=0)) / (1 + data.train.histories.shape[1]) ** 3
        return self

    def scores(self, queries: Interactions) -> Tensor:
        scores = np.tile(self.fallback, (len(queries), 1))
        width = queries.histories.shape[1]
        for row, place in zip(*np.nonzero(queries.histories >= 0), strict=True):
            items, sums = self.follows[queries.histories[row, place]]
            scores[row, items] += sums / (width - place)
        return torch.from_numpy(scores).float()


class RandomVectors(ScoringRetriever):
    """Cosine of random vectors of requests and items: nothing is learnt. A comparison must place it last.

    Args:
        dim: width of the vectors.
        seed: of the vectors.
    """

    vectors: Tensor

    def __init__(self, dim: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.dim = dim
        self.generator = torch.Generator().manual_seed(seed)

    def fit(self, data: Dataset) -> Self:
        self.vectors = F.normalize(torch.randn(len(data.catalog), self.dim, generator=self.generator), dim=1)
        return self

    def scores(self, queries: Interactions) -> Tensor:
        return F.normalize(torch.randn(len(queries), self.dim, generator=self.generator), dim=1) @ self.vectors.T

    def item_vectors(self) -> Tensor:
        return self.vectors
