"""Retrieval by words, with the library bm25s, and by vectors that come with the data."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi.data import Catalog, Dataset, Interactions
from dgi.extras import require
from dgi.retrieval.baselines.protocol import ScoringRetriever, request_texts

if TYPE_CHECKING:
    from typing_extensions import Self

EXPANSIONS = 16  # training queries added to an item, its most frequent ones


class BM25(ScoringRetriever):
    """BM25 (Lucene's variant, k1 1.5, b 0.75: the defaults of bm25s) over the items' texts.

    A request is its query and the texts of the latest items of its history, see :func:`request_texts`. An item without
    a word in common is no result.

    Args:
        expand: add to each item its most frequent training queries, as document expansion (docT5query) adds generated
            ones. A training query of a data set without queries is the text of the last item of the history.

    Raises:
        ImportError: bm25s is not installed.
    """

    def __init__(self, expand: bool = False) -> None:
        super().__init__()
        self.bm25s = require("bm25s", "baselines")
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self.expand = expand

    def fit(self, data: Dataset) -> Self:
        self.catalog = data.catalog
        self.index = self.bm25s.BM25()
        texts = expanded_texts(data) if self.expand else list(data.catalog.texts)
        self.index.index(self._words(texts), show_progress=False)
        return self

    def _words(self, texts: list[str]) -> list[list[str]]:
        return self.bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)

    def scores(self, queries: Interactions) -> Tensor:
        words = self._words(request_texts(queries, self.catalog))
        nothing = np.zeros(len(self.catalog), dtype=np.float32)
        scores = np.stack([self.index.get_scores(row) if self._known(row) else nothing for row in words])
        return torch.from_numpy(scores).masked_fill_(torch.from_numpy(scores <= 0), -torch.inf)

    def _known(self, words: list[str]) -> bool:
        return any(word in self.index.vocab_dict for word in words)


class GivenVectors(ScoringRetriever):
    """Cosine of the vectors that come with the data; a request without one is the mean of its history's vectors."""

    vectors: Tensor

    def fit(self, data: Dataset) -> Self:
        if data.catalog.vectors is None:
            raise ValueError(f"{data.name} has no item vectors, which this baseline ranks by")
        self.vectors = torch.from_numpy(data.catalog.vectors)
        return self

    def scores(self, queries: Interactions) -> Tensor:
        unit = F.normalize(self.vectors, dim=1)
        if queries.query_vectors is not None:
            vectors = torch.from_numpy(queries.query_vectors)
        else:
            histories = torch.from_numpy(queries.histories)
            vectors = (unit[histories.clamp(min=0)] * (histories >= 0).unsqueeze(-1)).sum(1)
        return F.normalize(vectors, dim=1) @ unit.T

    def item_vectors(self) -> Tensor:
        return self.vectors


def expanded_texts(data: Dataset) -> list[str]:
    """The text of each item with its most frequent training queries."""
    asked: list[Counter[Any]] = [Counter() for _ in data.catalog.texts]
    for text, item in zip(_training_queries(data.train, data.catalog), data.train.items.tolist(), strict=True):
        if text:
            asked[item][text] += 1
    return [
        " ".join([text, *(query for query, _ in counts.most_common(EXPANSIONS))])
        for text, counts in zip(data.catalog.texts, asked, strict=True)
    ]


def _training_queries(train: Interactions, catalog: Catalog) -> list[str]:
    if any(train.queries):
        return list(train.queries)
    return request_texts(train, catalog, recent=1)
