"""The trie of all semantic IDs in a catalog: which codes may follow which, and which items lie below a prefix.

It is stored as level-order arrays (see ``README.md`` in this folder).  The nodes of one depth are numbered in
lexicographic order of their prefixes, so the children of a node are a contiguous run of the next depth, sorted by
token: a node *is* its index in its depth, and no next-state table is stored.  Depth 0 holds the root alone, node 0.
The items of equal codes share a leaf.  A sequence that ends early continues with token -1 down to the last depth.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.trie import build, format, merge, node_scores
from dgi_kernels.trie.arrays import token_dtype
from dgi_kernels.trie.delta import Delta
from dgi_kernels.trie.filters import TrieFilter
from dgi_kernels.trie.format import TrieFormatError
from dgi_kernels.trie.item_set import ItemSet
from dgi_kernels.trie.node_scores import NodeScores
from dgi_kernels.trie.parts import TrieParts
from dgi_kernels.types import Backend, IntegersLike

__all__ = ["Beams", "ItemRanges", "NodeScores", "Trie", "TrieFilter", "TrieFormatError"]


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
    """A prefix tree of semantic IDs; immutable. Make one with :meth:`from_codes`, :meth:`load` or :meth:`update`.

    Attributes:
        parts: the arrays of one build, and for an updated trie the changes since.
        codebook_sizes: per level, the number of codes K.
        sizes_inferred: True if the sizes were not given: they are the largest code + 1, a lower bound.

    Examples:
        >>> trie = dgi_kernels.Trie.from_codes([[3, 1], [0, 4], [3, 1], [2, 2]])
        >>> trie.children(0, 0)  # the first codes that occur
        tensor([0, 2, 3])
        >>> trie.items(trie.find([[3, 1]]), depth=2).item_ids
        tensor([0, 2])
        >>> allowed = trie.filter(items=[1, 2])
    """

    def __init__(self, parts: TrieParts, codebook_sizes: tuple[int, ...], sizes_inferred: bool) -> None:
        self.parts = parts
        self.codebook_sizes = codebook_sizes
        self.sizes_inferred = sizes_inferred

    @classmethod
    def from_codes(
        cls,
        codes: IntegersLike,
        item_ids: IntegersLike | None = None,
        *,
        codebook_sizes: Sequence[int] | None = None,
        backend: Backend = "auto",
    ) -> Trie:
        """Build a trie from the semantic IDs of N items, in any order, with repetitions.

        Args:
            codes: an (N, L) integer tensor or array of any dtype, with -1 behind the end of a sequence that is shorter,
                as :meth:`codes` gives them; or a list of N sequences of integers, which may differ in length (then L is
                the largest). An empty tensor of shape (0, L) gives an empty trie.
            item_ids: (N,) distinct integers, any int64; default 0, 1, …, N - 1, which needs no memory.
            codebook_sizes: (L,) integers, the number of codes of each level. Default: the largest code + 1, taken as a
                lower bound: a search then accepts logits over more codes than that.
            backend: ``"auto"``, ``"reference"`` or ``"native"``; all give the same arrays.

        Returns:
            The trie, on the device of ``codes``.

        Raises:
            ValueError: a code is negative or not below its codebook's size, a sequence is empty, ids are repeated, or
                a shape does not fit.
            TypeError: codes, ids or sizes are not integers.
            BackendUnavailable: ``backend``, asked for by name, cannot run here.
        """
        table = build.padded_codes("codes", codes)
        sizes = build.checked_sizes("codes", table, codebook_sizes)
        ids = build.checked_ids("item_ids", item_ids, len(table), table.device)
        return cls(TrieParts(build.build_arrays(table, ids, sizes, backend)), sizes, codebook_sizes is None)

    @classmethod
    def merge(cls, shards: Sequence[Trie], *, renumber: bool = False, backend: Backend = "auto") -> Trie:
        """Make one trie of several that hold the shards of a catalog: the one that all codes together would give.

        The compiled code walks the shards' arrays, which may be memory-mapped files, and holds nothing besides them and
        the result: no codes. A catalog too large to be built at once is built in shards, on any number of machines.

        Args:
            shards: tries of one depth and with the same codebook sizes, on one device; at least one.
            renumber: ids of the items are rows of the whole: those of a shard, whatever they were, follow those of the
                shards before it. By default the shards' own ids stay, and must be distinct.
            backend: as in :meth:`from_codes`; the reference holds all codes.

        Raises:
            ValueError: there is no shard, or they do not fit each other.
            TypeError: one is no trie.
            BackendUnavailable: ``backend``, asked for by name, cannot run here.

        Examples:
            >>> halves = [dgi_kernels.Trie.from_codes(codes) for codes in ([[3, 1], [0, 4]], [[3, 1], [2, 2]])]
            >>> whole = dgi_kernels.Trie.merge(halves, renumber=True)
            >>> whole.items(whole.find([[3, 1]]), depth=2).item_ids
            tensor([0, 2])
        """
        shards = list(shards)
        for place, shard in enumerate(shards):
            if not isinstance(shard, Trie):
                raise TypeError(f"shards[{place}] must be a Trie; got {type(shard).__name__}")
            if shard.device != shards[0].device:
                raise ValueError(f"shards must be on one device; got {shards[0].device} and {shard.device}")
        if not shards:
            raise ValueError("shards must hold at least one trie; got none")
        inferred = [shard.sizes_inferred for shard in shards]
        sizes = merge.merged_sizes("shards", [shard.codebook_sizes for shard in shards], inferred)
        bases = [shard.compact(backend=backend).parts.base for shard in shards]
        ids = merge.merged_ids("shards", bases, renumber)
        return cls(TrieParts(merge.merge_arrays(bases, ids, sizes, backend)), sizes, all(inferred))

    @property
    def depth(self) -> int:
        """The number of levels L: the length of the longest sequence."""
        return self.parts.base.depth

    @property
    def num_items(self) -> int:
        """The number of items N."""
        return self.parts.num_items

    @property
    def num_nodes(self) -> int:
        """The number of nodes below the root, over all depths: distinct prefixes, ended sequences padded with -1."""
        return self.parts.num_nodes()

    @property
    def item_ids(self) -> Tensor:
        """The ids (num_items,) int64 in the order given at build; those that :meth:`update` added come last."""
        return self.parts.ids()

    @property
    def max_degree(self) -> tuple[int, ...]:
        """Per depth, an upper bound of the number of children of a node."""
        return self.parts.max_degree

    @property
    def nbytes(self) -> int:
        """The size of all arrays in bytes, those that are shared with other tries included.

        About 3 bytes per item map leaves to items (``item_start`` and ``item_order``); no search reads them. See
        "Memory" in ``README.md`` in this folder.
        """
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def device(self) -> torch.device:
        """The device that holds the arrays."""
        return self.parts.base.device

    @property
    def arrays(self) -> dict[str, Tensor]:
        """All arrays by name; see ``README.md`` in this folder."""
        delta = self.parts.delta
        return self.parts.base.named() | ({} if delta is None else delta.named())

    def num_nodes_at(self, depth: int) -> int:
        """Exclusive upper bound of the node indices at ``depth`` (0 to L); equals their count if never updated."""
        checks.integer("depth", depth, low=0, high=self.depth)
        return self.parts.num_nodes_at(depth)

    def root(self, batch_size: int) -> Beams:
        """The start of a search: one live beam at the root, with score 0, for each of ``batch_size`` requests."""
        checks.integer("batch_size", batch_size, low=0, high=MAX_COUNT)
        shape, device = (batch_size, 1), self.device
        none = torch.full(shape, -1, dtype=torch.int64, device=device)
        return Beams(
            torch.full(shape, 0, dtype=torch.int64, device=device),
            none,
            none,
            torch.full(shape, 0.0, dtype=torch.float32, device=device),
            0,
        )

    def find(self, prefixes: IntegersLike) -> Tensor:
        """Find the nodes of prefixes.

        Args:
            prefixes: (..., t) integers, t from 0 to L; -1 continues a sequence that has ended.

        Returns:
            (...) int64 nodes at depth t, -1 where no item has that prefix.
        """
        prefixes = build.integer_tensor("prefixes", prefixes, self.device)
        if prefixes.ndim == 0 or prefixes.shape[-1] > self.depth:
            raise ValueError(f"prefixes must have shape (..., t), t at most {self.depth}; got {tuple(prefixes.shape)}")
        return self.parts.find(prefixes)

    def is_valid(self, prefixes: IntegersLike) -> Tensor:
        """Whether each prefix (..., t) begins the codes of some item; (...) bool. See :meth:`find`."""
        return self.find(prefixes) >= 0

    def children(self, node: int | Tensor, depth: int) -> Tensor:
        """The codes that may follow ``node`` of ``depth`` (0 to L - 1): (degree,) int64, ascending, -1 for the end."""
        checks.integer("depth", depth, low=0, high=self.depth - 1)
        value = node.item() if isinstance(node, Tensor) and node.numel() == 1 else node
        i = checks.integer("node", value, low=0, high=self.num_nodes_at(depth) - 1)
        children, tokens, exists = self.parts.children(torch.tensor(i, device=self.device), depth)
        return tokens[exists & self.parts.holds(children, depth + 1, self.parts.live, None)]

    def items(self, nodes: IntegersLike | int, depth: int) -> ItemRanges:
        """List the items below nodes: the inverted index from prefixes to items.

        Args:
            nodes: integers of any shape (flattened), nodes of ``depth``; -1 (a dead beam) has no items.
            depth: 0 (the root, node 0) to L (the leaves).

        Returns:
            ItemRanges with offsets (n + 1,) and item_ids (total,), int64.
        """
        checks.integer("depth", depth, low=0, high=self.depth)
        nodes = build.integer_tensor("nodes", nodes, self.device).flatten()
        nodes = checks.index("nodes", nodes, 0, self.num_nodes_at(depth), also=-1)
        return ItemRanges(*self.parts.items(nodes, depth))

    def filter(
        self, *, items: IntegersLike | None = None, mask: Tensor | np.ndarray | Sequence[bool] | None = None
    ) -> TrieFilter:
        """Make a filter that allows a subset of the items, for ``filters=`` of the searches.

        Args:
            items: the ids allowed, integers; repetitions do no harm.
            mask: (num_items,) bool, True where allowed, in the order given at build (that of ``item_ids``).

        Raises:
            ValueError: an id that the trie does not hold, a mask of another shape, or not exactly one of the two given.
        """
        if (items is None) == (mask is None):
            raise ValueError("filter needs exactly one of items and mask")
        base, delta = self.parts.base, self.parts.delta
        if mask is None:
            of_base, of_delta = self._rows("items", items)
            if delta is None:
                in_base = in_delta = _members(of_base, base.num_items)
            else:
                in_base = _members(of_base[of_base >= 0], base.num_items)
                in_delta = _members(of_delta[of_delta >= 0], delta.arrays.num_items)
        else:
            chosen = self._mask(mask)
            in_base, in_delta = chosen[: base.num_items], chosen[base.num_items :]
            if delta is not None:
                count = base.num_items - len(delta.removed)
                in_base, in_delta = self.parts.kept_rows(), chosen[count:]
                in_base[in_base.clone()] = chosen[:count]
        added = self.parts.added
        return TrieFilter(
            self,
            ItemSet.of_rows(in_base, base.item_order),
            None if added is None else ItemSet.of_rows(in_delta, added.item_order),
        )

    def node_scores(self, item_weights: Tensor | np.ndarray | Sequence[float]) -> NodeScores:
        """Make scores of all nodes from weights of the items, for ``node_scores=`` of the searches.

        A node has the weight W(n), the sum over the items below it, in float64. A child adds ``strength * (log W(child)
        - log W(parent))`` to its score; along a path that is ``strength * log (W(leaf) / W(root))``. With clicks as
        weights a positive strength prefers what is popular and a negative one takes popularity off; business weights
        boost. Filters do not change the weights, and items that are gone have none.

        Args:
            item_weights: (num_items,) positive and finite numbers, in the order given at build (that of ``item_ids``).

        Raises:
            ValueError, TypeError: weights of another shape, or that are not positive, finite numbers.

        Examples:
            >>> trie = dgi_kernels.Trie.from_codes([[0], [1], [1]])
            >>> trie.node_scores([6.0, 1.0, 1.0]).at(trie.find([[0], [1]]), depth=1).exp()
            tensor([0.7500, 0.2500])
        """
        return node_scores.make(self, item_weights)

    def _mask(self, mask: object) -> Tensor:
        try:
            chosen = torch.as_tensor(mask, device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"mask must be a tensor, array or list of bool; got {type(mask).__name__} ({error})"
            ) from None
        checks.tensor("mask", chosen, dtypes=(torch.bool,))
        checks.shape("mask", chosen, (self.num_items,), "(num_items,)")
        return chosen

    def _rows(self, name: str, ids: object) -> tuple[Tensor, Tensor]:
        """The rows of item ids, which must all be there, in base and delta; -1 in the other."""
        wanted = build.integer_tensor(name, ids, self.device).flatten()
        of_base, of_delta = self.parts.rows_of(wanted)
        missing = torch.maximum(of_base, of_delta) < 0 if self.parts.delta is not None else of_base < 0
        if missing.any():
            raise ValueError(f"{name} must be ids of items in the trie; it has no item {wanted[missing][0].item()}")
        return of_base, of_delta

    def codes(self) -> tuple[Tensor, Tensor]:
        """Return codes (N, L) int64, -1 where a sequence has ended, and item ids (N,), in the order given at build.

        Items that :meth:`update` added come last.
        """
        return self.parts.codes(), self.parts.ids()

    def update(
        self,
        add: tuple[IntegersLike, IntegersLike] | None = None,
        remove: IntegersLike | None = None,
        *,
        backend: Backend = "auto",
    ) -> Trie:
        """Return a trie with items added and removed; this one is unchanged.

        The new trie shares this one's arrays: removed items are masked, added items are in a second, small trie, and
        both are searched together, exactly. It costs a pass over one bit per item and a build of all items added since
        the arrays were built; after many updates, :meth:`compact` merges them. Nodes are renumbered in the new trie.

        Args:
            add: ``(codes, ids)`` as for :meth:`from_codes`; sequences no longer than L. Given sizes still bind them.
            remove: ids of items to remove, before the others are added: an id in both is replaced.
            backend: as in :meth:`from_codes`.

        Raises:
            ValueError: an unknown id is removed, an existing one added, a code or shape does not fit.
        """
        base, delta = self.parts.base, self.parts.delta
        removed = torch.empty(0, dtype=torch.int64, device=self.device) if delta is None else delta.removed
        codes = removed.new_empty(0, self.depth) if delta is None else delta.arrays.codes()
        ids, sizes = removed[:0] if delta is None else delta.arrays.ids(), self.codebook_sizes
        if remove is not None:
            of_base, of_delta = self._rows("remove", remove)
            removed = torch.cat([removed, of_base[of_base >= 0]]).unique()
            kept = torch.ones(len(ids), dtype=torch.bool, device=self.device)
            kept[of_delta[of_delta >= 0]] = False
            codes, ids = codes[kept], ids[kept]
        if add is not None:
            new_codes, sizes = self._added_codes(add)
            new_ids = build.integer_tensor("add[1], the ids,", add[1], self.device)
            build.checked_ids("add[1], the ids,", new_ids, len(new_codes), self.device)
            of_base = base.rows_of(new_ids)
            known = ((of_base >= 0) & ~torch.isin(of_base, removed)) | torch.isin(new_ids, ids)
            if known.any():
                raise ValueError(f"add[1], the ids, must be new; {new_ids[known][0].item()} is already in the trie")
            codes, ids = torch.cat([codes, new_codes]), torch.cat([ids, new_ids])
        if token_dtype(sizes) != base.tokens[0].dtype:  # a code that the base's tokens could not hold
            kept_rows = torch.ones(base.num_items, dtype=torch.bool, device=self.device)
            kept_rows[removed] = False
            return self._rebuilt(
                torch.cat([base.codes()[kept_rows], codes]), torch.cat([base.ids()[kept_rows], ids]), sizes, backend
            )
        if len(removed) == 0 and len(ids) == 0:
            return Trie(TrieParts(base), sizes, self.sizes_inferred)
        added = build.build_arrays(codes, ids, sizes, backend)
        return Trie(TrieParts(base, Delta.make(base, added, removed, delta)), sizes, self.sizes_inferred)

    def compact(self, *, backend: Backend = "auto") -> Trie:
        """Return a trie of the same items with all updates merged, or this one if there are none.

        Its arrays are those that :meth:`from_codes` makes of :meth:`codes`; nodes are renumbered.

        Args:
            backend: as in :meth:`from_codes`.
        """
        if self.parts.delta is None:
            return self
        codes = self.parts.codes(self.parts.base.tokens[0].dtype)
        return self._rebuilt(codes, self.parts.ids(), self.codebook_sizes, backend)

    def _rebuilt(self, codes: Tensor, ids: Tensor, sizes: tuple[int, ...], backend: str) -> Trie:
        is_identity = torch.equal(ids, torch.arange(len(ids), device=self.device))
        arrays = build.build_arrays(codes, None if is_identity else ids, sizes, backend)
        return Trie(TrieParts(arrays), sizes, self.sizes_inferred)

    def _added_codes(self, add: tuple[object, object]) -> tuple[Tensor, tuple[int, ...]]:
        name = "add[0], the codes,"
        if not isinstance(add, Sequence) or len(add) != 2 or add[1] is None:
            raise TypeError("add must be a pair (codes, ids)")
        nothing = isinstance(add[0], Sequence) and len(add[0]) == 0
        codes = (
            torch.empty(0, self.depth, dtype=torch.int64, device=self.device)
            if nothing
            else build.padded_codes(name, add[0], self.device).long()
        )
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
        parts = TrieParts(self.parts.base.to(here), None if self.parts.delta is None else self.parts.delta.to(here))
        return Trie(parts, self.codebook_sizes, self.sizes_inferred)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The trie as named arrays and JSON data, to embed it in another file; :meth:`from_state` reads them.

        Updates are folded in, as by :meth:`compact`.
        """
        return format.state(self.compact().parts.base, self.codebook_sizes, self.sizes_inferred)

    @classmethod
    def from_state(cls, arrays: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Trie:
        """Make a trie from what :meth:`state` gave.

        Raises:
            TrieFormatError: the arrays do not form a trie; the message says why.
        """
        base, sizes, inferred = format.checked_state(arrays, meta)
        return cls(TrieParts(base), sizes, inferred)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the trie to one file: whole or not at all, versioned, with a checksum.

        Updates are folded in, as by :meth:`compact`.
        """
        format.write(path, *self.state())

    @classmethod
    def load(cls, path: str | os.PathLike[str], mmap: bool = False, *, verify: bool = True) -> Trie:
        """Read a file written by :meth:`save`.

        Args:
            path: the file.
            mmap: map the arrays instead of copying them: processes that load one file then share its memory, and pages
                are read as a search comes by.
            verify: compare the checksum of the whole file and check its structure, which reads all of it once. Without,
                only the header is checked, and that the file has the size that it says: with ``mmap`` a trie of any
                size is then there at once, but a file that was altered may crash a search. For files that were
                verified since they were written.

        Raises:
            TrieFormatError: the file is truncated, altered, of another version, or no trie; the message says which.
            OSError: the file cannot be read.
        """
        base, sizes, inferred = format.read(path, mmap, verify)
        return cls(TrieParts(base), sizes, inferred)

    def __repr__(self) -> str:
        return (
            f"Trie(num_items={self.num_items}, depth={self.depth}, num_nodes={self.num_nodes}, "
            f"codebook_sizes={self.codebook_sizes}, nbytes={self.nbytes}, device={str(self.device)!r})"
        )


def _members(rows: Tensor, size: int) -> Tensor:
    """(size,) bool, True at ``rows`` (n,)."""
    return torch.zeros(size, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
