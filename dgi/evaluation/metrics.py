"""What an index is worth: ranking quality, also by popularity, and the geometry behind it.

One relevant item per query (the next film, the item clicked), at 0-based rank r of the list:

    HitRate@k = [r < k]        NDCG@k = [r < k] / log2(r + 2)

each averaged over the queries.  These two closed forms are what trec_eval's Success and nDCG reduce to, and are tested
against ir-measures, which needs 200 times as long for them.  Graded judgments, where nDCG is more than one line, are
left to ir-measures itself; it is imported only there, since the trec_eval it binds has no wheels for some platforms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dgi.data.judgments import Judgments
from dgi.extras import require

CUTOFFS = (1, 5, 10, 20)
Json = dict[str, Any]


def target_ranks(ranked_items: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The 0-based rank of each target in its list: (n, width) and (n,) item rows -> (n,) int64, ``width`` where absent.

    Lists are padded with -1 where a search returned fewer items.
    """
    ranked_items, targets = np.asarray(ranked_items), np.asarray(targets)
    if ranked_items.ndim != 2:
        raise ValueError(f"ranked_items must have shape (n, width); got {ranked_items.shape}")
    if targets.shape != ranked_items.shape[:1]:
        raise ValueError(f"targets must have shape (n,) = ({len(ranked_items)},); got {targets.shape}")
    if (targets < 0).any():
        raise ValueError(f"targets must be item rows, 0 or more; got {targets.min()}")
    hits = ranked_items == targets[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1), ranked_items.shape[1])


def hit_rate(ranks: np.ndarray, k: int) -> float:
    """HitRate@k: the share of :func:`target_ranks` below k."""
    return float(np.mean(ranks < k))


def ndcg(ranks: np.ndarray, k: int) -> float:
    """NDCG@k with one relevant item, from its :func:`target_ranks`."""
    return float(np.mean(np.where(ranks < k, 1 / np.log2(ranks + 2), 0.0)))


def evaluate_rankings(
    ranked_items: np.ndarray,
    targets: np.ndarray,
    train_counts: np.ndarray,
    *,
    num_buckets: int = 5,
    cutoffs: Sequence[int] = CUTOFFS,
) -> Json:
    """Hit rate and NDCG, overall and by the popularity of the target.

    Args:
        ranked_items: (n, width) integer item rows, best first, -1 where there is none; width >= the largest cutoff.
        targets: (n,) integer item rows.
        train_counts: (num_items,) how often each item was chosen in training.
        num_buckets: see :func:`popularity_buckets`.
        cutoffs: the k of HitRate@k and NDCG@k.

    Returns:
        JSON-ready ``{"overall": {"queries": n, "hit_rate@1": …, "ndcg@20": …}, "buckets": [{"name": "1 (head)",
        "items": …, "train_interactions": …, "queries": …, "hit_rate@1": …}, …, {"name": "unseen", …}]}``, from the
        most popular items to the least; measures are None where there are no queries.
    """
    ranked_items, targets, train_counts = np.asarray(ranked_items), np.asarray(targets), np.asarray(train_counts)
    ranks = target_ranks(ranked_items, targets)
    _check_width(ranked_items, cutoffs)
    if len(targets) and targets.max() >= len(train_counts):
        raise ValueError(f"targets must be below the number of items, {len(train_counts)}; got {targets.max()}")
    bucket_of = popularity_buckets(train_counts, num_buckets)
    last = int(bucket_of.max(initial=-1))
    buckets = []
    for bucket in [*range(last + 1), -1]:
        members = bucket_of == bucket
        buckets.append(
            {
                "name": _bucket_name(bucket, last),
                "items": int(members.sum()),
                "train_interactions": int(train_counts[members].sum()),
                **_measures(ranks[members[targets]], cutoffs),
            }
        )
    return {"overall": _measures(ranks, cutoffs), "buckets": buckets}


def popularity_buckets(train_counts: np.ndarray, num_buckets: int = 5) -> np.ndarray:
    """Sort items by popularity into buckets that hold about equally many training interactions each.

    Items of equal count stay together, at the place of the middle of their interactions; so there may be fewer buckets
    than asked for, but none is empty.

    Args:
        train_counts: (num_items,) how often each item was chosen in training.

    Returns:
        (num_items,) int64: 0 is the head, larger is less popular, -1 are the items unseen in training.
    """
    train_counts = np.asarray(train_counts)
    if train_counts.ndim != 1 or (train_counts < 0).any():
        raise ValueError("train_counts must have shape (num_items,) and be 0 or more")
    if num_buckets < 1:
        raise ValueError(f"num_buckets must be at least 1; got {num_buckets}")
    counts, group_of, sizes = np.unique(-train_counts, return_inverse=True, return_counts=True)  # most popular first
    mass = -counts * sizes
    middle = np.cumsum(mass) - mass / 2
    bucket_of_group = np.floor(num_buckets * middle / max(mass.sum(), 1)).astype(np.int64)
    seen = train_counts > 0
    buckets = np.full(len(train_counts), -1, dtype=np.int64)
    buckets[seen] = np.unique(bucket_of_group[group_of[seen]], return_inverse=True)[1]
    return buckets


def evaluate_judgments(ranked_items: np.ndarray, judgments: Judgments, *, cutoffs: Sequence[int] = CUTOFFS) -> Json:
    """Hit rate and NDCG against graded judgments, over the queries that have a relevant item (a rating above 0).

    The gain of a rating is ``2^rating - 1``, the discount ``1 / log2(rank + 2)``.  ``ndcg@k`` takes an item without a
    judgment for irrelevant; ``ndcg_judged@k`` leaves such items out of the list first, so it needs lists that are long
    enough, or a search among the judged items only; ``judged@k`` is the share of the first k places that hold a
    judged item.

    Args:
        ranked_items: (n, width) integer item rows, best first, -1 where there is none; width >= the largest cutoff.
        judgments: n queries in the same order.

    Raises:
        ImportError: ir-measures is not installed.
    """
    ir_measures = require("ir_measures", "eval")
    ranked_items = np.asarray(ranked_items)
    if ranked_items.ndim != 2 or len(ranked_items) != len(judgments):
        raise ValueError(
            f"ranked_items must have shape (n, width) with n = {len(judgments)} queries; got {ranked_items.shape}"
        )
    _check_width(ranked_items, cutoffs)
    gains, run, judged = {}, {}, []
    for query, (ratings, row) in enumerate(zip(judgments.ratings, ranked_items.tolist(), strict=True)):
        if max(ratings.values()) > 0:
            gains[str(query)] = {str(item): 2**rating - 1 for item, rating in ratings.items()}
            run[str(query)] = {str(item): float(-rank) for rank, item in enumerate(dict.fromkeys(row)) if item >= 0}
            judged.append([item in ratings for item in row])
    if not gains:
        raise ValueError("judgments must have at least one query with a rating above 0; got none")
    named = {
        f"{name}@{k}": measure @ k
        for name, measure in (
            ("hit_rate", ir_measures.Success),
            ("ndcg", ir_measures.nDCG),
            ("ndcg_judged", ir_measures.nDCG(judged_only=True)),
        )
        for k in cutoffs
    }
    values = ir_measures.calc_aggregate(named.values(), gains, run)
    return {
        "queries": len(gains),
        **{name: float(values[measure]) for name, measure in named.items()},
        **{f"judged@{k}": float(np.mean(np.array(judged)[:, :k])) for k in cutoffs},
    }


def hubness(ranked_items: np.ndarray, num_items: int, k: int = 10) -> Json:
    """How unevenly items turn up in the first k results: the k-occurrences N_k (Radovanovic et al., JMLR 2010).

    Args:
        ranked_items: (n, width >= k) integer item rows, best first, -1 where there is none.

    Returns:
        ``skewness`` of N_k over all items of the catalog (0 where all are equal), ``max_occurrence`` in lists, and
        ``never_returned``, the share of the catalog that is in no list.
    """
    ranked_items = np.asarray(ranked_items)
    _check_width(ranked_items, (k,))
    top = ranked_items[:, :k]
    occurrences = np.bincount(top[top >= 0], minlength=num_items)
    if len(occurrences) != num_items:
        raise ValueError(f"ranked_items must be below num_items = {num_items}; got {len(occurrences) - 1}")
    stats = require("scipy.stats")  # takes a while to import, and nothing else needs it

    uneven = occurrences.min() != occurrences.max()
    return {
        "k": k,
        "skewness": float(stats.skew(occurrences)) if uneven else 0.0,
        "max_occurrence": int(occurrences.max()),
        "never_returned": float(np.mean(occurrences == 0)),
    }


def isotropy(vectors: np.ndarray) -> Json:
    """How evenly the directions of (n, d) vectors fill the space; vectors are normalised first.

    ``iso_score`` is the IsoScore of Rudman et al. (Findings of ACL 2022): with the eigenvalues λ of the covariance,
    ``((Σλ)² / Σλ² - 1) / (d - 1)``, which their steps reduce to: 1 where all directions vary alike, 0 where all
    variance is in one dimension.  It does not see a common offset; ``mean_cosine`` over all pairs does:
    ``(‖Σx̂‖² - Σ‖x̂‖²) / (n (n - 1))``, 0 where there is none.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) < 2 or vectors.shape[1] < 2:
        raise ValueError(f"vectors must have shape (n, d) with n and d at least 2; got {vectors.shape}")
    n, d = vectors.shape
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    covariance = np.cov(unit, rowvar=False)
    variance = np.trace(covariance)  # Σλ
    effective = variance**2 / np.sum(covariance**2) if variance > 1e-12 else 1.0  # Σλ² is the squared Frobenius norm
    mean_cosine = (np.sum(unit.sum(axis=0) ** 2) - np.sum(unit**2)) / (n * (n - 1))
    return {"iso_score": float((effective - 1) / (d - 1)), "mean_cosine": float(mean_cosine)}


def code_usage(codes: np.ndarray, codebook_sizes: Sequence[int]) -> list[Json]:
    """How much of each codebook (N, m) codes use.

    Returns:
        One dict per level: ``size`` K, ``used`` the share of codes that occur, ``entropy`` of their frequencies in
        nats, ``perplexity = exp(entropy)``, the number of codes that an even use would come down to (at most K).
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or not len(codes) or codes.shape[1] != len(codebook_sizes):
        raise ValueError(
            f"codes must have shape (N, m) with N at least 1 and m = {len(codebook_sizes)}; got {codes.shape}"
        )
    stats = require("scipy.stats")

    levels = []
    for level, size in enumerate(codebook_sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        if len(counts) != size:
            raise ValueError(f"codes of level {level} must be below {size}; got {codes[:, level].max()}")
        entropy = float(stats.entropy(counts))
        levels.append(
            {"size": int(size), "used": float(np.mean(counts > 0)), "entropy": entropy, "perplexity": math.exp(entropy)}
        )
    return levels


def collisions(codes: np.ndarray) -> Json:
    """How many items share a semantic ID, from their (N, m) codes.

    Returns:
        ``unique_sids``; ``colliding_items``, the share of items that share theirs; ``max_items_per_sid``.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or not len(codes):
        raise ValueError(f"codes must have shape (N, m) with N at least 1; got {codes.shape}")
    counts = np.unique(codes, axis=0, return_counts=True)[1]
    return {
        "unique_sids": len(counts),
        "colliding_items": float(counts[counts > 1].sum() / len(codes)),
        "max_items_per_sid": int(counts.max()),
    }


def _measures(ranks: np.ndarray, cutoffs: Sequence[int]) -> Json:
    values: Json = {"queries": len(ranks)}
    for name, measure in (("hit_rate", hit_rate), ("ndcg", ndcg)):
        values |= {f"{name}@{k}": measure(ranks, k) if len(ranks) else None for k in cutoffs}
    return values


def _bucket_name(bucket: int, last: int) -> str:
    if bucket < 0:
        return "unseen"
    end = " (head)" if bucket == 0 else " (tail)" if bucket == last else ""
    return f"{bucket + 1}{end}"


def _check_width(ranked_items: np.ndarray, cutoffs: Sequence[int]) -> None:
    if ranked_items.ndim != 2 or ranked_items.shape[1] < max(cutoffs):
        raise ValueError(
            f"ranked_items must have shape (n, width) with width at least {max(cutoffs)}, the largest "
            f"cutoff; got {ranked_items.shape}; search with a larger k and pad with -1"
        )
