"""Choosing what a search has besides its model, on validation data."""

from __future__ import annotations

from collections.abc import Sequence

from dgi.data import Interactions
from dgi.evaluation import metrics
from dgi.retrieval.search import Searcher

COSINE_WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
K = 10


def tune_cosine_weight(
    searcher: Searcher,
    validation: Interactions,
    *,
    weights: Sequence[float] = COSINE_WEIGHTS,
    num_beams: int | Sequence[int] = 50,
    exclude_history: bool = True,
    progress: bool = False,
) -> tuple[float, dict[float, float]]:
    """Choose the weight of the cosine in a ranking by ``order="sum"``, by NDCG@10.

    Args:
        searcher: model, index and catalog.
        validation: what was neither trained on nor will be tested on.
        weights: those to try.
        num_beams, exclude_history, progress: as in :meth:`dgi.Searcher.search_interactions`.

    Returns:
        The best weight, the least of equal ones, and the NDCG@10 of each.

    Raises:
        ValueError: there are no interactions or no weights.
    """
    if len(validation) == 0 or len(weights) == 0:
        raise ValueError(f"there must be interactions and weights; got {len(validation)} and {len(weights)}")
    found = {}
    for weight in sorted(weights):
        items = searcher.search_interactions(
            validation,
            k=K,
            num_beams=num_beams,
            exclude_history=exclude_history,
            progress=progress,
            order="sum",
            cosine_weight=weight,
        ).items
        found[weight] = metrics.ndcg(metrics.target_ranks(items.numpy(), validation.items), K)
    return max(found, key=lambda weight: (found[weight], -weight)), found
