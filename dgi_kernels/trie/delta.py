"""What an updated trie lays over the arrays that it shares with the trie it was made from.

An updated trie has two parts: the *base*, some of whose items may be gone, and a *delta*, a small trie of the items
that came since.  They are searched as one.  Node n of the whole, at a depth where the base has b nodes, is the base's
node n if n < b, else the delta's node n - b.  A prefix that both parts hold goes by the base's number; the two nodes
are *twins*.  The children of a node are the run of the base's node and the run of the delta's, the delta's twins left
out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgi_kernels.trie.arrays import TrieArrays, run_of_each
from dgi_kernels.trie.item_set import ItemSet
from dgi_kernels.trie.starts import plain_starts


@dataclass(frozen=True, eq=False)
class Delta:
    """The changes since the base was built.

    Attributes:
        arrays: a trie of the items added, of the base's depth; it may have none.
        anchors: ``anchors[t]``, one int64 for each of its nodes at depth t, 0 to L: 2 a + 1 for the twin of the base's
            node a, 2 a for a node without a twin that has a of the base's nodes before it. They ascend.
        removed: (r,) int64, the rows of the base that are gone, ascending.
        live: the places of the base that are left; None where all are.
    """

    arrays: TrieArrays
    anchors: tuple[Tensor, ...]
    removed: Tensor
    live: ItemSet | None

    @classmethod
    def make(cls, base: TrieArrays, added: TrieArrays, removed: Tensor, before: Delta | None) -> Delta:
        """Lay ``added`` and the rows ``removed`` over ``base``; ``before`` may have the set of live items already."""
        if len(removed) == 0:
            live = None
        elif before is not None and len(before.removed) == len(removed):  # none has gone since
            live = before.live
        else:
            members = torch.ones(base.num_items, dtype=torch.bool, device=base.device)
            members[removed] = False
            live = ItemSet.of_rows(members, base.item_order)
        return cls(added, _anchors(base, added), removed, live)

    def to(self, device: torch.device) -> Delta:
        """The delta on ``device``."""
        live = None if self.live is None else self.live.to(device)
        return Delta(
            self.arrays.to(device), tuple(anchors.to(device) for anchors in self.anchors), self.removed.to(device), live
        )

    def named(self) -> dict[str, Tensor]:
        """All arrays by name."""
        named = {f"delta.{name}": array for name, array in self.arrays.named().items()}
        named |= {f"delta.anchors.{t}": anchors for t, anchors in enumerate(self.anchors)}
        named["removed"] = self.removed
        return named if self.live is None else named | {"live.words": self.live.words, "live.ranks": self.live.ranks}

    def has_twin(self, nodes: Tensor, depth: int) -> Tensor:
        """Whether each of the delta's nodes is also a node of the base."""
        return (self.anchors[depth][nodes] & 1).bool()

    def twin_of(self, nodes: Tensor, depth: int) -> Tensor:
        """The delta's nodes that are the twins of the base's ``nodes`` (…); -1 where there is none, and of -1."""
        anchors = self.anchors[depth]
        if len(anchors) == 0:
            return torch.full_like(nodes, -1)
        wanted = 2 * nodes + 1
        place = torch.searchsorted(anchors, wanted).clamp(max=len(anchors) - 1)
        return torch.where(anchors[place] == wanted, place, -1)

    def places_before(self, base: TrieArrays) -> Tensor:
        """For each of the delta's items, in its leaf order, how many places of the base come before it."""
        anchors = self.anchors[-1]
        leaves = (anchors >> 1) + (anchors & 1)  # a twin's items stand behind those of its leaf of the base
        places, added = base.item_starts_at(leaves), self.arrays
        if added.item_start is None:
            return places
        starts = plain_starts(added.item_start, added.num_items, torch.int64)
        return places[run_of_each(starts, added.num_items)]


def _anchors(base: TrieArrays, added: TrieArrays) -> tuple[Tensor, ...]:
    """Level by level: a child of a twin is looked for among its children, another stands where its parent does."""
    anchors = [torch.ones(1, dtype=torch.int64, device=base.device)]  # the roots are twins
    for depth, (tokens, starts) in enumerate(zip(added.tokens, added.child_start, strict=True)):
        above = anchors[-1][run_of_each(starts, len(tokens))]
        is_twin, node = (above & 1).bool(), above >> 1
        place, found = base.search(torch.where(is_twin, node, -1), tokens.long(), depth)
        before = base.child_start[depth][node].long()
        anchors.append(torch.where(is_twin, 2 * place + found, 2 * before))
    return tuple(anchors)
