"""Ranking by a sum of beam score and cosine, against a sort of all items in float64."""

from __future__ import annotations

import math

import pytest
import torch

from dgi_kernels import Beams, Trie, beam_step, rank_candidates

from .ranking_cases import BACKENDS, DTYPES, assert_random_sums
from .shapes import name_of


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_items_come_by_the_sum(backend: str, dtype: torch.dtype) -> None:
    for _ in range(40):
        assert_random_sums(dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 20, 300, 5000])
def test_many_items(backend: str, k: int) -> None:
    """Beams whose score is too low for any cosine are passed over; what they hold must not be missed."""
    trie = Trie.from_codes(torch.randint(0, 90, (4000, 1)), codebook_sizes=[90])
    filters = [trie.filter(mask=torch.rand(4000) < 0.5), None]
    beams = beam_step(trie, 3 * torch.randn(2, 1, 90), trie.root(2), num_beams=80)
    query, vectors = torch.randn(2, 6), torch.randn(4000, 6)
    for weight, share in ((0.0, True), (5.0, False), (-2.0, True), (0.3, True)):
        options = {"order": "sum", "cosine_weight": weight, "share": share, "filters": filters}
        got = rank_candidates(query, vectors, trie, beams, k, backend=backend, **options)
        expected = rank_candidates(query.double(), vectors.double(), trie, beams, k, backend="reference", **options)
        torch.testing.assert_close(got.scores, expected.scores, rtol=1e-5, atol=1e-5)
        if weight:
            same = (got.items == expected.items).double().mean().item()
            assert same > 0.99  # of neighbours whose sums differ by rounding alone


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_semantic_id_does_not_fill_the_list(backend: str) -> None:
    trie = Trie.from_codes([[0], [0], [0], [0], [1]])
    nodes = torch.tensor([[0, 1, -1]])
    beams = Beams(nodes, nodes, nodes, torch.tensor([[-1.0, -1.5, -math.inf]]), 1)
    query, vectors = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]] * 5)

    def ranked(**options: object) -> list[int]:
        return rank_candidates(query, vectors, trie, beams, 6, backend=backend, **options).items[0].tolist()

    assert ranked() == [0, 1, 2, 3, 4, -1]
    assert ranked(order="sum", share=False) == [0, 1, 2, 3, 4, -1]
    found = rank_candidates(query, vectors, trie, beams, 6, backend=backend, order="sum")
    assert found.items[0].tolist() == [4, 0, 1, 2, 3, -1]
    assert found.scores[0].tolist() == pytest.approx([-1.5, *[-1 - math.log(4)] * 4, -math.inf])
    filters = trie.filter(items=[1, 4])  # alone below its node, as far as this request goes
    assert ranked(order="sum", filters=filters) == [1, 4, -1, -1, -1, -1]
    less = trie.update(remove=[0, 1, 2])
    assert rank_candidates(query, vectors, less, beams, 2, backend=backend, order="sum").items.tolist() == [[3, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cosine_counts_by_its_weight(backend: str) -> None:
    trie = Trie.from_codes([[0], [1]])
    beams = beam_step(trie, torch.tensor([[[1.0, 0.0]]]), trie.root(1), num_beams=2)
    query, vectors = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for weight, order in ((0.0, [0, 1]), (0.9, [0, 1]), (1.1, [1, 0]), (-3.0, [0, 1])):
        found = rank_candidates(query, vectors, trie, beams, 2, order="sum", cosine_weight=weight, backend=backend)
        assert found.items[0].tolist() == order


def test_wrong_arguments_are_named() -> None:
    trie = Trie.from_codes([[0]])
    query = torch.ones(1, 2)

    def rank(**options: object) -> None:
        rank_candidates(query, query, trie, trie.root(1), 1, **options)  # type: ignore[arg-type]

    for options, error, message in (
        ({"order": "product"}, ValueError, "order must be one of 'lexicographic', 'sum'"),
        ({"order": "sum", "cosine_weight": math.nan}, ValueError, "cosine_weight must be finite"),
        ({"order": "sum", "cosine_weight": "1"}, TypeError, "cosine_weight must be a float"),
        ({"order": "sum", "share": 1}, TypeError, "share must be a bool"),
    ):
        with pytest.raises(error, match=message):
            rank(**options)
