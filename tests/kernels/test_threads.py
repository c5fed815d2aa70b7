"""The CPU kernels with 16 threads, more than there may be cores: results within the claim, and the same each time.

Every family is large enough to be split into a share for each thread, and once too large for shares of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from dgi_kernels import (
    Trie,
    _extension,
    assign_codes,
    beam_search,
    cosine_beam_step,
    cosine_cross_entropy,
    cosine_logits,
    gumbel_noise,
    gumbel_softmax,
    rank_candidates,
    residual_quantize,
)

THREADS = 16
CLAIM = 2e-5  # of results in float32, relative to the norm
pytestmark = pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))

Run = Callable[[], list[Tensor]]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def loss(n: int, k: int, d: int, dtype: torch.dtype = torch.float32, reduction: str = "mean") -> Run:
    h, weight = leaves((n, d), (k, d), dtype=dtype)
    target, scale = torch.randint(k, (n,)), torch.tensor(20.0, requires_grad=True)
    target[torch.rand(n) < 0.1] = -100
    with torch.no_grad():  # peaked, as a trained head's: lists take the place of rows
        h[::2] = weight[target.clamp(min=0)][::2] + 0.2 * h[::2]
    upstream = torch.rand(n) if reduction == "none" else torch.ones(())

    def run() -> list[Tensor]:
        value = cosine_cross_entropy(h, weight, target, scale, reduction=reduction, backend="native")
        return [value.detach(), *torch.autograd.grad((value * upstream).sum(), (h, weight, scale))]

    return run


def quantize(n: int, d: int, sizes: tuple[int, ...], mode: str) -> Run:
    z, *books = leaves((n, d), *((size, d) for size in sizes))
    if mode == "soft":
        with torch.no_grad():
            z[::2] = books[0][torch.randint(sizes[0], (len(z[::2]),))]

    def run() -> list[Tensor]:
        result = residual_quantize(z, books, 20.0, 0.3, mode=mode, seed=3, backend="native")
        if mode == "hard":
            return [result.codes, result.quantized, *result.usage]
        value = result.quantized.square().sum() + torch.cat(list(result.usage)).square().sum()
        return [
            result.quantized.detach(),
            *(u.detach() for u in result.usage),
            *torch.autograd.grad(value, (z, *books)),
        ]

    return run


def softmax() -> Run:
    (logits,) = leaves((700, 900))

    def run() -> list[Tensor]:
        sample = gumbel_softmax(logits, 0.5, seed=1, backend="native")
        return [sample.detach(), *torch.autograd.grad(sample.square().sum(), logits)]

    return run


def search() -> Run:
    size, batch, beams = 64, 40, 30
    codes = torch.randint(size, (20000, 3))
    steps = [torch.randn(batch, beams if depth else 1, size) for depth in range(3)]
    hidden, codebook = torch.randn(batch, 1, 24), torch.randn(size, 24)
    query, vectors = torch.randn(batch, 24), torch.randn(len(codes), 24)

    def run() -> list[Tensor]:
        trie = Trie.from_codes(codes, codebook_sizes=[size] * 3)
        found = beam_search(trie, lambda depth, tokens, parents: steps[depth], batch_size=batch, num_beams=beams)
        step = cosine_beam_step(trie, hidden, codebook, 10.0, trie.root(batch), num_beams=beams)
        ranked = rank_candidates(query, vectors, trie, found, 20)
        return [found.codes, found.scores, step.tokens, step.scores, ranked.items, ranked.cosines]

    return run


RUNS: dict[str, Callable[[], Run]] = {
    "loss": lambda: loss(5000, 70, 24),
    "loss-lists": lambda: loss(5000, 300, 128, reduction="none"),
    "loss-bfloat16": lambda: loss(2100, 70, 24, torch.bfloat16),
    "loss-one-share": lambda: loss(1100, 70, 24),
    "loss-large-codebook": lambda: loss(5000, 6000, 96),
    "quantize-soft": lambda: quantize(2500, 24, (70, 33), "soft"),
    "quantize-straight-through": lambda: quantize(2500, 24, (70, 33), "straight_through"),
    "quantize-hard": lambda: quantize(2500, 24, (70, 33), "hard"),
    "quantize-one-share": lambda: quantize(900, 24, (70, 33), "soft"),
    "softmax": softmax,
    "search": search,
}


@pytest.mark.parametrize("name", RUNS)
def test_sixteen_threads_give_what_one_gives(name: str) -> None:
    run = RUNS[name]()
    torch.set_num_threads(1)
    expected = run()
    torch.set_num_threads(THREADS)
    first = run()
    for i, (got, want) in enumerate(zip(first, expected, strict=True)):
        if want.is_floating_point():
            tolerance = 1e-2 if want.dtype == torch.bfloat16 else CLAIM
            error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
            assert error <= tolerance, f"result {i} of {name}: {error:.1e}"
        else:
            assert torch.equal(got, want), f"result {i} of {name}"
    for _ in range(5):
        for i, (again, before) in enumerate(zip(run(), first, strict=True)):
            assert torch.equal(again, before), f"result {i} of {name} differs from run to run"


@pytest.mark.parametrize("rows", [1, 1000])
def test_rows_are_their_own(rows: int) -> None:
    """What is made row by row has the same bits with any number of threads."""
    h, weight = torch.randn(rows, 24), torch.randn(70, 24)
    runs: tuple[Callable[[], Tensor], ...] = (
        lambda: gumbel_noise(5, 0, rows, 333, backend="native"),
        lambda: gumbel_softmax(h, 0.5, seed=1, backend="native"),
    )
    for run in runs:
        torch.set_num_threads(1)
        expected = run()
        torch.set_num_threads(THREADS)
        assert torch.equal(run(), expected)
    torch.set_num_threads(1)
    codes, logits = assign_codes(h, [weight]), cosine_logits(h, weight, 20.0, backend="native")
    torch.set_num_threads(THREADS)
    assert torch.equal(assign_codes(h, [weight]), codes)
    assert (cosine_logits(h, weight, 20.0, backend="native") - logits).norm() <= CLAIM * logits.norm()
