"""What the tests of ranking share: a sort of all items below the beams, in pure Python and float64, and its inputs."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from dgi_kernels import Beams, Ranking, Trie, backends, rank_candidates

from .tries import Catalog, Code, make, names, random_catalog

BACKENDS = ("reference", *(["native"] if backends()["native"].available else []))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUND = 1e-6  # of cosines, absolute: float32 sums over a few dimensions


def cosine(a: list[float], b: list[float]) -> float:
    norms = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / norms if norms > 0 else 0.0


def rank(
    catalog: Catalog,
    query: list[float],
    vectors: list[list[float]],
    beams: list[tuple[float, Code]],
    k: int,
    allowed: set[int] | None,
) -> list[tuple[int, float, float]]:
    """(id, beam score, cosine) of the best items below live beams of one request: by score, cosine, lower id."""
    found = [
        (-score, -cosine(query, vectors[item]), item)
        for score, prefix in beams
        for item in catalog.items(prefix)
        if allowed is None or item in allowed
    ]
    return [(item, -score, -similarity) for score, similarity, item in sorted(found)][:k]


def random_beams(trie: Trie, catalog: Catalog, batch: int, depth: int) -> tuple[Beams, list[list[tuple[float, Code]]]]:
    """Beams with ties, dead ones among them, in any order; and the live ones as (score, prefix)."""
    known = names(trie, catalog, depth)
    width = random.randint(1, 6)
    nodes = torch.full((batch, width), -1)
    scores = torch.full((batch, width), -math.inf)
    live: list[list[tuple[float, Code]]] = [[] for _ in range(batch)]
    for b in range(batch):
        chosen = random.sample(sorted(known), random.randint(0, min(width, len(known))))
        for place, node in zip(random.sample(range(width), len(chosen)), chosen, strict=True):
            nodes[b, place], scores[b, place] = node, float(random.randint(-2, 0))
            live[b].append((scores[b, place].item(), known[node]))
    return Beams(nodes, nodes, nodes, scores, depth), live


def integer_vectors(rows: int, dims: int, dtype: torch.dtype) -> Tensor:
    """Vectors whose cosines tie often, with some zero vectors among them."""
    return torch.randint(-1, 2, (rows, dims)).to(dtype)


def assert_ranked(ranking: Ranking, b: int, expected: list[tuple[int, float, float]], k: int) -> None:
    """Request ``b`` has the (id, beam score, cosine) of :func:`rank`, and padding up to ``k``."""
    missing = k - len(expected)
    assert ranking.items[b].tolist() == [item for item, _, _ in expected] + [-1] * missing
    assert ranking.scores[b].tolist() == [score for _, score, _ in expected] + [-math.inf] * missing
    cosines = [cosine for _, _, cosine in expected] + [-1.0] * missing
    assert ranking.cosines[b].tolist() == pytest.approx(cosines, abs=BOUND)


def assert_random_ranking(dtype: torch.dtype, backend: str) -> None:
    """A random catalog, its beams at any depth, filtered or not, with more vectors than items or not."""
    catalog = random_catalog(max_items=20, max_size=3)
    trie, batch, k = make(catalog), random.randint(0, 3), random.randint(1, 25)
    beams, live = random_beams(trie, catalog, batch, random.randint(0, catalog.depth))
    # 1 or 2 dimensions: equal directions give equal cosines bit for bit, others differ by far more than rounding
    rows = max(catalog.ids) + 1 + random.choice([0, 200])
    query, vectors = integer_vectors(batch, 2, dtype), integer_vectors(rows, 2, dtype)
    items = None if random.random() < 0.5 else set(random.sample(catalog.ids, random.randint(0, len(catalog.ids))))
    filters = None if items is None else trie.filter(items=items)
    ranking = rank_candidates(query, vectors, trie, beams, k, filters=filters, backend=backend)
    assert ranking.scores.dtype == torch.float32
    assert ranking.cosines.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for b in range(batch):
        assert_ranked(ranking, b, rank(catalog, query[b].tolist(), vectors.tolist(), live[b], k, items), k)


def assert_random_sums(dtype: torch.dtype, backend: str) -> None:
    """The same by ``order="sum"``: the sums are those of the best items, each has its own, and none comes twice."""
    catalog = random_catalog(max_items=20, max_size=3)
    trie, batch, k = make(catalog), random.randint(0, 3), random.randint(1, 25)
    beams, live = random_beams(trie, catalog, batch, random.randint(0, catalog.depth))
    query, vectors = integer_vectors(batch, 2, dtype), integer_vectors(max(catalog.ids) + 1, 2, dtype)
    items = None if random.random() < 0.5 else set(random.sample(catalog.ids, random.randint(0, len(catalog.ids))))
    weight, share = random.choice([0.0, 0.7, -1.3, 9.0]), random.random() < 0.5
    ranking = rank_candidates(
        query,
        vectors,
        trie,
        beams,
        k,
        filters=None if items is None else trie.filter(items=items),
        order="sum",
        cosine_weight=weight,
        share=share,
        backend=backend,
    )
    for b in range(batch):
        sums: dict[int, float] = {}
        for score, prefix in live[b]:
            below = [item for item in catalog.items(prefix) if items is None or item in items]
            for item in below:
                similarity = cosine(query[b].tolist(), vectors[item].tolist())
                sums[item] = score + weight * similarity - (math.log(len(below)) if share else 0.0)
        expected = sorted(sums.values(), reverse=True)[:k]
        missing = k - len(expected)
        found = ranking.items[b].tolist()
        assert found[len(expected) :] == [-1] * missing and len(set(found[: len(expected)])) == len(expected)
        assert ranking.scores[b].tolist() == pytest.approx([*expected, *[-math.inf] * missing], abs=BOUND * 10)
        own = [sums[item] for item in found[: len(expected)]]
        assert own == pytest.approx(expected, abs=BOUND * 10)
