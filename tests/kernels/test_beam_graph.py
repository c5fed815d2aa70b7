"""A whole search in one CUDA graph; without a GPU what is around the graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dgi_kernels import Trie, beam_search, cuda_graphs
from dgi_kernels.beam import BeamResult, HiddenStates
from dgi_kernels.beam.graph import CapturedSearch, capture_search

SIZES = [7, 5, 6]


def trie_and_heads() -> tuple[Trie, list[Tensor]]:
    codes = torch.stack([torch.randint(0, size, (60,)) for size in SIZES], 1)
    return Trie.from_codes(codes, codebook_sizes=SIZES), [torch.randn(size, 4) for size in SIZES]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("fused", [False, True])
def test_a_captured_search_finds_what_a_search_finds(fused: bool) -> None:
    trie, heads = trie_and_heads()
    trie, heads = trie.to("cuda"), [head.cuda() for head in heads]
    queries, width = torch.randn(3, 4, device="cuda"), 10

    def step(depth: int, tokens: Tensor | None, parents: Tensor | None) -> Tensor | HiddenStates:
        h = queries.unsqueeze(1).expand(-1, 1 if depth == 0 else width, -1)
        if tokens is not None:
            h = h + tokens.unsqueeze(-1) / 10
        return HiddenStates(h, heads[depth], 5.0) if fused else h @ heads[depth].T

    filters = [None, trie.filter(items=range(20)), None]
    captured = capture_search(trie, step, [queries], batch_size=3, num_beams=width, filters=filters)
    for _ in range(3):
        new = torch.randn(3, 4, device="cuda")
        result = captured(new)
        assert torch.equal(captured.inputs[0], new)
        expected = beam_search(trie, step, batch_size=3, num_beams=width, filters=filters)
        for got, want in zip(result, expected, strict=True):
            assert torch.equal(got, want)


def test_a_search_is_warmed_up_aside_and_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trie, heads = trie_and_heads()
    steps, streams = [], [SimpleNamespace(name=name, wait_stream=lambda other: None) for name in ("main", "aside")]
    now = [streams[0]]

    @contextmanager
    def on(stream: SimpleNamespace) -> Iterator[None]:
        now.append(stream)
        yield
        now.pop()

    for name, fake in {
        "Stream": lambda device: streams[1],
        "current_device": lambda: 0,
        "device": lambda device: nullcontext(),
        "current_stream": lambda: now[-1],
        "stream": on,
        "graph": on,
        "CUDAGraph": lambda: SimpleNamespace(name="graph"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def step(depth: int, tokens: Tensor | None, parents: Tensor | None) -> Tensor:
        steps.append((now[-1].name, depth))
        return torch.zeros(2, 1 if depth == 0 else 5, SIZES[depth])

    monkeypatch.setattr(cuda_graphs, "possible", lambda device: True)
    cuda_graphs._other_stream.cache_clear()
    result = capture_search(trie, step, [], batch_size=2, num_beams=5).result
    cuda_graphs._other_stream.cache_clear()
    assert result.codes.shape == (2, 5, 3)
    assert steps == [(where, depth) for where in ["aside"] * cuda_graphs.WARMUPS + ["graph"] for depth in range(3)]


def test_calls_copy_their_inputs_and_replay() -> None:
    """With a graph that runs the search again on the CPU, as a GPU would."""
    trie, heads = trie_and_heads()
    queries = torch.randn(2, 4)

    def search() -> BeamResult:
        return beam_search(
            trie,
            lambda depth, tokens, parents: (queries.unsqueeze(1) @ heads[depth].T).expand(
                -1, 1 if depth == 0 else 5, -1
            ),
            batch_size=2,
            num_beams=5,
        )

    first = search()

    def replay() -> None:
        for target, value in zip(first, search(), strict=True):
            target.copy_(value)

    captured = CapturedSearch(SimpleNamespace(replay=replay), (queries,), first, None)  # type: ignore[arg-type]
    new = torch.randn(2, 4)
    result = captured(new)
    assert result is captured.result and torch.equal(queries, new)
    assert all(torch.equal(got, want) for got, want in zip(result, search(), strict=True))
    queries[1] = queries[0]
    assert captured().scores[0].tolist() == captured().scores[1].tolist()  # on what the inputs hold


def test_what_cannot_be_captured_is_named() -> None:
    trie, _ = trie_and_heads()
    with pytest.raises(ValueError, match="trie must be on a CUDA device"):
        capture_search(trie, lambda *_: torch.zeros(1, 1, 7), [], batch_size=1, num_beams=2)
    with pytest.raises(TypeError, match="trie must be a Trie"):
        capture_search(None, lambda *_: torch.zeros(1, 1, 7), [], batch_size=1, num_beams=2)  # type: ignore[arg-type]
    x = torch.zeros(2, 4)
    captured = CapturedSearch(SimpleNamespace(replay=lambda: None), (x,), None, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the 1 tensors of the captured search; got 2"):
        captured(x, x)
    with pytest.raises(ValueError, match=r"inputs\[0\] must"):
        captured(x[:1])
