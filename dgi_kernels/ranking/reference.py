"""Lexicographic ranking of the items below beams, in plain PyTorch.

    rank items by (beam score, cos(query, item)), both descending, ties to the lower item id

Shapes are static where they must be: the candidates of a request fill the first of a fixed number of slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.trie import Trie
from dgi_kernels.trie.filters import TrieFilter, allowed_items

EPS = 1e-12


def rank_candidates(query: Tensor, item_vectors: Tensor, trie: Trie, nodes: Tensor, scores: Tensor, depth: int, k: int,
                    filters: TrieFilter | list[TrieFilter | None] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return item ids, beam scores and cosines (B, k), padded with -1, -inf and -1."""
    positions, candidate_scores = _candidates(trie, nodes, scores, depth)
    candidate_scores = candidate_scores.masked_fill(~allowed_items(filters, positions), -torch.inf)
    items = trie.item_ids[trie.item_order[positions]]  # (B, C)
    cosines = _cosines(query, item_vectors, items)

    order = items.argsort(dim=-1, stable=True)
    for key in (cosines, candidate_scores):
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    order = order[:, :k]
    ranked_scores = candidate_scores.gather(-1, order)
    none = ranked_scores == -torch.inf
    missing = (0, k - order.shape[1])
    return (F.pad(items.gather(-1, order).masked_fill(none, -1), missing, value=-1),
            F.pad(ranked_scores, missing, value=-torch.inf),
            F.pad(cosines.gather(-1, order).masked_fill(none, -1), missing, value=-1))


def _candidates(trie: Trie, nodes: Tensor, scores: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The items below all live beams of a request, each once: leaf-order positions and beam scores (B, C)."""
    if trie.num_items == 0:
        return nodes[:, :0], scores[:, :0]
    live = (nodes >= 0) & (nodes < trie.num_nodes_at(depth)) & (scores > -torch.inf)
    scores, order = scores.masked_fill(~live, -torch.inf).sort(dim=-1, descending=True, stable=True)
    nodes, live = nodes.gather(-1, order), live.gather(-1, order)
    same = (nodes.unsqueeze(-1) == nodes.unsqueeze(-2)).tril(-1)  # a node given twice counts with its better score
    live = live & ~same.any(-1)

    first, end = trie.item_range(nodes.masked_fill(~live, 0), depth)
    lengths = torch.where(live, end - first, 0)
    stop = lengths.cumsum(-1)  # (B, M): beam m fills the slots stop[m] - lengths[m] to stop[m] - 1
    slot = torch.arange(_slots(trie, stop, depth), device=nodes.device).expand(len(nodes), -1).contiguous()
    beam = torch.searchsorted(stop, slot, right=True)
    filled = beam < nodes.shape[1]
    beam = beam.clamp(max=nodes.shape[1] - 1)
    positions = first.gather(-1, beam) + slot - (stop - lengths).gather(-1, beam)
    return positions.masked_fill(~filled, 0), scores.gather(-1, beam).masked_fill(~filled, -torch.inf)


def _slots(trie: Trie, stop: Tensor, depth: int) -> int:
    """How many candidates a request may have: the true number where reading it costs no sync, a bound elsewhere."""
    if stop.device.type == "cpu" and not torch.compiler.is_compiling():
        return int(stop.max()) if stop.numel() else 0
    return min(stop.shape[1] * trie.max_items[depth], trie.num_items)


def _cosines(query: Tensor, item_vectors: Tensor, items: Tensor) -> Tensor:
    """cos(query, item) of each candidate (B, C), -1 where it is NaN; over the candidates or all rows, what is less."""
    query = F.normalize(query, dim=-1, eps=EPS)
    if items.numel() < len(item_vectors):
        vectors = item_vectors[items].to(query.dtype)  # (B, C, D)
        cosines = (vectors @ query.unsqueeze(-1)).squeeze(-1) / _norms(vectors)
    else:
        vectors = item_vectors.to(query.dtype)  # (rows, D)
        cosines = (query @ vectors.T / _norms(vectors)).gather(-1, items)
    return cosines.nan_to_num(nan=-1.0)


def _norms(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1).clamp(min=EPS)
