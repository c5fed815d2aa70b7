"""Head against tail as a knob: the quality of a system over the weight of popularity that its search takes off.

Every system keeps the other weights that the validation set has chosen. The knob is turned on the test requests, to
show what it does; no setting is chosen by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgi.data import Interactions
from dgi.evaluation.evaluate import K
from dgi.evaluation.per_query import MEASURES, bucket_means, measure_queries
from dgi.retrieval.baselines import Dense, Generative, Retriever
from dgi.retrieval.fused import TEMPERATURE, Candidates

ALPHAS = (-0.25, 0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # of −α log(1 + clicks), for scores that are one log-probability
_WIDTH = 20  # of the rankings that are measured


def tail_curve(
    system: Retriever, test: Interactions, counts: np.ndarray, *, exclude_history: bool
) -> list[dict[str, Any]] | None:
    """Recall and NDCG at 10 of each α, in all and by popularity bucket; None for a system without such a knob."""
    found = _rankings(system, test, torch.from_numpy(counts), exclude_history)
    if found is None:
        return None
    rows = []
    for alpha, items in found:
        values = measure_queries(items.numpy(), test.items)
        recall, ndcg = (values[MEASURES.index(f"{name}@{K}")] for name in ("recall", "ndcg"))
        rows.append(
            {
                "popularity_weight": alpha,
                f"recall@{K}": float(recall.mean(dtype=np.float64)),
                f"ndcg@{K}": float(ndcg.mean(dtype=np.float64)),
                "buckets": bucket_means(recall, test.items, counts),
            }
        )
    return rows


def _rankings(
    system: Retriever, test: Interactions, counts: Tensor, exclude_history: bool
) -> Iterator[tuple[float, Tensor]] | None:
    if isinstance(system, Dense):
        return _dense(system, test, exclude_history)
    if isinstance(system, Generative):
        return _generative(system, test, counts, exclude_history)
    return None


def _dense(system: Dense, test: Interactions, exclude_history: bool) -> Iterator[tuple[float, Tensor]]:
    chosen = system.popularity_weight
    for alpha in ALPHAS:
        system.popularity_weight = alpha
        yield alpha, system.search(test, _WIDTH, exclude_history=exclude_history).items
    system.popularity_weight = chosen


def _generative(
    system: Generative, test: Interactions, counts: Tensor, exclude_history: bool
) -> Iterator[tuple[float, Tensor]]:
    """One search finds the candidates of all weights: what the beams find does not depend on them."""
    own = system.model.item_bias
    options = {"num_beams": system.num_beams, "exclude_history": exclude_history}
    candidates = Candidates.find(system.searcher, test, **options)
    for alpha in ALPHAS:
        alpha = round(alpha * (1.0 + system.weights.cosine * TEMPERATURE), 6)  # so many log-probabilities are summed
        weights = dataclasses.replace(system.weights, popularity=alpha)
        yield alpha, candidates.ranked(weights, weights.item_scores(own, counts), _WIDTH)


def mean_curve(curves: list[list[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """The curve of several seeds: means of every value."""
    return [_mean(rows) for rows in zip(*curves, strict=True)]


def _mean(rows: tuple[Mapping[str, Any], ...]) -> dict[str, Any]:
    means: dict[str, Any] = {}
    for key, value in rows[0].items():
        values = [row[key] for row in rows]
        if isinstance(value, Mapping):
            means[key] = _mean(tuple(values))
        else:
            means[key] = None if any(one is None for one in values) else float(np.mean(values))
    return means
