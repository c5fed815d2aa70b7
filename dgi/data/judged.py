"""Queries with judgments as training and test data, as the collections of information retrieval have them.

Two forms: ``queries`` (query_id, query) with ``qrels`` (query_id, item_id, relevance), as BEIR has them; or one table
``ratings`` (query, item_id, rating).  A column ``split`` says ``train``, ``validation`` (or ``dev``) or ``test``;
without it every query is a test query.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgi.data.catalog import Catalog
from dgi.data.interactions import Interactions, catalog_row
from dgi.data.judgments import MAX_RATING, rating_of
from dgi.data.readers import DataError, Problems, as_id, read_rows, read_vectors

SPLITS = {"train": "train", "validation": "validation", "dev": "validation", "valid": "validation", "test": "test"}


@dataclass(frozen=True, eq=False)
class JudgedQueries:
    """Queries and the items rated for them.

    Attributes:
        queries: n texts.
        ratings: for each query ``{catalog row: rating}``.
        splits: for each query ``train``, ``validation`` or ``test``.
        query_vectors: (n, d) float32, or None.
    """

    queries: tuple[str, ...]
    ratings: tuple[dict[int, int], ...]
    splits: tuple[str, ...]
    query_vectors: np.ndarray | None = None

    def clicks(self, split: str) -> Interactions:
        """Every item rated above 0 as an interaction of its query, for training."""
        pairs = [
            (row, item)
            for row, ratings in enumerate(self.ratings)
            if self.splits[row] == split
            for item, rating in ratings.items()
            if rating > 0
        ]
        return self._interactions(pairs)

    def requests(self, split: str) -> tuple[Interactions, tuple[dict[int, int], ...]]:
        """The queries of a split that have an item rated above 0, once each, with all their ratings.

        The interaction's item is the first one of the highest rating.
        """
        pairs = []
        for row, ratings in enumerate(self.ratings):
            best = max(ratings, key=ratings.__getitem__)
            if self.splits[row] == split and ratings[best] > 0:
                pairs.append((row, best))
        return self._interactions(pairs), tuple(self.ratings[row] for row, _ in pairs)

    def _interactions(self, pairs: list[tuple[int, int]]) -> Interactions:
        rows = np.array([row for row, _ in pairs], dtype=np.int64)
        return Interactions(
            tuple(self.queries[row] for row in rows),
            np.full((len(pairs), 1), -1, dtype=np.int64),
            np.array([item for _, item in pairs], dtype=np.int64),
            np.zeros(len(pairs)),
            None if self.query_vectors is None else self.query_vectors[rows],
        )


def load_ratings(
    path: str | os.PathLike[str], catalog: Catalog, *, query_vectors: str | os.PathLike[str] | None = None
) -> JudgedQueries:
    """Read ``query``, ``item_id``, ``rating`` and optionally ``split`` from TSV, JSONL or Parquet.

    Args:
        query_vectors: an ``.npy`` file with one vector per distinct query, in sorted order of the queries.

    Raises:
        DataError: with file, line and fix of every malformed line, unknown id, bad rating or split.
    """
    path = Path(path)
    problems = Problems(path)
    table = _Table(problems, catalog)
    for number, row in read_rows(path, problems, ("query", "item_id", "rating"), ("split",)):
        query = row["query"]
        if not isinstance(query, str):
            problems.add(number, f"query is {query!r}; it must be a text")
        else:
            table.add(number, query.strip(), row["item_id"], row["rating"], row.get("split"))
    problems.raise_if_any()
    queries = sorted(table.ratings)
    vectors = None if query_vectors is None else read_vectors(query_vectors, len(queries), f"queries of {path.name}")
    return table.judged(path, queries, queries, vectors)


def load_qrels(
    queries_path: str | os.PathLike[str],
    qrels_path: str | os.PathLike[str],
    catalog: Catalog,
    *,
    query_vectors: str | os.PathLike[str] | None = None,
) -> JudgedQueries:
    """Read ``query_id``, ``query`` and ``query_id``, ``item_id``, ``relevance``; either may have a ``split``.

    Args:
        query_vectors: an ``.npy`` file with one vector per row of the queries.

    Raises:
        DataError: with file, line and fix of every malformed line, unknown id, bad relevance or split.
    """
    queries_path, qrels_path = Path(queries_path), Path(qrels_path)
    problems = Problems(queries_path)
    texts: dict[str, str] = {}
    split_of: dict[str, object] = {}
    for number, row in read_rows(queries_path, problems, ("query_id", "query"), ("split",)):
        query_id = as_id(row["query_id"])
        if query_id is None or not isinstance(row["query"], str):
            problems.add(number, "query_id must be a non-empty string or an integer, and query a text")
        elif query_id in texts:
            problems.add(number, f"query_id {query_id!r} is there already; keep one of the two")
        else:
            texts[query_id], split_of[query_id] = row["query"].strip(), row.get("split")
    problems.raise_if_any()
    of_qrels = Problems(qrels_path)
    table = _Table(of_qrels, catalog)
    for number, row in read_rows(qrels_path, of_qrels, ("query_id", "item_id", "relevance"), ("split",)):
        query_id = as_id(row["query_id"])
        if query_id not in texts:
            of_qrels.add(number, f"query_id {row['query_id']!r} is not in {queries_path.name}; add the query")
        else:
            table.add(number, str(query_id), row["item_id"], row["relevance"], row.get("split", split_of[query_id]))
    of_qrels.raise_if_any()
    vectors = (
        None if query_vectors is None else read_vectors(query_vectors, len(texts), f"queries of {queries_path.name}")
    )
    judged = [query_id for query_id in texts if query_id in table.ratings]
    if vectors is not None:
        vectors = vectors[[query_id in table.ratings for query_id in texts]]
    return table.judged(qrels_path, judged, [texts[query_id] for query_id in judged], vectors)


class _Table:
    """Ratings by the query's key, as rows come in."""

    def __init__(self, problems: Problems, catalog: Catalog) -> None:
        self.problems = problems
        self.catalog = catalog
        self.ratings: dict[str, dict[int, int]] = {}
        self.splits: dict[str, str] = {}

    def add(self, number: int, key: str, item_id: object, value: object, split: object) -> None:
        before = self.problems.count
        item = catalog_row(item_id, "item_id", self.catalog, self.problems, number)
        rating = rating_of(value)
        known = SPLITS.get(str(split).strip().lower()) if split is not None else "test"
        if rating is None:
            self.problems.add(number, f"the rating is {value!r}; it must be a whole number from 0 to {MAX_RATING}")
        if known is None:
            self.problems.add(number, f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
        elif self.splits.get(key, known) != known:
            self.problems.add(number, f"query {key!r} is in two splits, {self.splits[key]} and {known}; keep one")
        if self.problems.count == before and rating is not None and known is not None:
            ratings = self.ratings.setdefault(key, {})
            ratings[item] = max(rating, ratings.get(item, 0))
            self.splits[key] = known

    def judged(self, path: Path, keys: list[str], texts: Iterable[str], vectors: np.ndarray | None) -> JudgedQueries:
        if not keys:
            raise DataError(f"{path}: holds no judgments; at least one is needed")
        return JudgedQueries(
            tuple(texts), tuple(self.ratings[key] for key in keys), tuple(self.splits[key] for key in keys), vectors
        )
