"""Ranking of the items below beams, in plain PyTorch.

    rank items by (beam score, cos(query, item)), both descending, ties to the lower item id
    or by (beam score + weight cos(query, item) - log(items below the node), cos(query, item))

Shapes are static where they must be: the candidates of a request fill the first of a fixed number of slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.backend import tracing
from dgi_kernels.trie import Trie
from dgi_kernels.trie.filters import TrieFilter, allowed_items

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
    """Return item ids, beam scores (or sums) and cosines (B, k), padded with -1, -inf and -1."""
    places, candidate_scores, owners = _candidates(trie, nodes, scores, depth)
    candidate_scores = candidate_scores.masked_fill(~allowed_items(filters, places), -torch.inf)
    items = trie.parts.ids_at(places).masked_fill(candidate_scores == -torch.inf, 0)  # (B, C); no vector of one gone
    cosines = _cosines(query, item_vectors, items)
    if by_sum:
        candidate_scores = candidate_scores.to(cosines.dtype) + cosine_weight * cosines
        if share:
            found = (candidate_scores > -torch.inf).to(cosines.dtype)
            below = found.new_zeros(nodes.shape).scatter_add_(1, owners, found)  # items, of each beam
            candidate_scores = candidate_scores - below.gather(1, owners).clamp(min=1).log()

    order = items.argsort(dim=-1, stable=True)
    for key in (cosines, candidate_scores):
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    order = order[:, :k]
    ranked_scores = candidate_scores.gather(-1, order)
    none = ranked_scores == -torch.inf
    missing = (0, k - order.shape[1])
    return (
        F.pad(items.gather(-1, order).masked_fill(none, -1), missing, value=-1),
        F.pad(ranked_scores.float(), missing, value=-torch.inf),
        F.pad(cosines.gather(-1, order).masked_fill(none, -1), missing, value=-1),
    )


def _candidates(trie: Trie, nodes: Tensor, scores: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """The items below all live beams of a request, each once: places of the leaf order, beam scores, and numbers that
    those of one node share (B, C)."""
    if trie.parts.num_places == 0:
        return nodes[:, :0], scores[:, :0], nodes[:, :0]
    live = (nodes >= 0) & (nodes < trie.num_nodes_at(depth)) & (scores > -torch.inf)
    scores, order = scores.masked_fill(~live, -torch.inf).sort(dim=-1, descending=True, stable=True)
    nodes, live = nodes.gather(-1, order), live.gather(-1, order)
    same = (nodes.unsqueeze(-1) == nodes.unsqueeze(-2)).tril(-1)  # a node given twice counts with its better score
    live = live & ~same.any(-1)

    first, end = trie.parts.place_ranges(nodes.masked_fill(~live, -1), depth)  # (B, M, parts)
    scores = scores.unsqueeze(-1).expand_as(first).flatten(1)
    first, lengths = first.flatten(1), (end - first).flatten(1)
    stop = lengths.cumsum(-1)  # (B, ranges): range r fills the slots stop[r] - lengths[r] to stop[r] - 1
    slot = torch.arange(_slots(trie, stop, nodes.shape[1], depth), device=nodes.device)
    slot = slot.expand(len(nodes), -1).contiguous()
    of_slot = torch.searchsorted(stop, slot, right=True)
    filled = of_slot < first.shape[1]
    of_slot = of_slot.clamp(max=first.shape[1] - 1)
    places = first.gather(-1, of_slot) + slot - (stop - lengths).gather(-1, of_slot)
    owners = of_slot // max(1, first.shape[1] // max(1, nodes.shape[1]))
    return places.masked_fill(~filled, 0), scores.gather(-1, of_slot).masked_fill(~filled, -torch.inf), owners


def _slots(trie: Trie, stop: Tensor, beams: int, depth: int) -> int:
    """How many candidates a request may have: the true number where reading it costs no sync, a bound elsewhere."""
    if stop.device.type == "cpu" and not tracing():
        return int(stop.max()) if stop.numel() else 0
    return min(beams * trie.parts.max_items[depth], trie.parts.num_places)


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
