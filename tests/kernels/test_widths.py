"""Searches whose width differs by level, against a brute-force search of the same widths."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from dgi_kernels import HiddenStates, Trie, beam_search

from . import beam_cases
from .beam_cases import BACKENDS
from .tries import make, random_catalog


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_level_keeps_its_own_number(backend: str) -> None:
    for _ in range(100):
        catalog = random_catalog(max_items=40, max_size=8)
        trie, batch = make(catalog), random.randint(1, 3)
        widths = [random.choice([1, 2, 3, 9, 30]) for _ in range(catalog.depth)]
        levels = [torch.randint(-9, 9, (batch, 1, size)).float() for size in catalog.sizes]
        asked: list[tuple[int, ...]] = []

        def step(
            depth: int,
            tokens: Tensor | None,
            parents: Tensor | None,
            levels: list[Tensor] = levels,
            widths: list[int] = widths,
            asked: list[tuple[int, ...]] = asked,
        ) -> Tensor:
            if tokens is not None and parents is not None:
                assert tokens.shape == parents.shape
                asked.append(tuple(tokens.shape))
            return levels[depth].expand(-1, widths[depth - 1] if depth else 1, -1)

        result = beam_search(trie, step, batch_size=batch, num_beams=widths, normalize="none", backend=backend)
        assert asked == [(batch, width) for width in widths[: len(asked)]]
        assert result.codes.shape == (batch, widths[-1], catalog.depth)
        for b in range(batch):
            expected = beam_cases.search(catalog, [level[b, 0].tolist() for level in levels], widths, None)
            dead = widths[-1] - len(expected)
            assert result.scores[b].tolist() == [score for score, _ in expected] + [-math.inf] * dead
            assert list(map(tuple, result.codes[b].tolist())) == (
                [code for _, code in expected] + [(-1,) * catalog.depth] * dead
            )


def test_one_number_is_that_number_for_every_level() -> None:
    trie = Trie.from_codes(torch.randint(0, 9, (200, 3)), codebook_sizes=[9] * 3)
    heads = [(torch.randn(2, 7, 5), torch.randn(9, 5)) for _ in range(3)]

    def step(depth: int, tokens: Tensor | None, parents: Tensor | None) -> HiddenStates:
        h, codebook = heads[depth]
        return HiddenStates(h[:, : 1 if depth == 0 else 7], codebook, 5.0)

    one, each = (beam_search(trie, step, batch_size=2, num_beams=beams) for beams in (7, (7, 7, 7)))
    for a, b in zip(one, each, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("widths", "error", "message"),
    [
        ([3, 4], ValueError, r"num_beams must be an integer, or have one per level of the trie, 3; got \[3, 4\]"),
        ([], ValueError, "num_beams must be an integer, or have one per level"),
        ([3, 0, 4], ValueError, r"num_beams\[1\] must be at least 1"),
        ([3, 4, 2.5], TypeError, r"num_beams\[2\] must be an integer"),
        ("345", TypeError, "num_beams must be an integer"),
        (0, ValueError, "num_beams must be at least 1"),
    ],
)
def test_wrong_widths_are_named(widths: object, error: type[Exception], message: str) -> None:
    trie = Trie.from_codes([[0, 1, 2]])
    with pytest.raises(error, match=message):
        beam_search(trie, lambda *_: torch.zeros(1, 1, 3), batch_size=1, num_beams=widths)  # type: ignore[arg-type]
