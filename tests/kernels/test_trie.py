"""Trie construction, lookups, the inverted index and updates, against sets of tuples."""

from __future__ import annotations

import copy
import itertools
import pickle
import random

import numpy as np
import pytest
import torch

from dgi_kernels import Trie, backends, beam_search
from dgi_kernels.trie.arrays import _longest_run

from .tries import Catalog, random_catalog

CASES = 60
BUILDERS = ["reference"] + (
    ["native"] if "trie_build" in backends()["native"].ops and backends()["native"].available else []
)


def make(catalog: Catalog, **options: object) -> Trie:
    return Trie.from_codes(list(catalog.codes), catalog.ids, codebook_sizes=catalog.sizes, **options)


def assert_same(a: Trie, b: Trie) -> None:
    assert a.arrays.keys() == b.arrays.keys()
    for name, array in a.arrays.items():
        assert torch.equal(array, b.arrays[name]), name
    assert (a.codebook_sizes, a.sizes_inferred) == (b.codebook_sizes, b.sizes_inferred)


def all_paddings(catalog: Catalog, depth: int) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(-1, size + 1) for size in catalog.sizes[:depth])))[:200]


@pytest.mark.parametrize("builder", BUILDERS)
def test_nodes_children_and_items_are_those_of_the_sorted_prefixes(builder: str) -> None:
    for _ in range(CASES):
        catalog = random_catalog()
        trie = make(catalog, backend=builder)
        assert (trie.depth, trie.num_items) == (catalog.depth, len(catalog.ids))
        assert trie.codebook_sizes == tuple(catalog.sizes)
        assert trie.num_nodes == sum(len(catalog.prefixes(t + 1)) for t in range(catalog.depth))
        for depth in range(catalog.depth + 1):
            prefixes = catalog.prefixes(depth)
            nodes = trie.find(torch.tensor(prefixes).reshape(len(prefixes), depth))
            assert nodes.tolist() == list(range(len(prefixes)))
            ranges = trie.items(range(len(prefixes)), depth)
            for node, prefix in enumerate(prefixes):
                assert ranges.item_ids[ranges.offsets[node] : ranges.offsets[node + 1]].tolist() == catalog.items(
                    prefix
                )
                if depth < catalog.depth:
                    assert trie.children(node, depth).tolist() == catalog.children(prefix)


def test_find_and_is_valid_know_exactly_the_prefixes_that_exist() -> None:
    for _ in range(CASES):
        catalog = random_catalog()
        trie = make(catalog)
        depth = random.randint(1, catalog.depth)
        prefixes = all_paddings(catalog, depth)
        expected = [catalog.node(prefix) for prefix in prefixes]
        assert trie.find(torch.tensor(prefixes)).tolist() == expected
        valid = trie.is_valid(np.array(prefixes).reshape(-1, 1, depth))
        assert valid.tolist() == [[node >= 0] for node in expected]
        assert bool(trie.is_valid(list(prefixes[0]))) == (expected[0] >= 0)


@pytest.mark.skipif("native" not in BUILDERS, reason="the extension is not built")
def test_native_build_gives_the_arrays_of_the_reference() -> None:
    for _ in range(CASES):
        catalog = random_catalog(max_items=200)
        assert_same(make(catalog, backend="native"), make(catalog, backend="reference"))
    empty = torch.empty(0, 3, dtype=torch.int64)
    assert_same(Trie.from_codes(empty, backend="native"), Trie.from_codes(empty, backend="reference"))


def test_codes_come_back_in_the_order_given() -> None:
    for _ in range(CASES):
        catalog = random_catalog()
        codes, ids = make(catalog).codes()
        assert list(map(tuple, codes.tolist())) == catalog.padded()
        assert ids.tolist() == catalog.ids


def test_every_form_of_codes_gives_the_same_trie() -> None:
    table = torch.randint(0, 7, (40, 3))
    ids = torch.randperm(1000)[:40] - 500
    expected = Trie.from_codes(table, ids, codebook_sizes=[7, 7, 7])
    rows = table.tolist()
    wide = torch.stack([table, table], dim=-1).flatten(1)
    forms = [
        table.int(),
        table.to(torch.uint8),
        table.numpy(),
        table.numpy().astype(np.uint16),
        wide[:, ::2],
        rows,
        tuple(map(tuple, rows)),
        list(table),
        list(table.numpy()),
        [*rows[:20], *map(tuple, rows[20:])],
    ]
    for codes in forms:
        assert_same(Trie.from_codes(codes, ids.tolist(), codebook_sizes=(7, 7, 7)), expected)
    assert_same(Trie.from_codes(table, ids.numpy().astype(np.int32), codebook_sizes=np.array([7, 7, 7])), expected)


def test_ids_default_to_rows_and_may_be_any_int64() -> None:
    assert Trie.from_codes([[1], [0]]).items([0, 1], 1).item_ids.tolist() == [1, 0]
    extremes = [2**63 - 1, -(2**63)]
    assert Trie.from_codes([[1], [0]], extremes).items([1, 0], 1).item_ids.tolist() == extremes


def test_equal_codes_share_a_leaf_in_the_order_given() -> None:
    trie = Trie.from_codes([[2, 1], [0, 0], [2, 1], [2, 1]], [7, 5, 9, 3])
    assert trie.items(trie.find([2, 1]), 2).item_ids.tolist() == [7, 9, 3]


def test_items_of_dead_beams_are_none() -> None:
    trie = Trie.from_codes([[0, 1], [0, 2]], [4, 8])
    offsets, items = trie.items(torch.tensor([[-1, 1], [0, -1]]), 2)
    assert offsets.tolist() == [0, 0, 1, 2, 2]
    assert items.tolist() == [8, 4]


def test_an_empty_trie_is_valid() -> None:
    trie = Trie.from_codes(torch.empty(0, 2, dtype=torch.int64), codebook_sizes=[3, 4])
    assert (trie.num_items, trie.num_nodes, trie.depth) == (0, 0, 2)
    assert trie.find(torch.tensor([[0, 0], [2, 3]])).tolist() == [-1, -1]
    assert trie.children(0, 0).tolist() == []
    assert trie.items([0], 0).offsets.tolist() == [0, 0]
    assert trie.items([-1], 2).offsets.tolist() == [0, 0]
    assert trie.codes()[0].shape == (0, 2)
    assert_same(trie.update(add=([[1, 2]], [5])).compact(), Trie.from_codes([[1, 2]], [5], codebook_sizes=[3, 4]))


def test_updates_are_builds_of_the_merged_catalog_and_leave_the_old_trie_alone() -> None:
    for _ in range(CASES):
        catalog = random_catalog()
        trie = make(catalog)
        before = {name: array.clone() for name, array in trie.arrays.items()}
        removed = set(random.sample(catalog.ids, random.randint(0, len(catalog.ids))))
        kept = [(code, item) for code, item in zip(catalog.codes, catalog.ids, strict=True) if item not in removed]
        added = [
            (tuple(random.randrange(size) for size in catalog.sizes[: random.randint(1, catalog.depth)]), item)
            for item in random.sample(sorted(removed) + list(range(1000, 1005)), random.randint(0, 4))
        ]
        merged = kept + added
        new = trie.update(add=([code for code, _ in added], [item for _, item in added]), remove=sorted(removed))
        codes, ids = new.codes()
        padded = Catalog([code for code, _ in merged], [item for _, item in merged], catalog.sizes).padded()
        assert (list(map(tuple, codes.tolist())), ids.tolist()) == (padded, [item for _, item in merged])
        if any(len(code) == catalog.depth for code, _ in merged):
            built = Trie.from_codes([code for code, _ in merged], ids, codebook_sizes=catalog.sizes)
            assert_same(new.compact(), built)
            assert (new.num_items, new.num_nodes) == (built.num_items, built.num_nodes)
        for name, array in trie.arrays.items():
            assert torch.equal(array, before[name]), name


def test_updates_keep_inferred_sizes_as_lower_bounds() -> None:
    trie = Trie.from_codes([[4, 1], [2, 3]])
    assert trie.codebook_sizes == (5, 4)
    assert trie.update(add=([[0, 9]], [2])).codebook_sizes == (5, 10)
    assert trie.update(remove=[0]).codebook_sizes == (5, 4)


def test_an_update_with_nothing_is_the_same_trie() -> None:
    trie = Trie.from_codes([[4, 1], [2]])
    assert_same(trie.update(), trie)
    assert_same(trie.update(add=([], []), remove=[]), trie)


def test_state_makes_the_same_trie() -> None:
    for _ in range(10):
        trie = make(random_catalog())
        assert_same(Trie.from_state(*trie.state()), trie)


def test_nbytes_is_the_size_of_the_arrays() -> None:
    trie = Trie.from_codes([[0, 0], [0, 1], [1, 0]])
    # tokens: 2 and 3 int16; child_start: 2 and 3 int32; what is 0, 1, 2, … takes nothing
    assert trie.nbytes == (2 + 3) * 2 + (2 + 3) * 4
    trie = Trie.from_codes([[1, 0], [0, 1], [0, 1]], [4, 5, 6], codebook_sizes=[2, 40000])
    # tokens: 2 and 2 int32; child_start: 2 and 3; item_start 3 int32; item_order 3 of 3 bytes; item_ids 3 int64
    assert trie.nbytes == (2 + 2) * 4 + (2 + 3 + 3) * 4 + 3 * 3 + 3 * 8
    trie = Trie.from_codes([[0, 0], [0, 1], [1, 0]])
    assert "num_items=3" in repr(trie) and "codebook_sizes=(2, 2)" in repr(trie)


def test_a_deep_and_a_large_trie() -> None:
    deep = torch.randint(0, 2, (50, 40))
    trie = Trie.from_codes(deep)
    assert torch.equal(trie.codes()[0], deep)
    large = torch.randint(0, 300, (20000, 3))
    trie = Trie.from_codes(large)
    assert torch.equal(trie.codes()[0], large)
    assert trie.num_nodes_at(3) == len(torch.unique(large, dim=0))
    rows = torch.randint(0, 300, (500, 3))
    present = set(map(tuple, large.tolist()))
    assert trie.is_valid(rows).tolist() == [tuple(row) in present for row in rows.tolist()]


BAD_CODES = [
    (torch.tensor([[0, -2]]), ValueError, r"codes\[0\]\[1\] must not be negative"),
    (torch.tensor([[0, 1], [-1, 1]]), ValueError, r"codes\[1\]\[0\] must not be negative, but for -1 behind"),
    (torch.tensor([[0, -1, 1]]), ValueError, r"codes\[0\]\[1\] must not be negative, but for -1 behind"),
    (torch.tensor([[-1, -1]]), ValueError, r"codes\[0\]\[0\] must not be negative"),
    ([[0, -1, 1], [2, 1]], ValueError, r"codes\[0\]\[1\] must not be negative"),
    ([[0, 1], [2, -3]], ValueError, r"codes\[1\]\[1\] must not be negative.*-3"),
    ([[0, 1], []], ValueError, r"codes\[1\] is empty"),
    ([], ValueError, "codes must hold at least one sequence"),
    (torch.empty(3, 0, dtype=torch.int64), ValueError, r"codes must have shape \(N, L\)"),
    (torch.tensor([1, 2]), ValueError, r"codes must have shape \(N, L\)"),
    (torch.tensor([[0.5]]), TypeError, "codes must hold integers"),
    (torch.tensor([[True]]), TypeError, "codes must hold integers"),
    ([[0.5]], TypeError, "codes must hold integers"),
    (torch.zeros(2, 2, dtype=torch.int64).to_sparse(), ValueError, "codes must be a dense tensor"),
    ([torch.tensor([[0, 1]])], ValueError, "codes must be a list of flat sequences"),
    ([["a"]], TypeError, "codes must hold integers"),
    ([0, 1], TypeError, "codes must be a list of sequences"),
    ([[[0]], [[1]]], ValueError, "codes must be a list of flat sequences"),
    ([[[0], [1, 2]], [0]], TypeError, "codes"),
    ("12", TypeError, "codes must be"),
    (None, TypeError, "codes must be"),
    ([[2**70]], TypeError, "codes must hold integers that fit"),
    (np.array([[2**63]], dtype=np.uint64), ValueError, "codes must fit in int64"),
    ([[2**31]], ValueError, "codebook_sizes must be from 0"),
]


@pytest.mark.parametrize(("codes", "error", "message"), BAD_CODES)
def test_bad_codes_are_named(codes: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Trie.from_codes(codes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Trie.from_codes([[0], [1]], [3, 3]), ValueError, "item_ids must be distinct; 3"),
        (lambda: Trie.from_codes([[0], [1]], [3]), ValueError, "item_ids must have one id per item"),
        (lambda: Trie.from_codes([[0], [1]], [0.5, 1]), TypeError, "item_ids must hold integers"),
        (lambda: Trie.from_codes([[0, 5]], codebook_sizes=[1, 5]), ValueError, r"codes\[0\]\[1\] must be less .*got 5"),
        (
            lambda: Trie.from_codes([[0, 5]], codebook_sizes=[6]),
            ValueError,
            "codebook_sizes must have one size per level",
        ),
        (lambda: Trie.from_codes([[0]], codebook_sizes=[1.5]), TypeError, "codebook_sizes must hold integers"),
        (lambda: Trie.from_codes([[0]], codebook_sizes=[-1]), ValueError, "codebook_sizes must be from 0"),
        (lambda: Trie.from_codes([[0]], codebook_sizes=3), ValueError, "codebook_sizes must have one size"),
        (lambda: Trie.from_codes([[0]], backend="fast"), ValueError, "backend must be one of"),
        (lambda: Trie.from_codes([[0]]).find([[0, 0]]), ValueError, "prefixes must have shape"),
        (lambda: Trie.from_codes([[0]]).find(0), ValueError, "prefixes must have shape"),
        (lambda: Trie.from_codes([[0]]).find([[0.5]]), TypeError, "prefixes must hold integers"),
        (lambda: Trie.from_codes([[0]]).children(1, 0), ValueError, "node must be"),
        (lambda: Trie.from_codes([[0]]).children(torch.tensor([0, 0]), 0), TypeError, "node must be an integer"),
        (lambda: Trie.from_codes([[0]]).children(0, 1), ValueError, "depth must be"),
        (lambda: Trie.from_codes([[0]]).items([1], 1), ValueError, "nodes must be in"),
        (lambda: Trie.from_codes([[0]]).items([0], 2), ValueError, "depth must be"),
        (lambda: Trie.from_codes([[0]]).root(-1), ValueError, "batch_size must be"),
        (lambda: Trie.from_codes([[0]]).update(remove=[1]), ValueError, "remove must be ids of items .* 1"),
        (lambda: Trie.from_codes([[0]]).update(add=([[0]], [0])), ValueError, "0 is already in the trie"),
        (lambda: Trie.from_codes([[0]]).update(add=([[0], [0]], [4, 4])), ValueError, "distinct; 4"),
        (lambda: Trie.from_codes([[0]]).update(add=[[0]]), TypeError, r"add must be a pair \(codes, ids\)"),
        (lambda: Trie.from_codes([[0]]).update(add=([[0, 1]], [1])), ValueError, "must have 1 levels"),
        (lambda: Trie.from_codes([[0, 0]]).update(add=(torch.tensor([[0]]), [1])), ValueError, "must have 2 levels"),
        (lambda: Trie.from_codes([[0]], codebook_sizes=[2]).update(add=([[2]], [1])), ValueError, "must be less than"),
    ],
)
def test_bad_arguments_are_named(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_an_update_shares_the_arrays_of_the_trie_it_comes_from() -> None:
    trie = Trie.from_codes(torch.randint(0, 50, (3000, 3)), codebook_sizes=[50] * 3)
    first = trie.update(add=(torch.randint(0, 50, (20, 3)), range(3000, 3020)), remove=range(100))
    second = first.update(add=([[1, 2, 3]], [5]), remove=[3000, 101])
    assert first.parts.base is trie.parts.base and second.parts.base is trie.parts.base
    assert (trie.num_items, first.num_items, second.num_items) == (3000, 2920, 2919)
    assert second.parts.delta is not None and len(second.parts.delta.removed) == 101
    third = second.update(remove=range(3001, 3020)).update(remove=[5])  # nothing is left of what was added
    assert third.parts.added is None and third.num_items == 2899
    everything = third.update(remove=third.item_ids)
    assert everything.num_items == everything.num_nodes == 0 and everything.parts.id_bounds == (0, -1)
    assert not everything.is_valid(trie.codes()[0]).any() and everything.children(0, 0).tolist() == []


def test_an_update_beyond_the_tokens_of_the_base_is_a_rebuild() -> None:
    trie = Trie.from_codes([[4, 1], [2, 3]])
    new = trie.update(add=([[40000, 0]], [7]), remove=[0])
    assert new.parts.delta is None and new.parts.base.tokens[0].dtype == torch.int32
    assert_same(new, Trie.from_codes([[2, 3], [40000, 0]], [1, 7]))


@pytest.mark.parametrize("spread", [1, 3, 10**6], ids=["rows", "close", "far"])
def test_items_are_found_by_any_ids(spread: int) -> None:
    ids = torch.randperm(500) * spread - (0 if spread == 1 else 700)
    trie = Trie.from_codes(torch.randint(0, 9, (500, 2)), ids)
    wanted = ids[torch.randperm(500)[:40]]
    assert sorted(trie.update(remove=wanted).item_ids.tolist()) == sorted(set(ids.tolist()) - set(wanted.tolist()))
    assert trie.filter(items=wanted).num_items == 40
    for missing in (int(ids.min()) - 1, int(ids.max()) + 1, *([int(ids[0]) + 1] if spread > 1 else [])):
        for wrong in ([missing], [*wanted.tolist(), missing]):
            with pytest.raises(ValueError, match=f"it has no item {missing}"):
                trie.filter(items=wrong)


@pytest.mark.parametrize("backend", BUILDERS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_codes_of_unequal_length_can_be_given_back(dtype: torch.dtype, backend: str) -> None:
    """Guards against -1 behind the end of a sequence, in what codes() gives, that from_codes refuses."""
    trie = Trie.from_codes([[0, 1], [2], [1, 1, 0], [2], [0, 1, 3]], [7, 3, 5, 9, 1], backend=backend)
    codes, ids = trie.codes()
    for given in (codes.to(dtype), codes.to(dtype).numpy(), codes.tolist()):
        again = Trie.from_codes(given, ids, backend=backend)
        assert again.arrays.keys() == trie.arrays.keys() and again.codebook_sizes == trie.codebook_sizes
        assert all(torch.equal(array, trie.arrays[name]) for name, array in again.arrays.items())
    larger = trie.update(add=(codes, ids + 10))
    assert larger.num_items == 10 and torch.equal(larger.codes()[0], torch.cat([codes, codes]))


@pytest.mark.parametrize("many", [False, True], ids=["one item to a leaf", "items share leaves"])
def test_a_trie_can_be_pickled_and_copied(many: bool) -> None:
    """Guards against arrays of a dtype that torch writes and cannot read: distributed objects and caches pickle."""
    codes = torch.cartesian_prod(*[torch.arange(6)] * 3)
    trie = Trie.from_codes(torch.cat([codes, codes[:5]]) if many else codes, codebook_sizes=(6, 6, 6))
    some = trie.filter(items=[1, 216] if many else [1])
    some.nodes, trie.update(remove=[3])  # what is made when first asked for is there
    for made in (pickle.loads(pickle.dumps((trie, some, trie.update(remove=[3])))), copy.deepcopy((trie, some, trie))):
        again, filtered, updated = made
        assert all(
            torch.equal(array, trie.arrays[name]) and array.dtype == trie.arrays[name].dtype
            for name, array in again.arrays.items()
        )
        found = beam_search(
            again,
            lambda depth, *_: torch.arange(6.0).expand(1, 1 if depth == 0 else 4, 6),
            batch_size=1,
            num_beams=4,
            filters=filtered,
        )
        assert found.codes[0, 0].tolist() == codes[1].tolist() and again.find(codes[7]) == trie.find(codes[7])
        assert updated.num_items in (trie.num_items, trie.num_items - 1)
        assert torch.equal(again.items(torch.tensor([0]), 0).item_ids, trie.items(torch.tensor([0]), 0).item_ids)


def test_the_longest_run_of_more_starts_than_a_block_holds() -> None:
    """Guards the difference across two blocks."""
    starts = torch.arange(2**22 + 5, dtype=torch.int32)
    starts[2**22 + 1 :] += 6
    assert _longest_run(starts) == 7 and _longest_run(starts[: 2**22 + 1]) == 1
    assert (_longest_run(starts[:1]), _longest_run(None)) == (0, 0)
