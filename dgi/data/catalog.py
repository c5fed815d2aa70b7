"""The items that can be found: ``id`` and ``text`` of each, and optionally a precomputed vector."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dgi.data.readers import DataError, Problems, as_id, is_text, read_rows, read_vectors


@dataclass(frozen=True, eq=False)
class Catalog:
    """Items in row order; the row is the item's internal id everywhere.

    Attributes:
        ids: one distinct, non-empty id per item.
        texts: one text per item.
        vectors: (num_items, d) float32, or None.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    vectors: np.ndarray | None = None
    _rows: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.ids):
            raise ValueError(f"texts must have one text per id ({len(self.ids)}); got {len(self.texts)}")
        if self.vectors is not None and (self.vectors.ndim != 2 or len(self.vectors) != len(self.ids)):
            raise ValueError(f"vectors must have shape (num_items, d) = ({len(self.ids)}, *); got {self.vectors.shape}")
        for name in ("ids", "texts"):
            if not is_text(getattr(self, name)):
                row = next(row for row, value in enumerate(getattr(self, name)) if not is_text(value))
                raise ValueError(
                    f"{name}[{row}] holds half of a character (a lone surrogate), which no file can "
                    f"store: {getattr(self, name)[row]!r}"
                )
        rows = {item_id: row for row, item_id in enumerate(self.ids)}
        if len(rows) != len(self.ids):
            repeated = len(self.ids) - len(rows)
            raise ValueError(f"ids must be distinct; {repeated} of {len(self.ids)} repeat an earlier one")
        object.__setattr__(self, "_rows", rows)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._rows

    def row(self, item_id: str) -> int:
        """The row of the item with this id; KeyError where there is none."""
        return self._rows[item_id]


def load_catalog(
    path: str | os.PathLike[str],
    *,
    vectors: str | os.PathLike[str] | None = None,
    text: Sequence[str] = ("text",),
) -> Catalog:
    """Read a catalog from TSV, JSONL or Parquet with the columns ``id`` and ``text``; other columns are ignored.

    Args:
        path: ``*.tsv``, ``*.jsonl`` (both also ``.gz``) or ``*.parquet``.
        text: the columns that make an item's text, joined by spaces. Of several, an item needs only one.
        vectors: an ``.npy`` file of (num_items, d) floats in the order of the file; kept as float32.

    Raises:
        DataError: with file, line and fix of every malformed line, missing, empty or duplicate id, and empty text.
    """
    path = Path(path)
    problems = Problems(path)
    lines: dict[str, int] = {}
    texts: list[str] = []
    required = ("id", *text) if len(text) == 1 else ("id",)
    for number, row in read_rows(path, problems, required, () if len(text) == 1 else text):
        item_id, item_text = as_id(row["id"]), _text(row, text)
        if item_id is None:
            problems.add(number, f"id is {row['id']!r}; it must be a non-empty string or an integer")
        elif not isinstance(item_text, str) or not item_text.strip():
            problems.add(number, f"the text of item {item_id!r} is {item_text!r}; give it a text or remove the item")
        elif item_id in lines:
            first = problems.place(lines[item_id])
            problems.add(number, f"id {item_id!r} is on {first} already; keep one of the two")
        else:
            lines[item_id] = number
            texts.append(item_text.strip())
    problems.raise_if_any()
    if not lines:
        raise DataError(f"{path}: holds no items; a catalog needs at least one")
    item_vectors = None if vectors is None else read_vectors(vectors, len(lines), f"items of {path.name}")
    return Catalog(tuple(lines), tuple(texts), item_vectors)


def _text(row: Mapping[str, Any], columns: Sequence[str]) -> Any:
    """The columns' values, joined; a value that is no text is returned as it is, to be reported."""
    if len(columns) == 1:
        return row[columns[0]]
    values = [row[column] for column in columns if row.get(column) is not None]
    wrong = [value for value in values if not isinstance(value, str)]
    return wrong[0] if wrong else " ".join(value.strip() for value in values)


def one_line(text: str) -> str:
    """A text of the data as a terminal can show it: on one line, and without characters that steer the terminal."""
    return "".join(
        character if character.isprintable() else " " if character.isspace() else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )
