"""Calls into the compiled extension: a beam step in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels.trie import Beams, Trie
from dgi_kernels.trie.filters import TrieFilter

NORMALIZE = {"full": 0, "children": 1, "none": 2}


def beam_step(trie: Trie, logits: Tensor, beams: Beams, num_beams: int, normalize: str, log_normalizer: Tensor | None,
              filters: TrieFilter | list[TrieFilter | None] | None) -> Beams:
    """``logits`` (B, M, K) of any float dtype and strides; ``log_normalizer`` (B, M) float64 for float64 logits, else
    float32.

    Raises:
        RuntimeError: a node is out of range.
    """
    depth = beams.depth
    lower, counts, filter_of = filter_arguments(trie, filters, depth, logits.shape[0])
    scores = beams.scores.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    return Beams(*torch.ops.dgi_kernels.beam_step(
        trie.tokens[depth], trie.child_start[depth], lower, counts, filter_of, logits, beams.nodes.long(), scores,
        log_normalizer, num_beams, NORMALIZE[normalize]), depth + 1)


def filter_arguments(trie: Trie, filters: TrieFilter | list[TrieFilter | None] | None, depth: int,
                     batch: int) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """The levels below the children of ``depth``, the counts of each distinct filter, and its number (-1: none) for each
    of the ``batch`` requests; all empty without filters.
    """
    if filters is None:
        return [], [], []
    lower = [*trie.child_start[depth + 1:], trie.item_start]
    if isinstance(filters, TrieFilter):
        return lower, [filters.counts], [0] * batch
    distinct = {id(entry): entry for entry in filters if entry is not None}
    number = {key: i for i, key in enumerate(distinct)}
    return lower, [entry.counts for entry in distinct.values()], [number.get(id(entry), -1) for entry in filters]
