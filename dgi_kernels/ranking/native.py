"""Calls into the compiled extension: ranking in C++ and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels._extension import fake_kernel
from dgi_kernels.trie import Trie
from dgi_kernels.trie.filters import TrieFilter, filter_arguments

EPS = 1e-12


def rank_candidates(
    query: Tensor,
    item_vectors: Tensor,
    trie: Trie,
    nodes: Tensor,
    scores: Tensor,
    depth: int,
    k: int,
    filters: TrieFilter | list[TrieFilter | None] | None,
    by_sum: bool = False,
    cosine_weight: float = 1.0,
    share: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``query`` (B, D) and ``item_vectors`` (rows, D) of one dtype; ``nodes`` int64 and ``scores`` float32 (B, M).

    Raises:
        RuntimeError: a node is out of range (on CUDA it is dead).
    """
    base, delta, added = trie.parts.base, trie.parts.delta, trie.parts.added
    sets, set_of = filter_arguments(filters, len(query), None)
    of_delta: tuple[list[Tensor], Tensor | None, Tensor | None, Tensor | None] = ([], None, None, None)
    if added is not None and delta is not None:
        of_delta = (added.items_below(depth), added.item_order, added.item_ids, delta.anchors[depth])
    return torch.ops.dgi_kernels.rank_candidates(
        _rows(query),
        _rows(item_vectors),
        base.num_nodes_at(depth),
        base.items_below(depth),
        base.item_order,
        base.item_ids,
        *of_delta,
        sets,
        set_of,
        nodes,
        scores,
        k,
        EPS,
        by_sum,
        cosine_weight,
        share,
    )


def _rows(vectors: Tensor) -> Tensor:
    """With contiguous rows, at any distance from each other."""
    return vectors if vectors.stride(1) == 1 else vectors.contiguous()


@fake_kernel("rank_candidates")
def _(
    query: Tensor,
    item_vectors: Tensor,
    num_nodes: int,
    below: list[Tensor],
    item_order: Tensor | None,
    item_ids: Tensor | None,
    delta_below: list[Tensor],
    delta_order: Tensor | None,
    delta_ids: Tensor | None,
    delta_anchors: Tensor | None,
    sets: list[Tensor],
    set_of: list[int],
    nodes: Tensor,
    scores: Tensor,
    k: int,
    eps: float,
    by_sum: bool = False,
    cosine_weight: float = 1.0,
    share: bool = False,
) -> tuple[Tensor, ...]:
    shape, compute = (query.shape[0], k), torch.float64 if query.dtype == torch.float64 else torch.float32
    return (
        query.new_empty(shape, dtype=torch.int64),
        query.new_empty(shape, dtype=torch.float32),
        query.new_empty(shape, dtype=compute),
    )
