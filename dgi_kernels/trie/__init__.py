"""The trie of all semantic IDs in a catalog: which codes may follow which, and which items lie below a prefix.

It is stored as level-order arrays (see ``README.md`` in this folder).  The nodes of one depth are numbered in
lexicographic order of their prefixes, so the children of a node are a contiguous run of the next depth, sorted by
token: a node *is* its index in its depth, and no next-state table is stored.  Depth 0 holds the root alone, node 0.
The items of equal codes share a leaf.  A sequence that ends early continues with token -1 down to the last depth.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.trie import build, format
from dgi_kernels.trie.filters import TrieFilter
from dgi_kernels.trie.format import TrieFormatError

__all__ = ["Beams", "ItemRanges", "Trie", "TrieFilter", "TrieFormatError"]


MAX_COUNT = 2**31 - 1  # of requests, beams and results


class Beams(NamedTuple):
    """B requests with M beams each, all of one depth; a dead beam has node, token and parent -1 and score -inf.

    Attributes:
        nodes: (B, M) int64 nodes of the trie at ``depth``.
        tokens: (B, M) int64, the last code of each beam; -1 also in a live beam whose sequence has ended.
        parents: (B, M) int64, which beam of the step before each one continues (to reorder a key-value cache).
        scores: (B, M) float32 log-probabilities, descending.
        depth: the number of codes chosen so far.
    """

    nodes: Tensor
    tokens: Tensor
    parents: Tensor
    scores: Tensor
    depth: int


class ItemRanges(NamedTuple):
    """The items below n nodes: those of node i are ``item_ids[offsets[i]:offsets[i + 1]]``.

    Attributes:
        offsets: (n + 1,) int64.
        item_ids: (total,) int64, per node in the order of their codes, equal codes in the order given at build.
    """

    offsets: Tensor
    item_ids: Tensor


class Trie:
    """A prefix tree of semantic IDs; immutable. Make one with :meth:`from_codes` or :meth:`load`.

    Attributes:
        tokens: ``tokens[t]`` (n_{t+1},) int32, the codes out of depth t, run by run; -1 where a sequence has ended.
        child_start: ``child_start[t]`` (n_t + 1,) int64; the children of node i at depth t are the nodes
            ``child_start[t][i]`` to ``child_start[t][i + 1] - 1`` of depth t + 1, reached by ``tokens[t]`` there.
        item_start: (n_L + 1,) int64; leaf i holds the items ``item_start[i]`` to ``item_start[i + 1] - 1`` of the
            leaf order.
        item_order: (num_items,) int64; the row, as given at build, of each item in leaf order.
        item_ids: (num_items,) int64; the id of each row, as given at build.
        codebook_sizes: per level, the number of codes K.
        sizes_inferred: True where the sizes were not given but are the largest code + 1, and so lower bounds.
        max_degree: ``max_degree[t]``, the largest number of children of a node at depth t.
        max_items: ``max_items[t]``, the largest number of items below a node at depth t.
    """

    def __init__(self, arrays: build.TrieArrays, codebook_sizes: tuple[int, ...], sizes_inferred: bool) -> None:
        self.tokens, self.child_start, self.item_start, self.item_order, self.item_ids = arrays
        self.codebook_sizes = codebook_sizes
        self.sizes_inferred = sizes_inferred
        self.max_degree = tuple(_longest_run(starts) for starts in self.child_start)
        self.max_items = self._most_items()
        self.id_bounds = (int(self.item_ids.min()), int(self.item_ids.max())) if len(self.item_ids) else (0, 0)

    def _most_items(self) -> tuple[int, ...]:
        starts = self.item_start
        most = [_longest_run(starts)]
        for child_start in reversed(self.child_start):
            starts = starts[child_start]
            most.append(_longest_run(starts))
        return tuple(reversed(most))

    @classmethod
    def from_codes(cls, codes: object, item_ids: object = None, *, codebook_sizes: object = None,
                   backend: str = "auto") -> Trie:
        """Build a trie from the semantic IDs of N items, in any order, with repetitions.

        Args:
            codes: an (N, L) integer tensor or array, or a list of N sequences of integers, which may differ in length
                (then L is the largest). An empty tensor of shape (0, L) gives an empty trie.
            item_ids: (N,) distinct integers, any int64; default 0, 1, …, N - 1.
            codebook_sizes: (L,) integers, the number of codes of each level. Default: the largest code + 1, taken as a
                lower bound: a search then accepts logits over more codes than that.
            backend: ``"auto"``, ``"reference"`` or ``"native"``; all give the same arrays.

        Returns:
            The trie, on the device of ``codes``.

        Raises:
            ValueError: a code is negative or not below its codebook's size, a sequence is empty, ids are repeated, or
                a shape does not fit.
            TypeError: codes, ids or sizes that are no integers.
            BackendUnavailable: ``backend``, asked for by name, cannot run here.
        """
        table = build.padded_codes("codes", codes)
        sizes = build.checked_sizes("codes", table, codebook_sizes)
        ids = build.checked_ids("item_ids", item_ids, len(table), table.device)
        return cls(build.build_arrays(table, ids, backend), sizes, codebook_sizes is None)

    @property
    def depth(self) -> int:
        """The number of levels L: the length of the longest sequence."""
        return len(self.tokens)

    @property
    def num_items(self) -> int:
        """The number of items N."""
        return len(self.item_ids)

    @property
    def num_nodes(self) -> int:
        """The number of nodes below the root, over all depths: distinct prefixes, ended sequences padded with -1."""
        return sum(map(len, self.tokens))

    @property
    def nbytes(self) -> int:
        """The size of all arrays in bytes."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def device(self) -> torch.device:
        """The device that holds the arrays."""
        return self.item_ids.device

    @property
    def arrays(self) -> dict[str, Tensor]:
        """All arrays by name, as they are stored in a file."""
        return format.named_arrays(
            build.TrieArrays(self.tokens, self.child_start, self.item_start, self.item_order, self.item_ids))

    def num_nodes_at(self, depth: int) -> int:
        """The number of nodes at ``depth``, 0 to L; 1 at depth 0, the root."""
        checks.integer("depth", depth, low=0, high=self.depth)
        return 1 if depth == 0 else len(self.tokens[depth - 1])

    def root(self, batch_size: int) -> Beams:
        """The start of a search: one live beam at the root, with score 0, for each of ``batch_size`` requests."""
        checks.integer("batch_size", batch_size, low=0, high=MAX_COUNT)
        nodes = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.device)
        none = torch.full_like(nodes, -1)
        return Beams(nodes, none, none, torch.zeros_like(nodes, dtype=torch.float32), 0)

    def find(self, prefixes: object) -> Tensor:
        """Find the nodes of prefixes.

        Args:
            prefixes: (..., t) integers, t from 0 to L; -1 continues a sequence that has ended.

        Returns:
            (...) int64 nodes at depth t, -1 where no item has that prefix.
        """
        prefixes = build.integer_tensor("prefixes", prefixes, self.device)
        if prefixes.ndim == 0 or prefixes.shape[-1] > self.depth:
            raise ValueError(f"prefixes must have shape (..., t), t at most {self.depth}; got {tuple(prefixes.shape)}")
        nodes = torch.zeros(prefixes.shape[:-1], dtype=torch.int64, device=self.device)
        for depth, codes in enumerate(prefixes.unbind(-1)):
            nodes = self._child(nodes, codes, depth)
        return nodes

    def _child(self, nodes: Tensor, codes: Tensor, depth: int) -> Tensor:
        """The child of each node by its code, by binary search in its run of tokens; -1 where there is none."""
        tokens = self.tokens[depth]
        if len(tokens) == 0:
            return torch.full_like(nodes, -1)
        low = self.child_start[depth][nodes.clamp(min=0)]
        end = self.child_start[depth][nodes.clamp(min=0) + 1]
        high = end
        for _ in range(self.max_degree[depth].bit_length()):
            middle = (low + high) // 2
            right = (low < high) & (tokens[middle.clamp(max=len(tokens) - 1)] < codes)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
        found = (nodes >= 0) & (low < end) & (tokens[low.clamp(max=len(tokens) - 1)] == codes)
        return torch.where(found, low, -1)

    def is_valid(self, prefixes: object) -> Tensor:
        """Whether each prefix (..., t) begins the codes of some item; (...) bool. See :meth:`find`."""
        return self.find(prefixes) >= 0

    def children(self, node: int | Tensor, depth: int) -> Tensor:
        """The codes that may follow ``node`` of ``depth`` (0 to L - 1): (degree,) int64, ascending, -1 for the end."""
        checks.integer("depth", depth, low=0, high=self.depth - 1)
        value = node.item() if isinstance(node, Tensor) and node.numel() == 1 else node
        i = checks.integer("node", value, low=0, high=self.num_nodes_at(depth) - 1)
        first, end = self.child_start[depth][i:i + 2].tolist()
        return self.tokens[depth][first:end].long()

    def item_range(self, nodes: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """The items below nodes of ``depth``, none of them -1, as ranges [first, end) of the leaf order."""
        first, end = nodes, nodes + 1
        for starts in (*self.child_start[depth:], self.item_start):
            first, end = starts[first], starts[end]
        return first, end

    def items(self, nodes: object, depth: int) -> ItemRanges:
        """List the items below nodes: the inverted index from prefixes to items.

        Args:
            nodes: integers of any shape (flattened), nodes of ``depth``; -1, a dead beam, has no items.
            depth: 0 (the root, node 0) to L (the leaves).

        Returns:
            ItemRanges with offsets (n + 1,) and item_ids (total,), int64.
        """
        checks.integer("depth", depth, low=0, high=self.depth)
        nodes = build.integer_tensor("nodes", nodes, self.device).flatten()
        nodes = checks.index("nodes", nodes, 0, self.num_nodes_at(depth), also=-1)
        lengths, first = torch.zeros_like(nodes), torch.zeros_like(nodes)
        alive = nodes >= 0
        first[alive], end = self.item_range(nodes[alive], depth)
        lengths[alive] = end - first[alive]
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        within = torch.arange(int(offsets[-1]), device=self.device) - offsets[:-1].repeat_interleave(lengths)
        return ItemRanges(offsets, self.item_ids[self.item_order[first.repeat_interleave(lengths) + within]])

    def filter(self, *, items: object = None, mask: object = None) -> TrieFilter:
        """Make a filter that allows a subset of the items, for ``filters=`` of the searches.

        Args:
            items: the ids allowed, integers; repetitions do no harm.
            mask: (num_items,) bool, True where allowed, in the order given at build (that of ``item_ids``).

        Raises:
            ValueError: an id that the trie does not hold, a mask of another shape, or not exactly one of the two given.
        """
        if (items is None) == (mask is None):
            raise ValueError("filter needs exactly one of items and mask")
        if mask is None:
            rows = torch.zeros(self.num_items, dtype=torch.bool, device=self.device)
            rows[self._rows("items", items)] = True
        else:
            try:
                rows = torch.as_tensor(mask, device=self.device)
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(f"mask must be a tensor, array or list of bool; got {type(mask).__name__} "
                                f"({error})") from None
            checks.tensor("mask", rows, dtypes=(torch.bool,))
            checks.shape("mask", rows, (self.num_items,), "(num_items,)")
        return TrieFilter(self, rows[self.item_order])

    @functools.cached_property
    def _sorted_ids(self) -> tuple[Tensor, Tensor]:
        ids = self.item_ids.sort()
        return ids.values, ids.indices

    def _rows(self, name: str, ids: object) -> Tensor:
        """The rows of item ids, which must all be there."""
        wanted = build.integer_tensor(name, ids, self.device).flatten()
        values, rows = self._sorted_ids
        place = torch.searchsorted(values, wanted)
        inside = place < len(values)
        missing = ~inside
        missing[inside] = values[place[inside]] != wanted[inside]
        if missing.any():
            raise ValueError(f"{name} must be ids of items in the trie; it has no item {wanted[missing][0].item()}")
        return rows[place]

    def codes(self) -> tuple[Tensor, Tensor]:
        """Give back codes (N, L), -1 where a sequence has ended, and item ids (N,), in the order given at build."""
        by_leaf = torch.empty(self.num_items, self.depth, dtype=torch.int64, device=self.device)
        starts = self.item_start
        for t in reversed(range(self.depth)):
            by_leaf[:, t] = self.tokens[t].long().repeat_interleave(starts.diff())
            starts = starts[self.child_start[t]]
        codes = torch.empty_like(by_leaf)
        codes[self.item_order] = by_leaf
        return codes, self.item_ids

    def update(self, add: tuple[object, object] | None = None, remove: object = None, *, backend: str = "auto") -> Trie:
        """Return a trie with items added and removed; this one stays as it is.

        In this version the new trie is rebuilt from the merged codes: items keep their order, added ones come last.

        Args:
            add: ``(codes, ids)`` as for :meth:`from_codes`; sequences no longer than L. Given sizes still bind them.
            remove: ids of items to take away, before the others are added: an id in both is replaced.
            backend: as in :meth:`from_codes`.

        Raises:
            ValueError: an unknown id is removed, an existing one added, a code or shape does not fit.
        """
        codes, ids = self.codes()
        sizes = self.codebook_sizes
        if remove is not None:
            keep = torch.ones(self.num_items, dtype=torch.bool, device=self.device)
            keep[self._rows("remove", remove)] = False
            codes, ids = codes[keep], ids[keep]
        if add is not None:
            new_codes, new_sizes = self._added_codes(add)
            new_ids = build.checked_ids("add[1], the ids,", add[1], len(new_codes), self.device)
            known = torch.isin(new_ids, ids)
            if known.any():
                raise ValueError(f"add[1], the ids, must be new; {new_ids[known][0].item()} is already in the trie")
            codes, ids, sizes = torch.cat([codes, new_codes]), torch.cat([ids, new_ids]), new_sizes
        return Trie(build.build_arrays(codes, ids, backend), sizes, self.sizes_inferred)

    def _added_codes(self, add: tuple[object, object]) -> tuple[Tensor, tuple[int, ...]]:
        name = "add[0], the codes,"
        if not isinstance(add, Sequence) or len(add) != 2 or add[1] is None:
            raise TypeError("add must be a pair (codes, ids)")
        nothing = isinstance(add[0], Sequence) and len(add[0]) == 0
        codes = self.item_ids.new_empty(0, self.depth) if nothing else build.padded_codes(name, add[0], self.device)
        ragged = not hasattr(add[0], "shape")
        if codes.shape[1] > self.depth or (codes.shape[1] < self.depth and not ragged):
            raise ValueError(f"{name} must have {self.depth} levels, as the trie; got {codes.shape[1]}")
        codes = torch.nn.functional.pad(codes, (0, self.depth - codes.shape[1]), value=build.END)
        if not self.sizes_inferred:
            return codes, build.checked_sizes(name, codes, self.codebook_sizes)
        return codes, tuple(map(max, self.codebook_sizes, build.checked_sizes(name, codes, None)))

    def to(self, device: torch.device | str) -> Trie:
        """Return this trie on ``device``: itself if it is there already."""
        here = torch.empty(0, device=device).device
        if here == self.device:
            return self
        moved = {name: array.to(here) for name, array in self.arrays.items()}
        return Trie(format.arrays_by_name(moved, self.depth), self.codebook_sizes, self.sizes_inferred)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The trie as named arrays and JSON data, to embed it in another file; :meth:`from_state` reads them."""
        return self.arrays, {"codebook_sizes": list(self.codebook_sizes), "sizes_inferred": self.sizes_inferred}

    @classmethod
    def from_state(cls, arrays: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Trie:
        """Make a trie from what :meth:`state` gave.

        Raises:
            TrieFormatError: the arrays do not form a trie; the message says why.
        """
        return cls(*format.checked_state(arrays, meta))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trie to one file: whole or not at all, versioned, with a checksum."""
        format.write(path, *self.state())

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = False) -> Trie:
        """Read a file written by :meth:`save`, after checking its checksum and its structure.

        Args:
            path: the file.
            mmap: map the arrays instead of copying them: processes that load one file then share its memory. The
                checks read the file once either way.

        Raises:
            TrieFormatError: the file is truncated, altered, of another version, or no trie; the message says which.
            OSError: the file cannot be read.
        """
        return cls(*format.read(path, mmap))

    def __repr__(self) -> str:
        return (f"Trie(num_items={self.num_items}, depth={self.depth}, num_nodes={self.num_nodes}, "
                f"codebook_sizes={self.codebook_sizes}, nbytes={self.nbytes}, device={str(self.device)!r})")


def _longest_run(starts: Tensor) -> int:
    return int(starts.diff().max()) if len(starts) > 1 else 0
