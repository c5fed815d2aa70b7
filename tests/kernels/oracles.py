"""Brute-force truths for tries, beam search and ranking: pure Python, float64, every item looked at every time."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

Code = tuple[int, ...]
Candidate = tuple[int, int]  # parent, token


@dataclass
class Catalog:
    """Items as (codes, id) in the order given; ``sizes`` are the codebooks' sizes."""

    codes: list[Code]
    ids: list[int]
    sizes: list[int]

    @property
    def depth(self) -> int:
        return len(self.sizes)

    def padded(self) -> list[Code]:
        return [code + (-1,) * (self.depth - len(code)) for code in self.codes]

    def prefixes(self, depth: int) -> list[Code]:
        """All prefixes of one depth in order: the index of a prefix is its node."""
        return sorted({code[:depth] for code in self.padded()})

    def node(self, prefix: Code) -> int:
        prefixes = self.prefixes(len(prefix)) if prefix else [()]
        return prefixes.index(prefix) if prefix in prefixes else -1

    def children(self, prefix: Code) -> list[int]:
        return sorted({code[len(prefix)] for code in self.padded() if code[: len(prefix)] == prefix})

    def items(self, prefix: Code) -> list[int]:
        """Ids below a prefix, by code, equal codes in the order given."""
        below = [(code, row) for row, code in enumerate(self.padded()) if code[: len(prefix)] == prefix]
        return [self.ids[row] for _, row in sorted(below)]


def random_catalog(*, max_items: int = 12, max_depth: int = 4, max_size: int = 6) -> Catalog:
    """A small catalog in random order: often ragged, with duplicates, one item, one level or a codebook of one."""
    depth = random.randint(1, max_depth)
    sizes = [random.randint(1, max_size) for _ in range(depth)]
    ragged = random.random() < 0.5
    count = random.choice([1, random.randint(1, max_items)])
    lengths = [random.randint(1, depth) if ragged else depth for _ in range(count)]
    lengths[random.randrange(count)] = depth
    codes = [tuple(random.randrange(size) for size in sizes[:length]) for length in lengths]
    return Catalog(codes, random.sample(range(3 * count), count), sizes)


def log_softmax(values: list[float]) -> list[float]:
    """Over a row where NaN counts as -inf; all -inf where there is nothing else."""
    values = [-math.inf if math.isnan(value) else value for value in values]
    top = max(values, default=-math.inf)
    if top == -math.inf:
        return values
    return [value - top - math.log(math.fsum(math.exp(other - top) for other in values)) for value in values]


def step_candidates(
    catalog: Catalog,
    logits: list[list[float]],
    prefixes: list[Code | None],
    scores: list[float],
    normalize: str,
    log_normalizer: list[float] | None,
    allowed: set[int] | None,
) -> dict[Candidate, float]:
    """The score of every allowed child of every live beam of one request; ``prefixes`` has None for a dead beam."""
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
        found |= {(parent, token): scores[parent] + logp.get(token, 0.0) for token in tokens}
    return {candidate: score for candidate, score in found.items() if score > -math.inf}


def best(candidates: dict[Candidate, float], num_beams: int) -> list[tuple[float, Candidate]]:
    """The best candidates, ties to the lower parent, then the lower token."""
    return sorted(
        ((score, candidate) for candidate, score in candidates.items()), key=lambda entry: (-entry[0], entry[1])
    )[:num_beams]


def search(
    catalog: Catalog, logits: list[list[float]], num_beams: int, allowed: set[int] | None
) -> list[tuple[float, Code]]:
    """A whole search of one request whose logits, log-probabilities already, depend on the level alone."""
    beams: list[tuple[float, Code]] = [(0.0, ())]
    for row in logits:
        candidates = step_candidates(
            catalog,
            [row] * len(beams),
            [prefix for _, prefix in beams],
            [score for score, _ in beams],
            "none",
            None,
            allowed,
        )
        beams = [(score, (*beams[parent][1], token)) for score, (parent, token) in best(candidates, num_beams)]
    return beams


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
