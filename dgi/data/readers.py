"""Rows of a TSV, JSONL or Parquet file, with every problem reported with file, line and how to fix it.

TSV has a header row and no quoting: a field is the text between two tabs.  TSV and JSONL are UTF-8 and may be
gzipped (``.gz``).  Parquet needs pyarrow (``pip install "dgi-kernels[parquet]"``).
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet")
MAX_SHOWN = 20

Row = tuple[int, dict[str, Any]]


class DataError(ValueError):
    """The data cannot be used as it is; the message names the file, each line, and what to do."""


class Problems:
    """Collects the problems of one file's lines, so that all are reported at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self._shown: list[str] = []
        self._unit = "row" if path.suffix == ".parquet" else "line"

    def add(self, number: int, message: str) -> None:
        """Note a problem of line ``number`` (row ``number`` of a Parquet file); both count from 1."""
        self.count += 1
        if self.count <= MAX_SHOWN:
            self._shown.append(f"  {self.place(number)}: {message}")

    def place(self, number: int) -> str:
        return f"{self._unit} {number}"

    def raise_if_any(self) -> None:
        """Raise :class:`DataError` with the first problems and their total number, if there are any."""
        if self.count:
            more = [f"  and {self.count - MAX_SHOWN} more"] if self.count > MAX_SHOWN else []
            noun = "problem" if self.count == 1 else "problems"
            raise DataError("\n".join([f"{self.path}: {self.count} {noun}", *self._shown, *more]))


def read_rows(path: Path, problems: Problems, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """Yield ``(line number, {column: value})`` for every well-formed row.

    Only ``required`` and ``optional`` columns are kept, and only where they have a value.  Malformed lines and rows
    without a required value go to ``problems``.  TSV values are strings; JSONL and Parquet values have their types.

    Raises:
        DataError: the file is missing, damaged, of an unknown format, or has no such column at all.
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    name = path.name.removesuffix(".gz")
    if name.endswith(".tsv"):
        rows = _tsv_rows(path, problems, required)
    elif name.endswith(".jsonl"):
        rows = _jsonl_rows(path, problems)
    elif path.suffix == ".parquet":
        rows = _parquet_rows(path, required, optional)
    else:
        raise DataError(f"{path}: the file's name tells the format and must end in one of {', '.join(SUFFIXES)}")
    for number, row in rows:
        kept = {column: row[column] for column in (*required, *optional) if row.get(column) is not None}
        missing = [column for column in required if column not in kept]
        broken = [column for column, value in kept.items() if not is_text(value)]
        if missing:
            problems.add(number, f"no value for {' and '.join(missing)}; every row needs one")
        elif broken:
            problems.add(
                number,
                f"{broken[0]} holds half of a character (a lone surrogate such as \\ud800), which no "
                f"file can store; write the whole character, or remove it",
            )
        else:
            yield number, kept


def is_text(value: object) -> bool:
    """Whether a string can be encoded; of a list all its strings, of anything else always."""
    if isinstance(value, (list, tuple)):
        return all(map(is_text, value))
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_vectors(path: str | os.PathLike[str], rows: int, aligned_with: str) -> np.ndarray:
    """Load an ``.npy`` file of (rows, d) floats as float32; ``aligned_with`` says in words what its rows belong to.

    Raises:
        DataError: the file is missing or damaged, is not 2-d float, has another number of rows, or holds a NaN or
            infinity.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        vectors = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a readable .npy file of numbers ({error}); write it with numpy.save") from None
    if not isinstance(vectors, np.ndarray) or vectors.ndim != 2 or vectors.dtype.kind != "f" or vectors.shape[1] == 0:
        what = f"{vectors.dtype} of shape {vectors.shape}" if isinstance(vectors, np.ndarray) else "an .npz archive"
        raise DataError(f"{path}: vectors must be a 2-d floating-point array (rows, d); got {what}")
    if len(vectors) != rows:
        raise DataError(
            f"{path}: has {len(vectors)} vectors for {rows} {aligned_with}; write one vector per row, in the same order"
        )
    vectors = vectors.astype(np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise DataError(
            f"{path}: {int((~finite).sum())} vectors hold a NaN or an infinity in float32, the first in "
            f"row {int(np.argmin(finite))} (counted from 0); compute these vectors again"
        )
    return vectors


def as_id(value: object) -> str | None:
    """The item id in a field: a non-empty string or an integer, as a string; None for anything else."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return None


def _tsv_rows(path: Path, problems: Problems, required: Sequence[str]) -> Iterator[Row]:
    lines = _lines(path, problems)
    first = next(lines, None)
    problems.raise_if_any()  # an unreadable header: nothing after it makes sense
    if first is None:
        raise DataError(f"{path}: the file is empty; its first line must name the columns")
    header = [name.strip() for name in first[1].split("\t")]
    _check_columns(path, header, required, header)
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) == len(header):
            yield number, {column: value for column, value in zip(header, fields, strict=True) if value.strip()}
        else:
            problems.add(
                number,
                f"{len(fields)} columns where the header has {len(header)}; separate columns by one "
                f"tab, and write a tab or line break inside a text as a space",
            )


def _jsonl_rows(path: Path, problems: Problems) -> Iterator[Row]:
    for number, line in _lines(path, problems):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.add(number, f"not valid JSON ({error}); write one JSON object per line")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.add(number, f"a JSON {type(row).__name__} where an object is needed; write one object per line")


def _parquet_rows(path: Path, required: Sequence[str], optional: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f'{path}: reading Parquet needs pyarrow; run: pip install "dgi-kernels[parquet]"') from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_columns(path, schema.names, required, optional)
            names = [column for column in (*required, *optional) if column in schema.names]
            number = 0
            for batch in file.iter_batches(columns=names):
                columns = [_python_values(batch.column(name)) for name in names]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield number, dict(zip(names, values, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: a text in it is not UTF-8 ({error}); write it again") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from None


def _python_values(column: Any) -> list[Any]:
    """A pyarrow column as Python values; points in time become seconds since 1970."""
    import pyarrow

    if pyarrow.types.is_timestamp(column.type):
        per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[column.type.unit]
        ticks = column.cast(pyarrow.int64()).to_pylist()
        return [None if tick is None else tick / per_second for tick in ticks]
    return column.to_pylist()


def _check_columns(path: Path, present: Sequence[str], required: Sequence[str], optional: Sequence[str]) -> None:
    twice = [column for column in (*required, *optional) if list(present).count(column) > 1]
    if twice:
        raise DataError(f"{path}: the header names a column twice: {twice[0]!r}; remove or rename one of the two")
    missing = [column for column in required if column not in present]
    if missing:
        raise DataError(
            f"{path}: no column {' and '.join(missing)}; the columns are {', '.join(present)}; rename or "
            f"add what is missing"
        )


def _lines(path: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, decoded one by one so that a wrong byte is reported with its line."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    problems.add(
                        number,
                        f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start}); save the file as UTF-8",
                    )
                    continue
                if text.strip():
                    yield number, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); compress or download it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
