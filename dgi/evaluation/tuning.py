"""Choosing what a search has besides its model, on validation data."""

from __future__ import annotations

from collections.abc import Sequence

from dgi.data import Interactions
from dgi.retrieval.fused import COSINE_WEIGHTS, K, choose_weights
from dgi.retrieval.search import Searcher

__all__ = ["COSINE_WEIGHTS", "K", "tune_cosine_weight"]


def tune_cosine_weight(
    searcher: Searcher,
    validation: Interactions,
    *,
    weights: Sequence[float] = COSINE_WEIGHTS,
    num_beams: int | Sequence[int] = 50,
    exclude_history: bool = True,
    progress: bool = False,
) -> tuple[float, dict[float, float]]:
    """Choose the weight of the cosine alone in a ranking by ``order="sum"``, by NDCG@10.

    :func:`dgi.retrieval.fused.choose_weights` chooses those of bias and popularity with it.

    Args:
        searcher: model, index and catalog.
        validation: what was neither trained on nor will be tested on.
        weights: those to try; 0 stands for the lexicographic ranking.
        num_beams, exclude_history, progress: as in :meth:`dgi.Searcher.search_interactions`.

    Returns:
        The best weight, the least of equal ones, and the NDCG@10 of each.

    Raises:
        ValueError: there are no interactions or no weights.
    """
    best, found = choose_weights(
        searcher,
        validation,
        cosine=weights,
        bias=(0.0,),
        popularity=(0.0,),
        guide=(0.0,),
        num_beams=num_beams,
        exclude_history=exclude_history,
        progress=progress,
    )
    return best.cosine, {tried.cosine: measure for tried, measure in found.items()}
