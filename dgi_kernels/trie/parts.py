"""A trie's base and delta read as one, in plain PyTorch: what lookups and the references of searches need."""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels.backend import tracing
from dgi_kernels.trie.arrays import TrieArrays
from dgi_kernels.trie.delta import Delta
from dgi_kernels.trie.item_set import ItemSet


class TrieParts:
    """The base, and what changed since; see :mod:`dgi_kernels.trie.delta` for how nodes are numbered.

    The places of the whole are those of the base, 0 to n - 1, and then those of the delta, from n on.

    Attributes:
        base: the arrays of one build.
        delta: the changes since; None where there are none.
        added: the arrays of the delta; None where there is none, or nothing in it.
        live: the places of the base that are left; None where all are.
        max_degree: at least as many as any node of each depth has children.
        max_items: at least as many as there are items below any node of each depth.
        id_bounds: the least and the greatest id of items that are there; 0 and -1 where there is none.
    """

    def __init__(self, base: TrieArrays, delta: Delta | None = None) -> None:
        self.base = base
        self.delta = delta
        self.live = None if delta is None else delta.live
        self.added = None if delta is None or delta.arrays.num_items == 0 else delta.arrays
        self.max_degree, self.max_items = base.max_degree, base.max_items
        if self.added is not None:
            self.max_degree = _sums(base.max_degree, self.added.max_degree)
            self.max_items = _sums(base.max_items, self.added.max_items)
        self.id_bounds = base.id_bounds if delta is None else self._id_bounds(delta)
        self._live_nodes: tuple[ItemSet, ...] | None = None

    @property
    def live_nodes(self) -> tuple[ItemSet, ...] | None:
        """The nodes of the base, by depth from 1, that lead to a place that is left; None where all are left.

        Made when first asked for.
        """
        if self.live is None or self._live_nodes is not None:
            return self._live_nodes
        nodes = self.base.nodes_above(self.live)
        if not tracing():
            self._live_nodes = nodes
        return nodes

    def _id_bounds(self, delta: Delta) -> tuple[int, int]:
        base = self.base
        bounds = [] if self.added is None else [self.added.id_bounds]
        if len(delta.removed) < base.num_items:
            gone = delta.removed if base.item_ids is None else base.item_ids[delta.removed]
            if any(bool((gone == bound).any()) for bound in base.id_bounds):
                low, high = base.ids()[self.kept_rows()].aminmax()
                bounds.append((int(low), int(high)))
            else:
                bounds.append(base.id_bounds)
        lows, highs = zip(*bounds, strict=True) if bounds else ((0,), (-1,))
        return min(lows), max(highs)

    @property
    def num_items(self) -> int:
        """The number of items that are there."""
        return self.base.num_items + (
            0 if self.delta is None else self.delta.arrays.num_items - len(self.delta.removed)
        )

    @property
    def num_places(self) -> int:
        """The number of places, those of items that are gone included."""
        return self.base.num_items + (0 if self.added is None else self.added.num_items)

    def num_nodes_at(self, depth: int) -> int:
        """Nodes of ``depth`` have numbers less than this."""
        return self.base.num_nodes_at(depth) + (
            0 if depth == 0 or self.added is None else self.added.num_nodes_at(depth)
        )

    def num_nodes(self) -> int:
        """How many prefixes of items there are, the root not counted."""
        if self.delta is None:
            return sum(map(len, self.base.tokens))
        count = 0
        for depth in range(1, self.base.depth + 1):
            nodes = torch.arange(self.base.num_nodes_at(depth), device=self.base.device)
            count += int(self.holds(nodes, depth, self.live, None).sum())
            if self.added is not None:
                count += int((self.delta.anchors[depth] & 1 == 0).sum())
        return count

    def split(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor | None]:
        """The nodes of base and delta that each of ``nodes`` (…) stands for, -1: none; None where there is no delta."""
        if self.added is None or self.delta is None:
            return nodes, None
        count = self.base.num_nodes_at(depth)
        in_base = torch.where(nodes < count, nodes, -1)
        return in_base, torch.where(nodes < count, self.delta.twin_of(in_base, depth), nodes - count)

    def find(self, prefixes: Tensor) -> Tensor:
        """The nodes (…) of prefixes (…, t) int64; -1 where no item has that prefix."""
        in_base = torch.zeros(prefixes.shape[:-1], dtype=torch.int64, device=prefixes.device)
        in_added = in_base
        for depth, codes in enumerate(prefixes.unbind(-1)):
            in_base = self.base.child(in_base, codes, depth)
            if self.added is not None:
                in_added = self.added.child(in_added, codes, depth)
        depth = prefixes.shape[-1]
        nodes = in_base
        if self.added is not None:
            nodes = torch.where((in_base < 0) & (in_added >= 0), self.base.num_nodes_at(depth) + in_added, in_base)
        if self.live is None or depth == 0:
            return nodes
        return torch.where(self.holds(nodes, depth, self.live, None), nodes, -1)

    def holds(self, nodes: Tensor, depth: int, of_base: ItemSet | None, of_delta: ItemSet | None) -> Tensor:
        """Whether an item of two sets (None: all) lies below each of ``nodes`` (…); none below -1."""
        in_base, in_delta = self.split(nodes, depth)
        found = _holds(self.base, in_base, depth, of_base)
        if in_delta is None or self.added is None:
            return found
        return found | _holds(self.added, in_delta, depth, of_delta)

    def children(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
        """The children of ``nodes`` (…), none of them -1, in as many slots as any node of the depth needs, by token.

        Returns:
            The numbers (…, slots) of the children, their tokens (…, slots), and which of the slots hold a child. A
            child is listed whether or not items are left below it.
        """
        in_base, in_delta = self.split(nodes, depth)
        children, tokens, exists = _children(self.base, in_base, depth)
        if in_delta is None or self.added is None or self.delta is None:
            return children, tokens, exists
        others, other_tokens, other_exists = _children(self.added, in_delta, depth)
        if others.shape[-1]:
            other_exists = other_exists & ~self.delta.has_twin(others, depth + 1)
        children = torch.cat([children, others + self.base.num_nodes_at(depth + 1)], -1)
        tokens, exists = torch.cat([tokens, other_tokens], -1), torch.cat([exists, other_exists], -1)
        order = tokens.masked_fill(~exists, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True)
        return children.gather(-1, order), tokens.gather(-1, order), exists.gather(-1, order)

    def place_ranges(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """The places below ``nodes`` (…), in the base and, if any, the delta: ranges (…, parts), empty below -1."""
        in_base, in_delta = self.split(nodes, depth)
        first, end = _range(self.base, in_base, depth)
        if in_delta is None or self.added is None:
            return first.unsqueeze(-1), end.unsqueeze(-1)
        other_first, other_end = _range(self.added, in_delta, depth)
        offset = self.base.num_items
        return torch.stack([first, other_first + offset], -1), torch.stack([end, other_end + offset], -1)

    def items(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """The items below ``nodes`` (n,), none below -1: offsets (n + 1,), and ids in the order of their codes."""
        first, end = self.place_ranges(nodes, depth)
        lengths = (end - first).flatten()
        owner = torch.arange(len(nodes), device=nodes.device).repeat_interleave(first.shape[1])
        owner = owner.repeat_interleave(lengths)
        begins = (first.flatten() - (lengths.cumsum(0) - lengths)).repeat_interleave(lengths)
        places = begins + torch.arange(len(owner), device=nodes.device)
        if self.live is not None:
            left = self.contains(places, self.live, None)
            places, owner = places[left], owner[left]
        if self.added is not None and self.delta is not None:
            order = self._by_code(places, self.delta.places_before(self.base)).argsort(stable=True)
            order = order[owner[order].argsort(stable=True)]
            places, owner = places[order], owner[order]
        offsets = torch.searchsorted(owner, torch.arange(len(nodes) + 1, device=nodes.device))
        return offsets, self.ids_at(places)

    def _by_code(self, places: Tensor, before: Tensor) -> Tensor:
        """Numbers that stand to each other as the codes of the items at ``places`` do, a delta's behind equal ones."""
        count = self.base.num_items
        return torch.where(places < count, 2 * places + 1, 2 * before[(places - count).clamp(min=0)])

    def contains(self, places: Tensor, of_base: ItemSet | None, of_delta: ItemSet | None) -> Tensor:
        """Whether each of ``places`` (…) of the whole belongs to two sets (None: all)."""
        in_base = places < self.base.num_items
        found = torch.ones_like(in_base)
        if of_base is not None:
            found = ~in_base | of_base.contains(torch.where(in_base, places, 0))
        if of_delta is not None:
            found = found & (in_base | of_delta.contains(torch.where(in_base, 0, places - self.base.num_items)))
        return found

    def ids_at(self, places: Tensor) -> Tensor:
        """The ids of the items at ``places`` (…) of the whole."""
        if self.added is None:
            return self.base.ids_at(places)
        count = self.base.num_items
        of_added = self.added.ids_at((places - count).clamp(min=0))
        if count == 0:
            return of_added
        return torch.where(places < count, self.base.ids_at(places.clamp(max=count - 1)), of_added)

    def ids(self) -> Tensor:
        """The ids (num_items,) of the items that are there: those left of the base, then those of the delta."""
        return (
            self.base.ids()
            if self.delta is None
            else torch.cat([self.base.ids()[self.kept_rows()], self.delta.arrays.ids()])
        )

    def codes(self, dtype: torch.dtype = torch.int64) -> Tensor:
        """The codes (num_items, L) in the order of :meth:`ids`."""
        of_base = self.base.codes(dtype)
        return of_base if self.delta is None else torch.cat([of_base[self.kept_rows()], self.delta.arrays.codes(dtype)])

    def kept_rows(self) -> Tensor:
        """Which rows of the base are left, (n,) bool."""
        kept = torch.ones(self.base.num_items, dtype=torch.bool, device=self.base.device)
        if self.delta is not None:
            kept[self.delta.removed] = False
        return kept

    def rows_of(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of item ids (n,) in base and delta; -1 where a part has no such item, or no more."""
        of_base = self.base.rows_of(ids)
        if self.delta is None:
            return of_base, torch.full_like(of_base, -1)
        return (torch.where(torch.isin(of_base, self.delta.removed), -1, of_base), self.delta.arrays.rows_of(ids))


def _sums(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _holds(arrays: TrieArrays, nodes: Tensor, depth: int, members: ItemSet | None) -> Tensor:
    exists = nodes >= 0
    if members is None or arrays.num_items == 0:
        return exists if arrays.num_items else torch.zeros_like(exists)
    first, end = arrays.item_range(nodes.clamp(min=0), depth)
    return exists & members.any(first, end)


def _children(arrays: TrieArrays, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    slots = arrays.max_degree[depth]
    if slots == 0:
        none = nodes.new_empty((*nodes.shape, 0))
        return none, none, none.bool()
    inside = nodes.clamp(min=0)
    first, end = arrays.child_start[depth][inside].long(), arrays.child_start[depth][inside + 1].long()
    children = first.unsqueeze(-1) + torch.arange(slots, device=nodes.device)
    exists = (nodes >= 0).unsqueeze(-1) & (children < end.unsqueeze(-1))
    children = torch.where(exists, children, 0)
    return children, arrays.tokens[depth][children].long(), exists


def _range(arrays: TrieArrays, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    if arrays.num_items == 0:
        return torch.zeros_like(nodes), torch.zeros_like(nodes)
    first, end = arrays.item_range(nodes.clamp(min=0), depth)
    return first, torch.where(nodes >= 0, end, first)
