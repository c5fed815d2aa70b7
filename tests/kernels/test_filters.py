"""Filters: which prefixes they allow, their algebra, and their arguments."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from dgi_kernels import Trie, TrieFilter, beam_step

from .tries import Catalog, make, random_catalog


def subset(catalog: Catalog) -> list[int]:
    return random.sample(catalog.ids, random.randint(0, len(catalog.ids)))


def assert_allows(chosen: TrieFilter, catalog: Catalog, items: set[int]) -> None:
    """A prefix is allowed exactly while an allowed item lies below it."""
    assert chosen.num_items == len(items)
    for depth in range(catalog.depth + 1):
        prefixes = catalog.prefixes(depth)
        expected = [bool(items & set(catalog.items(prefix))) for prefix in prefixes]
        nodes = chosen.trie.find(torch.tensor(prefixes).reshape(len(prefixes), depth))
        assert chosen.allows(nodes, depth).tolist() == expected


def test_a_prefix_is_allowed_while_an_allowed_item_lies_below_it() -> None:
    for _ in range(40):
        catalog = random_catalog()
        trie, items = make(catalog), subset(catalog)
        mask = [item in items for item in catalog.ids]
        for chosen in (
            trie.filter(items=items),
            trie.filter(items=torch.tensor(items + items)),
            trie.filter(items=set(items)),
            trie.filter(mask=torch.tensor(mask)),
            trie.filter(mask=np.array(mask)),
            trie.filter(mask=mask),
        ):
            assert_allows(chosen, catalog, set(items))


def test_filters_combine_as_sets() -> None:
    for _ in range(40):
        catalog = random_catalog()
        trie, a, b = make(catalog), subset(catalog), subset(catalog)
        first, second = trie.filter(items=a), trie.filter(items=b)
        assert_allows(first & second, catalog, set(a) & set(b))
        assert_allows(first | second, catalog, set(a) | set(b))
        assert_allows(~first, catalog, set(catalog.ids) - set(a))


def test_an_empty_trie_has_filters() -> None:
    trie = Trie.from_codes(torch.empty(0, 2))
    chosen = trie.filter(items=[]) | ~trie.filter(mask=torch.empty(0, dtype=torch.bool))
    assert chosen.num_items == 0
    assert not chosen.allows(torch.tensor([0]), 0).item()


def test_a_filter_of_another_trie_is_refused() -> None:
    trie, other = (Trie.from_codes([[0, 1], [1, 1]]) for _ in range(2))
    logits, beams = torch.zeros(2, 1, 2), trie.root(2)
    for filters, name in (
        (other.filter(items=[0]), "filters"),
        ([None, other.filter(items=[0])], r"filters\[1\]"),
        (trie.update().filter(items=[0]), "filters"),
    ):
        with pytest.raises(ValueError, match=f"{name} belongs to another trie"):
            beam_step(trie, logits, beams, num_beams=2, filters=filters)
    with pytest.raises(ValueError, match="different tries"):
        trie.filter(items=[0]) & other.filter(items=[0])
    with pytest.raises(TypeError, match="TrieFilter"):
        trie.filter(items=[0]) | [0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "exactly one of items and mask"),
        ({"items": [0], "mask": [True, True]}, ValueError, "exactly one of items and mask"),
        ({"items": [5]}, ValueError, "items must be ids of items in the trie; it has no item 5"),
        ({"items": [0.5]}, TypeError, "items must hold integers"),
        ({"mask": [True]}, ValueError, "mask must have shape"),
        ({"mask": [0, 1]}, TypeError, "mask must have dtype bool"),
        ({"mask": {0: True}}, TypeError, "mask must be a tensor, array or list of bool; got dict"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Trie.from_codes([[0, 1], [1, 1]]).filter(**options)


@pytest.mark.parametrize(
    ("filters", "error", "message"),
    [
        ("all", TypeError, "filters must be a TrieFilter, a list"),
        ([None], ValueError, "filters must have one entry per request, 2; got 1"),
        ([None, [0]], TypeError, r"filters\[1\] must be a TrieFilter"),
    ],
)
def test_bad_filters_are_named(filters: object, error: type[Exception], message: str) -> None:
    trie = Trie.from_codes([[0, 1], [1, 1]])
    with pytest.raises(error, match=message):
        beam_step(trie, torch.zeros(2, 1, 2), trie.root(2), num_beams=2, filters=filters)


def test_the_nodes_of_each_depth_that_lead_to_an_allowed_item() -> None:
    """What compiled searches go by, against ranges of places."""
    for ragged in (False, True):
        codes = [[random.randrange(4) for _ in range(random.randint(1, 4) if ragged else 4)] for _ in range(300)]
        trie = Trie.from_codes(codes)
        for index in (trie, trie.update(remove=list(range(0, 300, 3)))):
            chosen = index.filter(mask=torch.rand(index.num_items) < random.random())
            for depth in range(1, index.depth + 1):
                nodes = torch.arange(index.num_nodes_at(depth))
                assert torch.equal(chosen.nodes[0][depth - 1].contains(nodes), chosen.allows(nodes, depth))
