"""Relevance judgments: for each query several items, each with a rating."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dgi.data.catalog import Catalog
from dgi.data.interactions import catalog_row
from dgi.data.readers import DataError, Problems, read_rows, read_vectors

MAX_RATING = 30  # the gain of a rating is 2^rating - 1


@dataclass(frozen=True, eq=False)
class Judgments:
    """Queries with rated items.

    Attributes:
        queries: n distinct texts, sorted.
        ratings: for each query ``{catalog row: rating}``; 0 is not relevant, more is better, up to ``MAX_RATING``.
        query_vectors: (n, d) float32, or None.
    """

    queries: tuple[str, ...]
    ratings: tuple[dict[int, int], ...]
    query_vectors: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.queries)


def load_judgments(
    path: str | os.PathLike[str], catalog: Catalog, *, query_vectors: str | os.PathLike[str] | None = None
) -> Judgments:
    """Read judgments from TSV, JSONL or Parquet with the columns ``query``, ``item_id`` and ``rating`` (0, 1, 2, …).

    Args:
        path: ``*.tsv``, ``*.jsonl`` (both also ``.gz``) or ``*.parquet``.
        catalog: the items that ids refer to.
        query_vectors: an ``.npy`` file of (n, d) floats, one per distinct query, in sorted order of the queries.

    Raises:
        DataError: with file, line and fix of every malformed line, unknown id, bad rating, and pair rated twice.
    """
    path = Path(path)
    problems = Problems(path)
    ratings: dict[str, dict[int, int]] = {}
    for number, row in read_rows(path, problems, ("query", "item_id", "rating")):
        before = problems.count
        query, item = row["query"], catalog_row(row["item_id"], "item_id", catalog, problems, number)
        rating = rating_of(row["rating"])
        if not isinstance(query, str) or not query.strip():
            problems.add(number, f"query is {query!r}; it must be a non-empty text")
        elif item in ratings.get(query.strip(), ()):
            problems.add(number, f"item {catalog.ids[item]!r} is rated for query {query!r} already; keep one rating")
        if rating is None:
            problems.add(number, f"rating is {row['rating']!r}; it must be a whole number from 0 to {MAX_RATING}")
        elif problems.count == before:
            ratings.setdefault(query.strip(), {})[item] = rating
    problems.raise_if_any()
    if not ratings:
        raise DataError(f"{path}: holds no judgments; at least one is needed")
    queries = tuple(sorted(ratings))
    vectors = None if query_vectors is None else read_vectors(query_vectors, len(queries), f"queries of {path.name}")
    return Judgments(queries, tuple(ratings[query] for query in queries), vectors)


def rating_of(value: object) -> int | None:
    """A rating as an integer; None where it is not one."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return None
    return int(number) if 0 <= number <= MAX_RATING and number.is_integer() else None
