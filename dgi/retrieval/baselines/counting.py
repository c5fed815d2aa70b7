"""What a retriever has to beat: the most popular items for everyone, and items drawn at random."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi.data import Dataset, Interactions
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
        self.counts = torch.bincount(torch.from_numpy(data.train.items), minlength=len(data.catalog)).float()
        return self

    def scores(self, queries: Interactions) -> Tensor:
        return self.counts.repeat(len(queries), 1)


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
