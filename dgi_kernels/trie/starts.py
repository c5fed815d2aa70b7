"""Where the items of each leaf start, in as few bytes as can be read at random.

They are int32 or int64, or *marks*: a bit for each place and the end, 1 where a leaf's items start and at the end, as
an :class:`ItemSet`, and for every 256th leaf the block of 512 places in which they start. Marks are one array of
uint64; ``README.md`` in this folder gives its layout.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels import backend as backends
from dgi_kernels.trie import native, reference
from dgi_kernels.trie.item_set import BLOCK_WORDS, WORD_BITS, ItemSet, num_words

MARKS = torch.uint64
SAMPLED = 256  # leaves to a sample


def marks_length(leaves: int, items: int) -> int:
    """How many elements the marks of so many leaves and items have."""
    return 1 + _num_blocks(items) * (1 + BLOCK_WORDS) + leaves // SAMPLED + 2


def packed_starts(starts: Tensor, items: int) -> Tensor:
    """The starts (leaves + 1,) of leaves that have an item or more each, or marks of them, whichever is smaller."""
    leaves = len(starts) - 1
    if 8 * marks_length(leaves, items) >= starts.nbytes:
        return starts
    native_or_not = backends.choose("trie_build", "auto", starts.device) == "native"
    return native.run_marks(starts) if native_or_not else _marks(starts, items)


def _marks(starts: Tensor, items: int) -> Tensor:
    leaves = len(starts) - 1
    heads = torch.zeros(items + 1, dtype=torch.bool, device=starts.device)
    heads[starts.long()] = True
    marks = ItemSet.of_rows(heads, None)
    count = marks.ranks.new_tensor([len(marks.ranks)])
    sampled = torch.arange(leaves // SAMPLED + 2, device=starts.device) * SAMPLED
    blocks = starts[sampled.clamp(max=leaves)].long() // (WORD_BITS * BLOCK_WORDS)
    return torch.cat([count, marks.ranks, marks.words, blocks]).view(MARKS)


def plain_starts(starts: Tensor, items: int, dtype: torch.dtype) -> Tensor:
    """The starts (leaves + 1,) themselves, as ``dtype`` if they were packed."""
    if starts.dtype != MARKS:
        return starts
    return _bits(_ranks_and_words(starts, items)[1]).nonzero().squeeze(1).to(dtype)


def starts_at(starts: Tensor, items: int, leaves: Tensor) -> Tensor:
    """Where the items of each of ``leaves`` (…) int64 start, the end for the number of leaves; (…) int64."""
    if starts.dtype != MARKS:
        return starts[leaves].long()
    if backends.choose("trie_find", "auto", leaves.device) == "native":
        return native.run_starts(starts, leaves)
    return reference.run_starts(*_ranks_and_words(starts, items), leaves)


def parent_set(children: ItemSet, starts: Tensor, parents: int) -> ItemSet:
    """The nodes that have a member of a set among their children; those of leaves are places."""
    if backends.choose("trie_filter", "auto", starts.device) == "native":
        return ItemSet(parents, *native.parent_set(children.words, children.ranks, starts, parents))
    if starts.dtype == MARKS:
        begins = _bits(_ranks_and_words(starts, children.size)[1])[: children.size]
    else:
        begins = torch.zeros(children.size, dtype=torch.uint8, device=starts.device)
        begins[starts[:-1].long()] = 1
    members = torch.zeros(parents, dtype=torch.uint8, device=starts.device)
    members.scatter_reduce_(0, begins.cumsum(0) - 1, _bits(children.words)[: children.size], "amax")
    return ItemSet.of_rows(members.bool(), None)


def _bits(words: Tensor) -> Tensor:
    """The bits of int64 words, the lowest first, as bytes."""
    eights = torch.stack([(words.flatten() >> shift & 0xFF).to(torch.uint8) for shift in range(0, WORD_BITS, 8)], 1)
    return (eights.view(-1, 1) >> torch.arange(8, dtype=torch.uint8, device=words.device) & 1).flatten()


def _num_blocks(items: int) -> int:
    return num_words(items + 1) // BLOCK_WORDS


def _ranks_and_words(marks: Tensor, items: int) -> tuple[Tensor, Tensor]:
    blocks = _num_blocks(items)
    _, ranks, words, _ = marks.view(torch.int64).tensor_split([1, 1 + blocks, 1 + (1 + BLOCK_WORDS) * blocks])
    return ranks, words.view(-1, BLOCK_WORDS)
