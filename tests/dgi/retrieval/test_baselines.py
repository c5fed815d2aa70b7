"""Baselines: each against a count by hand or the library itself, and all of them far above chance."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dgi.config import ModelConfig, TrainConfig
from dgi.data import (
    Catalog,
    Dataset,
    Interactions,
    Sequences,
    leave_one_out,
    load_dataset,
    pad_histories,
    train_counts,
    training_part,
    with_validation,
)
from dgi.evaluation.names import DEFAULT_SYSTEMS, DESCRIPTIONS
from dgi.evaluation.systems import SYSTEMS
from dgi.model.dgi_model import DGIModel
from dgi.retrieval.baselines import (
    BM25,
    Cooccurrence,
    Dense,
    FixedCodesModel,
    Generative,
    GivenVectors,
    IdEncoder,
    Plan,
    Popularity,
    fixed_codes_model,
    hierarchical_codes,
    rank_by_popularity,
)
from dgi.retrieval.baselines.dense import STD, own_encoder
from dgi.retrieval.baselines.protocol import best_items, request_texts
from dgi.retrieval.fused import GUIDE_WEIGHTS, Candidates, RankingWeights, choose_weights, hit_rate_and_ndcg
from tests.dgi.tiny_folder import ITEMS, write_data

PLAN = Plan(
    ModelConfig(
        dim=16,
        codebook_sizes=(8, 4),
        attention_heads=2,
        history_layers=1,
        text_layers=0,
        decoder_layers=1,
        vocabulary_size=256,
        dropout=0.0,
    ),
    TrainConfig(steps=120, batch_size=32, backbone_lr=1e-2, quantizer_lr=1e-2, warmup_steps=5),
    exclude_history=True,
)
CHANCE = 10 / ITEMS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = write_data(tmp_path_factory.mktemp("baselines") / "data", np.random.default_rng(5))
    return with_validation(load_dataset(folder), 0.15)


def hit_rate(items: torch.Tensor, data: Dataset, k: int) -> float:
    return float((items[:, :k].numpy() == data.test.items[:, None]).any(axis=1).mean())


def test_every_system_has_a_name_and_a_description() -> None:
    assert list(SYSTEMS) == list(DESCRIPTIONS) and set(DEFAULT_SYSTEMS) < set(SYSTEMS)


def test_best_items_leaves_out_and_pads() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [0.0, -torch.inf, -torch.inf]])
    found = best_items(scores, 4, torch.tensor([[1, -1], [-1, -1]]))
    assert found.items.tolist() == [[2, 0, -1, -1], [0, -1, -1, -1]]
    assert found.scores[0].tolist() == [2.0, 1.0, -torch.inf, -torch.inf]


def test_popularity_is_the_count(data: Dataset) -> None:
    found = Popularity().fit(data).search(data.test, 5, exclude_history=True)
    counts = np.bincount(data.train.items, minlength=len(data.catalog))
    expected = rank_by_popularity(counts, len(data.test), 5, exclude=torch.from_numpy(data.test.histories))
    assert (counts[found.items] == counts[expected]).all(), "ties may be in another order"


def sequence_data(users: int = 150) -> Dataset:
    """After item i comes i + 1; vectors lie on a circle, in the order of the items."""
    random = np.random.default_rng(6)
    items = tuple((start + np.arange(random.integers(4, 12))) % ITEMS for start in random.integers(0, ITEMS, users))
    sequences = Sequences(items, tuple(np.zeros(len(row)) for row in items))
    train, validation, test = leave_one_out(sequences)
    angles = 2 * np.pi * np.arange(ITEMS) / ITEMS
    vectors = np.stack([np.cos(angles), np.sin(angles), np.cos(2 * angles), np.sin(2 * angles)], 1).astype(np.float32)
    texts = tuple(f"title{item}" for item in range(ITEMS))
    return Dataset(
        Catalog(tuple(map(str, range(ITEMS))), texts, vectors),
        train,
        test,
        "sequences",
        validation,
        split="leave_one_out",
        sequences=training_part(sequences),
    )


@pytest.mark.parametrize(
    "name", ["sasrec", "dense_in_batch", "dense_ids", "two_stage", "two_stage_ids", "tiger", "dgi_ids"]
)
def test_systems_train_on_whole_sequences(name: str, tmp_path: Path, no_pictures: None) -> None:
    """A causal plan trains on rows of users, and finds what follows; a run that is there is not trained again."""
    data = sequence_data()
    model = dataclasses.replace(PLAN.model, causal=True)
    training = dataclasses.replace(PLAN.training, steps=60)
    plan = dataclasses.replace(PLAN, model=model, training=training, folder=tmp_path, exclude_history=False)
    assert plan.on_sequences(data) and plan.rows(data) == 150
    found = SYSTEMS[name].make(plan).fit(data).search(data.test, 10)
    assert hit_rate(found.items, data, 10) > 2 * CHANCE
    again = SYSTEMS[name].make(plan).fit(data).search(data.test, 10)
    assert torch.equal(found.items, again.items)


def test_vectors_of_items_start_at_the_given_ones() -> None:
    """Cosines are those of the given vectors, where there are as many axes; without vectors there is an error."""
    data = sequence_data()
    assert data.catalog.vectors is not None
    width = data.catalog.vectors.shape[1]
    encoder = own_encoder(dataclasses.replace(PLAN.model, dim=2 * width, attention_heads=1), data, "given")
    assert isinstance(encoder, IdEncoder)
    encoder.start(data.catalog)
    z = encoder.encode_items(encoder.prepare_items(data.catalog)).detach()
    given = F.normalize(torch.from_numpy(data.catalog.vectors).float(), dim=1)
    assert float(z[:, :width].std()) == pytest.approx(STD, rel=1e-5)
    z[:, width:] = 0  # beyond the axes: random, as all are without vectors
    torch.testing.assert_close(F.normalize(z, dim=1) @ F.normalize(z, dim=1).T, given @ given.T, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no vectors for its items to start at"):
        encoder.start(Catalog(data.catalog.ids, data.catalog.texts))
    with pytest.raises(ValueError, match="principal_axes=True only"):
        own_encoder(dataclasses.replace(PLAN.model, principal_axes=False), data, "given")
    random = own_encoder(PLAN.model, data, "random")
    assert isinstance(random, IdEncoder)
    before = random.tower.items.weight.clone()
    random.start(data.catalog)
    assert torch.equal(before, random.tower.items.weight) and own_encoder(PLAN.model, data, "text") is None


def test_tiger_reads_and_writes_semantic_ids() -> None:
    data = sequence_data()
    system = SYSTEMS["tiger"].make(dataclasses.replace(PLAN, training=dataclasses.replace(PLAN.training, steps=2)))
    system.fit(data)
    codes = system.model.item_codes
    assert len(codes.unique(dim=0)) == ITEMS and torch.equal(system.searcher.index.codes, codes)
    assert torch.equal(system.model.encoder.prepare_items(data.catalog), codes) and system.weights.cosine == 0
    assert all(row["loss"] == row["ntp"] for row in system.curve) and system.nearest(data.test, 5) is None
    with pytest.raises(ValueError, match="has no item vectors"):
        bare = dataclasses.replace(data, catalog=Catalog(data.catalog.ids, data.catalog.texts))
        SYSTEMS["tiger"].make(PLAN).fit(bare)
    with pytest.raises(ValueError, match="no query texts"):
        system.model.encoder.prepare_queries(["a query"])
    for codes, from_encoder in (("given", True), ("residual", False)):
        with pytest.raises(ValueError, match="codes must be made of a trained"):
            Generative(PLAN, codes, from_encoder=from_encoder)


def test_cooccurrence_is_the_sum_by_hand() -> None:
    data = sequence_data(40)
    chosen, size = data.train, len(data.catalog)
    follows = np.zeros((size, size))
    for history, item in zip(chosen.histories.tolist(), chosen.items.tolist(), strict=True):
        for rank, past in enumerate([one for one in history[::-1] if one >= 0], start=1):
            follows[past, item] += 1 / rank
    system = Cooccurrence().fit(data)
    scores = system.scores(data.test)
    for history, row in zip(data.test.histories.tolist(), scores.numpy(), strict=True):
        expected = sum(follows[past] / rank for rank, past in enumerate([i for i in history[::-1] if i >= 0], start=1))
        np.testing.assert_allclose(np.where(expected > 0, row, 0), expected, rtol=1e-2)
        assert row[expected > 0].min() > row[expected == 0].max(initial=0)
    found = system.search(data.test, 10)
    assert hit_rate(found.items, data, 10) > 2 * CHANCE


def random_texts(n: int) -> tuple[str, ...]:
    words = [f"word{i}" for i in range(40)]
    return tuple(" ".join(np.random.choice(words, np.random.randint(1, 9))) for _ in range(n))


def text_data(items: int = 50, queries: int = 20) -> Dataset:
    def some(n: int) -> Interactions:
        return Interactions(
            random_texts(n), np.full((n, 1), -1), np.random.randint(0, items, n), np.arange(n, dtype=float)
        )

    return Dataset(Catalog(tuple(map(str, range(items))), random_texts(items)), some(60), some(queries), "texts")


@pytest.mark.parametrize("expand", [False, True])
def test_bm25_is_the_library_called_by_hand(expand: bool) -> None:
    bm25s = pytest.importorskip("bm25s")
    data = text_data()
    found = BM25(expand=expand).fit(data).search(data.test, 10)
    texts = list(data.catalog.texts)
    if expand:
        for query, item in zip(data.train.queries, data.train.items, strict=True):
            texts[item] += " " + query  # fewer queries an item than are kept, each once
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    words = bm25s.tokenize(list(data.test.queries), stopwords="en", return_ids=False, show_progress=False)
    _, scores = retriever.retrieve(words, k=10, show_progress=False)
    positive = scores > 0
    np.testing.assert_allclose(found.scores.numpy()[positive], scores[positive], rtol=1e-6)
    assert (found.items.numpy()[~positive] == -1).all()
    for row, words_of in enumerate(words):
        own = retriever.get_scores(words_of)
        kept = found.items[row][found.items[row] >= 0]
        np.testing.assert_allclose(own[kept], found.scores[row, : len(kept)], rtol=1e-6)


def test_a_request_without_a_known_word_finds_nothing() -> None:
    pytest.importorskip("bm25s")
    data = text_data()
    strange = dataclasses.replace(data.test.take([0, 1]), queries=("", "nowhere"))
    assert (BM25().fit(data).search(strange, 5).items == -1).all()


def test_expansion_without_queries_is_the_item_before() -> None:
    pytest.importorskip("bm25s")
    catalog = Catalog(("0", "1", "2"), ("alpha", "beta", "gamma"))
    train = Interactions(("", ""), pad_histories([[0, 1], [1]], 2), np.array([2, 2]), np.zeros(2))
    data = Dataset(catalog, train, train.take([1]), "pairs")
    assert BM25().fit(data).search(data.test, 1).items.item() == 1, "its own words alone"
    assert set(BM25(expand=True).fit(data).search(data.test, 2).items[0].tolist()) == {1, 2}


def test_request_texts_have_the_query_and_the_latest_items() -> None:
    catalog = Catalog(("0", "1", "2"), ("a", "b", "c"))
    requests = Interactions(("q", ""), pad_histories([[0, 1, 2], []], 3), np.array([0, 0]), np.zeros(2))
    assert request_texts(requests, catalog, recent=2) == ["q b c", ""]


def test_given_vectors_is_plain_cosine() -> None:
    vectors = np.random.randn(6, 4).astype(np.float32)
    catalog = Catalog(tuple(map(str, range(6))), ("x",) * 6, vectors)
    requests = Interactions(("", ""), pad_histories([[3], [2, 5]], 2), np.array([0, 0]), np.zeros(2))
    system = GivenVectors().fit(Dataset(catalog, requests, requests, "vectors"))
    assert system.search(requests, 1).items[0].item() == 3
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    mean = unit[2] + unit[5]
    expected = np.argsort(-(unit @ mean / np.linalg.norm(mean)))[:6]
    assert system.search(requests, 6).items[1].tolist() == expected.tolist()


@pytest.mark.parametrize(
    "name", ["dense_in_batch", "dense", "dense_bias", "sasrec", "two_stage", "dsi_hierarchical", "dgi"]
)
def test_every_trained_baseline_beats_chance_by_far(name: str, data: Dataset) -> None:
    system = SYSTEMS[name].make(PLAN).fit(data)
    found = system.search(data.test, 10, exclude_history=True)
    assert hit_rate(found.items, data, 10) > 1.7 * CHANCE
    assert system.parameters > 1000 and system.item_vectors().shape == (ITEMS, 16)
    assert not (
        found.items[:, :, None].numpy() == np.where(data.test.histories < 0, -2, data.test.histories)[:, None]
    ).any()


def test_the_popularity_weight_is_chosen_on_the_validation_set(data: Dataset) -> None:
    """The chosen weight is the best of all on the validation set, and is what search takes off."""
    plan = dataclasses.replace(PLAN, training=dataclasses.replace(PLAN.training, steps=30))
    system = Dense(plan).fit(data)
    chosen = system.popularity_weight
    ndcgs = {}
    for weight in (0.0, -0.5, -0.25, 0.1, 0.25, 0.5, 0.75, 1.0):
        system.popularity_weight = weight
        ndcgs[weight] = system._measure(data.validation)[1]
    assert ndcgs[chosen] == max(ndcgs.values()) and system.settings == {"popularity_weight": chosen}
    system.popularity_weight = 0.0
    plain = system.scores(data.test)
    system.popularity_weight = 0.5
    counts = np.bincount(data.train.items, minlength=ITEMS)
    torch.testing.assert_close(system.scores(data.test), plain - 0.5 * torch.from_numpy(np.log1p(counts)).float())


def test_the_item_bias_learns_popularity() -> None:
    """Of items that nothing else tells apart, the bias learns how often they are chosen."""
    items = np.random.default_rng(0).choice(4, 400, p=[0.7, 0.15, 0.1, 0.05])
    train = Interactions(("same words",) * 400, np.full((400, 1), -1), items, np.arange(400, dtype=float))
    data = with_validation(Dataset(Catalog(tuple("abcd"), ("one text",) * 4), train, train.take([0]), "clicks"))
    plan = dataclasses.replace(PLAN, training=dataclasses.replace(PLAN.training, steps=300))
    system = Dense(plan, item_bias=True).fit(data)
    bias = system.model.item_bias.detach()
    share = np.bincount(data.train.items, minlength=4) / len(data.train)
    torch.testing.assert_close(bias.softmax(0), torch.from_numpy(share).float(), atol=0.03, rtol=0)


def test_an_item_bias_without_all_items_is_refused() -> None:
    with pytest.raises(ValueError, match="item_bias needs"):
        Dense(PLAN, "in_batch", item_bias=True)


@pytest.mark.parametrize(("items", "levels"), [(1, 2), (7, 1), (50, 2), (200, 3)])
def test_hierarchical_codes_are_unique_and_cluster(items: int, levels: int) -> None:
    groups = torch.randn(5, 8)
    z = groups[torch.arange(items) % 5] + 0.01 * torch.randn(items, 8)
    codes = hierarchical_codes(z, levels, generator=torch.Generator().manual_seed(0))
    assert codes.shape == (items, levels) and len(torch.unique(codes, dim=0)) == items
    again = hierarchical_codes(z, levels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codes, again)
    if levels > 1 and items > 5:  # two items of a cluster are more alike than two of different ones
        unit = torch.nn.functional.normalize(z, dim=1)
        same = codes[:, :1] == codes[:, :1].T
        assert (unit @ unit.T)[same].mean() > (unit @ unit.T)[~same].mean()


def test_fixed_codes_do_not_move(data: Dataset) -> None:
    """What a semantic ID is stays as it was made of the encoder's vectors, while its embedding learns."""
    z = torch.randn(ITEMS, 16)
    model = fixed_codes_model("residual", PLAN.model, z, torch.Generator().manual_seed(0))
    assert isinstance(model, FixedCodesModel) and len(model.item_codes.unique(dim=0)) == ITEMS
    assigned = model.quantizer.assign(z)
    kept = (model.item_codes == assigned).all(1)
    assert int(kept.sum()) == len(assigned.unique(dim=0)), "of items that share an ID one keeps it, the others move"
    atomic = fixed_codes_model("atomic", PLAN.model, z, torch.Generator().manual_seed(0))
    assert atomic.item_codes.tolist() == [[item] for item in range(ITEMS)]
    torch.testing.assert_close(atomic.quantizer.codebooks[0].detach(), z)
    system = Generative(PLAN, "residual", name="two_stage").fit(data)
    trained = system.model
    assert isinstance(trained, FixedCodesModel)
    assert torch.equal(system.searcher.index.codes, trained.item_codes)
    assert not torch.equal(trained.item_codes, trained.quantizer.assign(system.item_vectors())), "the embeddings learn"


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's picture takes longer than a run so small."""
    monkeypatch.setattr("dgi.training.curve.training_curve", lambda *_: None)


def test_the_weights_of_the_sum_are_chosen_on_the_validation_set(data: Dataset) -> None:
    """The chosen weights are the best of all tried, and searches go by them."""
    plan = dataclasses.replace(PLAN, training=dataclasses.replace(PLAN.training, steps=40))
    system = Generative(dataclasses.replace(plan, num_beams=6)).fit(data)
    assert data.validation is not None
    counts = torch.from_numpy(train_counts(data.train, ITEMS))
    options = {"num_beams": 6, "exclude_history": plan.exclude_history}
    best, tried = choose_weights(system.searcher, data.validation, counts=counts, **options)
    assert best == system.weights and tried[best] == max(tried.values())
    assert {weights.guide for weights in tried} == set(GUIDE_WEIGHTS)
    assert system.searcher.index.guide_weight == best.guide
    chosen = {"cosine_weight": best.cosine, "popularity_weight": best.popularity, "guide_weight": best.guide}
    assert system.settings == chosen
    weights = RankingWeights(7.0, 0.0, 0.5)
    system.searcher.index = weights.applied(system.searcher.index, None, counts)
    found = system.search(data.test, 5)
    every = system.searcher.search_interactions(data.test, k=ITEMS, num_beams=ITEMS, order="lexicographic")
    assert len(system.searcher.index.codes.unique(dim=0)) == ITEMS
    taken = counts.double().add(1).log() / -2
    taken -= taken.mean()
    for row in range(len(data.test)):
        scores = {
            item: score + 7.0 * cosine + float(taken[item])
            for item, score, cosine in zip(
                *(part[row].tolist() for part in (every.items, every.scores, every.cosines)), strict=True
            )
        }
        for item, score in zip(*(x[row].tolist() for x in found), strict=True):
            assert scores[item] == pytest.approx(score, abs=1e-3)
        assert found.scores[row, 0] <= max(scores.values()) + 1e-3


def test_nearest_is_a_search_that_leaves_nothing_out(data: Dataset) -> None:
    plan = dataclasses.replace(PLAN, training=dataclasses.replace(PLAN.training, steps=8))
    system = Generative(plan).fit(data)
    whole = {"num_beams": ITEMS, "order": "sum", "cosine_weight": 1e7, "exclude_history": True}
    by_cosine = system.searcher.search_interactions(data.test, k=5, **whole).items
    exact = system.nearest(data.test, 5, exclude_history=True)
    assert (
        exact is not None and (exact == by_cosine).float().mean() > 0.99
    )  # equal cosines to rounding may change places
    inner = dataclasses.replace(plan, model=dataclasses.replace(plan.model, similarity="inner_product"))
    assert Generative(inner).fit(data).nearest(data.test, 5) is None


def test_the_bias_of_an_item_counts_in_the_sum(data: Dataset) -> None:
    """With one search for all settings, ranked as a search by these weights ranks, also where beams are few."""
    plan = dataclasses.replace(PLAN, training=dataclasses.replace(PLAN.training, steps=8))
    searcher = Generative(dataclasses.replace(plan, num_beams=6)).fit(data).searcher
    searcher.model.keep_items(ITEMS, codes=False, bias=True)
    own = searcher.model.item_bias
    assert own is not None
    own.data.normal_()
    counts = torch.from_numpy(train_counts(data.train, ITEMS))
    for weights in (RankingWeights(200.0, 20.0, 5.0, 9.0), RankingWeights(5.0, 0.0, -0.1), RankingWeights(1.0)):
        candidates = Candidates.find(searcher, data.test, num_beams=6, guide_weight=weights.guide)
        quick = candidates.ranked(weights, weights.item_scores(own, counts), 6)
        targets = torch.from_numpy(data.test.items)
        found, places = candidates.with_target(targets)
        gains = found.gains(places, weights, weights.item_scores(own, counts), 6)
        assert float(gains.sum()) / len(targets) == pytest.approx(hit_rate_and_ndcg(quick, targets)[1], abs=1e-3)
        searcher.index = weights.applied(searcher.index, own, counts)
        slow = searcher.search_interactions(data.test, k=6, num_beams=6).items
        assert (quick == slow).float().mean() > 0.99  # equal sums to rounding may change places


def test_of_equal_sums_the_first_candidate_is_ahead() -> None:
    """As in a search: a target gains nothing by being level with many."""
    items = torch.arange(20).unsqueeze(0)
    candidates = Candidates(items, torch.zeros(1, 20), torch.ones(1, 20), torch.zeros(1, 20))
    weights, none = RankingWeights(3.0), torch.zeros(())
    for target in (0, 7, 19):
        found, places = candidates.with_target(torch.tensor([target]))
        gain = 1 / math.log2(target + 2) if target < 10 else 0.0
        assert found.gains(places, weights, none, 10).tolist() == pytest.approx([gain])
        assert found.gains(places, RankingWeights(), none, 10).tolist() == pytest.approx([gain])
    assert len(candidates.with_target(torch.tensor([20]))[1]) == 0


def test_beams_may_have_a_width_for_each_level(data: Dataset) -> None:
    """Where semantic IDs have another length, as many as the widest level has."""
    plan = dataclasses.replace(PLAN, num_beams=(3, 5), training=dataclasses.replace(PLAN.training, steps=8))
    two, one = Generative(plan).fit(data), Generative(plan, "atomic").fit(data)
    assert two.num_beams == (3, 5) and one.num_beams == 5 and one.weights.guide == 0.0
    assert int((two.search(data.test, ITEMS).items >= 0).sum(1).max()) <= 5
    with pytest.raises(ValueError, match="one per level"):
        dataclasses.replace(PLAN, num_beams=(3, 5, 7))


def test_systems_of_one_seed_share_the_encoder(data: Dataset, tmp_path: Path, no_pictures: None) -> None:
    """Trained once, whichever system comes first, and the same one for both."""
    plan = dataclasses.replace(PLAN, folder=tmp_path, training=dataclasses.replace(PLAN.training, steps=8))
    Generative(plan, "residual", name="two_stage").fit(data)
    encoder = tmp_path / "encoder-cosine-0" / "model.safetensors"
    written = encoder.read_bytes()
    Generative(plan, gradient="straight_through", name="straight_through").fit(data)
    assert encoder.read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder-cosine-0", "straight_through-0", "two_stage-0"]


def test_an_interrupted_fit_ends_in_the_same_bits(data: Dataset, tmp_path: Path, no_pictures: None) -> None:
    plan = dataclasses.replace(PLAN, training=dataclasses.replace(PLAN.training, steps=12, checkpoint_every=4))
    whole = Generative(dataclasses.replace(plan, folder=tmp_path / "whole")).fit(data)
    parts = dataclasses.replace(plan, folder=tmp_path / "parts")
    Generative(parts).fit(data)
    newest = max((tmp_path / "parts" / "dgi-0" / "checkpoints").iterdir())
    newest.unlink()  # as if it had been killed after the one before
    resumed = Generative(parts).fit(data)
    assert isinstance(resumed.model, DGIModel)
    for (name, first), second in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(first, second), name
    assert torch.equal(whole.search(data.test, 5).items, resumed.search(data.test, 5).items)
