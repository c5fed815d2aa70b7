"""Restricting a search to a subset of a trie's items, without dead ends.

The items below a node are a range of the leaf order, so a node leads to an allowed item if and only if the number of
allowed places before the range's end is greater than that before its beginning: two ranks of a bitset. Compiled
searches go by a set of the nodes of each depth, made from that of the places once: one bit says whether a node leads to
an allowed item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dgi_kernels.backend import tracing
from dgi_kernels.trie.item_set import ItemSet

if TYPE_CHECKING:
    from dgi_kernels.trie import Trie

NodeSets = tuple[ItemSet, ...]


class TrieFilter:
    """A subset of the items of one trie, made by :meth:`Trie.filter`; ``&``, ``|`` and ``~`` combine filters.

    It serves the very trie object that made it: after ``to``, ``update`` or ``load``, make it again.

    Attributes:
        trie: the trie that it belongs to.
        base: the places allowed of the trie's base; never those of items that are gone.
        delta: the places allowed of what an updated trie holds besides; None: all, if any.
    """

    def __init__(self, trie: Trie, base: ItemSet, delta: ItemSet | None) -> None:
        self.trie = trie
        self.base = base
        self.delta = delta
        self._nodes: tuple[NodeSets, NodeSets | None] | None = None

    @property
    def nodes(self) -> tuple[NodeSets, NodeSets | None]:
        """The nodes of base and delta that lead to an allowed item, by depth from 1: what a search goes by.

        Made when first asked for. Not a ``cached_property``, whose lock torch.compile cannot take.
        """
        if self._nodes is not None:
            return self._nodes
        parts = self.trie.parts
        base = parts.live_nodes if self.base is parts.live else parts.base.nodes_above(self.base)
        assert base is not None
        nodes = base, None if self.delta is None or parts.added is None else parts.added.nodes_above(self.delta)
        if not tracing():
            self._nodes = nodes
        return nodes

    @property
    def num_items(self) -> int:
        """The number of items allowed."""
        added = self.trie.parts.added
        return len(self.base) + (0 if added is None else added.num_items if self.delta is None else len(self.delta))

    def allows(self, nodes: Tensor, depth: int) -> Tensor:
        """Whether an allowed item lies below each of ``nodes`` (...) of ``depth``, none below -1; (...) bool."""
        return self.trie.parts.holds(nodes, depth, self.base, self.delta)

    def contains(self, places: Tensor) -> Tensor:
        """Whether the item at each of ``places`` (...) is allowed; (...) bool."""
        return self.trie.parts.contains(places, self.base, self.delta)

    def __and__(self, other: TrieFilter) -> TrieFilter:
        other = self._compatible(other)
        return TrieFilter(self.trie, self.base & other.base, _combined(self.delta, other.delta, ItemSet.__and__))

    def __or__(self, other: TrieFilter) -> TrieFilter:
        other = self._compatible(other)
        return TrieFilter(self.trie, self.base | other.base, _combined(self.delta, other.delta, ItemSet.__or__))

    def __invert__(self) -> TrieFilter:
        base, live = ~self.base, self.trie.parts.live
        return TrieFilter(self.trie, base if live is None else base & live, None if self.delta is None else ~self.delta)

    def _compatible(self, other: object) -> TrieFilter:
        if not isinstance(other, TrieFilter):
            raise TypeError(f"a TrieFilter combines with a TrieFilter; got {type(other).__name__}")
        if other.trie is not self.trie:
            raise ValueError("the filters belong to different tries; make both with the same trie's filter()")
        return other

    def __repr__(self) -> str:
        return f"TrieFilter({self.num_items} of {self.trie.num_items} items)"


def _combined(a: ItemSet | None, b: ItemSet | None, combine: Callable[[ItemSet, ItemSet], ItemSet]) -> ItemSet | None:
    return None if a is None or b is None else combine(a, b)  # all filters of one trie have a set, or none of them


Filters = TrieFilter | Sequence[TrieFilter | None] | None


def check_filters(filters: Filters, trie: Trie, batch: int) -> TrieFilter | list[TrieFilter | None] | None:
    """Check the argument ``filters``: None, one filter of ``trie``, or one (or None) for each of ``batch`` requests.

    Returns:
        What searches go by: of a trie with items that are gone, the filter of all that are left stands in for None.
    """
    live = trie.parts.live
    everything = None if live is None else TrieFilter(trie, live, None)
    if filters is None:
        return everything
    if isinstance(filters, TrieFilter):
        _check_filter("filters", filters, trie)
        return filters
    if not isinstance(filters, (list, tuple)):
        raise TypeError(f"filters must be a TrieFilter, a list of them or None; got {type(filters).__name__}")
    if len(filters) != batch:
        raise ValueError(f"filters must have one entry per request, {batch}; got {len(filters)}")
    for i, entry in enumerate(filters):
        if entry is not None:
            _check_filter(f"filters[{i}]", entry, trie)
    if all(entry is None for entry in filters):
        return everything
    return [everything if entry is None else entry for entry in filters]


def _check_filter(name: str, value: object, trie: Trie) -> None:
    if not isinstance(value, TrieFilter):
        raise TypeError(f"{name} must be a TrieFilter or None; got {type(value).__name__}")
    if value.trie is not trie:
        raise ValueError(f"{name} belongs to another trie; make it with the filter() of the trie that is searched")


def allowed_nodes(filters: TrieFilter | list[TrieFilter | None] | None, nodes: Tensor, depth: int) -> Tensor:
    """Whether each of ``nodes`` (B, ...) of ``depth`` leads to an item allowed to its request; (B, ...) bool."""
    if filters is None:
        return torch.ones_like(nodes, dtype=torch.bool)
    if isinstance(filters, TrieFilter):
        return filters.allows(nodes, depth)
    return torch.stack(
        [
            torch.ones_like(request, dtype=torch.bool) if entry is None else entry.allows(request, depth)
            for entry, request in zip(filters, nodes.unbind(0), strict=True)
        ]
    )


def allowed_items(filters: TrieFilter | list[TrieFilter | None] | None, places: Tensor) -> Tensor:
    """Whether each item, given by its place (B, ...), is allowed to its request; (B, ...) bool."""
    if filters is None:
        return torch.ones_like(places, dtype=torch.bool)
    if isinstance(filters, TrieFilter):
        return filters.contains(places)
    return torch.stack(
        [
            torch.ones_like(request, dtype=torch.bool) if entry is None else entry.contains(request)
            for entry, request in zip(filters, places.unbind(0), strict=True)
        ]
    )


def filter_arguments(
    filters: TrieFilter | list[TrieFilter | None] | None, batch: int, depth: int | None
) -> tuple[list[Tensor], list[int]]:
    """The filters as compiled ops take them: the nodes of ``depth`` that lead to an allowed item, or None: the places.

    Returns:
        Four arrays for each distinct filter, words and ranks of the base and of the delta (empty: all), and for each of
        ``batch`` requests which filter it has, -1 for none.
    """
    if filters is None:
        return [], []
    if isinstance(filters, TrieFilter):
        return _arrays(filters, depth), [0] * batch
    distinct = list({id(entry): entry for entry in filters if entry is not None}.values())
    number = {id(entry): i for i, entry in enumerate(distinct)}
    return (
        [array for entry in distinct for array in _arrays(entry, depth)],
        [number.get(id(entry), -1) for entry in filters],
    )


def _arrays(entry: TrieFilter, depth: int | None) -> list[Tensor]:
    base, delta = entry.base, entry.delta
    if depth is not None:
        of_base, of_delta = entry.nodes
        base, delta = of_base[depth - 1], None if of_delta is None else of_delta[depth - 1]
    everything = base.words[:0]
    return [base.words, base.ranks, *([everything, everything] if delta is None else [delta.words, delta.ranks])]
