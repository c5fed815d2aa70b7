"""Catalogs, interactions and judgments: what is read, and that what cannot be read is told by file, line and cure."""

from __future__ import annotations

import datetime
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from dgi.data import Catalog, DataError, Interactions, load_catalog, load_dataset, load_interactions, load_judgments
from dgi.data.catalog import one_line

ITEMS = [{"id": "a", "text": "red shoe"}, {"id": "b", "text": "blue shoe"}, {"id": "c", "text": "green hat"}]
# In the order of the file; the loader sorts by time.
CLICKS = [
    {"query": "hat", "history": ["a", "b"], "item_id": "c", "timestamp": 30.0},
    {"query": "", "history": ["c"], "item_id": "a", "timestamp": 10.0},
    {"query": "shoe", "history": [], "item_id": "b", "timestamp": 20.5},
]
FORMATS = ("tsv", "tsv.gz", "jsonl", "jsonl.gz", "parquet")


def write(path: Path, rows: list[dict]) -> Path:
    """Write rows in the format of the file's name."""
    if path.suffix == ".parquet":
        table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
        return path
    if ".tsv" in path.name:
        flat = [{k: " ".join(v) if isinstance(v, list) else str(v) for k, v in row.items()} for row in rows]
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in flat)]
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    content = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def catalog() -> Catalog:
    return Catalog(tuple(item["id"] for item in ITEMS), tuple(item["text"] for item in ITEMS))


def problems_of(load, *args, **kwargs) -> str:
    with pytest.raises(DataError) as caught:
        load(*args, **kwargs)
    return str(caught.value)


@pytest.mark.parametrize("suffix", FORMATS)
def test_catalog_reads_every_format(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"items.{suffix}", [{**item, "price": 3} for item in ITEMS])
    loaded = load_catalog(path)
    assert loaded.ids == ("a", "b", "c")
    assert loaded.texts == ("red shoe", "blue shoe", "green hat")
    assert loaded.vectors is None
    assert len(loaded) == 3 and loaded.row("c") == 2 and "d" not in loaded


@pytest.mark.parametrize("suffix", FORMATS)
def test_interactions_reads_every_format(tmp_path: Path, catalog: Catalog, suffix: str) -> None:
    vectors = np.random.randn(3, 4).astype(np.float16)
    np.save(tmp_path / "queries.npy", vectors)
    loaded = load_interactions(
        write(tmp_path / f"clicks.{suffix}", CLICKS), catalog, max_history=3, query_vectors=tmp_path / "queries.npy"
    )
    assert loaded.queries == ("", "shoe", "hat")
    assert loaded.items.tolist() == [0, 1, 2]
    assert loaded.histories.tolist() == [[-1, -1, 2], [-1, -1, -1], [-1, 0, 1]]
    assert loaded.timestamps.tolist() == [10.0, 20.5, 30.0]
    assert loaded.histories.dtype == loaded.items.dtype == np.int64
    assert loaded.query_vectors.dtype == np.float32
    np.testing.assert_array_equal(loaded.query_vectors, vectors[[1, 2, 0]])  # sorted along with their rows


def test_take_keeps_columns_aligned(catalog: Catalog, tmp_path: Path) -> None:
    loaded = load_interactions(write(tmp_path / "clicks.jsonl", CLICKS), catalog)
    taken = loaded.take([2, 0, 2])
    assert taken.queries == ("hat", "", "hat")
    assert taken.items.tolist() == [2, 0, 2]
    assert taken.timestamps.tolist() == [30.0, 10.0, 30.0]
    assert taken.histories[0, -2:].tolist() == [0, 1]
    assert len(taken) == 3 and len(loaded.take([])) == 0


def test_long_history_keeps_the_last(catalog: Catalog, tmp_path: Path) -> None:
    history = [ITEMS[i]["id"] for i in np.random.randint(3, size=14)]
    path = write(tmp_path / "clicks.jsonl", [{"history": history, "item_id": "a"}])
    rows = [catalog.row(item_id) for item_id in history]
    assert load_interactions(path, catalog).histories.tolist() == [rows[-10:]]
    assert load_interactions(path, catalog, max_history=4).histories.tolist() == [rows[-4:]]


def test_rows_of_one_time_keep_the_order_of_the_file(catalog: Catalog, tmp_path: Path) -> None:
    rows = [{"query": str(i), "item_id": "a", "timestamp": i % 2} for i in range(100)]
    loaded = load_interactions(write(tmp_path / "clicks.tsv", rows), catalog)
    assert loaded.queries == (*map(str, range(0, 100, 2)), *map(str, range(1, 100, 2)))


def test_history_in_tsv_takes_spaces_and_commas(catalog: Catalog, tmp_path: Path) -> None:
    path = tmp_path / "clicks.tsv"
    path.write_text("history\titem_id\r\na, b  c\ta\r\n\r\nb,a\tc\r\n")
    assert load_interactions(path, catalog, max_history=3).histories.tolist() == [[0, 1, 2], [-1, 1, 0]]


def test_integer_ids_and_unicode(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"id": 7, "text": "Misérables\\u2028 \\"quoted\\" 日本"}\n'.encode())
    loaded = load_catalog(path)
    assert loaded.ids == ("7",) and loaded.texts == ('Misérables\u2028 "quoted" 日本',)


def test_parquet_points_in_time_are_seconds(tmp_path: Path, catalog: Catalog) -> None:
    when = datetime.datetime(2024, 5, 17, 3, 4, 5, 250000, tzinfo=datetime.timezone.utc)
    path = write(tmp_path / "clicks.parquet", [{"query": "q", "item_id": "a", "timestamp": when}])
    assert load_interactions(path, catalog).timestamps.tolist() == [when.timestamp()]


def test_catalog_reports_every_problem_with_line_and_cure(tmp_path: Path) -> None:
    path = tmp_path / "items.tsv"
    path.write_bytes(b"id\ttext\na\tred\nb\na\tagain\nc\t \n\t\tx\nd\tcaf\xe9\n\ne\tok\n")
    message = problems_of(load_catalog, path)
    lines = message.splitlines()
    assert lines[0] == f"{path}: 5 problems"
    assert lines[1].startswith("  line 3: 1 columns where the header has 2; separate columns by one tab")
    assert lines[2] == "  line 4: id 'a' is on line 2 already; keep one of the two"
    assert lines[3] == "  line 5: no value for text; every row needs one"
    assert lines[4].startswith("  line 6: 3 columns where the header has 2")
    assert lines[5] == "  line 7: not UTF-8 (byte 0xe9 at position 5); save the file as UTF-8"


def test_catalog_reports_bad_json(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(
        '{"id": "a", "text": "ok"}\n{"id": "b", "text"\n[1]\n{"id": true, "text": "x"}\n'
        '{"id": "c", "text": ["x"]}\n{"id": "d", "text": "  "}\n{"text": "x"}\n' + "[" * 100_000 + "\n"
    )
    message = problems_of(load_catalog, path)
    assert "7 problems" in message
    assert "line 2: not valid JSON (" in message and "write one JSON object per line" in message
    assert "line 3: a JSON list where an object is needed" in message
    assert "line 4: id is True; it must be a non-empty string or an integer" in message
    assert "line 5: the text of item 'c' is ['x']; give it a text or remove the item" in message
    assert "line 6: the text of item 'd' is '  '" in message
    assert "line 7: no value for id" in message
    assert "line 8: not valid JSON" in message


def test_interactions_report_every_problem(tmp_path: Path, catalog: Catalog) -> None:
    path = tmp_path / "clicks.jsonl"
    rows = [
        {"query": "q", "item_id": "a", "timestamp": 1},
        {"query": "q", "item_id": "zz", "timestamp": 1},
        {"history": ["a", "yy", 1.5], "item_id": "b", "timestamp": 1},
        {"query": " ", "history": [], "item_id": "b", "timestamp": 1},
        {"query": "q", "item_id": "b", "timestamp": "noon"},
        {"query": "q", "item_id": "b", "timestamp": float("nan")},
        {"query": "q", "item_id": "b"},
        {"query": 5, "item_id": "b", "timestamp": 1},
        {"query": "q", "history": {"a": 1}, "item_id": "b", "timestamp": 1},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    message = problems_of(load_interactions, path, catalog)
    assert f"{path}: 9 problems" in message
    assert "line 2: item_id holds 'zz', which is no item of the catalog; add the item or remove this id" in message
    assert "line 3: history holds 'yy', which is no item" in message
    assert "line 3: history holds 1.5; an id must be a non-empty string or an integer" in message
    assert "line 4: neither query nor history; give it one of the two, or remove the row" in message
    assert "line 5: timestamp is 'noon'; it must be a finite number of seconds" in message
    assert "line 6: timestamp is nan;" in message
    assert "line 7: some rows have a timestamp and some have none" in message
    assert "line 8: query is 5; it must be a text" in message
    assert "line 9: history is {'a': 1}; it must be a list of item ids" in message


def test_parquet_problems_are_told_by_row(tmp_path: Path, catalog: Catalog) -> None:
    path = write(tmp_path / "clicks.parquet", [{"query": "q", "item_id": i} for i in ("a", "zz", None)])
    message = problems_of(load_interactions, path, catalog)
    assert "row 2: item_id holds 'zz'" in message and "row 3: no value for item_id" in message


def test_many_problems_are_counted_not_all_shown(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("nonsense\n" * 1234)
    lines = problems_of(load_catalog, path).splitlines()
    assert lines[0].endswith("1234 problems") and lines[-1] == "  and 1214 more" and len(lines) == 22


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("items.tsv", b"id\ttitle\na\tb\n", "no column text; the columns are id, title; rename or add"),
        ("items.tsv", b"id\ttext\tid\n", "the header names a column twice"),
        ("items.tsv", b"", "the file is empty; its first line must name the columns"),
        ("items.tsv", b"id\ttext\n", "holds no items"),
        ("items.tsv", "id\ttext\n".encode("utf-16"), "line 1: not UTF-8"),
        ("items.jsonl", b"\n\n", "holds no items"),
        ("items.csv", b"id,text\n", "must end in one of .tsv, .tsv.gz, .jsonl, .jsonl.gz, .parquet"),
        ("items.parquet", b"PAR1 nonsense", "not a readable Parquet file"),
        ("items.parquet.gz", b"x", "must end in one of"),
        ("items.jsonl.gz", b"not gzip at all", "damaged gzip file"),
        ("items.jsonl.gz", gzip.compress(b'{"id": 1, "text": "x"}\n' * 1000)[:-12], "damaged gzip file"),
        ("items.npy", None, "there is no such file"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes | None, expected: str) -> None:
    path = tmp_path / name
    if ".parquet" in name:
        pytest.importorskip("pyarrow")
    if content is not None:
        path.write_bytes(content)
    message = problems_of(load_catalog, path)
    assert message.startswith(str(path)) and expected in message


def test_a_parquet_column_twice(tmp_path: Path) -> None:
    """Guards against pyarrow's KeyError, without file and cure."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = [pyarrow.array([value]) for value in ("a", "b", "text")]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["id", "id", "text"]), tmp_path / "i.parquet")
    assert "i.parquet: the header names a column twice: 'id'" in problems_of(load_catalog, tmp_path / "i.parquet")


def test_half_a_character_is_told_where_it_stands(tmp_path: Path, catalog: Catalog) -> None:
    """Guards against ids and texts that are found after training to be such as no file can store."""
    items = tmp_path / "items.jsonl"
    items.write_text(
        '{"id": "x\\ud800", "text": "t"}\n{"id": "y", "text": "\\udc00"}\n{"id": "z", "text": "\\ud83c\\udfac"}\n'
    )
    message = problems_of(load_catalog, items)
    assert "2 problems" in message and "line 1: id holds half of a character" in message and "line 2: text" in message
    clicks = tmp_path / "clicks.jsonl"
    clicks.write_text('{"query": "\\ud800", "item_id": "a"}\n{"history": ["a", "\\ud800"], "item_id": "a"}\n')
    message = problems_of(load_interactions, clicks, catalog)
    assert "line 1: query holds half" in message and "line 2: history holds half" in message
    with pytest.raises(ValueError, match=r"ids\[1\] holds half of a character"):
        Catalog(("a", "\udfff"), ("x", "y"))
    with pytest.raises(ValueError, match=r"texts\[0\] holds half of a character"):
        Catalog(("a",), ("x\ud800",))


def test_a_text_on_a_terminal() -> None:
    """Guards against titles that break lines, or steer the terminal that shows them."""
    assert one_line("a\nb\x1b[31m\u202e日本é") == "a b\ufffd[31m\ufffd日本é"


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "items.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert 'pip install "dgi-kernels[parquet]"' in problems_of(load_catalog, tmp_path / "items.parquet")


def test_vectors_are_read_as_float32(tmp_path: Path) -> None:
    items = write(tmp_path / "items.tsv", ITEMS)
    vectors = np.random.randn(3, 5).astype(np.float16)
    np.save(tmp_path / "items.npy", vectors)
    loaded = load_catalog(items, vectors=tmp_path / "items.npy").vectors
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded, vectors.astype(np.float32))


@pytest.mark.parametrize(
    ("vectors", "expected"),
    [
        (np.zeros((2, 4), np.float32), "has 2 vectors for 3 items of items.tsv"),
        (np.zeros(3, np.float32), "must be a 2-d floating-point array (rows, d); got float32 of shape (3,)"),
        (np.zeros((3, 4), np.int64), "got int64 of shape (3, 4)"),
        (np.zeros((3, 0), np.float32), "of shape (3, 0)"),
        (np.array([[0.0], [np.nan], [np.inf]]), "2 vectors hold a NaN or an infinity in float32, the first in row 1"),
        (np.array([["a"], [None], [{}]], dtype=object), "not a readable .npy file"),
    ],
)
def test_unusable_vectors(tmp_path: Path, vectors: np.ndarray, expected: str) -> None:
    items = write(tmp_path / "items.tsv", ITEMS)
    np.save(tmp_path / "v.npy", vectors, allow_pickle=True)
    assert expected in problems_of(load_catalog, items, vectors=tmp_path / "v.npy")


def test_damaged_vector_file(tmp_path: Path) -> None:
    items = write(tmp_path / "items.tsv", ITEMS)
    np.save(tmp_path / "v.npy", np.zeros((3, 400)))
    whole = (tmp_path / "v.npy").read_bytes()
    for content in (b"", whole[:7], whole[:1000], b"\x80\x04nonsense"):
        (tmp_path / "v.npy").write_bytes(content)
        assert "not a readable .npy file" in problems_of(load_catalog, items, vectors=tmp_path / "v.npy")
    with open(tmp_path / "v.npy", "wb") as file:
        np.savez(file, np.zeros((3, 4)))
    assert "got an .npz archive" in problems_of(load_catalog, items, vectors=tmp_path / "v.npy")


def test_columns_must_be_aligned() -> None:
    with pytest.raises(ValueError, match=r"texts must have one text per id \(2\); got 1"):
        Catalog(("a", "b"), ("x",))
    with pytest.raises(ValueError, match="ids must be distinct; 1 of 3 repeat"):
        Catalog(("a", "b", "a"), ("x", "y", "z"))
    with pytest.raises(ValueError, match=r"vectors must have shape \(num_items, d\)"):
        Catalog(("a",), ("x",), np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match=r"queries must have one row per item chosen \(2\); got 1"):
        Interactions(("q",), np.zeros((2, 10), np.int64), np.zeros(2, np.int64), np.zeros(2))


def test_judgments(tmp_path: Path, catalog: Catalog) -> None:
    rows = [("shoe", "a", 3), ("hat", "c", 2), ("shoe", "c", 0), ("shoe", "b", "1")]
    path = write(
        tmp_path / "ratings.tsv.gz", [dict(zip(("query", "item_id", "rating"), row, strict=True)) for row in rows]
    )
    np.save(tmp_path / "q.npy", np.array([[1.0, 2.0], [3.0, 4.0]]))
    loaded = load_judgments(path, catalog, query_vectors=tmp_path / "q.npy")
    assert loaded.queries == ("hat", "shoe")  # sorted: the vectors' order does not depend on the file's
    assert loaded.ratings == ({2: 2}, {0: 3, 2: 0, 1: 1})
    assert loaded.query_vectors.tolist() == [[1.0, 2.0], [3.0, 4.0]] and len(loaded) == 2


def test_judgments_report_every_problem(tmp_path: Path, catalog: Catalog) -> None:
    path = tmp_path / "ratings.tsv"
    path.write_text(
        "query\titem_id\trating\nq\ta\t1\nq\ta\t2\nq\tzz\t1\nq\tb\t-1\nq\tb\t1.5\nq\tb\tgood\nq\tb\t\nq\tb\t31\n"
    )
    message = problems_of(load_judgments, path, catalog)
    assert "7 problems" in message
    assert "line 3: item 'a' is rated for query 'q' already; keep one rating" in message
    assert "line 4: item_id holds 'zz', which is no item" in message
    for line, rating in ((5, "-1"), (6, "1.5"), (7, "good"), (9, "31")):
        assert f"line {line}: rating is '{rating}'; it must be a whole number from 0 to 30" in message
    assert "line 8: no value for rating" in message


@pytest.mark.parametrize("suffix", FORMATS)
def test_dataset_from_a_folder_splits_by_time(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "shop"
    folder.mkdir()
    write(folder / f"items.{suffix}", ITEMS)
    write(folder / f"interactions.{suffix}", [{"query": str(i), "item_id": "a", "timestamp": -i} for i in range(10)])
    np.save(folder / "queries.npy", np.arange(10.0)[:, None])
    dataset = load_dataset(folder)
    assert dataset.name == "shop" and len(dataset.catalog) == 3
    assert dataset.train.queries == tuple("98765432") and dataset.test.queries == ("1", "0")
    assert dataset.test.query_vectors.tolist() == [[1.0], [0.0]]


def test_dataset_with_its_own_split(tmp_path: Path) -> None:
    write(tmp_path / "items.jsonl", ITEMS)
    write(tmp_path / "interactions.train.jsonl", CLICKS[:2])
    write(tmp_path / "interactions.test.tsv", [{"query": "hat", "item_id": "c"}])  # no timestamp: needs no split
    np.save(tmp_path / "items.npy", np.eye(3))
    np.save(tmp_path / "queries.train.npy", np.eye(2))
    np.save(tmp_path / "queries.test.npy", np.full((1, 2), 7.0))
    dataset = load_dataset(tmp_path)
    assert dataset.train.queries == ("", "hat") and dataset.test.queries == ("hat",)
    assert dataset.train.query_vectors.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert dataset.test.query_vectors.tolist() == [[7.0, 7.0]]
    np.testing.assert_array_equal(dataset.catalog.vectors, np.eye(3))


def test_unusable_folders(tmp_path: Path) -> None:
    assert "there is no such folder" in problems_of(load_dataset, tmp_path / "none")
    assert "there is no items file; it must be one of items.tsv, " in problems_of(load_dataset, tmp_path)
    write(tmp_path / "items.tsv", ITEMS)
    assert "there is no interactions file" in problems_of(load_dataset, tmp_path)
    write(tmp_path / "interactions.train.tsv", CLICKS)
    assert "there is no interactions.test file" in problems_of(load_dataset, tmp_path)
    write(tmp_path / "interactions.tsv", CLICKS)
    assert "keep one or the other" in problems_of(load_dataset, tmp_path)
    (tmp_path / "interactions.train.tsv").unlink()
    write(tmp_path / "items.jsonl", ITEMS)
    assert "has items.tsv and items.jsonl; keep one of them" in problems_of(load_dataset, tmp_path)
    (tmp_path / "items.jsonl").unlink()
    write(tmp_path / "interactions.tsv", [{"query": "q", "item_id": "a"}] * 5)
    message = problems_of(load_dataset, tmp_path)
    assert message.startswith(str(tmp_path / "interactions.tsv"))
    assert "all interactions have the same timestamp" in message
