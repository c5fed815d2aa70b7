"""A catalog with its training and test interactions, from a folder of files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dgi.data.catalog import Catalog, load_catalog
from dgi.data.interactions import Interactions, load_interactions
from dgi.data.readers import SUFFIXES, DataError
from dgi.data.split import time_split


@dataclass(frozen=True, eq=False)
class Dataset:
    """What a model is trained and evaluated on: histories and items are rows of ``catalog``."""

    catalog: Catalog
    train: Interactions
    test: Interactions
    name: str


def load_dataset(folder: str | os.PathLike[str], *, test_fraction: float = 0.2) -> Dataset:
    """Load a dataset from a folder; its name is the folder's.

    The folder holds ``items.*`` and either ``interactions.*``, of which the last ``test_fraction`` by time is the test
    set, or ``interactions.train.*`` and ``interactions.test.*``; ``*`` is ``tsv``, ``jsonl`` (both also with ``.gz``)
    or ``parquet``.  Optional vectors, one per row of the file they belong to: ``items.npy``, and ``queries.npy``, or
    ``queries.train.npy`` and ``queries.test.npy``.

    Raises:
        DataError: a file is missing or given twice, or its content is wrong, with file, line and how to fix it.
    """
    folder = Path(folder)
    catalog = load_items(folder)
    together = _find(folder, "interactions")
    parts = {part: _find(folder, f"interactions.{part}") for part in ("train", "test")}
    if together and any(parts.values()):
        raise DataError(f"{folder}: has both {together.name} and interactions.train/test files; keep one or the other")
    if not together and any(parts.values()):
        train, test = (
            load_interactions(
                _need(folder, f"interactions.{part}"), catalog, query_vectors=_vectors(folder, f"queries.{part}")
            )
            for part in parts
        )
    else:
        path = _need(folder, "interactions")
        both = load_interactions(path, catalog, query_vectors=_vectors(folder, "queries"))
        try:
            train, test = time_split(both, test_fraction)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
    return Dataset(catalog, train, test, folder.resolve().name)


def load_items(folder: str | os.PathLike[str]) -> Catalog:
    """Load the catalog of a dataset's folder alone, without its interactions; see :func:`load_dataset`."""
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: there is no such folder; it must hold items.* and interactions.* as tsv, jsonl or parquet"
        )
    return load_catalog(_need(folder, "items"), vectors=_vectors(folder, "items"))


def _find(folder: Path, stem: str) -> Path | None:
    """The one file ``stem`` + suffix of the folder, or None."""
    found = [folder / f"{stem}{suffix}" for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{folder}: has {' and '.join(path.name for path in found)}; keep one of them")
    return found[0] if found else None


def _need(folder: Path, stem: str) -> Path:
    path = _find(folder, stem)
    if path is None:
        raise DataError(
            f"{folder}: there is no {stem} file; it must be one of {', '.join(stem + suffix for suffix in SUFFIXES)}"
        )
    return path


def _vectors(folder: Path, stem: str) -> Path | None:
    path = folder / f"{stem}.npy"
    return path if path.is_file() else None
