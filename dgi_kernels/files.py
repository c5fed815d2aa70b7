"""Files are written whole or not at all, and where they cannot be, that is found before the work and not after it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path``; on success it replaces ``path``, on any error it is removed.

    A reader sees the old file or the new one, never a part: the bytes are synced before the rename, and the
    folder after it, so that a crash of the machine keeps that promise too.
    """
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def check_output(folder: str | os.PathLike[str], files: Iterable[Path] = (), nbytes: int = 0) -> None:
    """Make a folder for results, and make sure that files can be written into it.

    Args:
        folder: created where there is none.
        files: what will be written; none of them may be a folder.
        nbytes: how many bytes will be written.

    Raises:
        OSError: there can be no such folder, no file can be written into it, one of the files is a folder, or the disk
            has less room.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a folder is needed for the results")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"{folder} cannot be written to ({error.strerror})") from None
    for file in files:
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder; a file of that name will be written")
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(
            f"the disk of {folder} has {free / 2**20:,.0f} MiB left, and {nbytes / 2**20:,.0f} MiB will be "
            f"written: make room, or choose another folder"
        )


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
