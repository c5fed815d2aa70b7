"""MovieLens-100K: from the last 10 films watched, find the next one.

The data are in the wheel ``recbole==1.2.1`` on PyPI, which ships them as an example.  pip fetches it once,
without its dependencies; its SHA-256 is checked each time, and nothing of it is installed or unpacked.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict, deque
from pathlib import Path

import numpy as np

from dgi.data.catalog import Catalog
from dgi.data.dataset import Dataset
from dgi.data.interactions import MAX_HISTORY, Interactions, pad_histories
from dgi.data.readers import DataError
from dgi.data.split import time_split
from dgi_kernels.files import atomic_write

REQUIREMENT = "recbole==1.2.1"
WHEEL = "recbole-1.2.1-py3-none-any.whl"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
BY_HAND = f"fetch it with: python -m pip download --no-deps {REQUIREMENT}"
FOLDER_IN_WHEEL = "recbole/dataset_example/ml-100k"

MOVIELENS_TERMS = """\
The MovieLens 100K data were collected by the GroupLens Research Project at the University of Minnesota. Their terms
of use: the data may be used for research; the user may not state or imply any endorsement by the University of
Minnesota or GroupLens, must acknowledge the use of the data in publications, may not redistribute the data without
separate permission, and may not use them for commercial or revenue-bearing purposes without permission from a faculty
member of the GroupLens Research Project. The data come without warranty. In full:
https://files.grouplens.org/datasets/movielens/ml-100k-README.txt
Acknowledge: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. ACM
Transactions on Interactive Intelligent Systems 5, 4, Article 19. https://doi.org/10.1145/2827872"""


def load_movielens(wheel: str | os.PathLike[str] | None = None, *, test_fraction: float = 0.2) -> Dataset:
    """MovieLens-100K as next-film retrieval, split by time for all users at once.

    Every rating, whatever its value, is a film watched.  For each one the history is the last 10 films that this user
    watched before, and the target is the film itself; a user's first film has no history and gives no interaction.
    Ratings of the same second keep the order of the file.  There are no queries.  An item's text is title, year and
    genres: ``"Toy Story (1995) Animation Children's Comedy"``.

    Args:
        wheel: the wheel ``recbole-1.2.1-py3-none-any.whl``; by default the cached one, fetched first where needed.
        test_fraction: the share of the interactions, the last ones, that are the test set.

    Raises:
        DataError: the wheel cannot be fetched, or is not the one expected.
    """
    with zipfile.ZipFile(fetch_wheel() if wheel is None else _checked(Path(wheel))) as archive:
        items, ratings = (
            archive.read(f"{FOLDER_IN_WHEEL}/ml-100k.{name}").decode("utf-8").splitlines()[1:]
            for name in ("item", "inter")
        )
    films = [line.split("\t") for line in items]
    catalog = Catalog(tuple(film[0] for film in films), tuple(_text(*film[1:]) for film in films))
    train, test = time_split(_next_films([line.split("\t") for line in ratings], catalog), test_fraction)
    return Dataset(catalog, train, test, "MovieLens-100K")


def fetch_wheel() -> Path:
    """The checked wheel in the cache folder, fetched with pip where it is not there yet.

    The folder is ``$XDG_CACHE_HOME/dgi-kernels``, by default ``~/.cache/dgi-kernels``.

    Raises:
        DataError: it could not be fetched (say, offline), or what came is another file; with what to do by hand.
    """
    cached = _cache_folder() / WHEEL
    if cached.is_file() and _sha256(cached.read_bytes()) == WHEEL_SHA256:
        return cached
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _download(folder, cached)
        wheel = _checked(Path(folder) / WHEEL).read_bytes()
    with atomic_write(cached) as file:
        file.write(wheel)
    return cached


def _download(folder: str, cached: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-input",
        "--quiet",
        "--disable-pip-version-check",
        "--timeout",
        "20",
        "--retries",
        "2",
        "--dest",
        folder,
        REQUIREMENT,
    ]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        problem = result.stderr.strip() if result.returncode else ""
    except subprocess.TimeoutExpired:
        problem = "pip did not finish within 300 seconds"
    if problem:
        raise DataError(
            "MovieLens-100K could not be fetched:\n  " + "\n  ".join(problem.splitlines()[-3:]) + "\n"
            f"On a machine with access to PyPI, {BY_HAND}\n"
            f"Then put the file {WHEEL} into {cached.parent}, or give its path where the data are loaded."
        )


def _checked(wheel: Path) -> Path:
    if not wheel.is_file():
        raise DataError(f"{wheel}: there is no such file; {BY_HAND}")
    digest = _sha256(wheel.read_bytes())
    if digest != WHEEL_SHA256:
        raise DataError(
            f"{wheel}: this is not {WHEEL} as published on PyPI: its SHA-256 is {digest}, needed is "
            f"{WHEEL_SHA256}; {BY_HAND}"
        )
    return wheel


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "dgi-kernels"


def _text(title: str, year: str, genres: str) -> str:
    return f"{title} ({year}) {genres}" if year.isdigit() else f"{title} {genres}"


def _next_films(ratings: list[list[str]], catalog: Catalog) -> Interactions:
    """Ratings (user, item, rating, timestamp) as interactions: the films a user watched before -> this film."""
    watched: dict[str, deque[int]] = defaultdict(lambda: deque(maxlen=MAX_HISTORY))
    histories, items, timestamps = [], [], []
    for user, item_id, _, timestamp in sorted(ratings, key=lambda rating: float(rating[3])):
        item = catalog.row(item_id)
        if watched[user]:
            histories.append(tuple(watched[user]))
            items.append(item)
            timestamps.append(float(timestamp))
        watched[user].append(item)
    return Interactions(
        ("",) * len(items),
        pad_histories(histories, MAX_HISTORY),
        np.array(items, dtype=np.int64),
        np.array(timestamps, dtype=np.float64),
    )
