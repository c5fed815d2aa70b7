"""A catalog with its training and test interactions, from a folder of files."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from dgi.data.catalog import Catalog, load_catalog
from dgi.data.interactions import MAX_HISTORY, Interactions, load_interactions
from dgi.data.judged import JudgedQueries, load_qrels, load_ratings
from dgi.data.readers import SUFFIXES, DataError, Problems, as_id, read_rows
from dgi.data.sequences import Sequences, leave_one_out, load_sequences, next_items, training_part
from dgi.data.split import time_split

SplitKind = Literal["time", "leave_one_out", "given"]
QUERIES_PER_ITEM = 16  # of an item without a text: its most frequent training queries
Part = TypeVar("Part")


@dataclass(frozen=True, eq=False)
class Dataset:
    """What a model is trained and evaluated on: histories and items are rows of ``catalog``.

    Attributes:
        validation: what settings are chosen on, or None; see :func:`with_validation`.
        relevant: for each row of ``test`` all its rated items, ``{catalog row: rating}``, or None where the item chosen
            is the only relevant one.
        split: how training and test were told apart.
        sequences: those that ``train`` was made of, where it was made of sequences split by leave-one-out, or None.
    """

    catalog: Catalog
    train: Interactions
    test: Interactions
    name: str
    validation: Interactions | None = None
    relevant: tuple[dict[int, int], ...] | None = None
    split: SplitKind = "time"
    sequences: Sequences | None = None


def load_dataset(
    folder: str | os.PathLike[str],
    *,
    test_fraction: float = 0.2,
    split: SplitKind | None = None,
    max_history: int = MAX_HISTORY,
    text: Sequence[str] = ("text",),
    vectors: str = "",
) -> Dataset:
    """Load a dataset from a folder; its name is the folder's.

    The folder holds ``items.*`` and one of the following, where ``*`` is ``tsv``, ``jsonl`` (both also with ``.gz``) or
    ``parquet``:

    * ``interactions.*`` (or ``clicks.*``), see :func:`load_interactions`; the last ``test_fraction`` by time is the
      test set. Without ``items.*`` the items are those of the interactions, and an item's text is its most frequent
      training queries.
    * ``interactions.train.*``, ``interactions.test.*`` and, if it is there, ``interactions.validation.*``.
    * ``sequences.*``, see :func:`load_sequences`: split by leave-one-out, or by time with ``split="time"``.
    * ``queries.*`` with ``qrels.*``, or ``ratings.*``: see :mod:`dgi.data.judged`.

    Optional vectors, one per row of the file they belong to: ``items.npy``, and ``queries.npy``, or
    ``queries.train.npy`` and ``queries.test.npy``.

    Args:
        test_fraction: share of the test set where the split is by time.
        split: None for the usual one of the files, as above.
        max_history: of a longer history the last ``max_history`` items are kept.
        text: columns that make an item's text, joined by spaces.
        vectors: name of the vectors where a folder has several: ``"minilm"`` for ``items.minilm.npy``.

    Raises:
        DataError: a file is missing or given twice, or its content is wrong, with file, line and how to fix it.
        ValueError: ``split`` does not fit the files.
    """
    folder = Path(folder)
    if not folder.is_dir():
        load_items(folder)  # which says what is missing
    name = folder.resolve().name
    files = _Files(folder, f".{vectors}" if vectors else "")
    kinds = {stem: files.find(stem) for stem in ("interactions", "clicks", "sequences", "qrels", "ratings")}
    parts = {part: files.find(f"interactions.{part}") for part in ("train", "validation", "test")}
    present = [path.name for path in kinds.values() if path] + (
        ["interactions.train/test files"] if any(parts.values()) else []
    )
    if len(present) > 1:
        raise DataError(f"{folder}: has both {' and '.join(present[:2])}; keep one or the other")
    together = kinds["interactions"] or kinds["clicks"]
    if together and files.find("items") is None and together == kinds["clicks"]:
        _check_split(split, "time")
        return _from_clicks(together, name, test_fraction, max_history, files)
    catalog = load_items(folder, text=text, vectors=vectors)
    if kinds["sequences"]:
        _check_split(split, "leave_one_out", "time")
        sequences = load_sequences(kinds["sequences"], catalog)
        if split == "time":
            examples = next_items(sequences, max_history=max_history)
            train, test = _by_time(kinds["sequences"], examples, test_fraction)
            return Dataset(catalog, train, test, name)
        train, validation, test = _told(kinds["sequences"], lambda: leave_one_out(sequences, max_history=max_history))
        return Dataset(
            catalog,
            train,
            test,
            name,
            validation,
            split="leave_one_out",
            sequences=training_part(sequences),
        )
    if kinds["qrels"] or kinds["ratings"]:
        _check_split(split, "given")
        return _judged(_load_judged(kinds, files, catalog), catalog, name)
    if any(parts.values()):
        _check_split(split, "given")
        loaded = {
            part: load_interactions(
                files.need(f"interactions.{part}"),
                catalog,
                max_history=max_history,
                query_vectors=files.vectors(f"queries.{part}"),
            )
            for part in parts
            if part != "validation" or parts[part]
        }
        return Dataset(catalog, loaded["train"], loaded["test"], name, loaded.get("validation"), split="given")
    _check_split(split, "time")
    path = together or files.need("interactions")
    both = load_interactions(path, catalog, max_history=max_history, query_vectors=files.vectors("queries"))
    train, test = _by_time(path, both, test_fraction)
    return Dataset(catalog, train, test, name)


def load_items(folder: str | os.PathLike[str], *, text: Sequence[str] = ("text",), vectors: str = "") -> Catalog:
    """Load the catalog of a dataset's folder alone, without its interactions; see :func:`load_dataset`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; it must hold items.* and interactions.* as tsv, jsonl or parquet"
        )
    files = _Files(folder, f".{vectors}" if vectors else "")
    return load_catalog(files.need("items"), vectors=files.vectors("items"), text=text)


def with_validation(data: Dataset, fraction: float = 0.1, *, seed: int = 0) -> Dataset:
    """The dataset with a validation set, split off the end of the training interactions where it has none.

    By time; where all training interactions have one time, at random, with all interactions of a query on one side.

    Raises:
        ValueError: ``fraction`` is not strictly between 0 and 1.
    """
    if data.validation is not None:
        return data
    times = data.train.timestamps
    if len(times) and times.min() != times.max():
        train, validation = time_split(data.train, fraction)
    else:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be strictly between 0 and 1; got {fraction}")
        keys = {query: row for row, query in enumerate(dict.fromkeys(data.train.queries))}
        chosen = np.random.default_rng(seed).random(len(keys)) < fraction
        held = np.array([chosen[keys[query]] for query in data.train.queries], dtype=bool)
        train, validation = data.train.take(np.flatnonzero(~held)), data.train.take(np.flatnonzero(held))
    return dataclasses.replace(data, train=train, validation=validation)


def with_pseudo_queries(data: Dataset, per_item: int, *, words: tuple[int, int] = (1, 4), seed: int = 0) -> Dataset:
    """The dataset with ``per_item`` more training interactions for each item: some words of its text as a query for it.

    The words are a run of ``words[0]`` to ``words[1]`` of the text, at random. This is how a model of item texts is
    trained where there are few queries, as document expansion has it. Where items and queries have vectors, the new
    query's is the item's own, turned towards the difference of two other items until their cosine is 0.6 to 1.
    """
    random = np.random.default_rng(seed)
    queries, items = [], []
    for row, text in enumerate(data.catalog.texts):
        cut = text.split()
        for _ in range(per_item if cut else 0):
            length = min(len(cut), int(random.integers(words[0], words[1] + 1)))
            first = int(random.integers(len(cut) - length + 1))
            queries.append(" ".join(cut[first : first + length]))
            items.append(row)
    old, vectors = data.train, None
    if old.query_vectors is not None and data.catalog.vectors is not None:
        vectors = np.concatenate([old.query_vectors, _near(data.catalog.vectors, items, random)])
    train = Interactions(
        (*old.queries, *queries),
        np.concatenate([old.histories, np.full((len(items), old.histories.shape[1]), -1, dtype=np.int64)]),
        np.concatenate([old.items, np.array(items, dtype=np.int64)]),
        np.concatenate([old.timestamps, np.zeros(len(items))]),
        vectors,
    )
    return dataclasses.replace(data, train=train)


def _near(vectors: np.ndarray, rows: list[int], random: np.random.Generator) -> np.ndarray:
    """(len(rows), d) a unit vector near each of these rows of ``vectors``."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    own = unit[rows]
    first, second = random.integers(len(unit), size=(2, len(rows)))
    other = unit[first] - unit[second]
    other -= (other * own).sum(1, keepdims=True) * own
    other /= np.maximum(np.linalg.norm(other, axis=1, keepdims=True), 1e-12)
    cosine = random.uniform(0.6, 1.0, size=(len(rows), 1))
    near = cosine * own + np.sqrt(1 - cosine**2) * other  # shorter where an item was drawn twice: no other direction
    return (near / np.maximum(np.linalg.norm(near, axis=1, keepdims=True), 1e-12)).astype(np.float32)


@dataclass(frozen=True)
class _Files:
    """The files of a folder by their stem; ``suffix`` is what names of vectors have before ``.npy``."""

    folder: Path
    suffix: str

    def find(self, stem: str) -> Path | None:
        """The one file ``stem`` + suffix of the folder, or None."""
        paths = [self.folder / f"{stem}{suffix}" for suffix in SUFFIXES]
        found = [path for path in paths if path.is_file()]
        if len(found) > 1:
            raise DataError(f"{self.folder}: has {' and '.join(path.name for path in found)}; keep one of them")
        return found[0] if found else None

    def need(self, stem: str) -> Path:
        path = self.find(stem)
        if path is None:
            names = ", ".join(stem + suffix for suffix in SUFFIXES)
            raise DataError(f"{self.folder}: there is no {stem} file; it must be one of {names}")
        return path

    def vectors(self, stem: str) -> Path | None:
        path = self.folder / f"{stem}{self.suffix}.npy"
        if self.suffix and stem == "items" and not path.is_file():
            raise DataError(f"{path}: there is no such file; vectors were asked for by that name")
        return path if path.is_file() else None


def _check_split(split: SplitKind | None, *possible: SplitKind) -> None:
    if split is not None and split not in possible:
        raise ValueError(f"split must be {' or '.join(map(repr, possible))} for these files; got {split!r}")


def _told(path: Path, make: Callable[[], Part]) -> Part:
    """What ``make`` returns; an error of the data names the file."""
    try:
        return make()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _by_time(path: Path, both: Interactions, test_fraction: float) -> tuple[Interactions, Interactions]:
    return _told(path, lambda: time_split(both, test_fraction))


def _load_judged(kinds: dict[str, Path | None], files: _Files, catalog: Catalog) -> JudgedQueries:
    vectors = files.vectors("queries")
    if kinds["ratings"]:
        return load_ratings(kinds["ratings"], catalog, query_vectors=vectors)
    return load_qrels(files.need("queries"), files.need("qrels"), catalog, query_vectors=vectors)


def _judged(judged: JudgedQueries, catalog: Catalog, name: str) -> Dataset:
    test, relevant = judged.requests("test")
    if not len(test):
        raise DataError(f"{name}: no test query has an item rated above 0; at least one is needed")
    validation = judged.requests("validation")[0]
    return Dataset(
        catalog, judged.clicks("train"), test, name, validation if len(validation) else None, relevant, "given"
    )


def _from_clicks(path: Path, name: str, test_fraction: float, max_history: int, files: _Files) -> Dataset:
    """Clicks without a catalog: ids from the whole file, texts from the queries of the training part alone."""
    problems = Problems(path)
    ids: dict[str, None] = {}
    for _, row in read_rows(path, problems, ("item_id",)):
        item_id = as_id(row["item_id"])
        if item_id is not None:
            ids.setdefault(item_id)
    nameless = Catalog(tuple(ids), tuple(ids))
    both = load_interactions(path, nameless, max_history=max_history, query_vectors=files.vectors("queries"))
    train, test = _by_time(path, both, test_fraction)
    asked: list[Counter[str]] = [Counter() for _ in ids]
    for query, item in zip(train.queries, train.items.tolist(), strict=True):
        if query:
            asked[item][query] += 1
    texts = tuple(" ".join(query for query, _ in counts.most_common(QUERIES_PER_ITEM)) for counts in asked)
    return Dataset(Catalog(tuple(ids), texts), train, test, name)
