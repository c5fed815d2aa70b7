"""Restricting a search to a subset of a trie's items, without dead ends.

The items below a node are a range of the leaf order, so with ``counts[i]`` = number of allowed items among the first i,
a node with items [lo, hi) leads to an allowed item if and only if ``counts[hi] > counts[lo]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dgi_kernels.trie import Trie


class TrieFilter:
    """A subset of the items of one trie, made by :meth:`Trie.filter`; ``&``, ``|`` and ``~`` combine filters.

    It serves the very trie object that made it: after ``to``, ``update`` or ``load``, make it again.

    Attributes:
        trie: the trie that it belongs to.
        allowed: (num_items,) bool, the items allowed, in the trie's leaf order.
        counts: (num_items + 1,) int64, the number of allowed items among the first i of the leaf order.
    """

    def __init__(self, trie: Trie, allowed: Tensor) -> None:
        self.trie = trie
        self.allowed = allowed
        self.counts = torch.nn.functional.pad(allowed.cumsum(0), (1, 0))

    @property
    def num_items(self) -> int:
        """The number of items allowed."""
        return int(self.counts[-1])

    def allows(self, nodes: Tensor, depth: int) -> Tensor:
        """Whether an allowed item lies below each of ``nodes`` (...) of ``depth``, none of them -1; (...) bool."""
        first, end = self.trie.item_range(nodes, depth)
        return self.counts[end] > self.counts[first]

    def __and__(self, other: TrieFilter) -> TrieFilter:
        return TrieFilter(self.trie, self.allowed & self._allowed_of(other))

    def __or__(self, other: TrieFilter) -> TrieFilter:
        return TrieFilter(self.trie, self.allowed | self._allowed_of(other))

    def __invert__(self) -> TrieFilter:
        return TrieFilter(self.trie, ~self.allowed)

    def _allowed_of(self, other: TrieFilter) -> Tensor:
        if not isinstance(other, TrieFilter):
            raise TypeError(f"a TrieFilter combines with a TrieFilter; got {type(other).__name__}")
        if other.trie is not self.trie:
            raise ValueError("the filters belong to different tries; make both with the same trie's filter()")
        return other.allowed

    def __repr__(self) -> str:
        return f"TrieFilter({self.num_items} of {self.trie.num_items} items)"


Filters = TrieFilter | Sequence[TrieFilter | None] | None


def check_filters(filters: Filters, trie: Trie, batch: int) -> TrieFilter | list[TrieFilter | None] | None:
    """Check the argument ``filters``: None, one filter of ``trie``, or one (or None) for each of ``batch`` requests."""
    if filters is None:
        return None
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
    return list(filters) if any(entry is not None for entry in filters) else None


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
    return torch.stack([torch.ones_like(request, dtype=torch.bool) if entry is None else entry.allows(request, depth)
                        for entry, request in zip(filters, nodes.unbind(0), strict=True)])


def allowed_items(filters: TrieFilter | list[TrieFilter | None] | None, positions: Tensor) -> Tensor:
    """Whether each item, given by its position (B, ...) in the leaf order, is allowed to its request; (B, ...) bool."""
    if filters is None:
        return torch.ones_like(positions, dtype=torch.bool)
    if isinstance(filters, TrieFilter):
        return filters.allowed[positions]
    return torch.stack([torch.ones_like(request, dtype=torch.bool) if entry is None else entry.allowed[request]
                        for entry, request in zip(filters, positions.unbind(0), strict=True)])


def distinct_filters(filters: TrieFilter | list[TrieFilter | None] | None,
                     batch: int) -> tuple[list[TrieFilter], list[int]]:
    """The filters without repetition, and for each of ``batch`` requests which of them it has, -1 for none."""
    if filters is None:
        return [], []
    if isinstance(filters, TrieFilter):
        return [filters], [0] * batch
    distinct = list({id(entry): entry for entry in filters if entry is not None}.values())
    number = {id(entry): i for i, entry in enumerate(distinct)}
    return distinct, [number.get(id(entry), -1) for entry in filters]
