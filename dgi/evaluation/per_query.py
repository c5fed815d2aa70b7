"""Measures of each request, and intervals over them: what a paired comparison needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dgi.evaluation.metrics import CUTOFFS, popularity_buckets, target_ranks
from dgi.extras import require

MEASURES = tuple(f"{name}@{k}" for name in ("recall", "ndcg") for k in CUTOFFS)
RESAMPLES = 2000


def measure_queries(
    ranked_items: np.ndarray, targets: np.ndarray, relevant: Sequence[Mapping[int, int]] | None = None
) -> np.ndarray:
    """Recall and NDCG of each request: (len(MEASURES), n) float32.

    With one relevant item recall is the hit rate. With several, recall is the share of the items rated above 0 that are
    among the first k, and the gain of NDCG is ``2^rating - 1``.

    Args:
        ranked_items: (n, width) item rows, best first, -1 where there is none; width >= the largest cutoff.
        targets: (n,) the relevant item of each request.
        relevant: in its place, for each request the ratings of its items.
    """
    if ranked_items.ndim != 2 or ranked_items.shape[1] < max(CUTOFFS):
        raise ValueError(f"ranked_items must have shape (n, >= {max(CUTOFFS)}); got {ranked_items.shape}")
    if relevant is None:
        ranks = target_ranks(ranked_items, targets)
        gains = 1 / np.log2(ranks + 2)
        found = [ranks < k for k in CUTOFFS]
        return np.array([*found, *(np.where(hit, gains, 0) for hit in found)], dtype=np.float32)
    return np.array(
        [_graded(row, ratings) for row, ratings in zip(ranked_items.tolist(), relevant, strict=True)], dtype=np.float32
    ).T


def _graded(row: list[int], ratings: Mapping[int, int]) -> list[float]:
    wanted = sum(rating > 0 for rating in ratings.values())
    gains = np.array([2.0 ** ratings.get(item, 0) - 1 for item in row])
    ideal = np.sort([2.0**rating - 1 for rating in ratings.values()])[::-1]
    discounts = 1 / np.log2(np.arange(max(len(row), len(ideal))) + 2)
    recalls = [float((gains[:k] > 0).sum() / wanted) for k in CUTOFFS]
    ndcgs = [float(gains[:k] @ discounts[:k] / (ideal[:k] @ discounts[: len(ideal[:k])])) for k in CUTOFFS]
    return recalls + ndcgs


def bucket_means(values: np.ndarray, targets: np.ndarray, train_counts: np.ndarray) -> dict[str, float | None]:
    """Means of (n,) values by the popularity of the target: ``1`` the head, …, and ``unseen`` in training."""
    bucket_of = popularity_buckets(train_counts)
    groups = bucket_of[targets]
    return {
        "unseen" if bucket < 0 else str(bucket + 1): float(values[groups == bucket].mean())
        if (groups == bucket).any()
        else None
        for bucket in [*range(int(bucket_of.max(initial=-1)) + 1), -1]
    }


def interval(values: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Mean of (n,) values of requests with its 95 % interval, by the bootstrap over requests (percentiles).

    Of differences between two systems on the same requests this is the paired bootstrap.
    """
    stats = require("scipy.stats")
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2 or values.min() == values.max():
        return {"mean": mean, "low": mean, "high": mean}
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, 2**21 // len(values)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return {"mean": mean, "low": float(result.low), "high": float(result.high)}
