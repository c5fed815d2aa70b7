"""The coarse-to-fine end of the search: the items of the surviving beams, by beam score, then by cosine, or by a sum.

The beam score orders the semantic IDs; items that share one (or lie below one prefix) are told apart by
``cos(z_q, z_item)`` (``docs/method.md``, "Search, coarse to fine").
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.backend import choose_without_gradient
from dgi_kernels.beam import BeamResult
from dgi_kernels.ranking import native, reference
from dgi_kernels.trie import MAX_COUNT, Beams, Trie
from dgi_kernels.trie.filters import Filters, check_filters
from dgi_kernels.types import Backend, Order

__all__ = ["Ranking", "rank_candidates"]


class Ranking(NamedTuple):
    """The k best items of each of B requests, best first.

    Attributes:
        items: (B, k) int64 item ids, -1 if there are fewer than k.
        scores: (B, k) float32 score of the beam that the item is below, with ``order="sum"`` the sum; -inf where there
            is no item.
        cosines: (B, k) cosine of query and item, -1 where there is no item; float32 (float64 for float64 inputs).
    """

    items: Tensor
    scores: Tensor
    cosines: Tensor


def rank_candidates(
    query: Tensor,
    item_vectors: Tensor,
    trie: Trie,
    beams: Beams | BeamResult,
    k: int,
    *,
    filters: Filters = None,
    order: Order = "lexicographic",
    cosine_weight: float = 1.0,
    share: bool = True,
    backend: Backend = "auto",
) -> Ranking:
    """Rank the items below beams: by beam score first, then cosine with the query, or by a sum of both.

    ``order="sum"`` ranks by ``beam score + cosine_weight * cosine``, minus the log of the number of items below the
    beam's node that the request may find if they ``share`` its probability: then a semantic ID of many items does not
    fill the list. Equal sums are ranked by cosine. Either way the lower item id comes first of those that are equal.

    Args:
        query: (B, D) float32, bfloat16, float16 or float64, of any length; the cosine is computed in float32 (float64
            for float64 inputs). A zero vector has cosine 0 with everything, one that is not finite -1.
        item_vectors: (rows, D), the dtype of ``query``; the row of an item is its id.
        trie: the trie that was searched.
        beams: Beams of any depth, or the BeamResult of a whole search. Beams with equal scores are merged: their items
            are ordered by cosine. A node that occurs twice counts once.
        k: the number of items to return, from 1.
        filters: as given to the search. Items that share a semantic ID with an allowed one are found by it too; this
            leaves out those that are not allowed.
        order: ``"lexicographic"`` or ``"sum"``.
        cosine_weight: what the cosine counts in a sum, a finite number; read with ``order="sum"`` only.
        share: whether items share their node's probability in a sum; read with ``order="sum"`` only.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        Ranking: items, scores, cosines, each (B, k); where there are fewer than k: -1, -inf and -1.

    Raises:
        ValueError: a shape, device or filter does not fit, a node is out of range (on CUDA checked inside
            ``dgi_kernels.debug()`` only; it is dead otherwise), or an item id of the trie is no row of
            ``item_vectors``.
        TypeError: an argument has the wrong type or dtype.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> trie = dgi_kernels.Trie.from_codes([[0], [0], [1]])  # items 0 and 1 share a semantic ID
        >>> beams = dgi_kernels.beam_step(trie, torch.tensor([[[2.0, 1.0]]]), trie.root(1), num_beams=2)
        >>> vectors = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
        >>> dgi_kernels.rank_candidates(torch.tensor([[1.0, 0.0]]), vectors, trie, beams, k=3).items
        tensor([[1, 0, 2]])
    """
    if not isinstance(trie, Trie):
        raise TypeError(f"trie must be a Trie; got {type(trie).__name__}")
    checks.float_tensor("query", query, ndim=2, like=trie.parts.base.tokens[0])
    checks.float_tensor("item_vectors", item_vectors, ndim=2, like=query)
    checks.shape("item_vectors", item_vectors, (None, query.shape[1]), "(rows, D)")
    checks.same_dtype("item_vectors", item_vectors, "query", query)
    _check_ids(trie, len(item_vectors))
    nodes, scores, depth = _check_beams(trie, beams, query)
    checks.integer("k", k, low=1, high=MAX_COUNT)
    filters = check_filters(filters, trie, query.shape[0])
    checks.choice("order", order, get_args(Order))
    ranked_by = (order == "sum", checks.number("cosine_weight", cosine_weight), share)
    if not isinstance(share, bool):
        raise TypeError(f"share must be a bool; got {type(share).__name__}")
    common = torch.promote_types(query.dtype, item_vectors.dtype)
    if choose_without_gradient("rank_candidates", backend, query, item_vectors) == "native":
        return Ranking(
            *native.rank_candidates(
                query.to(common), item_vectors.to(common), trie, nodes, scores, depth, k, filters, *ranked_by
            )
        )
    compute = checks.compute_dtype(common)
    with torch.autocast(query.device.type, enabled=False):
        return Ranking(
            *reference.rank_candidates(
                query.to(compute), item_vectors, trie, nodes, scores, depth, k, filters, *ranked_by
            )
        )


def _check_ids(trie: Trie, rows: int) -> None:
    low, high = trie.parts.id_bounds
    if trie.num_items and (low < 0 or high >= rows):
        raise ValueError(
            f"item_vectors must have a row for every item id of the trie, {low} to {high}; got {rows} rows"
        )


def _check_beams(trie: Trie, beams: Beams | BeamResult, query: Tensor) -> tuple[Tensor, Tensor, int]:
    if not isinstance(beams, (Beams, BeamResult)):
        raise TypeError(f"beams must be Beams or a BeamResult; got {type(beams).__name__}")
    depth = beams.depth if isinstance(beams, Beams) else trie.depth
    checks.integer("beams.depth", depth, low=0, high=trie.depth)
    checks.tensor("beams.nodes", beams.nodes, dtypes=(torch.int64, torch.int32), ndim=2, like=query)
    checks.shape("beams.nodes", beams.nodes, (query.shape[0], None), "(B, M)")
    checks.float_tensor("beams.scores", beams.scores, like=query)
    checks.shape("beams.scores", beams.scores, tuple(beams.nodes.shape), "(B, M)")
    nodes = checks.index("beams.nodes", beams.nodes, 0, trie.num_nodes_at(depth), also=-1)
    return nodes.long(), beams.scores.float(), depth
