"""Searches with node scores against a brute-force float64 search that sums the weights of all items every time."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from dgi_kernels import Beams, HiddenStates, Trie, beam_search, beam_step, cosine_beam_step, cosine_logits

from .beam_cases import BACKENDS, DTYPES, NORMALIZE, assert_same, cosine_walk, walk
from .shapes import name_of
from .tries import make, random_catalog


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_are_the_top_by_weight_and_probability(backend: str, dtype: torch.dtype, normalize: str) -> None:
    """Ragged, duplicate and updated catalogs, filters, NaN and -inf, weights over 1e17, strengths of either sign."""
    for _ in range(20):
        catalog = random_catalog(max_items=30)
        walk(catalog, dtype=dtype, normalize=normalize, exact=False, backend=backend, weights=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_from_hidden_states(backend: str, dtype: torch.dtype) -> None:
    for _ in range(30):
        cosine_walk(random_catalog(max_items=30), dtype=dtype, backend=backend, weights=True)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize("updates", [False, True], ids=["built", "updated"])
def test_fused_and_plain_steps_skip_no_beam_that_counts(updates: bool, spread: float, normalize: str) -> None:
    """Many beams of few children, few of many: bounds, thresholds and the tile of the fused step, against float64."""
    codes, items, dim = random.choice([97, 300]), 3000, 9
    rows = torch.randint(0, codes, (items, 3)).tolist()
    ragged = [row[: random.choice([2, 3, 3])] for row in rows]
    trie = Trie.from_codes(ragged, codebook_sizes=[codes] * 3)
    if updates:
        trie = trie.update(add=(ragged[:100], range(items, items + 100)), remove=torch.randperm(items)[:200])
    scores = trie.node_scores(torch.randn(trie.num_items).mul(2).exp())
    strength = torch.tensor([1.0, -1.0, 0.2, -0.5])
    filters = [trie.filter(mask=torch.rand(trie.num_items) < 0.5), *[None] * 3]
    options = {
        "num_beams": 60,
        "filters": filters,
        "node_scores": scores,
        "strength": strength,
        "normalize": normalize,
    }
    beams = trie.root(4)
    for _ in range(3):
        codebook = torch.randn(codes, dim)
        h = torch.randn(4, beams.nodes.shape[1], dim)
        logits = cosine_logits(h.double(), codebook.double(), 10 * spread)
        expected = beam_step(trie, logits, beams, backend="reference", **options)
        for backend in BACKENDS:
            for got in (
                cosine_beam_step(trie, h, codebook, 10 * spread, beams, backend=backend, **options),
                beam_step(trie, logits.float(), beams, backend=backend, **options),
            ):
                assert_same(got, expected, exact=False, bound=1e-4)
        beams = expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_along_a_path_they_add_up_to_the_share_of_the_leaf(backend: str) -> None:
    for _ in range(20):
        catalog = random_catalog(max_items=30)
        trie = make(catalog)
        weights = {item: math.exp(3 * random.gauss(0, 1)) for item in catalog.ids}
        strength = random.choice([1.0, -0.7])
        result = beam_search(
            trie,
            lambda depth, tokens, parents, sizes=catalog.sizes: torch.zeros(1, 1 if depth == 0 else 40, sizes[depth]),
            batch_size=1,
            num_beams=40,
            normalize="none",
            node_scores=trie.node_scores([weights[item] for item in trie.item_ids.tolist()]),
            strength=strength,
            backend=backend,
        )
        live = result.scores[0] > -math.inf
        codes = list(map(tuple, result.codes[0][live].tolist()))
        assert set(codes) == set(catalog.padded())
        total = math.fsum(weights.values())
        shares = [math.fsum(weights[item] for item in catalog.items(code)) / total for code in codes]
        expected = [strength * math.log(share) for share in shares]
        assert result.scores[0][live].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_small_weights_behind_large_ones_count() -> None:
    """Differences of running sums would make 0 of them."""
    trie = Trie.from_codes([[0, 0], [0, 1], [1, 0], [1, 1]])
    scores = trie.node_scores(torch.tensor([1e30, 1e30, 1e-30, 3e-30], dtype=torch.float64))
    assert scores.at(torch.arange(4), 2).tolist() == pytest.approx(
        [math.log(0.5), math.log(0.5), math.log(0.25), math.log(0.75)]
    )


def test_items_that_are_gone_have_no_weight() -> None:
    trie = Trie.from_codes([[0, 0], [0, 1], [1, 1]], [7, 8, 9])
    new = trie.update(add=([[0, 1], [2, 0]], [10, 11]), remove=[8])
    assert new.item_ids.tolist() == [7, 9, 10, 11]
    scores = new.node_scores([1.0, 2.0, 4.0, 8.0])
    nodes = new.find([[0], [1], [2]])
    assert scores.at(nodes, 1).exp().tolist() == pytest.approx([5 / 15, 2 / 15, 8 / 15])
    nodes = new.find([[0, 0], [0, 1], [1, 1], [2, 0]])
    assert scores.at(nodes, 2).exp().tolist() == pytest.approx([1 / 5, 4 / 5, 1.0, 1.0])


def test_a_search_prefers_what_is_popular_or_takes_popularity_off() -> None:
    trie = Trie.from_codes([[0], [1], [2]])
    scores, logits = trie.node_scores([1.0, 10.0, 100.0]), torch.tensor([[[0.5, 0.2, 0.0]]])
    for strength, order in ((0.0, [0, 1, 2]), (1.0, [2, 1, 0]), (-1.0, [0, 1, 2]), (0.15, [2, 1, 0])):
        found = beam_step(trie, logits, trie.root(1), num_beams=3, node_scores=scores, strength=strength)
        assert found.tokens[0].tolist() == order


def test_strength_passes_a_gradient_on() -> None:
    """d score / d strength is the sum of node scores along the path, by the reference."""
    trie = Trie.from_codes([[0, 1], [1, 0], [1, 1]])
    scores, strength = trie.node_scores([1.0, 2.0, 5.0]), torch.tensor([0.5], requires_grad=True)
    result = beam_search(
        trie,
        lambda depth, tokens, parents: torch.zeros(1, 1 if depth == 0 else 3, 2),
        batch_size=1,
        num_beams=3,
        node_scores=scores,
        strength=strength,
    )
    (gradient,) = torch.autograd.grad(result.scores[0, 0], strength)
    assert result.codes[0, 0].tolist() == [1, 1] and float(gradient) == pytest.approx(math.log(5 / 8))


def test_wrong_arguments_are_named() -> None:
    trie = Trie.from_codes([[0, 1], [1, 0]])
    for weights, error, message in (
        ([1.0], ValueError, r"item_weights must have shape \(num_items,\) = \(2\)"),
        ([1.0, 0.0], ValueError, "item_weights must be positive and finite; that of row 1 is 0.0"),
        ([math.nan, 1.0], ValueError, "item_weights must be positive and finite; that of row 0 is nan"),
        ([1e308, 1.7e308], ValueError, "item_weights must have a finite sum"),
        ([True, False], TypeError, "item_weights must hold numbers"),
        ("ab", TypeError, "item_weights must be a tensor, array or list"),
    ):
        with pytest.raises(error, match=message):
            trie.node_scores(weights)
    scores = trie.node_scores([1.0, 2.0])

    def step(**options: object) -> Beams:
        return beam_step(trie, torch.zeros(1, 1, 2), trie.root(1), num_beams=1, **options)  # type: ignore[arg-type]

    for options, error, message in (
        ({"node_scores": [1.0]}, TypeError, "node_scores must be NodeScores or None; got list"),
        ({"strength": 2.0}, ValueError, "strength needs node_scores"),
        ({"node_scores": scores, "strength": math.nan}, ValueError, "strength must be finite"),
        ({"node_scores": scores, "strength": torch.tensor([1.0, math.inf])}, ValueError, "strength must have shape"),
        ({"node_scores": scores, "strength": torch.tensor([math.inf])}, ValueError, "strength must be finite; got inf"),
        ({"node_scores": scores, "strength": torch.tensor([1])}, TypeError, "strength must have dtype"),
        ({"node_scores": scores, "strength": "1"}, TypeError, "strength must be a float"),
    ):
        with pytest.raises(error, match=message):
            step(**options)
    for other in (trie.update(remove=[0]), Trie.from_codes([[0, 1], [1, 0]])):
        with pytest.raises(ValueError, match="node_scores belong to another trie"):
            beam_step(other, torch.zeros(1, 1, 2), other.root(1), num_beams=1, node_scores=scores)


def test_hidden_states_take_node_scores_too() -> None:
    trie = Trie.from_codes(torch.randint(0, 9, (80, 2)), codebook_sizes=[9, 9])
    heads = [(torch.randn(2, 6, 5), torch.randn(9, 5)) for _ in range(2)]

    def states(depth: int, tokens: Tensor | None, parents: Tensor | None) -> HiddenStates:
        h, codebook = heads[depth]
        return HiddenStates(h[:, : 1 if depth == 0 else 6], codebook, 7.0)

    options = {"batch_size": 2, "num_beams": 6, "node_scores": trie.node_scores(torch.rand(80) + 0.1), "strength": -1.5}
    fused = beam_search(trie, states, **options)
    plain = beam_search(trie, lambda *given: states(*given).logits(), **options)
    torch.testing.assert_close(fused.scores, plain.scores, rtol=1e-5, atol=1e-5)
    assert not torch.equal(fused.scores, beam_search(trie, states, batch_size=2, num_beams=6).scores)
