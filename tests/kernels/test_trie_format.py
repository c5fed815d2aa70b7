"""The trie's file: it comes back as it was, and no altered or hostile file crashes or misleads a reader."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dgi_kernels import Trie, TrieFormatError, beam_search, rank_candidates

from .tries import random_catalog

DIGEST = 32
MODES = pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])


@pytest.fixture
def small() -> Trie:
    return Trie.from_codes([[3, 1], [0], [3, 1], [2, 2], [3, 0]], [10, 7, 8, 0, 2], codebook_sizes=[4, 3])


@pytest.fixture
def marked() -> Trie:
    """Large enough that the starts of its leaves are marks."""
    trie = Trie.from_codes([[i % 41 % 7, i % 41 % 6] for i in range(90)], codebook_sizes=[7, 6])
    assert trie.arrays["item_start"].dtype == torch.uint64 and trie.arrays["item_order"].dtype == torch.uint8
    return trie


def assert_same(a: Trie, b: Trie) -> None:
    for name, array in a.arrays.items():
        assert torch.equal(array, b.arrays[name]), name
    assert (a.codebook_sizes, a.sizes_inferred) == (b.codebook_sizes, b.sizes_inferred)


def signed(data: bytes) -> bytes:
    """The file with checksums that fit: what someone who means harm would write."""
    header_end = 24 + struct.unpack_from("<I", data, 12)[0]
    if header_end + 2 * DIGEST <= len(data):
        data = data[:header_end] + hashlib.sha256(data[:header_end]).digest() + data[header_end + DIGEST :]
    return data[:-DIGEST] + hashlib.sha256(data[:-DIGEST]).digest()


def use(trie: Trie) -> None:
    """Read every array of a trie the way that searches do."""
    logits = [torch.randn(2, 5, size + 1 if trie.sizes_inferred else size) for size in trie.codebook_sizes]
    result = beam_search(
        trie,
        lambda depth, tokens, parents: logits[depth][:, : 1 if depth == 0 else 5],
        batch_size=2,
        num_beams=5,
        filters=trie.filter(mask=torch.rand(trie.num_items) < 0.5),
    )
    assert torch.equal(trie.find(result.codes), result.nodes)
    trie.items(result.nodes, trie.depth)
    if trie.parts.id_bounds[0] >= 0 and trie.parts.id_bounds[1] < 100:
        rank_candidates(torch.randn(2, 3), torch.randn(100, 3), trie, result, 3)
    assert trie.is_valid(trie.codes()[0]).all()


@MODES
def test_a_trie_comes_back_as_it_was(tmp_path: Path, mmap: bool) -> None:
    for _ in range(5):
        catalog = random_catalog()
        for sizes in (None, catalog.sizes):
            trie = Trie.from_codes(catalog.codes, catalog.ids, codebook_sizes=sizes)
            trie.save(tmp_path / "trie")
            loaded = Trie.load(tmp_path / "trie", mmap=mmap)
            assert_same(loaded, trie)
            use(loaded)
    empty = Trie.from_codes(torch.empty(0, 3))
    empty.save(str(tmp_path / "trie"))
    assert_same(Trie.load(str(tmp_path / "trie"), mmap), empty)
    assert [path.name for path in tmp_path.iterdir()] == ["trie"]


def test_the_file_is_what_the_readme_says(tmp_path: Path, small: Trie) -> None:
    small.save(tmp_path / "trie")
    data = (tmp_path / "trie").read_bytes()
    magic, version, header_bytes, total = struct.unpack("<8sIIQ", data[:24])
    assert (magic, version, total) == (b"DGITRIE\n", 3, len(data))
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()
    header = json.loads(data[24 : 24 + header_bytes])
    assert header["meta"] == {
        "codebook_sizes": [4, 3],
        "sizes_inferred": False,
        "num_items": 5,
        "max_degree": [3, 2],
        "max_items": [5, 3, 2],
        "id_bounds": [0, 10],
    }
    assert data[24 + header_bytes : 56 + header_bytes] == hashlib.sha256(data[: 24 + header_bytes]).digest()
    arrays, end = {}, 56 + header_bytes
    for name, dtype, length in header["arrays"]:
        start = -(-end // 64) * 64
        assert not any(data[end:start])
        stored = np.dtype({"int16": "<i2", "int32": "<i4", "int64": "<i8", "uint8": "<u1", "uint64": "<u8"}[dtype])
        arrays[name] = np.frombuffer(data, stored, length, start).tolist()
        end = start + length * stored.itemsize
    assert -(-end // 64) * 64 == len(data) - 32
    assert arrays == {
        "tokens.0": [0, 2, 3],
        "child_start.0": [0, 3],
        "tokens.1": [-1, 2, 0, 1],
        "child_start.1": [0, 1, 2, 4],
        "item_start": [0, 1, 2, 3, 5],
        "item_ids": [10, 7, 8, 0, 2],
        "item_order": [1, 0, 0, 3, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 0],
    }


@MODES
@pytest.mark.parametrize("trie", ["small", "marked"])
def test_every_flipped_byte_is_found(tmp_path: Path, trie: str, mmap: bool, request: pytest.FixtureRequest) -> None:
    path = tmp_path / "trie"
    request.getfixturevalue(trie).save(path)
    data = path.read_bytes()
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ random.randint(1, 255)]) + data[place + 1 :])
        with pytest.raises(TrieFormatError, match="trie: "):
            Trie.load(path, mmap=mmap)


@MODES
def test_every_truncation_and_any_added_byte_is_found(tmp_path: Path, small: Trie, mmap: bool) -> None:
    path = tmp_path / "trie"
    small.save(path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(TrieFormatError, match="truncated"):
            Trie.load(path, mmap=mmap)
    path.write_bytes(data + b"\0")
    with pytest.raises(TrieFormatError, match="truncated or altered"):
        Trie.load(path, mmap=mmap)


@MODES
@pytest.mark.parametrize("trie", ["small", "marked"])
def test_a_file_made_to_harm_is_refused_or_is_a_trie(
    tmp_path: Path, trie: str, mmap: bool, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / "trie"
    request.getfixturevalue(trie).save(path)
    data = path.read_bytes()
    accepted = 0
    for place in random.sample(range(len(data) - DIGEST), 250):
        path.write_bytes(signed(data[:place] + bytes([random.randrange(256)]) + data[place + 1 :]))
        try:
            loaded = Trie.load(path, mmap=mmap)
        except TrieFormatError:
            continue
        use(loaded)
        accepted += 1
    assert accepted > 0


def altered(small: Trie, name: str, value: list[int]) -> dict[str, torch.Tensor]:
    arrays, _ = small.state()
    return {**arrays, name: torch.tensor(value, dtype=arrays[name].dtype)}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("child_start.0", [0, 2], "child_start.0 does not cut 3 elements into 1 runs"),
        ("item_ids", [10, 7, 8, 0, 3], None),
        ("item_ids", [10, 7, 8, 1, 2], "id_bounds is .0, 10., but"),
        ("child_start.1", [0, 1, 1, 4], "child_start.1 does not cut"),
        ("child_start.1", [0, 3, 2, 4], "child_start.1 does not cut"),
        ("child_start.1", [1, 2, 3, 4], "child_start.1 does not cut"),
        ("child_start.1", [0, 1, 2, 5], "child_start.1 does not cut"),
        ("child_start.1", [0, 1, 4], "array child_start.1 has 3 elements; it must have 4"),
        ("tokens.0", [0, 2, 4], "tokens.0 holds codes outside of its codebook of 4"),
        ("tokens.0", [0, -2, 3], "tokens.0 holds codes outside"),
        ("tokens.0", [0, 2, 2], "tokens.0 holds codes that do not ascend"),
        ("tokens.0", [-1, 2, 3], "an empty sequence"),
        ("tokens.1", [-1, 2, 1, 1], "tokens.1 holds codes that do not ascend"),
        ("item_start", [0, 1, 2, 2, 5], "item_start does not cut"),
        ("item_start", [0, 1, 2, 3, 6], "item_start does not cut"),
        ("item_order", [1, 0, 0, 3, 0, 0, 4, 0, 0, 0, 0, 0, 5, 0, 0], "item_order holds rows that do not exist"),
        ("item_order", [1, 0, 0, 3, 0, 0, 4, 0, 0, 0, 0, 0, 2, 0, 1], "item_order holds rows that do not exist"),
        ("item_order", [1, 0, 0, 3, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0], "item_order repeats a row"),
        ("item_order", [1, 3, 4, 0, 2], "array item_order has 5 elements; it must have 15"),
    ],
)
def test_arrays_that_form_no_trie_are_refused(small: Trie, name: str, value: list[int], message: str) -> None:
    if message is None:
        assert Trie.from_state(altered(small, name, value), small.state()[1]).item_ids.tolist() == value
        return
    with pytest.raises(TrieFormatError, match=message):
        Trie.from_state(altered(small, name, value), small.state()[1])


def test_marks_that_are_no_starts_of_leaves_are_refused(marked: Trie) -> None:
    arrays, meta = marked.state()
    numbers = arrays["item_start"].view(torch.int64)
    blocks = int(numbers[0])
    assert (blocks, len(numbers)) == (1, 12)  # blocks, a number of ones, 8 words, 2 samples
    for place in range(len(numbers)):
        for bit in (1, 1 << 40, -1):
            wrong = numbers.clone()
            wrong[place] ^= bit
            with pytest.raises(TrieFormatError, match="item_start"):
                Trie.from_state({**arrays, "item_start": wrong.view(torch.uint64)}, meta)
    for wrong in (numbers[:-1], torch.cat([numbers, numbers[-1:]])):
        with pytest.raises(TrieFormatError, match="array item_start has 1[13] elements; it must have 12"):
            Trie.from_state({**arrays, "item_start": wrong.view(torch.uint64)}, meta)


@MODES
def test_files_of_version_2_are_read(tmp_path: Path, marked: Trie, mmap: bool) -> None:
    """They held starts and rows as they are: what is written of a trie of such arrays but for the number."""
    arrays, meta = marked.state()
    base = marked.parts.base
    plain = {
        "item_start": base.item_starts_at(torch.arange(base.num_nodes_at(2) + 1)).int(),
        "item_order": base.ids_at(torch.arange(90)).int(),
    }
    Trie.from_state(arrays | plain, meta).save(tmp_path / "trie")
    data = bytearray((tmp_path / "trie").read_bytes())
    assert data[8] == 3
    data[8] = 2
    (tmp_path / "trie").write_bytes(signed(bytes(data)))
    old = Trie.load(tmp_path / "trie", mmap=mmap)
    assert old.arrays["item_start"].dtype == old.arrays["item_order"].dtype == torch.int32
    use(old)
    assert torch.equal(old.codes()[0], marked.codes()[0])
    for depth in range(3):
        nodes = torch.arange(marked.num_nodes_at(depth))
        for got, expected in zip(old.items(nodes, depth), marked.items(nodes, depth), strict=True):
            assert torch.equal(got, expected)
    assert_same(old.update(remove=[0]).compact(), marked.update(remove=[0]).compact())


def test_a_sequence_does_not_go_on_after_its_end() -> None:
    arrays, meta = Trie.from_codes([[1], [0, 1, 2]]).state()
    assert arrays["tokens.2"].tolist() == [2, -1]
    with pytest.raises(TrieFormatError, match="after the end of a sequence"):
        Trie.from_state({**arrays, "tokens.2": torch.tensor([2, 0], dtype=torch.int16)}, meta)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_sizes": [4]}, "max_degree must be"),
        ({"codebook_sizes": [4, 3, 3]}, "max_degree must be"),
        ({"codebook_sizes": []}, "codebook_sizes must be"),
        ({"codebook_sizes": [4, 2.0]}, "codebook_sizes must be"),
        ({"codebook_sizes": [4, -1]}, "codebook_sizes must be"),
        ({"codebook_sizes": [4, 2**40]}, "codebook_sizes must be"),
        ({"codebook_sizes": 4}, "codebook_sizes must be"),
        ({"codebook_sizes": [4, 40000]}, "tokens.0 must be a vector of"),
        ({"sizes_inferred": 0}, "sizes_inferred must be"),
        ({"num_items": 4}, "item_order has 15"),
        ({"num_items": -1}, "num_items must be"),
        ({"num_items": True}, "num_items must be"),
        ({"num_items": 2**31}, "must be a vector of torch.int64"),
        ({"max_degree": [3, 3]}, "max_degree is .3, 3., but"),
        ({"max_degree": [3]}, "max_degree must be"),
        ({"max_items": [5, 3, 3]}, "max_items is"),
        ({"max_items": None}, "max_items must be"),
        ({"id_bounds": [0]}, "id_bounds must be"),
        ({"id_bounds": [0, 11]}, "id_bounds is"),
        ({"extra": 1}, "meta must hold"),
        (None, "meta must hold"),
    ],
)
def test_meta_data_of_no_trie_is_refused(small: Trie, changes: dict[str, object] | None, message: str) -> None:
    arrays, meta = small.state()
    with pytest.raises(TrieFormatError, match=message):
        Trie.from_state(arrays, None if changes is None else meta | changes)
    with pytest.raises(TrieFormatError, match="meta must hold"):
        Trie.from_state(arrays, {name: value for name, value in meta.items() if name != "num_items"})


def test_state_arrays_of_the_wrong_kind_are_refused(small: Trie) -> None:
    arrays, meta = small.state()
    for wrong in (arrays["item_ids"].int(), arrays["item_ids"].unsqueeze(0), [0, 1, 2, 3, 4]):
        with pytest.raises(TrieFormatError, match="item_ids must be a vector"):
            Trie.from_state({**arrays, "item_ids": wrong}, meta)
    with pytest.raises(TrieFormatError, match="wrong arrays.*extra"):
        Trie.from_state({**arrays, "extra": arrays["item_ids"]}, meta)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"meta":{},"arrays":3}',
        b'{"meta":{},"arrays":[["a","int64"]]}',
        b'{"meta":{},"arrays":[["a","int64",-1]]}',
        b'{"meta":{},"arrays":[["a","int64",1e3]]}',
        b'{"meta":{},"arrays":[["a","float",1]]}',
        b'{"meta":{},"arrays":[["a","int64",999999999999999]]}',
        b'{"meta":{},"arrays":[[[],"int32",0]]}',
        b'{"meta":{},"arrays":[["a",[],0]]}',
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_hostile_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    body = header + bytes(DIGEST) + bytes(-(24 + len(header) + DIGEST) % 64)
    data = struct.pack("<8sIIQ", b"DGITRIE\n", 3, len(header), 24 + len(body) + DIGEST) + body + bytes(DIGEST)
    (tmp_path / "trie").write_bytes(signed(data))
    with pytest.raises(TrieFormatError):
        Trie.load(tmp_path / "trie")


def test_another_version_is_named(tmp_path: Path, small: Trie) -> None:
    path = tmp_path / "trie"
    small.save(path)
    data = bytearray(path.read_bytes())
    for version in (1, 4):
        data[8] = version
        path.write_bytes(signed(bytes(data)))
        with pytest.raises(TrieFormatError, match=f"format version {version}; this library reads versions 2 to 3"):
            Trie.load(path)


def test_other_files_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a trie, and long enough to hold the fixed part of a header and a checksum")
    with pytest.raises(TrieFormatError, match="no trie file"):
        Trie.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        Trie.load(tmp_path / "missing")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, small: Trie, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trie"
    small.save(path)
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        small.update(remove=[7]).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["trie"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mmap_maps_the_file_and_never_writes_to_it(tmp_path: Path, small: Trie) -> None:
    path = tmp_path / "trie"
    small.save(path)
    before = path.read_bytes()
    mapped = Trie.load(path, mmap=True)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    for name, array in mapped.arrays.items():
        assert any(low <= array.data_ptr() < high for low, high in ranges), name
        assert array.data_ptr() % 64 == 0, name
    mapped.parts.base.item_ids.fill_(0)
    assert path.read_bytes() == before


def test_without_verifying_header_and_size_are_still_checked(tmp_path: Path, small: Trie) -> None:
    path = tmp_path / "trie"
    small.save(path)
    data = path.read_bytes()
    loaded = Trie.load(path, mmap=True, verify=False)
    assert_same(loaded, small)
    use(loaded)
    (header_bytes,) = struct.unpack_from("<I", data, 12)
    for place in range(24 + header_bytes + DIGEST):
        path.write_bytes(data[:place] + bytes([data[place] ^ random.randint(1, 255)]) + data[place + 1 :])
        with pytest.raises(TrieFormatError):
            Trie.load(path, mmap=True, verify=False)
    for length in range(0, len(data), 5):
        path.write_bytes(data[:length])
        with pytest.raises(TrieFormatError, match="truncated"):
            Trie.load(path, mmap=True, verify=False)


@MODES
def test_an_updated_trie_is_saved_with_its_updates_folded_in(tmp_path: Path, small: Trie, mmap: bool) -> None:
    changed = small.update(add=([[1, 2], [3, 1]], [3, 5]), remove=[8, 0])
    changed.save(tmp_path / "trie")
    assert_same(Trie.load(tmp_path / "trie", mmap), changed.compact())


@pytest.mark.parametrize("size", [32767, 32768, 32769])
def test_codebooks_about_the_limit_of_int16(tmp_path: Path, size: int) -> None:
    codes = torch.tensor([[size - 1, 0], [0, size - 1], [size - 1, size - 1]])
    trie = Trie.from_codes(codes, codebook_sizes=[size, size])
    assert trie.parts.base.tokens[0].dtype == (torch.int16 if size <= 32768 else torch.int32)
    trie.save(tmp_path / "trie")
    loaded = Trie.load(tmp_path / "trie")
    assert_same(loaded, trie)
    for index in (loaded, loaded.update(add=([[size - 1, 1]], [7]), remove=[0])):
        left = index.codes()[0]
        logits = torch.zeros(1, 4, size)
        logits[..., 0] = logits[..., 1] = 1
        found = beam_search(
            index,
            lambda depth, tokens, parents, logits=logits: logits[:, : 1 if depth == 0 else 4],
            batch_size=1,
            num_beams=4,
        )
        assert sorted(code for code in found.codes[0].tolist() if code[0] >= 0) == sorted(left.tolist())
        assert torch.equal(index.find(found.codes), found.nodes)


@MODES
def test_a_loaded_trie_outlives_a_replaced_file(tmp_path: Path, small: Trie, mmap: bool) -> None:
    small.save(tmp_path / "trie")
    loaded = Trie.load(tmp_path / "trie", mmap=mmap)
    small.update(remove=[7]).save(tmp_path / "trie")
    assert_same(loaded, small)
