"""Baselines and evaluation against counting by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dgi.config import ModelConfig
from dgi.data import Catalog, Interactions, Judgments
from dgi.evaluation import evaluate, metrics
from dgi.model.dgi_model import DGIModel
from dgi.retrieval.baselines import rank_by_popularity
from dgi.retrieval.index import DGIIndex
from dgi.retrieval.search import Requests, Searcher, rank_by_cosine

ITEMS = 25


def make_interactions(n: int) -> Interactions:
    histories, items = np.random.randint(-1, ITEMS, (n, 4)), np.random.randint(0, ITEMS, n)
    return Interactions(("",) * n, histories, items, np.arange(n, dtype=np.float64))


@pytest.fixture
def vector_searcher() -> Searcher:
    vectors = np.random.randn(ITEMS, 6).astype(np.float32)
    catalog = Catalog(tuple(map(str, range(ITEMS))), tuple(f"item {row}" for row in range(ITEMS)), vectors)
    model = DGIModel(
        ModelConfig(
            encoder="vectors",
            vector_dim=6,
            dim=8,
            codebook_sizes=(5, 3),
            attention_heads=2,
            history_layers=1,
            decoder_layers=1,
        )
    ).eval()
    return Searcher(model, DGIIndex.build(model, catalog), catalog)


def test_popularity_ranks_by_training_counts_without_the_history() -> None:
    train, test = make_interactions(200), make_interactions(30)
    counts = evaluate.train_counts(train, ITEMS)
    assert counts.tolist() == [train.items.tolist().count(item) for item in range(ITEMS)]
    order = sorted(range(ITEMS), key=lambda item: (-counts[item], item))
    assert rank_by_popularity(counts, 3, 7).tolist() == [order[:7]] * 3
    for k in (5, ITEMS, ITEMS + 3):
        ranked = rank_by_popularity(counts, len(test), k, exclude=evaluate.history_rows(test))
        for row, history in zip(ranked.tolist(), test.histories.tolist(), strict=True):
            expected = [item for item in order if item not in history]
            assert row == (expected + [-1] * k)[:k]


@pytest.mark.parametrize("k", [1, 6, ITEMS + 2])
def test_cosine_ranking_is_the_sorted_cosines_without_the_history(k: int) -> None:
    test = make_interactions(11)
    queries, vectors = torch.randn(11, 6), torch.randn(ITEMS, 6) * torch.rand(ITEMS, 1)
    for exclude in (None, evaluate.history_rows(test)):
        ranked = rank_by_cosine(queries, vectors, k, exclude=exclude, batch_size=4)
        for row, query in enumerate(queries):
            cosines = torch.nn.functional.cosine_similarity(query.double(), vectors.double(), dim=1)
            left_out = [] if exclude is None else exclude[row].tolist()
            expected = [item for item in cosines.argsort(descending=True).tolist() if item not in left_out]
            assert ranked[row].tolist() == (expected + [-1] * k)[:k]


def test_the_sample_is_fixed_and_keeps_the_order() -> None:
    interactions = make_interactions(100)
    drawn = evaluate.sample(interactions, 20)
    assert len(drawn) == 20 and (np.diff(drawn.timestamps) > 0).all()
    assert np.array_equal(drawn.timestamps, evaluate.sample(interactions, 20).timestamps)
    assert evaluate.sample(interactions, None) is interactions and evaluate.sample(interactions, 100) is interactions


def test_targets_in_their_own_history_are_counted() -> None:
    test = make_interactions(50)
    expected = sum(item in history for item, history in zip(test.items.tolist(), test.histories.tolist(), strict=True))
    assert evaluate.targets_in_history(test) == expected


def test_recall_counts_the_items_of_a_grade_or_better() -> None:
    judgments = Judgments(("a", "b", "c"), ({1: 3, 2: 1, 3: 0}, {4: 3, 5: 3}, {6: 0}))
    ranked = np.array([[1, 7, 2, 3], [9, 5, 8, -1], [6, 1, 2, 3]])
    assert evaluate.recall(ranked, judgments, 1) == pytest.approx((1 / 2 + 0) / 2)
    assert evaluate.recall(ranked, judgments, 3) == pytest.approx((1 + 1 / 2) / 2)
    assert evaluate.recall(ranked, judgments, 4, rating=3) == pytest.approx((1 + 1 / 2) / 2)
    with pytest.raises(ValueError, match="at least one rating of 4"):
        evaluate.recall(ranked, judgments, 1, rating=4)


def test_index_measures_are_those_of_its_codes_and_vectors(vector_searcher: Searcher) -> None:
    index = vector_searcher.index
    measured = evaluate.evaluate_index(index)
    sids = [tuple(code) for code in index.codes.tolist()]
    assert measured["items"] == ITEMS and measured["collisions"]["unique_sids"] == len(set(sids))
    assert [level["used"] for level in measured["codes"]] == [
        len({sid[0] for sid in sids}) / 5,
        len({sid[1] for sid in sids}) / 3,
    ]
    assert measured["isotropy"] == metrics.isotropy(index.vectors.numpy())


def test_judged_queries_are_measured_for_the_index_and_for_both_kinds_of_cosine(vector_searcher: Searcher) -> None:
    ratings = tuple(
        {int(item): int(np.random.randint(0, 4)) for item in np.random.permutation(ITEMS)[:12]} | {0: 3}
        for _ in range(5)
    )
    vectors = np.random.randn(5, 6).astype(np.float32)
    judgments = Judgments(tuple("abcde"), ratings, vectors)
    results = evaluate.evaluate_judgments(vector_searcher, judgments)

    def cosines(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, items)]
        return unit[0] @ unit[1].T

    no_history = Interactions(("",) * 5, np.full((5, 1), -1), np.zeros(5, dtype=np.int64), np.zeros(5), vectors)
    everything = vector_searcher.search_interactions(no_history, k=ITEMS, num_beams=ITEMS).items.numpy()
    requests = Requests.of(vector_searcher.model, no_history)
    with torch.no_grad():
        ((_, batch),) = requests.batches(vector_searcher.item_features, 5)
        encoded = vector_searcher.model.encode_queries(batch).vector.numpy()
    rankings = {
        "DGI": everything,
        "exact cosine": np.argsort(-cosines(encoded, vector_searcher.index.vectors.numpy()), axis=1),
        "plain cosine": np.argsort(-cosines(vectors, vector_searcher.catalog.vectors), axis=1),
    }
    assert list(results) == list(rankings)
    for name, ranked in rankings.items():
        for k in (10, 100):
            shares = [
                len({i for i, r in given.items() if r > 0} & set(row[:k])) / sum(r > 0 for r in given.values())
                for given, row in zip(ratings, ranked.tolist(), strict=True)
            ]
            assert results[name][f"recall@{k}"] == pytest.approx(np.mean(shares))
        for measure, judged_only in (("ndcg@10", False), ("ndcg_judged@10", True)):
            values = []
            for given, row in zip(ratings, ranked.tolist(), strict=True):
                kept = [item for item in row if item in given] if judged_only else row
                gain = sum((2 ** given.get(item, 0) - 1) / np.log2(rank + 2) for rank, item in enumerate(kept[:10]))
                best = sorted(given.values(), reverse=True)[:10]
                values.append(gain / sum((2**r - 1) / np.log2(rank + 2) for rank, r in enumerate(best)))
            assert results[name][measure] == pytest.approx(np.mean(values), abs=1e-6)


def test_the_table_holds_every_system_and_bucket() -> None:
    train, test = make_interactions(200), make_interactions(40)
    counts = evaluate.train_counts(train, ITEMS)
    rankings = {name: torch.stack([torch.randperm(ITEMS) for _ in range(40)]) for name in ("A", "B")}
    systems = evaluate.evaluate_systems(rankings, test, counts)
    lines = evaluate.results_table(systems).splitlines()
    assert lines[1].split() == ["popularity", "queries", "A", "B", "A", "B"]
    overall = [systems[name]["overall"] for name in "AB"]
    values = [f"{value[key]:.4f}" for key in ("hit_rate@10", "ndcg@10") for value in overall]
    assert lines[3].split() == ["all", "40", *values]
    assert [line.split("  ")[0] for line in lines[4:]] == [bucket["name"] for bucket in systems["A"]["buckets"]]
    assert lines[-1].split() == ["unseen", "0", *"––––"]


def test_results_are_written_as_json_and_picture(vector_searcher: Searcher, tmp_path: Path) -> None:
    train, test = make_interactions(200), make_interactions(40)
    counts = evaluate.train_counts(train, ITEMS)
    results = {
        "systems": evaluate.evaluate_systems({"popularity": rank_by_popularity(counts, 40, 20)}, test, counts),
        "index": evaluate.evaluate_index(vector_searcher.index),
    }
    evaluate.write_results(tmp_path / "new" / "folder", results)
    assert json.loads((tmp_path / "new/folder/metrics.json").read_text()) == results
    assert (tmp_path / "new/folder/buckets.png").read_bytes().startswith(b"\x89PNG")
