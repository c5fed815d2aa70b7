"""Trie construction and sets of items in C++ against the reference."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, library

from dgi_kernels import Trie, _extension
from dgi_kernels.trie import native, reference, starts
from dgi_kernels.trie.item_set import BLOCK_WORDS, ItemSet, num_words
from dgi_kernels.trie.rows import packed_rows

from .sanitizers import assert_clean
from .shapes import name_of

pytestmark = pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))

DTYPES = [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64]


def check(codes: np.ndarray | Tensor, tokens: torch.dtype = torch.int32, counts: torch.dtype = torch.int32) -> None:
    table = torch.as_tensor(codes)
    *levels, item_start, item_order = native.trie_arrays(table, tokens, counts)
    *expected_levels, expected_start, expected_order = reference.trie_arrays(table, tokens, counts)
    for made, wanted in zip(levels, expected_levels, strict=True):
        for array, expected in zip(made, wanted, strict=True):
            assert array.dtype == expected.dtype and torch.equal(array, expected)
    for array, expected in ((item_start, expected_start), (item_order, expected_order)):
        assert (array is None) == (expected is None)
        assert array is None or (array.dtype == counts and torch.equal(array, expected))


@pytest.mark.parametrize("columns", range(1, 9))
@pytest.mark.parametrize("values", [1, 2, 3, 300, 2048])
def test_random_codes(columns: int, values: int) -> None:
    check(np.random.randint(0, values, (2000, columns)))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 256, 257, 16383, 16384, 32767, 32768, 40000])
def test_few_rows_and_several_shares(rows: int) -> None:
    check(np.random.randint(0, 4, (rows, 3)))
    check(np.random.randint(0, 1000, (rows, 3)))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_codes_of_any_dtype_and_strides(dtype: torch.dtype) -> None:
    codes = torch.randint(0, 120, (900, 6)).to(dtype)
    check(codes)
    check(codes[:, ::2])
    check(codes.T.contiguous().T)
    check(codes[:1].expand(40, 6))
    largest = torch.iinfo(dtype).max
    if largest <= 2**31:
        largest = min(largest, 2**31 - 1)
        check(torch.tensor([[largest, 0], [0, largest], [largest - 1, 1]]).to(dtype))


@pytest.mark.parametrize("tokens", [torch.int16, torch.int32], ids=name_of)
@pytest.mark.parametrize("counts", [torch.int32, torch.int64], ids=name_of)
def test_arrays_of_every_width(tokens: torch.dtype, counts: torch.dtype) -> None:
    codes = np.random.randint(-1, 32768, (3000, 3))
    codes[:, 0] = np.abs(codes[:, 0])
    codes[::7] = [32767, 0, 32767]
    check(codes, tokens, counts)


def test_equal_rows_keep_their_order() -> None:
    check(np.repeat(np.random.randint(0, 50, (40, 3)), 30, axis=0))
    check(np.full((100, 4), 7))


def test_what_is_the_identity_is_left_out() -> None:
    codes = torch.cartesian_prod(torch.arange(30), torch.arange(20))
    *_, item_start, item_order = native.trie_arrays(codes, torch.int16, torch.int32)
    assert item_start is None and item_order is None
    *_, item_start, item_order = native.trie_arrays(codes.flip(0), torch.int16, torch.int32)
    assert item_start is None and torch.equal(item_order, torch.arange(600, dtype=torch.int32).flip(0))
    *_, item_start, item_order = native.trie_arrays(codes.repeat_interleave(2, 0), torch.int16, torch.int32)
    assert torch.equal(item_start, torch.arange(0, 1201, 2, dtype=torch.int32)) and item_order is None


def test_sequences_that_end_early_sort_first() -> None:
    codes = np.random.randint(0, 5, (3000, 4))
    codes[np.arange(4) >= np.random.randint(1, 5, (3000, 1))] = -1
    check(codes)


@pytest.mark.parametrize(("columns", "bits"), [(1, 31), (3, 31), (8, 31), (5, 25), (60, 1), (70, 1)])
def test_codes_of_more_bits_than_one_word_holds(columns: int, bits: int) -> None:
    codes = np.random.randint(0, 2**bits - 1, (1500, columns))
    codes[::3] = codes[0]  # so that later columns decide
    codes[::3, -1] = np.random.randint(-1, 2**bits - 1, 500)
    check(codes)
    check(np.concatenate([codes] * 30))


def test_columns_of_unequal_width() -> None:
    check(np.stack([np.random.randint(0, high, 4000) for high in (4096, 1, 2, 2**30, 256)], axis=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_ranges_of_codes(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    codes = torch.randint(max(info.min, -(2**62)), min(info.max, 2**62), (50000, 3)).to(dtype)
    codes[random.randrange(50000), 0] = info.min
    codes[random.randrange(50000), 2] = info.max
    for table in (codes, codes[:7], codes[:, 1:], codes[:0]):
        assert torch.equal(native.code_ranges(table), reference.code_ranges(table))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 511, 512, 513, 5000, 200000])
@pytest.mark.parametrize("counts", [None, torch.int32, torch.int64], ids=name_of)
def test_sets_of_items(size: int, counts: torch.dtype | None) -> None:
    order = None if counts is None else torch.randperm(size).to(counts)
    for share in (0.0, 0.01, 0.5, 1.0):
        members = torch.rand(size) < share
        words, ranks = native.item_set(members, order)
        expected_words, expected_ranks = reference.item_set(members, order, num_words(size), BLOCK_WORDS)
        assert torch.equal(words, expected_words) and torch.equal(ranks, expected_ranks)
        if order is not None:
            for got, expected in zip(native.item_set(members, packed_rows(order)), (words, ranks), strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize("leaves", [0, 1, 255, 256, 257, 512, 5000])
@pytest.mark.parametrize("counts", [torch.int32, torch.int64], ids=name_of)
def test_starts_as_marks(leaves: int, counts: torch.dtype) -> None:
    for most in (2, 4, 3000):  # one item each, few, and runs over several blocks of bits
        sizes = torch.where(torch.rand(leaves) < 0.02, torch.randint(1, most, (leaves,)), 1)
        plain = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).to(counts)
        items, marks = int(plain[-1]), native.run_marks(plain)
        assert len(marks) == starts.marks_length(leaves, items)
        assert torch.equal(marks, starts._marks(plain, items))
        assert torch.equal(starts.plain_starts(marks, items, counts), plain)
        wanted = torch.randint(0, leaves + 1, (3, 50))
        for got in (
            native.run_starts(marks, wanted),
            starts.starts_at(marks, items, wanted),
            reference.run_starts(*starts._ranks_and_words(marks, items), wanted),
        ):
            assert torch.equal(got, plain[wanted].long())
        smaller = starts.packed_starts(plain, items)
        assert smaller.nbytes == min(plain.nbytes, marks.nbytes)


@pytest.mark.parametrize("tokens", [torch.int16, torch.int32], ids=name_of)
@pytest.mark.parametrize("counts", [torch.int32, torch.int64], ids=name_of)
def test_children_are_found(tokens: torch.dtype, counts: torch.dtype) -> None:
    for rows in (0, 1, 300, 5000):
        (_, level), (_, child_start), _, _ = native.trie_arrays(torch.randint(0, 90, (rows, 2)), tokens, counts)
        nodes, codes = torch.randint(-1, max(1, len(child_start) - 1), (2, 700)), torch.randint(-2, 92, (2, 700))
        nodes = nodes.clamp(max=len(child_start) - 2)
        for got, expected in zip(
            native.find_children(level, child_start, nodes, codes),
            reference.find_children(level, child_start, nodes, codes),
            strict=True,
        ):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("tokens", [torch.int16, torch.int32], ids=name_of)
@pytest.mark.parametrize("codes", [1, 31, 32, 33, 90])
def test_masks_of_children(tokens: torch.dtype, codes: int) -> None:
    table = torch.randint(-1, codes, (400, 2))
    table[table[:, 0] < 0] = -1
    (_, level), (_, child_start), _, _ = native.trie_arrays(table, tokens, torch.int32)
    nodes = len(child_start) - 1
    has = torch.zeros(nodes, 32 * -(-codes // 32), dtype=torch.bool)
    for node in range(nodes):
        mine = level[child_start[node] : child_start[node + 1]].long()
        has[node, mine[mine >= 0]] = True
    masks = native.child_masks(level, child_start, codes)
    assert masks.dtype == torch.int32 and masks.shape == (nodes, -(-codes // 32))
    assert torch.equal((masks.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32) & 1).bool().flatten(1), has)
    with pytest.raises(RuntimeError, match="a token is beyond the last code"):
        native.child_masks(level + codes, child_start, codes)


def test_masks_take_no_more_memory_than_tokens() -> None:
    for share, kept in ((0.2, True), (0.01, False)):
        arrays = Trie.from_codes((torch.rand(50, 640) < share).nonzero(), codebook_sizes=[50, 640]).parts.base
        masks = arrays.child_masks(1, 640)
        assert (masks is not None) == kept and masks is arrays.child_masks(1, 640)
        assert masks is None or masks.nbytes <= arrays.tokens[1].nbytes


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), "codes must have shape"),
        (torch.zeros(2, 3), "codes must be integers"),
        (torch.zeros(2, 0, dtype=torch.int64), "codes must have shape"),
        (torch.tensor([[0, 1], [-2, 1]]), "codes must be from -1 to 32767; got -2 to 0"),
        (torch.tensor([[0, 32768]]), "codes must be from -1 to 32767; got 32768 to 32768"),
    ],
)
def test_direct_callers_are_stopped_too(codes: Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dgi_kernels.trie_arrays(codes, True, True)


def test_direct_callers_of_item_set_are_stopped_too() -> None:
    members = torch.ones(3, dtype=torch.bool)
    for order, message in (
        ([0, 1, 3], "a row that does not exist"),
        ([0, -1, 2], "a row that does not exist"),
        ([0, 1], "an element for each member"),
        ([0.0, 1, 2], "item_order must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.dgi_kernels.item_set(members, torch.tensor(order))
    with pytest.raises(RuntimeError, match="members must be"):
        torch.ops.dgi_kernels.item_set(members.int(), None)


@pytest.mark.parametrize("leaves", [1, 63, 64, 65, 511, 512, 3000, 70000])
def test_leaves_that_hold_a_place_of_a_set(leaves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (2, 5, 2000):
        sizes = torch.randint(1, min(most, 5), (leaves,))
        sizes[torch.randint(0, leaves, (3,))] = most - 1  # runs over many words
        plain = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
        items = int(plain[-1])
        for share in (0.0, 0.001, 0.1, 0.6, 1.0):
            members = torch.rand(items) < share
            places = ItemSet.of_rows(members, None)
            owner = torch.arange(leaves).repeat_interleave(sizes)
            held = torch.zeros(leaves, dtype=torch.bool).index_fill_(0, owner[members], True)
            expected = ItemSet.of_rows(held, None)
            for given in (native.run_marks(plain), plain, plain.int()):
                words, ranks = native.parent_set(places.words, places.ranks, given, leaves)
                assert torch.equal(words, expected.words) and torch.equal(ranks, expected.ranks)
                with monkeypatch.context() as patch:
                    patch.setattr(starts.backends, "choose", lambda *_: "reference")
                    assert torch.equal(starts.parent_set(places, given, leaves).words, expected.words)


def test_direct_callers_of_marks_are_stopped_too() -> None:
    marks = torch.ops.dgi_kernels.run_marks(torch.arange(301))
    for run in (-1, 301):
        with pytest.raises(RuntimeError, match=f"there is no run {run}"):
            torch.ops.dgi_kernels.run_starts(marks, torch.tensor([0, run]))
    for wrong in (marks[:-1].clone(), marks[:0], marks[1:].clone()):
        with pytest.raises(RuntimeError, match="not of the size that they say"):
            torch.ops.dgi_kernels.run_starts(wrong, torch.tensor([0]))
    whole = ItemSet.of_rows(torch.ones(300, dtype=torch.bool), None)
    for wrong, leaves in ((marks, 299), (marks[:-1].clone(), 300), (torch.arange(300), 300)):
        with pytest.raises(RuntimeError, match="parent_set: starts"):
            torch.ops.dgi_kernels.parent_set(whole.words, whole.ranks, wrong, leaves)
    for unsorted in ([0, 2, 2], [1, 2], [0, 5, 3], [0, -1, 3], []):
        with pytest.raises(RuntimeError, match="run_marks: starts must"):
            torch.ops.dgi_kernels.run_marks(torch.tensor(unsorted, dtype=torch.int64))


def test_the_ops_are_well_registered() -> None:
    library.opcheck(torch.ops.dgi_kernels.code_ranges.default, (torch.randint(-1, 5, (20, 3)),))
    library.opcheck(
        torch.ops.dgi_kernels.find_children.default,
        (
            torch.tensor([1, 4, 2], dtype=torch.int16),
            torch.tensor([0, 2, 3]),
            torch.tensor([0, 1, -1]),
            torch.tensor([4, 4, 4]),
        ),
    )
    marks = native.run_marks(torch.arange(9))
    library.opcheck(
        torch.ops.dgi_kernels.child_masks.default,
        (torch.tensor([1, 4, 2], dtype=torch.int16), torch.tensor([0, 2, 3]), 40),
    )
    library.opcheck(torch.ops.dgi_kernels.run_starts.default, (marks, torch.arange(5)))
    library.opcheck(torch.ops.dgi_kernels.item_set.default, (torch.rand(20) < 0.5, torch.randperm(20)))
    places = torch.ops.dgi_kernels.item_set(torch.rand(20) < 0.5, None)
    library.opcheck(torch.ops.dgi_kernels.parent_set.default, (*places, torch.tensor([0, 3, 20]), 2))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_construction_is_clean_under_sanitizers(tmp_path: Path, seed: int) -> None:
    """Random tables and sets through the same C++ with AddressSanitizer and UBSan, against their definitions."""
    assert_clean("trie_driver.cpp", ("cpu/trie/trie.cpp", "cpu/trie/item_set.cpp"), tmp_path, seed, 100)
