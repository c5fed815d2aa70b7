"""The CPU kernels with 1, 2, 4, 8 and 16 threads: how each family grows, and that its results stay what they claim.

They were tuned with two threads. One shape of each family, of the size of a training step on a CPU; a minute in all.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import bench_beam
import bench_cosine
import bench_quantize
import torch
from torch import Tensor

from dgi_kernels import (
    Trie,
    assign_codes,
    beam_search,
    cosine_beam_step,
    cosine_cross_entropy,
    gumbel_noise,
    gumbel_softmax,
    rank_candidates,
    residual_quantize,
)

from .device import Cpu
from .session import Session

COUNTS = (1, 2, 4, 8, 16)
SECONDS = 0.8  # for each family and number of threads


@dataclass(frozen=True)
class Family:
    """``run`` returns what is compared; ``exact``: its bits do not depend on the number of threads."""

    name: str
    run: Callable[[], list[Tensor]]
    exact: bool


def families(small: bool) -> list[Family]:
    """Each with the inputs that it keeps; ``small`` for a rehearsal."""
    torch.manual_seed(0)
    n, k, d = (256, 256, 32) if small else (4096, 4096, 64)
    h, weight, target, scale = bench_cosine.inputs(n, d, k, True)
    rows = 256 if small else 2048
    sizes = (64, 32) if small else bench_quantize.SIZES
    z = torch.randn(rows, d).requires_grad_()
    books = [torch.randn(size, d).requires_grad_() for size in sizes]
    logits = torch.randn(rows, sizes[0]).requires_grad_()
    case = bench_beam.Case(items=2000 if small else 10**6, codes=64 if small else 2048, batch=16)
    trie = Trie.from_codes(case.sids(), codebook_sizes=[case.codes] * case.levels)
    steps = [torch.randn(case.batch, case.beams if level else 1, case.codes) for level in range(case.levels)]
    hidden, codebook = torch.randn(case.batch, 1, d), torch.randn(case.codes, d)
    query, vectors = torch.randn(case.batch, d), torch.randn(case.items, d)

    def loss() -> list[Tensor]:
        value = cosine_cross_entropy(h, weight, target, scale)
        return [value.detach(), *torch.autograd.grad(value, (h, weight, scale))]

    def quantize() -> list[Tensor]:
        result = residual_quantize(z, books, 30.0, 0.5, seed=1)
        return [result.quantized.detach(), *torch.autograd.grad(result.quantized.square().sum(), (z, *books))]

    def softmax() -> list[Tensor]:
        sample = gumbel_softmax(logits, 0.5, seed=1)
        return [sample.detach(), *torch.autograd.grad(sample.square().sum(), logits)]

    def search() -> list[Tensor]:
        found = beam_search(
            trie, lambda depth, tokens, parents: steps[depth], batch_size=case.batch, num_beams=case.beams
        )
        return [found.codes, found.scores]

    found = beam_search(trie, lambda depth, tokens, parents: steps[depth], batch_size=case.batch, num_beams=case.beams)
    return [
        Family("cosine_cross_entropy", loss, False),
        Family("residual_quantize", quantize, False),
        Family("gumbel_softmax", softmax, True),
        Family("gumbel_noise", lambda: [gumbel_noise(1, 0, rows, sizes[0])], True),
        Family("assign_codes", lambda: [assign_codes(z.detach(), [book.detach() for book in books])], True),
        Family("beam_search", search, True),
        Family(
            "cosine_beam_step",
            lambda: [
                cosine_beam_step(trie, hidden, codebook, 30.0, trie.root(case.batch), num_beams=case.beams).scores
            ],
            True,
        ),
        Family("rank_candidates", lambda: [rank_candidates(query, vectors, trie, found, 20).cosines], True),
        Family(
            "trie_build",
            lambda: [Trie.from_codes(case.sids(), codebook_sizes=[case.codes] * case.levels).parts.base.tokens[-1]],
            True,
        ),
    ]


def run(session: Session) -> None:
    cpu, before = Cpu(), torch.get_num_threads()
    small = bool(session.options.get("rehearse"))
    try:
        for family in families(small):
            with session.guarded(family.name):
                grow(session, cpu, family, 0.02 if small else SECONDS)
    finally:
        torch.set_num_threads(before)


def grow(session: Session, cpu: Cpu, family: Family, budget: float) -> None:
    """Time a family with each number of threads, and hold its results against those of one."""
    first: list[Tensor] = []
    times: dict[int, float] = {}
    for count in COUNTS:
        torch.set_num_threads(count)
        results = family.run()
        first = first or results
        off = max(distance(a, b) for a, b in zip(results, first, strict=True))
        once = cpu.seconds(family.run)
        repeats = max(2, min(50, int(budget / max(once, 1e-9))))
        samples = [cpu.seconds(family.run) for _ in range(repeats)]
        times[count] = statistics.median(samples)
        session.add(
            family.name,
            {"threads": count, "cores": os.cpu_count()},
            "ours",
            samples,
            None,
            difference_from_one_thread=off,
        )
        if off > (0.0 if family.exact else 1e-5):
            session.fail(f"{family.name} with {count} threads differs by {off:.1e} from one")
    session.say(
        f"{family.name}: "
        + ", ".join(f"{count}: {1e3 * seconds:.4g} ms ({times[1] / seconds:.1f})" for count, seconds in times.items())
    )


def distance(a: Tensor, b: Tensor) -> float:
    """Relative to the norm; 0 for the same bits."""
    if torch.equal(a, b):
        return 0.0
    return ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
