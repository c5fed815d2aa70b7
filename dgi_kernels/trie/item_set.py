"""Sets of items as bits over the leaf order, with the number of members before each block: what filters are made of."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dgi_kernels import backend as backends
from dgi_kernels.trie import native, reference

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

    def __init__(self, words: Tensor, size: int) -> None:
        self.size = size
        self.words = words
        per_block = count_ones(words).view(-1, BLOCK_WORDS).sum(1)
        self.ranks = per_block.cumsum(0) - per_block

    @classmethod
    def of_rows(cls, rows: Tensor, size: int, item_order: Tensor | None) -> ItemSet:
        """The set of the places of ``rows``: (n,) int64, with repetitions, or (size,) bool, True where it belongs."""
        native_or_not = backends.choose("trie_filter", "auto", rows.device)
        make = native.item_words if native_or_not == "native" else reference.item_words
        return cls(make(rows, size, item_order), size)

    def __len__(self) -> int:
        return int(self.ranks[-1] + count_ones(self.words[-BLOCK_WORDS:]).sum())

    def __and__(self, other: ItemSet) -> ItemSet:
        return ItemSet(self.words & other.words, self.size)

    def __or__(self, other: ItemSet) -> ItemSet:
        return ItemSet(self.words | other.words, self.size)

    def __invert__(self) -> ItemSet:
        last, bits = divmod(self.size, WORD_BITS)
        words = ~self.words
        words[last] &= (1 << bits) - 1
        words[last + 1:] = 0
        return ItemSet(words, self.size)

    @functools.cached_property
    def members(self) -> Tensor:
        """(size,) bool, whether each place belongs to the set."""
        bits = self.words.unsqueeze(1) >> torch.arange(WORD_BITS, device=self.words.device)
        return (bits & 1).bool().flatten()[:self.size]

    @functools.cached_property
    def counts(self) -> Tensor:
        """(size + 1,) int64, the number of members among the first i places: the ranks, one by one."""
        return torch.nn.functional.pad(self.members.cumsum(0), (1, 0))

    def any(self, first: Tensor, end: Tensor) -> Tensor:
        """Whether the set holds a place of each range [first, end)."""
        return self.counts[end] > self.counts[first]


def num_words(size: int) -> int:
    """How many words a set over ``size`` places has: whole blocks, with room for one place more."""
    return (size // (WORD_BITS * BLOCK_WORDS) + 1) * BLOCK_WORDS


def count_ones(words: Tensor) -> Tensor:
    """The number of bits that are 1 in each int64."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    words = words + (words >> 4) & 0x0F0F0F0F0F0F0F0F
    return words * 0x0101010101010101 >> 56
