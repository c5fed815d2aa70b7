"""The CUDA beam steps, run thread by thread on the CPU, against the reference and a brute-force search in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dgi_kernels import Beams, Trie, beam_step, cosine_beam_step

from ..kernels.beam_cases import (
    GPU_DTYPES,
    NORMALIZE,
    assert_exact_log_sum_exp,
    assert_extremes,
    assert_same,
    cosine_walk,
    fused_walk,
    random_fused,
    walk,
)
from ..kernels.shapes import name_of
from ..kernels.tries import random_catalog
from . import on_cpu

OPS = ("beam_step", "cosine_beam_step")

pytestmark = pytest.mark.slow  # the first of them compiles the kernels, too


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=name_of)
def test_steps_are_the_top_of_all_allowed_children(cuda_ops: on_cpu.Ops, dtype: torch.dtype, normalize: str) -> None:
    """Ragged, duplicate and updated catalogs, filters, NaN and -inf, strides, shuffled beams, more beams than items."""
    with cuda_ops.instead(*OPS):
        for _ in range(4):
            walk(random_catalog(), dtype=dtype, normalize=normalize, exact=False, backend="native")


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=name_of)
def test_ties_go_to_the_lower_parent_then_the_lower_token(cuda_ops: on_cpu.Ops, dtype: torch.dtype) -> None:
    with cuda_ops.instead(*OPS):
        for _ in range(4):
            walk(random_catalog(max_items=40), dtype=dtype, normalize="none", exact=True, backend="native")


def both(cuda_ops: on_cpu.Ops, trie: Trie, logits: Tensor, beams: Beams, **options: object) -> tuple[Beams, Beams]:
    with cuda_ops.instead(*OPS):
        got = beam_step(trie, logits, beams, backend="native", **options)
    return got, beam_step(trie, logits, beams, backend="reference", **options)


@pytest.mark.parametrize("num_beams", [1, 65, 1024, 1025], ids=str)
@pytest.mark.parametrize("equal", [False, True])
def test_more_candidates_than_a_block_holds(cuda_ops: on_cpu.Ops, num_beams: int, equal: bool) -> None:
    """Keys beyond 4096 are made again each pass, of 1025 beams lie in global memory; equal scores take all digits."""
    codes = 1400
    trie = Trie.from_codes(torch.randint(0, codes, (12000, 2)), codebook_sizes=[codes, codes])
    beams = trie.root(1)
    for width in (1, 1200 if num_beams > 1024 else 5):
        logits = torch.zeros(1, width, codes) if equal else torch.randint(-9, 9, (1, width, codes)).float()
        if width > 1:
            nodes = torch.arange(width).unsqueeze(0)
            beams = Beams(nodes, nodes, nodes, -torch.rand(1, width).round(decimals=1), 1)
        assert_same(*both(cuda_ops, trie, logits, beams, num_beams=num_beams, normalize="none"), exact=True)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_few_requests_of_many_candidates(cuda_ops: on_cpu.Ops, normalize: str) -> None:
    """A slice is 64 candidates here: a request's are selected by several blocks, some of which have none."""
    codes = 500
    trie = Trie.from_codes(torch.randint(0, codes, (4000, 2)), codebook_sizes=[codes, codes])
    for requests, num_beams in ((1, 7), (3, 100)):
        beams = beam_step(trie, torch.randn(requests, 1, codes), trie.root(requests), num_beams=9)
        logits = torch.randn(requests, 9, codes).round(decimals=1)
        filters = [None] * (requests - 1) + [trie.filter(mask=torch.rand(4000) < 0.5)]
        got, expected = both(cuda_ops, trie, logits, beams, num_beams=num_beams, normalize=normalize, filters=filters)
        assert_same(got, expected, exact=False)


def test_logits_of_any_alignment(cuda_ops: on_cpu.Ops) -> None:
    """Rows that begin at 16 bytes are read so, the others one by one; a row's end is left to single reads."""
    trie = Trie.from_codes(torch.randint(0, 200, (300, 1)), codebook_sizes=[200])
    for dtype in GPU_DTYPES:
        for length, start in ((200, 0), (208, 8), (203, 3)):
            logits = (3 * torch.randn(2, 1, length)).to(dtype)[..., start:][..., :200]
            got, expected = both(cuda_ops, trie, logits, trie.root(2), num_beams=20)
            assert_same(got, expected, exact=False)


def test_many_beams_of_few_children_each(cuda_ops: on_cpu.Ops) -> None:
    """A child of each code would be 2^31 candidates from 7,068 beams on; what counts are those that there are.

    The reference, which would form 4 GB of logits, is given the two live beams alone.
    """
    codes, width, live = 151_936, 7100, torch.tensor([3, 7000])
    trie = Trie.from_codes([[0, 5], [1, 7], [1, 9]], codebook_sizes=[codes, codes])
    nodes = torch.full((1, width), -1)
    nodes[0, live] = torch.tensor([1, 0])
    beams = Beams(nodes, nodes, nodes, torch.zeros(1, width), 1)
    logits = torch.randn(1, 1, codes).expand(1, width, codes)
    options = {"num_beams": 4, "normalize": "none"}
    with cuda_ops.instead(*OPS):
        got = beam_step(trie, logits, beams, backend="native", **options)
    few = Beams(*(part[:, live] for part in beams[:4]), beams.depth)
    expected = beam_step(trie, logits[:, live], few, backend="reference", **options)
    assert int((expected.nodes >= 0).sum()) == 3
    parents = torch.where(expected.parents < 0, -1, live[expected.parents])
    assert_same(got, expected._replace(parents=parents), exact=True)
    base = trie.parts.base
    with cuda_ops.instead(*OPS), pytest.raises(RuntimeError, match="more than 2..31 candidates"):
        torch.ops.dgi_kernels.beam_step(
            base.tokens[1], base.child_start[1], [], [], [], [], logits, nodes, beams.scores, None, 4, 2
        )


def test_wide_tokens(cuda_ops: on_cpu.Ops) -> None:
    codes = 40000
    trie = Trie.from_codes(torch.randint(0, codes, (300, 1)), codebook_sizes=[codes])
    got, expected = both(cuda_ops, trie, 3 * torch.randn(1, 1, codes), trie.root(1), num_beams=20)
    assert_same(got, expected, exact=False)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_numbers_at_the_end_of_the_range(cuda_ops: on_cpu.Ops, normalize: str) -> None:
    with cuda_ops.instead(*OPS):
        assert_extremes(40, torch.float32, normalize)


def test_the_log_sum_exp_is_exact_to_rounding(cuda_ops: on_cpu.Ops) -> None:
    with cuda_ops.instead(*OPS):
        assert_exact_log_sum_exp((1, 255, 1025, 5000))


def test_nodes_that_are_none_are_dead(cuda_ops: on_cpu.Ops) -> None:
    """On CUDA nobody looks at values: no wild read, no beam."""
    trie = Trie.from_codes([[0], [1]], codebook_sizes=[2])
    nodes = torch.tensor([[1, -7, 2**40, 0]])
    root = trie.root(1)
    with cuda_ops.instead(*OPS):
        arguments = (trie.parts.base.tokens[0], trie.parts.base.child_start[0], [], [], [], [])
        found, tokens, parents, scores = torch.ops.dgi_kernels.beam_step(
            *arguments, torch.zeros(1, 4, 2), nodes, root.scores.expand(1, 4), None, 3, 2
        )
    assert parents.tolist() == [[3, 3, -1]] and tokens.tolist() == [[0, 1, -1]]
    assert found.tolist() == [[0, 1, -1]] and scores.tolist() == [[0.0, 0.0, -math.inf]]


def test_many_requests_with_filters_of_their_own(cuda_ops: on_cpu.Ops) -> None:
    """A launch takes 96 sets; more come in several."""
    trie = Trie.from_codes(torch.randint(0, 6, (40, 2)), codebook_sizes=[6, 6])
    filters = [trie.filter(mask=torch.rand(40) < 0.1) if i != 50 else None for i in range(100)]
    got, expected = both(cuda_ops, trie, torch.randn(100, 1, 6), trie.root(100), num_beams=4, filters=filters)
    assert_same(got, expected, exact=False)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=name_of)
def test_cosine_steps_match_the_reference(cuda_ops: on_cpu.Ops, dtype: torch.dtype, normalize: str) -> None:
    """300 products are made at a time here, so that the requests come in several parts."""
    with cuda_ops.instead(*OPS):
        for _ in range(3):
            fused_walk(random_fused(small=True), depth=2, dtype=dtype, normalize=normalize, backend="native")


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=name_of)
def test_cosine_steps_are_steps_on_cosine_logits(cuda_ops: on_cpu.Ops, dtype: torch.dtype) -> None:
    with cuda_ops.instead(*OPS):
        for _ in range(4):
            cosine_walk(random_catalog(), dtype=dtype, backend="native")


def test_the_order_of_threads_does_not_matter(cuda_ops: on_cpu.Ops) -> None:
    trie = Trie.from_codes(torch.randint(0, 300, (3000, 2)), codebook_sizes=[300, 300])
    logits, beams = torch.randn(1, 4, 300), beam_step(trie, torch.randn(1, 1, 300), trie.root(1), num_beams=4)
    with cuda_ops.instead(*OPS):
        first, second = (beam_step(trie, logits, beams, num_beams=50, backend="native") for _ in range(2))
    for a, b in zip(first[:4], second[:4], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_node_scores(cuda_ops: on_cpu.Ops, normalize: str) -> None:
    """Of both parts of a trie, ends of sequences among them, one strength or several."""
    with cuda_ops.instead(*OPS):
        for _ in range(6):
            catalog = random_catalog(max_items=30)
            walk(catalog, dtype=torch.float32, normalize=normalize, exact=False, backend="native", weights=True)
            cosine_walk(random_catalog(), dtype=torch.float32, backend="native", weights=True)


def test_node_scores_of_requests_in_several_parts(cuda_ops: on_cpu.Ops) -> None:
    """300 products are made at a time here: the strengths of a part are those of its requests."""
    trie = Trie.from_codes(torch.randint(0, 40, (200, 1)), codebook_sizes=[40])
    options = {
        "num_beams": 5,
        "node_scores": trie.node_scores(torch.rand(200) + 0.01),
        "strength": torch.linspace(-3, 3, 40)[::2],
    }
    h, codebook = torch.randn(20, 1, 8), torch.randn(40, 8)
    with cuda_ops.instead(*OPS):
        got = cosine_beam_step(trie, h, codebook, 5.0, trie.root(20), backend="native", **options)
    expected = cosine_beam_step(trie, h, codebook, 5.0, trie.root(20), backend="reference", **options)
    assert_same(got, expected, exact=False)
