"""The CUDA ranking, run thread by thread on the CPU, against a sort of all items below the beams."""

from __future__ import annotations

import math
import random

import pytest
import torch

from dgi_kernels import Beams, Trie, rank_candidates

from ..kernels.ranking_cases import BOUND, GPU_DTYPES, assert_random_ranking, assert_random_sums
from ..kernels.shapes import name_of
from . import on_cpu


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=name_of)
def test_items_come_by_beam_score_then_cosine_then_id(cuda_ops: on_cpu.Ops, dtype: torch.dtype) -> None:
    with cuda_ops.instead("rank_candidates"):
        for _ in range(15):
            assert_random_ranking(dtype, "native")


@pytest.mark.parametrize("width, k", [(3, 5), (40, 300), (40, 600), (600, 20)])
def test_more_items_than_the_buffer_holds(cuda_ops: on_cpu.Ops, width: int, k: int) -> None:
    """The buffer is cut several times; more beams or items than shared memory holds lie in global memory."""
    trie = Trie.from_codes(torch.randint(0, 600, (4000, 1)), codebook_sizes=[600])
    angles = torch.linspace(0.1, 3, 4000)[torch.randperm(4000)]  # no cosines so close that float32 confuses them
    query, vectors = torch.tensor([[2.0, 0.0]]), torch.stack([angles.cos(), angles.sin()], dim=-1)
    vectors *= torch.empty(4000, 1).uniform_(0.1, 5)
    nodes = torch.randint(-1, trie.num_nodes_at(1), (1, width))  # some twice
    scores = torch.full((1, width), -1.0) if random.random() < 0.5 else -torch.rand(1, width).round(decimals=1)
    beams = Beams(nodes, nodes, nodes, scores, 1)
    filters = random.choice([None, trie.filter(mask=torch.rand(4000) < 0.5)])
    for depth, start in ((1, beams), (0, trie.root(1))):
        with cuda_ops.instead("rank_candidates"):
            got = rank_candidates(query, vectors, trie, start, k, filters=filters, backend="native")
        expected = rank_candidates(
            query.double(), vectors.double(), trie, start, k, filters=filters, backend="reference"
        )
        assert torch.equal(got.items, expected.items), depth
        assert torch.equal(got.scores, expected.scores)
        torch.testing.assert_close(got.cosines.double(), expected.cosines, rtol=0, atol=BOUND)


def test_vectors_that_are_not_finite_come_last(cuda_ops: on_cpu.Ops) -> None:
    trie = Trie.from_codes([[0], [0], [0], [0]])
    vectors = torch.tensor([[math.nan, 1.0], [1.0, 0.0], [math.inf, 1.0], [0.0, 0.0]])
    with cuda_ops.instead("rank_candidates"):
        ranking = rank_candidates(torch.tensor([[1.0, 1.0]]), vectors, trie, trie.root(1), 5, backend="native")
    assert ranking.items.tolist() == [[1, 3, 0, 2, -1]]
    assert ranking.cosines[0].tolist() == pytest.approx([math.sqrt(0.5), 0.0, -1.0, -1.0, -1.0])


def test_rows_of_any_distance_and_nodes_that_are_none(cuda_ops: on_cpu.Ops) -> None:
    trie = Trie.from_codes([[0], [1]])
    query, vectors = torch.randn(2, 9)[:, :5], torch.randn(2, 9)[:, :5]
    nodes = torch.tensor([[7, 1], [-5, 2**40]])
    base = trie.parts.base
    with cuda_ops.instead("rank_candidates"):
        items, scores, _ = torch.ops.dgi_kernels.rank_candidates(
            query,
            vectors,
            base.num_nodes_at(1),
            base.items_below(1),
            base.item_order,
            base.item_ids,
            [],
            None,
            None,
            None,
            [],
            [],
            nodes,
            torch.tensor([[0.0, -1.0], [0.0, 0.0]]),
            2,
            1e-12,
        )
    assert items.tolist() == [[1, -1], [-1, -1]] and scores[0].tolist() == [-1.0, -math.inf]


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=name_of)
def test_items_come_by_the_sum(cuda_ops: on_cpu.Ops, dtype: torch.dtype) -> None:
    with cuda_ops.instead("rank_candidates"):
        for _ in range(15):
            assert_random_sums(dtype, "native")
