"""Sequences of users: each user's items in order of time, expanded to examples as the benchmarks of the field do it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dgi.data.catalog import Catalog
from dgi.data.interactions import MAX_HISTORY, Interactions, catalog_row, pad_histories
from dgi.data.readers import DataError, Problems, read_rows

SHORTEST = 3  # items of a user with one for training, one for validation and one for the test


@dataclass(frozen=True, eq=False)
class Sequences:
    """What each user chose, oldest first.

    Attributes:
        items: for each user (n,) int64 catalog rows.
        timestamps: for each user (n,) float64 seconds, not decreasing; all 0 where the file has none.
    """

    items: tuple[np.ndarray, ...]
    timestamps: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.items)


def load_sequences(path: str | os.PathLike[str], catalog: Catalog) -> Sequences:
    """Read sequences from TSV, JSONL or Parquet, one user per row.

    Columns: ``item_ids``, oldest first (a list, or a text of ids separated by spaces or commas), and optionally
    ``timestamps`` in seconds, as many.  Other columns, such as ``user_id``, are ignored.

    Raises:
        DataError: with file, line and fix of every malformed line, unknown id and bad or decreasing timestamp.
    """
    path = Path(path)
    problems = Problems(path)
    items: list[np.ndarray] = []
    timestamps: list[np.ndarray] = []
    for number, row in read_rows(path, problems, ("item_ids",), ("timestamps",)):
        before = problems.count
        ids = _list(row["item_ids"], "item_ids", problems, number)
        rows = [catalog_row(item_id, "item_ids", catalog, problems, number) for item_id in ids]
        times = _times(row.get("timestamps"), len(rows), problems, number)
        if problems.count == before and rows:
            items.append(np.array(rows, dtype=np.int64))
            timestamps.append(times)
    problems.raise_if_any()
    if not items:
        raise DataError(f"{path}: holds no sequences; at least one is needed")
    return Sequences(tuple(items), tuple(timestamps))


def leave_one_out(
    sequences: Sequences, *, max_history: int = MAX_HISTORY
) -> tuple[Interactions, Interactions, Interactions]:
    """The standard split of sequential recommendation, as SASRec and TIGER have it: (train, validation, test).

    The last item of each user is the test, the last but one validation, each from all items before it.  Of the items
    before those two, every one but the first is a training example, from the items before it.  Users with fewer than
    three items are training data only.

    Args:
        max_history: of a longer history the last ``max_history`` items are kept.

    Raises:
        DataError: no user has three items.
    """
    parts: tuple[list[tuple[int, int]], ...] = ([], [], [])
    for user, items in enumerate(sequences.items):
        last = len(items) - 2 if len(items) >= SHORTEST else len(items)
        parts[0].extend((user, place) for place in range(1, last))
        if len(items) >= SHORTEST:
            parts[1].append((user, len(items) - 2))
            parts[2].append((user, len(items) - 1))
    if not parts[2]:
        raise DataError(f"no user has {SHORTEST} items, which leave-one-out needs; split by time instead")
    train, validation, test = (_examples(sequences, part, max_history) for part in parts)
    return train, validation, test


def next_items(sequences: Sequences, *, max_history: int = MAX_HISTORY) -> Interactions:
    """Every item but each user's first as an interaction, from the items before it; sorted by time."""
    places = [(user, place) for user, items in enumerate(sequences.items) for place in range(1, len(items))]
    examples = _examples(sequences, places, max_history)
    return examples.take(np.argsort(examples.timestamps, kind="stable"))


def _examples(sequences: Sequences, places: Sequence[tuple[int, int]], max_history: int) -> Interactions:
    if max_history < 1:
        raise ValueError(f"max_history must be at least 1; got {max_history}")
    histories = [sequences.items[user][max(0, place - max_history) : place] for user, place in places]
    return Interactions(
        ("",) * len(places),
        pad_histories(histories, max_history),
        np.array([sequences.items[user][place] for user, place in places], dtype=np.int64),
        np.array([sequences.timestamps[user][place] for user, place in places], dtype=np.float64),
    )


def _list(value: Any, column: str, problems: Problems, number: int) -> Sequence[Any]:
    if isinstance(value, str):
        return [part for part in re.split(r"[,\s]+", value) if part]
    if not isinstance(value, (list, tuple)):
        problems.add(number, f"{column} is {value!r}; it must be a list, oldest first")
        return ()
    return value


def _times(value: Any, count: int, problems: Problems, number: int) -> np.ndarray:
    if value is None:
        return np.zeros(count)
    try:
        times = np.array([float(time) for time in _list(value, "timestamps", problems, number)])
    except (TypeError, ValueError, OverflowError):
        times = np.array([np.nan])
    if len(times) != count or not np.isfinite(times).all() or (np.diff(times) < 0).any():
        problems.add(
            number,
            f"timestamps must be {count} finite numbers of seconds, one per item and not decreasing; got {value!r}",
        )
    return times
