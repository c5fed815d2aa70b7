"""What users did: a query and/or the items of the past, the item chosen then, and when."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dgi.data.catalog import Catalog
from dgi.data.readers import DataError, Problems, as_id, read_rows, read_vectors

MAX_HISTORY = 10  # the paper's setting: the query and up to 10 titles of items clicked before


@dataclass(frozen=True, eq=False)
class Interactions:
    """Column-wise interactions, all columns aligned; the loaders give them sorted by time.

    Attributes:
        queries: n texts, "" where there is none.
        histories: (n, max_history) int64 catalog rows, oldest first, padded with -1 on the left.
        items: (n,) int64, the catalog row of the item chosen.
        timestamps: (n,) float64 seconds; only their order counts.
        query_vectors: (n, d) float32, or None.
    """

    queries: tuple[str, ...]
    histories: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray
    query_vectors: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.items)
        if self.histories.ndim != 2:
            raise ValueError(f"histories must have shape (n, max_history); got {self.histories.shape}")
        for name in ("queries", "histories", "timestamps", "query_vectors"):
            column = getattr(self, name)
            if column is not None and len(column) != n:
                raise ValueError(f"{name} must have one row per item chosen ({n}); got {len(column)}")

    def __len__(self) -> int:
        return len(self.items)

    def take(self, rows: Sequence[int] | np.ndarray) -> Interactions:
        """The interactions ``rows`` (integers), in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        return Interactions(
            queries=tuple(self.queries[row] for row in rows),
            histories=self.histories[rows],
            items=self.items[rows],
            timestamps=self.timestamps[rows],
            query_vectors=None if self.query_vectors is None else self.query_vectors[rows],
        )


def load_interactions(
    path: str | os.PathLike[str],
    catalog: Catalog,
    *,
    max_history: int = MAX_HISTORY,
    query_vectors: str | os.PathLike[str] | None = None,
) -> Interactions:
    """Read interactions from TSV, JSONL or Parquet, sorted by time (rows of one time keep the order of the file).

    Columns: ``item_id``; ``query`` (text) and/or ``history`` (ids of items, oldest first: a list, or a text of ids
    separated by spaces or commas); ``timestamp`` (seconds), which may be absent from the whole file: then all are 0
    and the file cannot be split by time.  Other columns are ignored.

    Args:
        path: ``*.tsv``, ``*.jsonl`` (both also ``.gz``) or ``*.parquet``.
        catalog: the items that ids refer to.
        max_history: of a longer history the last ``max_history`` items are kept.
        query_vectors: an ``.npy`` file of (n, d) floats in the order of the file; a row then needs no query text.

    Raises:
        DataError: with file, line and fix of every malformed line, unknown id, bad timestamp, and row that has
            neither query nor history.
    """
    if max_history < 1:
        raise ValueError(f"max_history must be at least 1; got {max_history}")
    path = Path(path)
    problems = Problems(path)
    queries, items, timestamps = [], [], []
    histories: list[list[int]] = []
    timed: bool | None = None
    for number, row in read_rows(path, problems, ("item_id",), ("query", "history", "timestamp")):
        timed = "timestamp" in row if timed is None else timed
        before = problems.count
        item = catalog_row(row["item_id"], "item_id", catalog, problems, number)
        history = _history(row.get("history", ()), catalog, problems, number)
        timestamp = _timestamp(row.get("timestamp"), timed, problems, number)
        query = row.get("query", "")
        if not isinstance(query, str):
            problems.add(number, f"query is {query!r}; it must be a text")
        elif not query.strip() and not history and query_vectors is None:
            problems.add(number, "neither query nor history; give it one of the two, or remove the row")
        if problems.count == before:
            queries.append(query.strip())
            histories.append(history[-max_history:])
            items.append(item)
            timestamps.append(timestamp)
    problems.raise_if_any()
    if not items:
        raise DataError(f"{path}: holds no interactions; at least one is needed")
    vectors = None if query_vectors is None else read_vectors(query_vectors, len(items), f"interactions of {path.name}")
    loaded = Interactions(
        tuple(queries),
        pad_histories(histories, max_history),
        np.array(items, dtype=np.int64),
        np.array(timestamps, dtype=np.float64),
        vectors,
    )
    return loaded.take(np.argsort(loaded.timestamps, kind="stable"))


def pad_histories(histories: Sequence[Sequence[int] | np.ndarray], max_history: int) -> np.ndarray:
    """Histories of at most ``max_history`` rows as (n, max_history) int64, padded with -1 on the left."""
    padded = np.full((len(histories), max_history), -1, dtype=np.int64)
    for row, history in zip(padded, histories, strict=True):
        if len(history):
            row[-len(history) :] = history
    return padded


def catalog_row(value: object, column: str, catalog: Catalog, problems: Problems, number: int) -> int:
    """The catalog row of the id in a field; an unknown or malformed id goes to ``problems`` and gives -1."""
    item_id = as_id(value)
    if item_id is None:
        problems.add(number, f"{column} holds {value!r}; an id must be a non-empty string or an integer")
    elif item_id not in catalog:
        problems.add(
            number, f"{column} holds {item_id!r}, which is no item of the catalog; add the item or remove this id"
        )
    else:
        return catalog.row(item_id)
    return -1


def _history(value: Any, catalog: Catalog, problems: Problems, number: int) -> list[int]:
    if isinstance(value, str):
        value = [item_id for item_id in re.split(r"[,\s]+", value) if item_id]
    if not isinstance(value, (list, tuple)):
        problems.add(number, f"history is {value!r}; it must be a list of item ids, oldest first")
        return []
    return [catalog_row(item_id, "history", catalog, problems, number) for item_id in value]


def _timestamp(value: Any, timed: bool, problems: Problems, number: int) -> float:
    if timed != (value is not None):
        problems.add(number, "some rows have a timestamp and some have none; give every row its time in seconds")
    if value is None:
        return 0.0
    try:
        timestamp = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        timestamp = math.nan
    if not math.isfinite(timestamp):
        problems.add(number, f"timestamp is {value!r}; it must be a finite number of seconds")
    return timestamp


def train_counts(train: Interactions, num_items: int) -> np.ndarray:
    """(num_items,) how often each item was chosen in training."""
    return np.bincount(train.items, minlength=num_items)
