"""Every measure against values worked out by hand and against ir-measures, scipy or the definition written out."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from scipy import stats

from dgi.data import Judgments
from dgi.evaluation import metrics


def rankings(n: int, num_items: int, width: int) -> np.ndarray:
    """Random lists without repetition, some of them cut short with -1."""
    lists = np.argsort(np.random.rand(n, num_items), axis=1)[:, :width]
    lists[np.arange(width) >= np.random.randint(0, width + 1, size=(n, 1))] = -1
    return lists


def test_by_hand() -> None:
    ranked = np.array([[3, 1, 2], [0, 1, 2], [2, 0, 3], [1, -1, -1]])
    ranks = metrics.target_ranks(ranked, np.array([3, 2, 1, 1]))
    assert ranks.tolist() == [0, 2, 3, 0]
    assert metrics.hit_rate(ranks, 1) == 0.5 and metrics.hit_rate(ranks, 3) == 0.75
    assert metrics.ndcg(ranks, 3) == pytest.approx((1 + 1 / math.log2(4) + 0 + 1) / 4)


def test_against_ir_measures() -> None:
    ir_measures = pytest.importorskip("ir_measures")
    n, num_items = 200, 60
    ranked, targets = rankings(n, num_items, 20), np.random.randint(num_items, size=n)
    mine = metrics.evaluate_rankings(ranked, targets, np.ones(num_items, np.int64))["overall"]
    run = {str(q): {str(item): -float(r) for r, item in enumerate(row) if item >= 0} for q, row in enumerate(ranked)}
    qrels = {str(q): {str(target): 1} for q, target in enumerate(targets)}
    for k in (1, 5, 10, 20):
        theirs = ir_measures.calc_aggregate([ir_measures.Success @ k, ir_measures.nDCG @ k], qrels, run)
        assert mine[f"hit_rate@{k}"] == pytest.approx(theirs[ir_measures.Success @ k], abs=1e-12)
        assert mine[f"ndcg@{k}"] == pytest.approx(theirs[ir_measures.nDCG @ k], abs=1e-12)
    assert mine["queries"] == n


def test_buckets_share_out_the_interactions() -> None:
    counts = np.random.permutation(np.concatenate([np.random.zipf(1.3, 3000) % 500, np.zeros(40, np.int64)]))
    buckets = metrics.popularity_buckets(counts, 5)
    assert ((buckets == -1) == (counts == 0)).all()
    assert sorted(set(buckets.tolist()) - {-1}) == [0, 1, 2, 3, 4]
    by_popularity = np.argsort(-counts, kind="stable")
    seen = buckets[by_popularity][counts[by_popularity] > 0]
    assert (np.diff(seen) >= 0).all()  # head to tail
    for count in np.unique(counts):
        assert len(set(buckets[counts == count])) == 1  # equal popularity, equal bucket
    largest_group = max(count * np.sum(counts == count) for count in np.unique(counts))
    for bucket in range(5):
        assert abs(counts[buckets == bucket].sum() - counts.sum() / 5) <= largest_group


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([0, 0], [-1, -1]),
        ([4, 4, 4], [0, 0, 0]),
        ([90, 5, 5], [0, 1, 1]),
        ([1, 3, 0, 2, 2], [2, 0, -1, 1, 1]),  # middles 1.5, 5 and 7.5 of 8: fifths 1, 3 and 4, renumbered
    ],
)
def test_buckets_by_hand(counts: list[int], expected: list[int]) -> None:
    assert metrics.popularity_buckets(np.array(counts)).tolist() == expected


def test_evaluation_by_bucket() -> None:
    n, num_items = 500, 50
    counts = np.random.randint(0, 30, size=num_items)
    counts[:2] = 0, 30
    ranked, targets = rankings(n, num_items, 20), np.random.randint(num_items, size=n)
    result = metrics.evaluate_rankings(ranked, targets, counts, num_buckets=4)
    assert json.loads(json.dumps(result)) == result
    names = [bucket["name"] for bucket in result["buckets"]]
    assert names == ["1 (head)", "2", "3", "4 (tail)", "unseen"]
    assert sum(bucket["queries"] for bucket in result["buckets"]) == n
    assert sum(bucket["items"] for bucket in result["buckets"]) == num_items
    assert sum(bucket["train_interactions"] for bucket in result["buckets"]) == counts.sum()
    assert result["buckets"][-1]["items"] == np.sum(counts == 0)
    for key in ("hit_rate@10", "ndcg@20"):  # the overall value is the mean of the buckets, weighted by their queries
        total = sum(bucket["queries"] * (bucket[key] or 0.0) for bucket in result["buckets"])
        assert total / n == pytest.approx(result["overall"][key], abs=1e-12)


def test_buckets_without_queries_have_no_value() -> None:
    result = metrics.evaluate_rankings(np.zeros((3, 20), np.int64), np.zeros(3, np.int64), np.array([9, 1]))
    assert result["overall"]["hit_rate@1"] == 1.0
    assert result["buckets"][0]["queries"] == 3
    assert result["buckets"][1]["hit_rate@1"] is None and result["buckets"][-1]["ndcg@20"] is None


def test_bad_rankings_are_named() -> None:
    good, targets, counts = np.zeros((3, 20), np.int64), np.zeros(3, np.int64), np.ones(5, np.int64)
    with pytest.raises(ValueError, match="ranked_items must have shape .* width at least 20"):
        metrics.evaluate_rankings(good[:, :10], targets, counts)
    with pytest.raises(ValueError, match=r"targets must have shape \(n,\) = \(3,\); got \(2,\)"):
        metrics.evaluate_rankings(good, targets[:2], counts)
    with pytest.raises(ValueError, match="targets must be item rows, 0 or more; got -1"):
        metrics.evaluate_rankings(good, targets - 1, counts)  # -1 would match the padding
    with pytest.raises(ValueError, match="targets must be below the number of items, 5; got 5"):
        metrics.evaluate_rankings(good, targets + 5, counts)
    with pytest.raises(ValueError, match="train_counts must"):
        metrics.evaluate_rankings(good, targets, counts - 2)


def test_graded_judgments_by_hand() -> None:
    pytest.importorskip("ir_measures")
    judgments = Judgments(("q", "r", "s"), ({0: 3, 1: 1, 2: 0}, {4: 0}, {5: 1}))
    ranked = np.array([[7, 1, 0, 2, 8], [4, 1, 2, 3, 0], [6, 7, 8, -1, -1]])
    result = metrics.evaluate_judgments(ranked, judgments, cutoffs=(1, 3))
    discount = [1 / math.log2(rank + 2) for rank in range(3)]
    ideal = 7 * discount[0] + 1 * discount[1]
    assert result["queries"] == 2  # "r" has nothing relevant
    assert result["hit_rate@1"] == 0 and result["hit_rate@3"] == 0.5
    assert result["ndcg@3"] == pytest.approx((1 * discount[1] + 7 * discount[2]) / ideal / 2)
    assert result["ndcg_judged@3"] == pytest.approx((1 * discount[0] + 7 * discount[1]) / ideal / 2)
    assert result["judged@1"] == 0 and result["judged@3"] == pytest.approx(2 / 3 / 2)


def test_graded_judgments_equal_the_definition() -> None:
    pytest.importorskip("ir_measures")
    n, num_items = 30, 40
    ratings = tuple(
        {int(i): int(np.random.randint(4)) for i in np.random.permutation(num_items)[:15]} | {0: 2} for _ in range(n)
    )
    ranked = rankings(n, num_items, 20)
    result = metrics.evaluate_judgments(ranked, Judgments(tuple(map(str, range(n))), ratings))

    def dcg(gains: list[int]) -> float:
        return sum((2**gain - 1) / math.log2(rank + 2) for rank, gain in enumerate(gains[:10]))

    expected = np.mean(
        [
            dcg([rated.get(item, 0) for item in row]) / dcg(sorted(rated.values(), reverse=True))
            for rated, row in zip(ratings, ranked.tolist(), strict=True)
        ]
    )
    assert result["ndcg@10"] == pytest.approx(expected, abs=1e-9)


def test_judgments_need_a_relevant_item() -> None:
    pytest.importorskip("ir_measures")
    with pytest.raises(ValueError, match="at least one query with a rating above 0"):
        metrics.evaluate_judgments(np.zeros((1, 20), np.int64), Judgments(("q",), ({0: 0},)))
    with pytest.raises(ValueError, match=r"n = 1 queries; got \(2, 20\)"):
        metrics.evaluate_judgments(np.zeros((2, 20), np.int64), Judgments(("q",), ({0: 1},)))


def test_hubness() -> None:
    ranked = np.array([[0, 1, 9], [0, 2, 9], [0, -1, 9], [0, 1, 9]])
    result = metrics.hubness(ranked, 5, k=2)  # occurrences 4 2 1 0 0; the third column is beyond k
    assert result == {
        "k": 2,
        "skewness": pytest.approx(stats.skew([4, 2, 1, 0, 0])),
        "max_occurrence": 4,
        "never_returned": 0.4,
    }
    moments = np.array([4, 2, 1, 0, 0]) - 1.4
    assert result["skewness"] == pytest.approx(np.mean(moments**3) / np.mean(moments**2) ** 1.5)
    assert metrics.hubness(np.array([[0], [1]]), 2, k=1)["skewness"] == 0.0
    with pytest.raises(ValueError, match="ranked_items must be below num_items = 5; got 9"):
        metrics.hubness(ranked, 5, k=3)


def test_isotropy_equals_the_published_steps() -> None:
    """IsoScore, algorithm 1 of Rudman et al. 2022, step by step, and the mean cosine pair by pair."""
    vectors = np.random.randn(40, 6) * np.random.rand(6) * 3 + np.random.randn(6)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    d = 6
    variances = np.linalg.eigvalsh(np.cov(unit.T))  # the diagonal of the covariance after PCA
    normalised = math.sqrt(d) * variances / np.linalg.norm(variances)
    defect = np.linalg.norm(normalised - np.ones(d)) / math.sqrt(2 * (d - math.sqrt(d)))
    fraction = (d - defect**2 * (d - math.sqrt(d))) ** 2 / d**2
    result = metrics.isotropy(vectors)
    assert result["iso_score"] == pytest.approx((d * fraction - 1) / (d - 1), abs=1e-9)
    cosines = [unit[i] @ unit[j] for i, j in itertools.permutations(range(40), 2)]
    assert result["mean_cosine"] == pytest.approx(np.mean(cosines), abs=1e-12)


def test_isotropy_at_the_extremes() -> None:
    both_ways = np.concatenate([np.eye(5), -np.eye(5)]) * np.random.uniform(1, 9, size=(10, 1))
    assert metrics.isotropy(both_ways)["iso_score"] == pytest.approx(1.0)
    line = np.outer(np.array([1.0, -2.0, 3.0]), np.random.randn(4))
    assert metrics.isotropy(line)["iso_score"] == pytest.approx(0.0, abs=1e-9)
    assert metrics.isotropy(np.ones((7, 4))) == {"iso_score": 0.0, "mean_cosine": pytest.approx(1.0)}
    assert metrics.isotropy(np.zeros((7, 4))) == {"iso_score": 0.0, "mean_cosine": 0.0}
    with pytest.raises(ValueError, match="vectors must have shape"):
        metrics.isotropy(np.ones((1, 4)))


def test_code_usage_and_collisions() -> None:
    codes = np.array([[0, 0], [0, 1], [1, 2], [1, 2], [1, 2], [2, 0]])
    first, second = metrics.code_usage(codes, [4, 3])
    assert first["size"] == 4 and first["used"] == 0.75 and second["used"] == 1.0
    assert first["entropy"] == pytest.approx(-sum(p * math.log(p) for p in (1 / 3, 1 / 2, 1 / 6)))
    assert first["perplexity"] == pytest.approx(math.exp(first["entropy"]))
    assert metrics.code_usage(np.arange(8)[:, None], [8])[0]["perplexity"] == pytest.approx(8)
    assert metrics.collisions(codes) == {"unique_sids": 4, "colliding_items": 0.5, "max_items_per_sid": 3}
    assert metrics.collisions(codes[:3])["colliding_items"] == 0.0
    with pytest.raises(ValueError, match="codes of level 0 must be below 2; got 2"):
        metrics.code_usage(codes, [2, 3])
    with pytest.raises(ValueError, match=r"m = 3; got \(6, 2\)"):
        metrics.code_usage(codes, [4, 3, 2])
