"""The level-order arrays of one trie as it was built, and how they are read; nothing here knows of updates."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgi_kernels import backend as backends
from dgi_kernels.trie import native, reference
from dgi_kernels.trie.item_set import ItemSet
from dgi_kernels.trie.rows import packed_rows, plain_rows, rows_at
from dgi_kernels.trie.starts import MARKS, packed_starts, parent_set, plain_starts, starts_at

END = -1  # the token of a sequence that has ended; it sorts before every code
NARROW_CODEBOOK = 2**15  # tokens are int16 where no codebook is larger
NARROW_COUNT = 2**31  # offsets are int32 below


@dataclass(frozen=True, eq=False)
class TrieArrays:
    """The arrays of a trie of depth L over N items; n_t is the number of nodes at depth t, and n_0 = 1 (the root).

    Tokens are int16 where every codebook has at most 32768 codes, else int32. Offsets are int32 below 2^31, else int64.
    ``item_start`` and ``item_order`` may be packed: see ``starts.py`` and ``rows.py``. The last three are None where
    they would be 0, 1, 2, …

    Attributes:
        tokens: ``tokens[t]`` (n_{t+1},), the codes out of depth t, run by run; -1 where a sequence has ended.
        child_start: ``child_start[t]`` (n_t + 1,); the children of node i at depth t are the nodes
            ``child_start[t][i]`` to ``child_start[t][i + 1] - 1`` of depth t + 1, reached by ``tokens[t]`` there.
        item_start: (n_L + 1,); leaf i holds places ``item_start[i]`` to ``item_start[i + 1] - 1`` of the leaf order.
        item_order: (N,); the row, as given at build, of each item in leaf order.
        item_ids: (N,) int64; the id of each row.
        num_items: N.
        max_degree: ``max_degree[t]``, the largest number of children of a node at depth t.
        max_items: ``max_items[t]``, the largest number of items below a node at depth t.
        id_bounds: the least and the greatest id; 0 and -1 where there is no item.
    """

    tokens: tuple[Tensor, ...]
    child_start: tuple[Tensor, ...]
    item_start: Tensor | None
    item_order: Tensor | None
    item_ids: Tensor | None
    num_items: int
    max_degree: tuple[int, ...]
    max_items: tuple[int, ...]
    id_bounds: tuple[int, int]
    _marks: tuple[Tensor, ...] | None = field(default=None, init=False, repr=False)
    _masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def make(
        cls,
        tokens: tuple[Tensor, ...],
        child_start: tuple[Tensor, ...],
        item_start: Tensor | None,
        item_order: Tensor | None,
        item_ids: Tensor | None,
        num_items: int,
    ) -> TrieArrays:
        """The arrays with the numbers that follow from them; ``item_start`` and ``item_order`` are packed here."""
        runs = item_start  # of items, below each node
        max_items = [1 if num_items and runs is None else _longest_run(runs)]
        for starts in reversed(child_start):
            runs = starts if runs is None else runs[starts]
            max_items.append(_longest_run(runs))
        bounds = (0, num_items - 1)
        if item_ids is not None and num_items:
            low, high = item_ids.aminmax()
            bounds = (int(low), int(high))
        return cls(
            tokens,
            child_start,
            None if item_start is None else packed_starts(item_start, num_items),
            None if item_order is None else packed_rows(item_order),
            item_ids,
            num_items,
            tuple(map(_longest_run, child_start)),
            tuple(reversed(max_items)),
            bounds,
        )

    def __getstate__(self) -> dict[str, Any]:
        """What pickle stores: not what is made when first asked for, and no uint64, which torch cannot unpickle."""
        state = {name: value for name, value in vars(self).items() if name != "_row_lookup"}
        state |= {"_marks": None, "_masks": {}}
        if self.item_start is not None and self.item_start.dtype == MARKS:
            state["item_start"] = _StoredMarks(self.item_start.view(torch.int64))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        stored = state["item_start"]
        if isinstance(stored, _StoredMarks):
            state = state | {"item_start": stored.marks.view(MARKS)}
        vars(self).update(state)

    @property
    def depth(self) -> int:
        """L."""
        return len(self.tokens)

    @property
    def device(self) -> torch.device:
        """The device of all arrays."""
        return self.tokens[0].device

    def named(self) -> dict[str, Tensor]:
        """The arrays that are there, by the names that files use and in the order in which files hold them."""
        levels = {f"tokens.{t}": tokens for t, tokens in enumerate(self.tokens)}
        levels |= {f"child_start.{t}": starts for t, starts in enumerate(self.child_start)}
        items = {"item_start": self.item_start, "item_order": self.item_order, "item_ids": self.item_ids}
        return levels | {name: array for name, array in items.items() if array is not None}

    def to(self, device: torch.device) -> TrieArrays:
        """The arrays on ``device``."""
        moved = {name: array.to(device) for name, array in self.named().items()}
        return TrieArrays(
            tuple(moved[f"tokens.{t}"] for t in range(self.depth)),
            tuple(moved[f"child_start.{t}"] for t in range(self.depth)),
            moved.get("item_start"),
            moved.get("item_order"),
            moved.get("item_ids"),
            self.num_items,
            self.max_degree,
            self.max_items,
            self.id_bounds,
        )

    def num_nodes_at(self, depth: int) -> int:
        """n_t: 1 at depth 0, the root."""
        return 1 if depth == 0 else len(self.tokens[depth - 1])

    def items_below(self, depth: int) -> list[Tensor]:
        """The arrays that lead from the nodes of ``depth`` down to places of the leaf order."""
        return [*self.child_start[depth:], *([] if self.item_start is None else [self.item_start])]

    def nodes_above(self, places: ItemSet) -> tuple[ItemSet, ...]:
        """The sets of the nodes of depth 1, 2, … L that lead to a place of a set."""
        sets = [places]  # which are leaves, if each has one item
        levels = [*self._marks_of_children(), *([] if self.item_start is None else [self.item_start])]
        for depth, starts in reversed(list(enumerate(levels, 1))):
            sets.append(parent_set(sets[-1], starts, self.num_nodes_at(depth)))
        return tuple(reversed(sets[-self.depth :]))

    def child_masks(self, depth: int, codes: int) -> Tensor | None:
        """Which of ``codes`` codes the children of each node of ``depth`` have, a bit for each code, for compiled steps
        on the CPU; see :func:`native.child_masks`. None where the tokens take less memory.

        Made when first asked for, and kept.
        """
        key = depth, codes
        if key not in self._masks:
            tokens, starts = self.tokens[depth], self.child_start[depth]
            larger = 4 * (-(-codes // 32)) * (len(starts) - 1) > tokens.nbytes
            self._masks[key] = None if larger else native.child_masks(tokens, starts, codes)
        return self._masks[key]

    def _marks_of_children(self) -> tuple[Tensor, ...]:
        """``child_start[1:]``, as marks where compiled code reads them, which makes sets of nodes faster.

        Made when first asked for, and kept: a bit for each node.
        """
        plain = self.child_start[1:]
        if backends.tracing() or backends.choose("trie_filter", "auto", self.device) != "native":
            return plain
        if self._marks is None:
            object.__setattr__(self, "_marks", tuple(map(native.run_marks, plain)))
        return self._marks or ()

    def item_range(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """The items below nodes of ``depth``, none of them -1, as int64 ranges [first, end) of the leaf order."""
        first, end = nodes, nodes + 1
        for starts in self.child_start[depth:]:
            first, end = starts[first].long(), starts[end].long()
        return self.item_starts_at(first), self.item_starts_at(end)

    def item_starts_at(self, leaves: Tensor) -> Tensor:
        """The first place of each of ``leaves`` (…) int64, the end for the number of leaves; (…) int64."""
        return leaves if self.item_start is None else starts_at(self.item_start, self.num_items, leaves)

    def ids_at(self, places: Tensor) -> Tensor:
        """The ids of items, given by their places in the leaf order."""
        rows = places if self.item_order is None else rows_at(self.item_order, places)
        return rows if self.item_ids is None else self.item_ids[rows]

    def ids(self) -> Tensor:
        """The ids (N,) int64 of all rows."""
        return torch.arange(self.num_items, device=self.device) if self.item_ids is None else self.item_ids

    def rows_of(self, ids: Tensor) -> Tensor:
        """The rows of item ids (n,) int64; -1 where the trie has no such item."""
        if self.item_ids is None:
            low, high = ids.aminmax() if ids.numel() else (0, -1)
            all_known = low >= 0 and high < self.num_items
            return ids if all_known else torch.where((ids >= 0) & (ids < self.num_items), ids, -1)
        return self._row_lookup.rows_of(ids)

    @functools.cached_property
    def _row_lookup(self) -> RowLookup:
        return RowLookup(self.ids())

    def search(self, nodes: Tensor, codes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Look for the child of each node by its code; see :func:`reference.find_children`."""
        native_or_not = backends.choose("trie_find", "auto", nodes.device) == "native"
        find = native.find_children if native_or_not else reference.find_children
        return find(self.tokens[depth], self.child_start[depth], nodes, codes)

    def child(self, nodes: Tensor, codes: Tensor, depth: int) -> Tensor:
        """The child of each node (-1: none) by its code; -1 where there is none."""
        place, found = self.search(nodes, codes, depth)
        return torch.where(found, place, -1)

    def codes(self, dtype: torch.dtype = torch.int64) -> Tensor:
        """The codes (N, L) of all rows, -1 where a sequence has ended."""
        by_place = torch.empty(self.num_items, self.depth, dtype=dtype, device=self.device)
        runs = None  # of items, below each node of the next depth
        if self.item_start is not None:
            runs = plain_starts(self.item_start, self.num_items, count_dtype(self.num_items))
        for t in reversed(range(self.depth)):
            tokens = self.tokens[t]
            by_place[:, t] = tokens if runs is None else tokens[run_of_each(runs, self.num_items)]
            runs = self.child_start[t] if runs is None else runs[self.child_start[t]]
        if self.item_order is None:
            return by_place
        codes = torch.empty_like(by_place)
        codes[plain_rows(self.item_order)] = by_place
        return codes


class _StoredMarks(NamedTuple):
    """Marks as they are pickled, which tells them from starts of int64."""

    marks: Tensor


class RowLookup:
    """Finds the rows of item ids: by a table where the ids lie close together, else by binary search."""

    def __init__(self, item_ids: Tensor) -> None:
        self.low, high = map(int, item_ids.aminmax()) if len(item_ids) else (0, -1)
        self.table: Tensor | None = None
        if high - self.low < 4 * len(item_ids) + 1024:
            rows = torch.arange(len(item_ids), dtype=count_dtype(len(item_ids)), device=item_ids.device)
            self.table = torch.full((high - self.low + 1,), -1, dtype=rows.dtype, device=item_ids.device)
            self.table[item_ids - self.low] = rows
        else:
            self.values, self.rows = item_ids.sort()

    def rows_of(self, ids: Tensor) -> Tensor:
        """The rows of ``ids`` (n,) int64; -1 where there is none."""
        if self.table is not None:
            inside = (ids >= self.low) & (ids < self.low + len(self.table))
            if len(self.table) == 0:
                return torch.full_like(ids, -1)
            return torch.where(inside, self.table[torch.where(inside, ids - self.low, 0)].long(), -1)
        place = torch.searchsorted(self.values, ids).clamp(max=len(self.values) - 1)
        return torch.where(self.values[place] == ids, self.rows[place], -1)


def _longest_run(starts: Tensor | None) -> int:
    """The largest difference of neighbours, a block at a time: differences of all would be as large as the array."""
    if starts is None or len(starts) < 2:
        return 0
    block = 2**22
    return max(int(starts[first : first + block + 1].diff().max()) for first in range(0, len(starts) - 1, block))


def run_of_each(starts: Tensor, total: int) -> Tensor:
    """Which run each of 0 … total - 1 belongs to, ``starts`` (runs + 1,) cutting them into runs; (total,) int64."""
    if total < 2**16:  # the other way wakes up all threads, 0.1 ms and often more, however few there are
        return torch.searchsorted(starts, torch.arange(total, dtype=starts.dtype, device=starts.device), right=True) - 1
    runs = torch.arange(len(starts) - 1, device=starts.device)
    return runs.repeat_interleave(starts.diff(), output_size=total)


def token_dtype(codebook_sizes: tuple[int, ...]) -> torch.dtype:
    """The dtype of tokens below codebooks of these sizes."""
    return torch.int16 if max(codebook_sizes, default=0) <= NARROW_CODEBOOK else torch.int32


def count_dtype(num_items: int) -> torch.dtype:
    """The dtype of offsets and rows of a trie of so many items."""
    return torch.int32 if num_items < NARROW_COUNT else torch.int64
