"""Standard splits: leave-one-out, judged queries, clicks without a catalog; each against a count by hand."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dgi.data import (
    Catalog,
    DataError,
    Sequences,
    leave_one_out,
    load_dataset,
    load_sequences,
    next_items,
    with_pseudo_queries,
    with_validation,
)


def catalog_of(size: int) -> Catalog:
    return Catalog(tuple(map(str, range(size))), tuple(f"word{row} kind{row % 3}" for row in range(size)))


def random_sequences(users: int, items: int) -> Sequences:
    lengths = np.random.randint(1, 9, users)
    lengths[0] = 5
    return Sequences(
        tuple(np.random.randint(0, items, length) for length in lengths),
        tuple(np.sort(np.random.randint(0, 50, length)).astype(float) for length in lengths),
    )


def rows(examples: object) -> Counter:
    return Counter(
        (tuple(item for item in history if item >= 0), target)
        for history, target in zip(examples.histories.tolist(), examples.items.tolist(), strict=True)
    )


def test_leave_one_out_is_the_benchmarks() -> None:
    """Every prefix of a user's sequence, counted by another walk: no target of the test is seen in training."""
    sequences = random_sequences(40, 12)
    expected: dict[str, Counter] = {part: Counter() for part in ("train", "validation", "test")}
    for items in sequences.items:
        items = tuple(items.tolist())
        for end in range(len(items), 1, -1):
            left = len(items) - end
            part = "train" if len(items) < 3 else ("test", "validation", "train")[min(left, 2)]
            expected[part][(items[: end - 1][-4:], items[end - 1])] += 1
    parts = dict(zip(expected, leave_one_out(sequences, max_history=4), strict=True))
    assert {part: rows(examples) for part, examples in parts.items()} == expected


def test_next_items_are_in_order_of_time() -> None:
    sequences = random_sequences(40, 12)
    examples = next_items(sequences, max_history=8)
    assert len(examples) == sum(len(items) - 1 for items in sequences.items)
    assert (np.diff(examples.timestamps) >= 0).all()


def test_users_too_short_for_leave_one_out() -> None:
    with pytest.raises(DataError, match="no user has 3 items"):
        leave_one_out(Sequences((np.array([1, 2]),), (np.zeros(2),)))


def test_sequences_report_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "sequences.tsv"
    path.write_text("user_id\titem_ids\ttimestamps\n0\t0 1 2\t1 2 3\n1\t0 9\t1 2\n2\t0 1\t5 4\n3\t0 1\t5\n")
    with pytest.raises(DataError) as error:
        load_sequences(path, catalog_of(3))
    message = str(error.value)
    assert "3 problems" in message and "line 3: item_ids holds '9'" in message
    assert "line 4: timestamps" in message and "line 5: timestamps must be 2 finite" in message
    path.write_text("user_id\titem_ids\n0\t0,1,2\n")
    assert load_sequences(path, catalog_of(3)).items[0].tolist() == [0, 1, 2]


def test_a_folder_of_sequences(tmp_path: Path) -> None:
    (tmp_path / "items.tsv").write_text("id\ttitle\n" + "".join(f"{item}\tname {item}\n" for item in range(9)))
    (tmp_path / "sequences.tsv").write_text("item_ids\ttimestamps\n0 1 2 3\t1 2 3 4\n4 5 6\t1 2 9\n")
    data = load_dataset(tmp_path, text=("title",))
    assert data.split == "leave_one_out" and data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (1, 2, 2)
    assert with_validation(data) is data
    by_time = load_dataset(tmp_path, text=("title",), split="time")
    assert by_time.split == "time" and by_time.train.timestamps.max() < by_time.test.timestamps.min()
    with pytest.raises(ValueError, match="split must be"):
        load_dataset(tmp_path, text=("title",), split="given")


def test_clicks_without_a_catalog_read_no_later_query(tmp_path: Path) -> None:
    clicks = [("a", "red shoe")] * 3 + [("a", "shoe"), ("b", "hat"), ("c", "later words"), ("a", "later too")]
    lines = [f"{time}\t{item}\t{query}" for time, (item, query) in enumerate(clicks)]
    (tmp_path / "clicks.tsv").write_text("timestamp\titem_id\tquery\n" + "\n".join(lines) + "\n")
    data = load_dataset(tmp_path, test_fraction=2 / 7)
    assert data.catalog.ids == ("a", "b", "c") and data.catalog.texts == ("red shoe shoe", "hat", "")
    assert data.test.queries == ("later words", "later too")


def test_judged_queries_in_both_forms(tmp_path: Path) -> None:
    """The same judgments as qrels and as ratings give the same data."""
    qrels, ratings = tmp_path / "qrels", tmp_path / "ratings"
    judged = [("q0", "1", 2, "train"), ("q0", "2", 0, "train"), ("q1", "0", 1, "dev"), ("q2", "2", 1, "test")]
    judged += [("q2", "0", 3, "test"), ("q3", "1", 0, "test")]
    for folder in (qrels, ratings):
        folder.mkdir()
        (folder / "items.jsonl").write_text(
            "".join(f'{{"id": "{item}", "title": "t{item}", "text": "body {item}"}}\n' for item in range(3))
        )
        np.save(folder / "queries.small.npy", np.arange(8, dtype=np.float32).reshape(4, 2))
        np.save(folder / "items.small.npy", np.ones((3, 2), dtype=np.float32))
    (qrels / "queries.tsv").write_text(
        "query_id\tquery\n" + "".join(f"{q}\tquery {q}\n" for q in ("q0", "q1", "q2", "q3"))
    )
    (qrels / "qrels.tsv").write_text(
        "query_id\titem_id\trelevance\tsplit\n" + "".join("\t".join(map(str, row)) + "\n" for row in judged)
    )
    (ratings / "ratings.tsv").write_text(
        "query\titem_id\trating\tsplit\n"
        + "".join(f"query {q}\t{item}\t{r}\t{split}\n" for q, item, r, split in judged)
    )
    for folder in (qrels, ratings):
        data = load_dataset(folder, text=("title", "text"), vectors="small")
        assert data.catalog.texts[1] == "t1 body 1" and data.split == "given"
        assert data.train.queries == ("query q0",) and data.train.items.tolist() == [1], "0 is not relevant"
        assert data.validation is not None and data.validation.queries == ("query q1",)
        assert data.test.queries == ("query q2",) and data.relevant == ({2: 1, 0: 3},), "q3 has nothing to find"
        assert data.test.items.tolist() == [0] and data.test.query_vectors is not None
        assert data.test.query_vectors.tolist() == [[4.0, 5.0]]


def test_validation_of_queries_without_times_keeps_a_query_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "items.tsv").write_text("id\ttext\n" + "".join(f"{item}\tname\n" for item in range(20)))
    lines = [f"query {n // 3}\t{n % 20}\t1\t{'train' if n < 90 else 'test'}" for n in range(99)]
    (tmp_path / "ratings.tsv").write_text("query\titem_id\trating\tsplit\n" + "\n".join(lines) + "\n")
    data = with_validation(load_dataset(tmp_path), 0.3)
    assert data.validation is not None and len(data.train) + len(data.validation) == 90
    assert not set(data.train.queries) & set(data.validation.queries)
    assert 3 <= len(data.validation) <= 60


def test_pseudo_queries_are_runs_of_the_items_own_words(tmp_path: Path) -> None:
    (tmp_path / "items.tsv").write_text("id\ttext\n" + "".join(f"{item}\tw{item} x{item} y z\n" for item in range(5)))
    (tmp_path / "ratings.tsv").write_text("query\titem_id\trating\tsplit\nq\t0\t1\ttrain\nr\t1\t1\ttest\n")
    data = with_pseudo_queries(load_dataset(tmp_path), 4, words=(2, 3))
    assert len(data.train) == 1 + 5 * 4 and data.train.queries[0] == "q"
    for query, item in zip(data.train.queries[1:], data.train.items[1:], strict=True):
        assert query in data.catalog.texts[item] and len(query.split()) in (2, 3)


def test_pseudo_queries_with_vectors_are_near_their_items(tmp_path: Path) -> None:
    (tmp_path / "items.tsv").write_text("id\ttext\n" + "".join(f"{item}\tw{item} y\n" for item in range(5)))
    (tmp_path / "ratings.tsv").write_text("query\titem_id\trating\tsplit\nq\t0\t1\ttrain\nr\t1\t1\ttest\n")
    data = load_dataset(tmp_path)
    vectors = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    own = {name: dataclasses.replace(getattr(data, name), query_vectors=vectors[:1]) for name in ("train", "test")}
    data = dataclasses.replace(data, catalog=dataclasses.replace(data.catalog, vectors=vectors), **own)
    expanded = with_pseudo_queries(data, 40)
    found = expanded.train.query_vectors
    assert found is not None and expanded.test.query_vectors is not None and np.array_equal(found[0], vectors[0])
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (found[1:] * unit[expanded.train.items[1:]]).sum(1)
    np.testing.assert_allclose(np.linalg.norm(found[1:], axis=1), 1, atol=1e-5)
    assert cosines.min() > 0.599 and cosines.max() < 1.001 and cosines.std() > 0.05


def test_two_kinds_of_interactions_are_one_too_many(tmp_path: Path) -> None:
    (tmp_path / "items.tsv").write_text("id\ttext\n0\ta\n")
    for name in ("sequences.tsv", "clicks.tsv"):
        (tmp_path / name).write_text("x\n")
    with pytest.raises(DataError, match="has both clicks.tsv and sequences.tsv"):
        load_dataset(tmp_path)
