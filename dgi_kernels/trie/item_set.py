"""Sets of items as bits over the leaf order, with the number of members before each block: what filters are made of.

The items below a node are a range [first, end) of the leaf order, so the node leads to a member if and only if
``rank(end) > rank(first)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels import backend as backends
from dgi_kernels.trie import native, reference
from dgi_kernels.trie.reference import count_ones
from dgi_kernels.trie.rows import plain_rows

WORD_BITS = 64
BLOCK_WORDS = 8  # a rank for every 512 places


class ItemSet:
    """A set of places of a leaf order of ``size`` items.

    Attributes:
        size: the number of places.
        words: (8 n,) int64; bit p % 64 of word p // 64 is 1 where place p belongs to the set. At least one place more
            than there are fits in, and the bits behind the last place are 0.
        ranks: (n,) int64, the number of members before each block of 8 words.
    """

    def __init__(self, size: int, words: Tensor, ranks: Tensor | None = None) -> None:
        self.size = size
        self.words = words
        if ranks is None:
            per_block = count_ones(words).view(-1, BLOCK_WORDS).sum(1)
            ranks = per_block.cumsum(0) - per_block
        self.ranks = ranks

    @classmethod
    def of_rows(cls, members: Tensor, item_order: Tensor | None) -> ItemSet:
        """The set of the places whose row is a member: ``members`` (size,) bool by row; ``item_order`` place -> row.

        ``item_order`` may be packed.
        """
        size = len(members)
        if backends.choose("trie_filter", "auto", members.device) == "native":
            return cls(size, *native.item_set(members, item_order))
        order = None if item_order is None else plain_rows(item_order)
        return cls(size, *reference.item_set(members, order, num_words(size), BLOCK_WORDS))

    def to(self, device: torch.device) -> ItemSet:
        """The set on ``device``."""
        return ItemSet(self.size, self.words.to(device), self.ranks.to(device))

    def __len__(self) -> int:
        return int(self.ranks[-1] + count_ones(self.words[-BLOCK_WORDS:]).sum())

    def __and__(self, other: ItemSet) -> ItemSet:
        return ItemSet(self.size, self.words & other.words)

    def __or__(self, other: ItemSet) -> ItemSet:
        return ItemSet(self.size, self.words | other.words)

    def __invert__(self) -> ItemSet:
        last, bits = divmod(self.size, WORD_BITS)
        words = ~self.words
        words[last] &= (1 << bits) - 1
        words[last + 1 :] = 0
        return ItemSet(self.size, words)

    def contains(self, places: Tensor) -> Tensor:
        """Whether each of ``places`` (…) int64 belongs to the set."""
        return (self.words[places // WORD_BITS] >> places % WORD_BITS & 1).bool()

    def rank(self, places: Tensor) -> Tensor:
        """The number of members before each of ``places`` (…) int64, up to ``size``."""
        block, within = places // (WORD_BITS * BLOCK_WORDS), places % (WORD_BITS * BLOCK_WORDS)
        before = within.unsqueeze(-1) - WORD_BITS * torch.arange(BLOCK_WORDS, device=places.device)  # bits, per word
        mask = torch.where(before >= WORD_BITS, -1, (1 << before.clamp(0, WORD_BITS - 1)) - 1)
        return self.ranks[block] + count_ones(self.words.view(-1, BLOCK_WORDS)[block] & mask).sum(-1)

    def any(self, first: Tensor, end: Tensor) -> Tensor:
        """Whether the set holds a place of each range [first, end)."""
        return self.rank(end) > self.rank(first)


def num_words(size: int) -> int:
    """How many words a set over ``size`` places has: whole blocks, with room for one place more."""
    return (size // (WORD_BITS * BLOCK_WORDS) + 1) * BLOCK_WORDS
