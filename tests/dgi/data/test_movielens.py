"""MovieLens-100K: the cache, what is done about a wrong or missing wheel, and the interactions made of the ratings."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dgi.data import MOVIELENS_TERMS, Catalog, DataError, Dataset, load_movielens, movielens


@pytest.fixture(scope="module")
def wheel() -> Path:
    try:
        return movielens.fetch_wheel()
    except DataError as error:
        pytest.skip(f"the wheel with MovieLens-100K is not to be had here: {error}")


@pytest.fixture(scope="module")
def dataset(wheel: Path) -> Dataset:
    return load_movielens(wheel)


def test_next_films_by_hand() -> None:
    catalog = Catalog(("10", "20", "30"), ("x", "y", "z"))
    ratings = [
        ["u", "10", "5", "100"],
        ["v", "30", "1", "50"],
        ["u", "30", "2", "90"],
        ["v", "10", "3", "50"],
        ["u", "20", "4", "100"],
    ]
    made = movielens._next_films(ratings, catalog)
    # v: 30, then 10 (same second, order of the file); u: 30 at 90, then 10 and 20 at 100.
    assert made.items.tolist() == [0, 0, 1]
    assert [[row for row in history if row >= 0] for history in made.histories.tolist()] == [[2], [2], [2, 0]]
    assert made.timestamps.tolist() == [50, 100, 100]
    assert made.queries == ("", "", "")


def test_the_real_data(dataset: Dataset) -> None:
    catalog, train, test = dataset.catalog, dataset.train, dataset.test
    assert len(catalog) == 1682
    assert catalog.texts[catalog.row("1")] == "Toy Story (1995) Animation Children's Comedy"
    assert catalog.texts[catalog.row("12")] == "Usual Suspects, The (1995) Crime Thriller"
    assert catalog.texts[catalog.row("543")] == "Misérables, Les (1995) Drama Musical"
    # 100,000 ratings of 943 users, each user's first dropped.
    assert len(train) + len(test) == 100_000 - 943
    assert abs(len(test) / (len(train) + len(test)) - 0.2) < 0.001
    assert train.timestamps.max() < test.timestamps.min()
    for part in (train, test):
        assert (np.diff(part.timestamps) >= 0).all()
        assert part.histories[:, -1].min() >= 0  # everyone has a history
        padded = part.histories < 0
        assert (padded[:, 1:] <= padded[:, :-1]).all()  # padding on the left only
        assert not (part.histories == part.items[:, None]).any()  # no target is in its own history: nobody rated twice


def test_each_history_is_what_this_user_saw_before(wheel: Path, dataset: Dataset) -> None:
    """Guards against histories that look ahead or mix users: rebuilt the slow way for some users."""
    lines = zipfile.ZipFile(wheel).read("recbole/dataset_example/ml-100k/ml-100k.inter").decode().splitlines()[1:]
    ratings = [line.split("\t") for line in lines]
    rows = Counter(
        (tuple(h), i, t)
        for part in (dataset.train, dataset.test)
        for h, i, t in zip(part.histories.tolist(), part.items.tolist(), part.timestamps.tolist(), strict=True)
    )
    for user in np.random.choice(943, size=5, replace=False) + 1:
        mine = [(float(t), n, dataset.catalog.row(film)) for n, (u, film, _, t) in enumerate(ratings) if u == str(user)]
        films = [film for _, _, film in sorted(mine)]
        for place, (time, _, film) in enumerate(sorted(mine)):
            before = films[max(0, place - 10) : place]
            if before:
                assert rows[(*[-1] * (10 - len(before)), *before), film, time] >= 1


def test_a_wrong_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / movielens.WHEEL
    with pytest.raises(DataError, match="there is no such file; fetch it with: python -m pip download"):
        load_movielens(path)
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match="its SHA-256 is [0-9a-f]{64}, needed is 9c994820"):
        load_movielens(path)


def test_offline_says_what_to_do_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DataError) as caught:
        load_movielens()
    message = str(caught.value)
    assert "python -m pip download --no-deps recbole==1.2.1" in message
    assert str(tmp_path / "dgi-kernels") in message and movielens.WHEEL in message
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_damaged_cache_is_fetched_again_and_pip_is_asked_once(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached = tmp_path / "dgi-kernels" / movielens.WHEEL
    cached.parent.mkdir()
    cached.write_bytes(wheel.read_bytes()[:-1])
    commands = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess:
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / movielens.WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(movielens.subprocess, "run", pip)
    for _ in range(2):
        assert movielens.fetch_wheel() == cached
    assert cached.read_bytes() == wheel.read_bytes()
    assert len(commands) == 1 and commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert list(cached.parent.iterdir()) == [cached]


def test_a_wrong_download_never_reaches_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess:
        (Path(command[command.index("--dest") + 1]) / movielens.WHEEL).write_bytes(b"an altered wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(movielens.subprocess, "run", pip)
    with pytest.raises(DataError, match="this is not recbole-1.2.1"):
        movielens.fetch_wheel()
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_terms_name_licensor_and_paper() -> None:
    for needed in ("GroupLens", "may not redistribute", "commercial", "Harper", "2015"):
        assert needed in MOVIELENS_TERMS
