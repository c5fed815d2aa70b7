"""Lexicographic ranking against a sort of all items below the beams."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgi_kernels import (
    BackendUnavailable,
    BeamResult,
    Beams,
    Trie,
    beam_search,
    debug,
    rank_candidates,
)

from .ranking_cases import BACKENDS, BOUND, DTYPES, assert_random_ranking
from .shapes import name_of


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_items_come_by_beam_score_then_cosine_then_id(dtype: torch.dtype, backend: str) -> None:
    for _ in range(100):
        assert_random_ranking(dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_dimensions_against_the_formula(backend: str) -> None:
    codes = torch.cat([torch.cartesian_prod(torch.arange(4), torch.arange(4)), torch.randint(0, 4, (44, 2))])
    trie = Trie.from_codes(codes)
    query, vectors = torch.randn(2, 33), 5 * torch.randn(60, 33)
    for width in (2, 16):  # fewer candidates than vectors, and more
        nodes = torch.arange(width).expand(2, -1)
        scores = -torch.rand(2, width)
        ranking = rank_candidates(query, vectors, trie, Beams(nodes, nodes, nodes, scores, 2), 60, backend=backend)
        expected = torch.nn.functional.cosine_similarity(query.double().unsqueeze(1), vectors.double(), dim=-1)
        for b in range(2):
            found = ranking.items[b][ranking.items[b] >= 0]
            leaf = trie.find(codes[found])
            assert sorted(found.tolist()) == sorted(trie.items(nodes[b], 2).item_ids.tolist())
            torch.testing.assert_close(ranking.scores[b, : len(found)], scores[b, leaf])
            torch.testing.assert_close(
                ranking.cosines[b, : len(found)].double(), expected[b, found], atol=BOUND, rtol=0
            )
            keys = list(zip((-scores[b, leaf]).tolist(), (-ranking.cosines[b, : len(found)]).tolist(), strict=True))
            assert keys == sorted(keys)


def test_a_search_result_ranks_as_its_leaves() -> None:
    trie = Trie.from_codes([[0, 1], [0, 1], [1], [1, 0]], [3, 1, 0, 2], codebook_sizes=[2, 2])
    result = beam_search(
        trie,
        lambda depth, tokens, parents: torch.zeros(1, 1 if depth == 0 else 3, 2),
        batch_size=1,
        num_beams=3,
        normalize="none",
    )
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    ranking = rank_candidates(torch.tensor([[2.0, 0.0]]), vectors, trie, result, 6)
    assert ranking.items.tolist() == [[0, 2, 1, 3, -1, -1]]  # all beams tie, so the cosine alone decides
    assert ranking.cosines[0].tolist() == pytest.approx([1.0, math.sqrt(0.5), 0.0, -1.0, -1.0, -1.0])
    assert ranking.scores[0].tolist() == [0.0] * 4 + [-math.inf] * 2
    again = rank_candidates(
        torch.tensor([[2.0, 0.0]]), vectors, trie, Beams(result.nodes, result.nodes, result.nodes, result.scores, 2), 6
    )
    assert all(torch.equal(a, b) for a, b in zip(ranking, again, strict=True))


def test_a_filter_keeps_out_items_that_share_a_semantic_id_with_an_allowed_one() -> None:
    """A leaf is reached for its allowed items; the others in it must not come along."""
    trie = Trie.from_codes([[0], [0], [1]])
    nodes = torch.tensor([[0], [0]])
    beams = Beams(nodes, nodes, nodes, torch.zeros(2, 1), 1)
    query, vectors = torch.ones(2, 2), torch.ones(3, 2)
    one = trie.filter(items=[1])
    assert rank_candidates(query, vectors, trie, beams, 3, filters=one).items.tolist() == [[1, -1, -1]] * 2
    ranking = rank_candidates(query, vectors, trie, beams, 3, filters=[None, one])
    assert ranking.items.tolist() == [[0, 1, -1], [1, -1, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_item_comes_twice_when_a_node_does(backend: str) -> None:
    trie = Trie.from_codes([[0], [1]])
    nodes = torch.tensor([[1, 1, 0, 1]])
    scores = torch.tensor([[-3.0, -1.0, -2.0, -1.0]])
    beams = Beams(nodes, nodes, nodes, scores, 1)
    ranking = rank_candidates(torch.ones(1, 2), torch.ones(2, 2), trie, beams, 4, backend=backend)
    assert ranking.items.tolist() == [[1, 0, -1, -1]]
    assert ranking.scores.tolist() == [[-1.0, -2.0, -math.inf, -math.inf]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_dead_beams_and_nan_yield_nothing_wrong(backend: str) -> None:
    trie = Trie.from_codes([[0], [1], [2]])
    nodes = torch.tensor([[0, 1, -1, 2]])
    scores = torch.tensor([[math.nan, -math.inf, 0.0, -1.0]])
    vectors = torch.tensor([[1.0], [1.0], [math.nan]])
    beams = Beams(nodes, nodes, nodes, scores, 1)
    ranking = rank_candidates(torch.ones(1, 1), vectors, trie, beams, 2, backend=backend)
    assert ranking.items.tolist() == [[2, -1]]
    assert ranking.cosines.tolist() == [[-1.0, -1.0]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_tries_batches_and_beams(backend: str) -> None:
    empty = Trie.from_codes(torch.empty(0, 2), codebook_sizes=[2, 2])
    dead = torch.full((2, 3), -1)
    for beams in (
        empty.root(2),
        Beams(dead, dead, dead, torch.zeros(2, 3), 1),
        BeamResult(dead.unsqueeze(-1), torch.zeros(2, 3), dead),
    ):
        ranking = rank_candidates(torch.ones(2, 4), torch.ones(0, 4), empty, beams, 3, backend=backend)
        assert ranking.items.tolist() == [[-1] * 3] * 2
    trie = Trie.from_codes([[0, 1]])
    ranking = rank_candidates(torch.ones(0, 4), torch.ones(1, 4), trie, trie.root(0), 3, backend=backend)
    assert ranking.items.shape == (0, 3)
    strided = torch.ones(8, 0).T  # no row, and strides of which .contiguous() makes no others
    assert rank_candidates(strided, torch.ones(1, 8), trie, trie.root(0), 3, backend=backend).items.shape == (0, 3)
    none = Beams(*(part[:, :0] for part in trie.root(2)[:4]), 0)
    ranking = rank_candidates(torch.ones(2, 4), torch.ones(1, 4), trie, none, 3, backend=backend)
    assert ranking.items.tolist() == [[-1] * 3] * 2


def test_compiled_ranking_matches() -> None:
    trie = Trie.from_codes(torch.randint(0, 4, (40, 2)))
    query, vectors = torch.randn(2, 8), torch.randn(40, 8)
    nodes = torch.stack([torch.randperm(trie.num_nodes_at(2))[:5] for _ in range(2)])
    beams = Beams(nodes, nodes, nodes, torch.randn(2, 5), 2)
    filters = [None, trie.filter(items=range(20))]

    def rank(query: Tensor, vectors: Tensor, beams: Beams) -> tuple[Tensor, Tensor, Tensor]:
        return rank_candidates(query, vectors, trie, beams, 12, filters=filters)

    torch._dynamo.reset()
    got = torch.compile(rank, fullgraph=True, backend="aot_eager")(query, vectors, beams)
    expected = rank(query, vectors, beams)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[2], expected[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ranking_on_cuda_is_the_same_and_captures_in_a_graph() -> None:
    trie = Trie.from_codes(torch.randint(0, 4, (40, 2)))
    query, vectors = torch.randn(2, 8), torch.randn(40, 8)
    nodes = torch.stack([torch.randperm(trie.num_nodes_at(2))[:5] for _ in range(2)])
    scores = torch.randn(2, 5)
    expected = rank_candidates(query, vectors, trie, Beams(nodes, nodes, nodes, scores, 2), 12)
    there, moved = trie.to("cuda"), [value.cuda() for value in (query, vectors, nodes, scores)]
    beams = Beams(moved[2], moved[2], moved[2], moved[3], 2)
    rank_candidates(moved[0], moved[1], there, beams, 12)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rank_candidates(moved[0], moved[1], there, beams, 12)
    graph.replay()
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got.cpu(), want)
    wild = beams._replace(nodes=torch.full_like(nodes, 10**12, device="cuda"))
    assert (rank_candidates(moved[0], moved[1], there, wild, 3).items == -1).all()
    with debug(), pytest.raises(ValueError, match="beams.nodes must be in"):
        rank_candidates(moved[0], moved[1], there, wild, 3)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"trie": None}, TypeError, "trie must be a Trie"),
        ({"query": torch.ones(2)}, ValueError, "query must have 2 dimensions"),
        ({"query": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "query must have dtype"),
        ({"query": torch.ones(3, 4)}, ValueError, "beams.nodes must have shape"),
        ({"item_vectors": torch.ones(3, 5)}, ValueError, "item_vectors must have shape"),
        ({"item_vectors": torch.ones(3, 4, dtype=torch.float64)}, TypeError, "item_vectors"),
        ({"item_vectors": torch.ones(2, 4)}, ValueError, "item_vectors must have a row for every item id .*, 0 to 2"),
        ({"beams": [0]}, TypeError, "beams must be Beams or a BeamResult"),
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": 1.5}, TypeError, "k must be an integer"),
        ({"filters": 3}, TypeError, "filters must be a TrieFilter"),
        ({"backend": "triton"}, BackendUnavailable, "rank_candidates"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], error: type[Exception], message: str) -> None:
    trie = Trie.from_codes([[0, 1], [1, 0]], [2, 0])
    arguments = {
        "query": torch.ones(2, 4),
        "item_vectors": torch.ones(3, 4),
        "trie": trie,
        "beams": trie.root(2),
        "k": 3,
    }
    with pytest.raises(error, match=message):
        rank_candidates(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, "beams.depth must be"),
        ({"nodes": torch.tensor([[0], [1]])}, "beams.nodes must be in"),
        ({"scores": torch.zeros(2, 2)}, "beams.scores must have shape"),
    ],
)
def test_bad_beams_are_named(changes: dict[str, object], message: str) -> None:
    trie = Trie.from_codes([[0, 1], [1, 0]])
    with pytest.raises(ValueError, match=message):
        rank_candidates(torch.ones(2, 4), torch.ones(2, 4), trie, trie.root(2)._replace(**changes), 3)


def test_negative_ids_are_no_rows() -> None:
    trie = Trie.from_codes([[0], [1]], [-1, 0])
    with pytest.raises(ValueError, match="item_vectors must have a row for every item id of the trie, -1 to 0"):
        rank_candidates(torch.ones(1, 2), torch.ones(5, 2), trie, trie.root(1), 3)
