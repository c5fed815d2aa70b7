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


def training_part(sequences: Sequences) -> Sequences:
    """What :func:`leave_one_out` trains on: each user's items but the last two, all of users with fewer than three."""
    kept = [slice(len(items) - 2 if len(items) >= SHORTEST else None) for items in sequences.items]
    return Sequences(
        tuple(items[part] for items, part in zip(sequences.items, kept, strict=True)),
        tuple(times[part] for times, part in zip(sequences.timestamps, kept, strict=True)),
    )


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


@dataclass(frozen=True, eq=False)
class SequenceRows:
    """Training examples of sequences, many in a row: every item with a target ends a history, the items up to it.

    Attributes:
        histories: (n, H) int64 catalog rows, oldest first, padded with -1 on the right.
        targets: (n, H) int64 the item that followed each one, -1 where it is in another row or none followed.
    """

    histories: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.histories)


def training_rows(sequences: Sequences, *, max_history: int = MAX_HISTORY) -> SequenceRows:
    """The examples of :func:`next_items`, a row for each user.

    A sequence of more than ``max_history`` + 1 items takes several rows. Each example is in one of them, and has at
    least half of ``max_history`` items before it in its row.
    """
    if max_history < 1:
        raise ValueError(f"max_history must be at least 1; got {max_history}")
    histories, targets = [], []
    for items in sequences.items:
        start, done, last = 0, 0, len(items) - 1
        while done < last:
            end = min(start + max_history, last)
            history = np.full(max_history, -1, dtype=np.int64)
            target = history.copy()
            history[: end - start] = items[start:end]
            target[done - start : end - start] = items[done + 1 : end + 1]
            histories.append(history)
            targets.append(target)
            start, done = max(0, end - max_history // 2), end
    shape = (len(histories), max_history)
    return SequenceRows(
        np.array(histories, dtype=np.int64).reshape(shape), np.array(targets, dtype=np.int64).reshape(shape)
    )


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
