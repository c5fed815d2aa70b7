"""What the tests of beam search share: a brute-force float64 oracle, inputs that hurt, shapes, bounds, and whole walks.

The oracle is pure Python and looks at every item every time. A walk searches a trie step by step; each step starts
where the one before arrived and is held against the oracle and the reference. Tests of the CUDA kernels run the same
walks with ``cuda_ops.instead`` around them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import Beams, NodeScores, Trie, TrieFilter, backends, beam_step, cosine_beam_step, cosine_logits

from .tries import Catalog, Code, make, names, random_filters

NORMALIZE = ("full", "children", "none")
BACKENDS = ("reference", *(["native"] if backends()["native"].available else []))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUND = 1e-5  # of scores, absolute and relative: sums of log-probabilities of a few units in float32

STRENGTHS = (0.0, 1.0, -1.0, 0.3, -2.5)

Candidate = tuple[int, int]  # parent, token


def log_softmax(values: list[float]) -> list[float]:
    """Over a row where NaN counts as -inf; all -inf where there is nothing else."""
    values = [-math.inf if math.isnan(value) else value for value in values]
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return values
    return [value - top - math.log(math.fsum(math.exp(other - top) for other in values)) for value in values]


def candidates(
    catalog: Catalog,
    logits: list[list[float]],
    prefixes: list[Code | None],
    scores: list[float],
    *,
    normalize: str = "none",
    log_normalizer: list[float] | None = None,
    allowed: set[int] | None = None,
    bonus: Callable[[Code], float] = lambda prefix: 0.0,
) -> dict[Candidate, float]:
    """The score of every allowed child of every live beam of one request; ``prefixes`` has None for a dead beam, and
    ``bonus`` is what a prefix adds."""
    found: dict[Candidate, float] = {}
    for parent, prefix in enumerate(prefixes):
        if prefix is None or not scores[parent] > -math.inf:
            continue
        tokens = [
            token
            for token in catalog.children(prefix)
            if allowed is None or allowed & set(catalog.items((*prefix, token)))
        ]
        row = [-math.inf if math.isnan(value) else value for value in logits[parent]]
        codes = [token for token in tokens if token >= 0]
        if log_normalizer is not None:
            logp = {token: row[token] - log_normalizer[parent] for token in codes}
        elif normalize == "full":
            normalized = log_softmax(row)
            logp = {token: normalized[token] for token in codes}
        elif normalize == "children":
            logp = dict(zip(codes, log_softmax([row[token] for token in codes]), strict=True))
        else:
            logp = {token: row[token] for token in codes}
        found |= {(parent, token): scores[parent] + logp.get(token, 0.0) + bonus((*prefix, token)) for token in tokens}
    return {candidate: score for candidate, score in found.items() if score > -math.inf}


def best(found: dict[Candidate, float], num_beams: int) -> list[tuple[float, Candidate]]:
    """The best candidates, ties to the lower parent, then the lower token."""
    return sorted(((score, candidate) for candidate, score in found.items()), key=lambda entry: (-entry[0], entry[1]))[
        :num_beams
    ]


def search(
    catalog: Catalog, logits: list[list[float]], num_beams: int | list[int], allowed: set[int] | None
) -> list[tuple[float, Code]]:
    """A whole search of one request whose logits, log-probabilities already, depend on the level alone."""
    beams: list[tuple[float, Code]] = [(0.0, ())]
    widths = num_beams if isinstance(num_beams, list) else [num_beams] * len(logits)
    for row, width in zip(logits, widths, strict=True):
        found = candidates(
            catalog,
            [row] * len(beams),
            [prefix for _, prefix in beams],
            [score for score, _ in beams],
            allowed=allowed,
        )
        beams = [(score, (*beams[parent][1], token)) for score, (parent, token) in best(found, width)]
    return beams


@dataclass
class Options:
    """The options of one step, for the ops and for the oracle; ``allowed`` are the ids that ``filters`` let pass, and
    ``bonuses`` what prefixes add."""

    num_beams: int
    normalize: str = "full"
    log_normalizer: Tensor | None = None
    filters: TrieFilter | list[TrieFilter | None] | None = None
    allowed: list[set[int] | None] | None = None
    node_scores: NodeScores | None = None
    strength: float | Tensor = 1.0
    bonuses: list[Callable[[Code], float]] | None = None

    def of_op(self) -> dict[str, object]:
        """Keywords of ``beam_step`` and ``cosine_beam_step``."""
        return {name: value for name, value in vars(self).items() if name not in ("allowed", "bonuses")}

    def of_oracle(self, request: int) -> dict[str, object]:
        """Keywords of :func:`candidates`."""
        return {
            "normalize": self.normalize,
            "log_normalizer": None if self.log_normalizer is None else self.log_normalizer[request].tolist(),
            "allowed": None if self.allowed is None else self.allowed[request],
            **({} if self.bonuses is None else {"bonus": self.bonuses[request]}),
        }


def weighted(trie: Trie, catalog: Catalog, batch: int) -> dict[str, object]:
    """Node scores by clicks that are equal, follow a law or differ by many orders of magnitude, for :class:`Options`;
    with one strength for all requests or one for each."""
    spread = random.choice([0.0, 1.0, 3.0, 20.0])
    weights = {item: math.exp(spread * random.gauss(0, 1)) for item in catalog.ids}
    strengths = [random.choice(STRENGTHS)] * batch
    strength: float | Tensor = strengths[0] if strengths else 1.0
    if random.random() < 0.5:
        strengths = [random.choice(STRENGTHS) for _ in range(batch)]
        strength = torch.tensor(strengths, dtype=random.choice([torch.float32, torch.float64]))

    def bonus_of(strength: float) -> Callable[[Code], float]:
        def bonus(prefix: Code) -> float:
            child, parent = (math.fsum(weights[item] for item in catalog.items(code)) for code in (prefix, prefix[:-1]))
            return strength * (math.log(child) - math.log(parent))

        return bonus

    return {
        "node_scores": trie.node_scores([weights[item] for item in trie.item_ids.tolist()]),
        "strength": strength,
        "bonuses": list(map(bonus_of, strengths)),
    }


def random_normalizer(shape: tuple[int, int], dtype: torch.dtype, normalize: str) -> Tensor | None:
    """(B, M), sometimes, where ``normalize`` allows one."""
    return torch.randn(shape).to(dtype) if normalize != "none" and random.random() < 0.3 else None


def hurt(logits: Tensor) -> Tensor:
    """Put NaN and -inf (banned codes) into some places, sometimes into all of a row."""
    logits = logits.masked_fill(torch.rand(logits.shape) < 0.15, -math.inf)
    logits = logits.masked_fill(torch.rand(logits.shape) < 0.1, math.nan)
    return logits.masked_fill(torch.rand(*logits.shape[:2], 1) < 0.05, random.choice([math.nan, -math.inf]))


def strided(values: Tensor) -> Tensor:
    """The same values as a slice of something larger, transposed."""
    batch, width, size = values.shape
    larger = torch.full((size + 3, width, batch + 1), math.nan, dtype=values.dtype)
    view = larger.permute(2, 1, 0)[1:, :, 2 : 2 + size]
    view.copy_(values)
    return view


def shuffled(beams: Beams) -> Beams:
    """The same beams in another order, as nobody promises that a caller keeps them sorted."""
    order = torch.randperm(beams.nodes.shape[1])
    return Beams(*(part[:, order] for part in beams[:4]), beams.depth)


class Fused(NamedTuple):
    """Sizes of a search from hidden states: all codebooks (size, dim), so many items and requests."""

    size: int
    dim: int
    items: int
    batch: int


def random_fused(*, small: bool = False) -> Fused:
    """Wide and narrow requests, few and many children: tiles of all products, and products of children alone."""
    if small:  # one thread after the other takes a CUDA kernel seconds
        return Fused(
            random.choice([3, 40]), random.choice([1, 5, 40]), random.choice([1, 50, 300]), random.randint(0, 5)
        )
    sizes, dims, items = [3, 40, 700], [1, 5, 32], [1, 50, 3000]
    return Fused(random.choice(sizes), random.choice(dims), random.choice(items), random.randint(0, 12))


EXTREMES = (math.inf, 1.0, -1.0, 0.5, 0.0, -0.0, -math.inf, math.nan)  # times the largest number of a dtype


def extreme(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Infinities, NaN, zeros of both signs, and numbers at the end of the range beside ordinary ones."""
    values = torch.tensor([*(x * torch.finfo(dtype).max for x in EXTREMES), 1.0, -1e30], dtype=dtype)
    return values[torch.randint(len(values), shape)]


def prefixes_of(known: dict[int, Code], nodes: list[int]) -> list[Code | None]:
    return [known[node] if node >= 0 else None for node in nodes]


def assert_step(
    trie: Trie, catalog: Catalog, before: Beams, logits: Tensor, after: Beams, options: Options, *, exact: bool
) -> None:
    """Check one step, request by request. ``exact``: scores are sums without rounding, so ties are told, too."""
    num_beams = options.num_beams
    assert after.nodes.shape == (len(before.nodes), num_beams)
    assert after.depth == before.depth + 1
    assert after.scores.dtype == torch.float32 and after.nodes.dtype == torch.int64
    known_before, known_after = names(trie, catalog, before.depth), names(trie, catalog, after.depth)
    for b in range(len(before.nodes)):
        parents = prefixes_of(known_before, before.nodes[b].tolist())
        all_of_them = candidates(
            catalog, logits[b].double().tolist(), parents, before.scores[b].tolist(), **options.of_oracle(b)
        )
        expected = best(all_of_them, num_beams)
        live = after.scores[b] > -math.inf
        count = len(expected)
        assert live.tolist() == [True] * count + [False] * (num_beams - count), f"live beams of request {b}"
        for name in ("nodes", "tokens", "parents"):
            assert (getattr(after, name)[b, count:] == -1).all(), f"{name} of dead beams of request {b}"
        found = list(zip(after.parents[b, :count].tolist(), after.tokens[b, :count].tolist(), strict=True))
        assert len(set(found)) == count, f"request {b} has a child twice"
        scores = after.scores[b, :count].tolist()
        assert scores == sorted(scores, reverse=True), f"scores of request {b}"
        if exact:
            assert list(zip(scores, found, strict=True)) == expected
        assert scores == pytest.approx([score for score, _ in expected], rel=BOUND, abs=BOUND)
        assert scores == pytest.approx([all_of_them[candidate] for candidate in found], rel=BOUND, abs=BOUND)
        assert prefixes_of(known_after, after.nodes[b, :count].tolist()) == [
            (*parents[parent], token) for parent, token in found
        ]


def assert_same(got: Beams, expected: Beams, *, exact: bool, bound: float = BOUND) -> None:
    """The same beams; without ``exact`` two whose scores differ by rounding alone may have changed places."""
    assert got.depth == expected.depth
    assert [part.dtype for part in got[:4]] == [part.dtype for part in expected[:4]]
    assert torch.equal(got.scores == -math.inf, expected.scores == -math.inf), "other beams are dead"
    torch.testing.assert_close(got.scores, expected.scores, rtol=bound, atol=bound, msg=lambda text: f"scores: {text}")
    if exact:
        for name in ("scores", "nodes", "tokens", "parents"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name


def assert_consistent(trie: Trie, before: Beams, after: Beams, logits: Tensor, options: Options) -> None:
    """Each live result is a child of its parent, once, and its score what this parent and code give."""
    live = after.nodes >= 0
    parents, tokens = after.parents.clamp(min=0), after.tokens.clamp(min=0)
    for row, alive in zip(after.nodes, live, strict=True):
        assert len(set(row[alive].tolist())) == int(alive.sum()), "a node comes twice"
    nodes = before.nodes.gather(1, parents)[live]
    children, of_children, exists = trie.parts.children(nodes, before.depth)
    is_it = exists & (children == after.nodes[live].unsqueeze(-1))
    assert (is_it.sum(-1) == 1).all() and torch.equal(of_children[is_it], after.tokens[live])
    if options.normalize == "children" and options.log_normalizer is None:
        return
    logp = logits.nan_to_num(-math.inf)
    if options.log_normalizer is not None:
        logp = logp - options.log_normalizer.double().unsqueeze(-1)
    elif options.normalize == "full":
        logp = logp.log_softmax(-1)
    rows = logp.gather(1, parents.unsqueeze(-1).expand(-1, -1, logp.shape[2])).gather(2, tokens.unsqueeze(-1))
    expected = before.scores.double().gather(1, parents) + rows.squeeze(-1)
    torch.testing.assert_close(after.scores.double()[live], expected[live], rtol=BOUND, atol=BOUND)


def steps(trie: Trie, logits: Tensor, beams: Beams, **options: object) -> tuple[Beams, Beams]:
    """One step in C++ (or CUDA, inside ``cuda_ops.instead``) and in the reference."""
    got, expected = (beam_step(trie, logits, beams, backend=name, **options) for name in ("native", "reference"))
    return got, expected


def walk(
    catalog: Catalog, *, dtype: torch.dtype, normalize: str, exact: bool, backend: str, weights: bool = False
) -> None:
    """Steps from given logits over one random catalog, its filters included. ``exact``: logits are small integers;
    ``weights``: with node scores."""
    trie, batch = make(catalog), random.randint(0, 3)
    filters, allowed = random_filters(catalog, trie, batch)
    own = weighted(trie, catalog, batch) if weights else {}
    beams = trie.root(batch)
    for size in catalog.sizes:
        shape = (batch, beams.nodes.shape[1])
        logits = torch.randint(-4, 4, (*shape, size)).to(dtype) if exact else (3 * torch.randn(*shape, size)).to(dtype)
        logits = strided(hurt(logits)) if random.random() < 0.7 else logits
        options = Options(
            num_beams=random.choice([1, 2, 5, 17, 400]),
            normalize=normalize,
            log_normalizer=random_normalizer(shape, dtype, normalize),
            filters=filters,
            allowed=allowed,
            **own,
        )
        after = beam_step(trie, logits, beams, backend=backend, **options.of_op())
        assert_step(trie, catalog, beams, logits, after, options, exact=exact)
        if backend != "reference":
            expected = beam_step(trie, logits, beams, backend="reference", **options.of_op())
            assert_same(after, expected, exact=exact)
        beams = shuffled(after) if random.random() < 0.3 else after


def cosine_walk(catalog: Catalog, *, dtype: torch.dtype, backend: str, weights: bool = False) -> None:
    """Steps from hidden states over one random catalog, against the oracle on logits in float64."""
    trie = make(catalog)
    own = weighted(trie, catalog, 2) if weights else {}
    beams = trie.root(2)
    filters, allowed = random_filters(catalog, trie, 2)
    for size in catalog.sizes:
        h, codebook = torch.randn(2, beams.nodes.shape[1], 5).to(dtype), torch.randn(size, 5).to(dtype)
        scale = torch.tensor(7.0) if random.random() < 0.5 else 7.0
        options = Options(4, random.choice(NORMALIZE), filters=filters, allowed=allowed, **own)
        after = cosine_beam_step(trie, h, codebook, scale, beams, backend=backend, **options.of_op())
        logits = 7.0 * F.normalize(h.double(), dim=-1) @ F.normalize(codebook.double(), dim=-1).T
        assert_step(trie, catalog, beams, logits, after, options, exact=False)
        beams = after


def fused_walk(sizes: Fused, *, depth: int, dtype: torch.dtype, normalize: str, backend: str) -> None:
    """Steps from hidden states (strided, some NaN or zero) over a large trie, against the reference and the formula."""
    size, dim, items, batch = sizes
    trie = Trie.from_codes(torch.randint(0, size, (items, depth)), codebook_sizes=[size] * depth)
    if random.random() < 0.5:
        new = torch.randint(0, size, (random.choice([1, 50]), depth))
        trie = trie.update(add=(new, range(5000, 5000 + len(new))), remove=range(0, trie.num_items, 3))
    filters = trie.filter(items=trie.item_ids[::2]) if random.random() < 0.5 else None
    beams = trie.root(batch)
    for _ in range(depth):
        shape = (batch, beams.nodes.shape[1])
        h, codebook = torch.randn(*shape, 2 * dim).to(dtype)[..., ::2], torch.randn(size, dim).to(dtype)
        h[torch.rand(shape) < 0.05] = random.choice([0, math.nan])
        scale = random.choice([1.0, torch.tensor(1.0)])
        options = Options(
            random.choice([1, 5, 33, 200]), normalize, random_normalizer(shape, dtype, normalize), filters=filters
        )
        got, expected = (
            cosine_beam_step(trie, h, codebook, scale, beams, backend=name, **options.of_op())
            for name in (backend, "reference")
        )
        assert_same(got, expected, exact=False)
        assert_consistent(trie, beams, got, cosine_logits(h.double(), codebook.double(), 1.0), options)
        beams = got


def assert_extremes(requests: int, dtype: torch.dtype, normalize: str) -> None:
    """Logits and scores at the end of the range, each request for itself: the kernel goes as the reference does."""
    trie = Trie.from_codes(torch.arange(9).unsqueeze(1), codebook_sizes=[9])
    for _ in range(requests // 40):
        logits, beams = extreme((40, 1, 9), dtype), trie.root(40)._replace(scores=extreme((40, 1), torch.float32))
        assert_same(*steps(trie, logits, beams, num_beams=6, normalize=normalize), exact=normalize == "none")


def assert_exact_log_sum_exp(sizes: tuple[int, ...]) -> None:
    """To rounding, over any number of codes and far from zero: the quick way is for maxima up to 1e6."""
    trie = Trie.from_codes([[0]], codebook_sizes=[1])
    for codes in sizes:
        trie.codebook_sizes = (codes,)
        logits = torch.randn(3, 1, codes) * torch.tensor([0.1, 3.0, 40.0]).view(3, 1, 1)
        logits += random.choice([0.0, 100.3, -700.7, -5e4, 9.9e5, 3e7])
        scores = beam_step(trie, logits, trie.root(3), num_beams=1, backend="native").scores[:, 0]
        expected = logits.double().log_softmax(-1)[:, 0, 0]
        torch.testing.assert_close(scores.double(), expected, rtol=4e-7, atol=1e-6)
