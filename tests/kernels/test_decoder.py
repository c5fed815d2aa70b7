"""decoder_step against torch's own decoder in float64, which reads every beam's whole prefix and memory again."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgi_kernels import BackendUnavailable, DecoderLayer, decoder_step, why_not

from .near import assert_near
from .sanitizers import assert_clean
from .shapes import name_of

BACKENDS = [(name, dtype) for name in ("reference", "native") for dtype in (torch.float32, torch.float64)]
# D, heads, layers, B, beams of each position, S
CASES = (
    (64, 4, 2, 3, (1, 50, 50), 12),
    (8, 2, 1, 1, (1, 1, 1, 1), 1),
    (36, 6, 2, 2, (1, 33, 7, 20), 70),
    (20, 5, 3, 5, (3, 16, 17), 3),
    (6, 1, 1, 40, (1, 2), 5),
)


def torch_decoder(dim: int, heads: int, layers: int) -> nn.TransformerDecoder:
    layer = nn.TransformerDecoderLayer(dim, heads, 3 * dim + 1, 0.0, "gelu", batch_first=True, norm_first=True)
    stack = nn.TransformerDecoder(layer, layers).double().eval()
    for parameter in stack.parameters():  # biases and norms must matter
        nn.init.normal_(parameter, std=0.3)
    return stack


def parameters(stack: nn.TransformerDecoder, dtype: torch.dtype) -> list[DecoderLayer]:
    def pair(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight.detach().to(dtype), bias.detach().to(dtype)

    def of(part: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
        return pair(part.weight, part.bias)

    found = []
    for layer in stack.layers:
        prefix, memory = layer.self_attn, layer.multihead_attn
        dim = memory.embed_dim
        found.append(
            DecoderLayer(
                self_norm=of(layer.norm1),
                self_in=pair(prefix.in_proj_weight, prefix.in_proj_bias),
                self_out=of(prefix.out_proj),
                cross_norm=of(layer.norm2),
                query=pair(memory.in_proj_weight[:dim], memory.in_proj_bias[:dim]),
                cross_out=of(memory.out_proj),
                feed_norm=of(layer.norm3),
                feed_in=of(layer.linear1),
                feed_out=of(layer.linear2),
            )
        )
    return found


def kept_memory(stack: nn.TransformerDecoder, memory: Tensor, dtype: torch.dtype) -> list[Tensor]:
    width = memory.shape[2]
    parts = [layer.multihead_attn for layer in stack.layers]
    return [
        nn.functional.linear(memory, part.in_proj_weight[width:], part.in_proj_bias[width:]).detach().to(dtype)
        for part in parts
    ]


class Search:
    """Random beams of some positions: their inputs, parents, and a memory."""

    def __init__(self, dim: int, heads: int, layers: int, batch: int, beams: tuple[int, ...], slots: int) -> None:
        self.stack, self.heads = torch_decoder(dim, heads, layers), heads
        self.inputs = [torch.randn(batch, count, dim, dtype=torch.float64) for count in beams]
        self.parents = [torch.randint(a, (batch, b)) for a, b in zip(beams, beams[1:], strict=False)]
        self.memory = torch.randn(batch, slots, dim, dtype=torch.float64)
        self.mask = torch.rand(batch, slots) < 0.7
        self.mask[:, 0] = True

    def truth(self) -> Iterator[Tensor]:
        """Hidden states of every position by whole prefixes, the memory repeated for every beam."""
        prefix = self.inputs[0].unsqueeze(2)
        for position, inputs in enumerate(self.inputs):
            batch, beams, dim = inputs.shape
            if position:
                survivors = self.parents[position - 1][..., None, None].expand(-1, -1, *prefix.shape[2:])
                prefix = torch.cat([prefix.gather(1, survivors), inputs.unsqueeze(2)], 2)
            future = torch.ones(position + 1, position + 1, dtype=torch.bool).triu(1)
            hidden = self.stack(
                prefix.flatten(0, 1),
                self.memory.repeat_interleave(beams, 0),
                tgt_mask=future,
                memory_key_padding_mask=~self.mask.repeat_interleave(beams, 0),
            )
            yield hidden[:, -1].view(batch, beams, dim).detach()

    def cached(
        self, backend: str, dtype: torch.dtype, change: Callable[[Tensor], Tensor] = lambda x: x
    ) -> list[Tensor]:
        """The same by decoder_step; ``change`` is applied to its tensors."""
        layers = [
            DecoderLayer(*((change(weight), change(bias)) for weight, bias in layer))
            for layer in parameters(self.stack, dtype)
        ]
        memory = [change(x) for x in kept_memory(self.stack, self.memory, dtype)]
        past: list[Tensor] = []
        ancestors: list[Tensor] = []
        found = []
        for position, inputs in enumerate(self.inputs):
            if position:
                parents = self.parents[position - 1]
                ancestors = [*(of.gather(1, parents) for of in ancestors), parents]
            hidden, left = decoder_step(
                change(inputs.to(dtype)),
                layers,
                memory,
                change(self.mask),
                [change(x) for x in past],
                [change(x) for x in ancestors],
                heads=self.heads,
                backend=backend,
            )
            past.append(left)
            found.append(hidden)
        return found


def skip_without(backend: str, dtype: torch.dtype) -> None:
    problem = why_not("decoder_step", backend, "cpu", dtype)
    if problem is not None:
        pytest.skip(problem)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"D{case[0]}-B{case[3]}-S{case[5]}")
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=name_of)
def test_steps_equal_whole_prefixes(backend: str, dtype: torch.dtype, case: tuple[Any, ...]) -> None:
    skip_without(backend, dtype)
    search = Search(*case)
    usual = search.cached("reference", dtype)
    for position, (got, want) in enumerate(zip(search.cached(backend, dtype), search.truth(), strict=True)):
        assert_near(f"position {position}", got, want, usual[position])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_half_precision(dtype: torch.dtype) -> None:
    search = Search(*CASES[0])
    for got, want in zip(search.cached("auto", dtype), search.truth(), strict=True):
        assert got.dtype == dtype
        assert_near("states", got, want, factor=10)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_strides_do_not_matter(backend: str) -> None:
    skip_without(backend, torch.float32)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    search = Search(*CASES[3])
    plain = search.cached(backend, torch.float32)
    for got, want in zip(search.cached(backend, torch.float32, strided), plain, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_an_attention_to_nothing_but_padding_gives_nothing(backend: str) -> None:
    """A request without a memory must not become NaN, and what is masked must not matter."""
    skip_without(backend, torch.float32)
    search = Search(16, 4, 2, 2, (1, 5), 4)
    search.mask[0] = False
    first = search.cached(backend, torch.float32)
    search.memory[0] += 1
    for got, before in zip(search.cached(backend, torch.float32), first, strict=True):
        assert before.isfinite().all() and torch.equal(got, before)


def test_a_beam_has_the_same_bits_alone_and_with_any_threads() -> None:
    skip_without("native", torch.float32)
    search = Search(32, 4, 2, 7, (1, 21, 21), 9)
    together = search.cached("native", torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for got, want in zip(search.cached("native", torch.float32), together, strict=True):
            assert torch.equal(got, want)
    finally:
        torch.set_num_threads(threads)
    request = random.randrange(7)
    for name in ("inputs", "parents"):
        setattr(search, name, [x[request : request + 1] for x in getattr(search, name)])
    search.memory, search.mask = search.memory[request : request + 1], search.mask[request : request + 1]
    for got, want in zip(search.cached("native", torch.float32), together, strict=True):
        assert torch.equal(got[0], want[request])


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("batch", "beams"), [(0, (1, 3)), (2, (1, 0))])
def test_no_requests_and_no_beams(backend: str, batch: int, beams: tuple[int, ...]) -> None:
    skip_without(backend, torch.float32)
    search = Search(8, 2, 2, batch, (1,), 3)
    (first,) = search.cached(backend, torch.float32)
    assert first.shape == (batch, 1, 8)
    _, left = step(search, backend)
    hidden, kept = step(
        search,
        backend,
        states=torch.empty(batch, beams[1], 8),
        past=[left],
        ancestors=[torch.empty(batch, beams[1], dtype=torch.int64)],
    )
    assert hidden.shape == (batch, beams[1], 8) and kept.shape == (2, batch, beams[1], 16)


def step(search: Search, backend: str = "auto", **changed: Any) -> tuple[Tensor, Tensor]:
    """A first step of ``search`` in float32, with some arguments ``changed``."""
    arguments: dict[str, Any] = {
        "states": search.inputs[0].float(),
        "layers": parameters(search.stack, torch.float32),
        "memory": kept_memory(search.stack, search.memory, torch.float32),
        "mask": search.mask,
        "heads": search.heads,
    }
    return decoder_step(**arguments | changed, backend=backend)


def test_the_reference_has_gradients_and_auto_takes_it_for_them() -> None:
    search = Search(4, 2, 1, 1, (1, 2), 3)
    layers = parameters(search.stack, torch.float64)
    memory = [x.requires_grad_() for x in kept_memory(search.stack, search.memory, torch.float64)]

    def run(states: Tensor, memory: Tensor) -> tuple[Tensor, ...]:
        first, left = decoder_step(states[:, :1], layers, [memory], search.mask, heads=2, backend="reference")
        hidden, _ = decoder_step(
            states[:, 1:], layers, [memory], search.mask, [left], search.parents, heads=2, backend="reference"
        )
        return first, hidden

    states = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (states, memory[0]))
    wanted = search.inputs[0].float().requires_grad_()
    assert step(search, states=wanted)[0].requires_grad
    if why_not("decoder_step", "native", "cpu", torch.float32) is None:
        with pytest.raises(BackendUnavailable, match="gives no gradients"):
            step(search, "native", states=wanted)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"states": torch.zeros(2, 8)}, ValueError, "states must have 3 dimensions"),
        ({"states": torch.zeros(2, 1, 8, dtype=torch.int64)}, TypeError, "states must have dtype"),
        ({"heads": 3}, ValueError, "heads must divide the width 8"),
        ({"heads": 0}, ValueError, "heads must be"),
        ({"eps": 0.0}, ValueError, "eps must be"),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask must have dtype"),
        ({"mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"memory": []}, ValueError, "memory must hold one tensor per layer"),
        ({"memory": [torch.zeros(2, 4, 8)]}, ValueError, r"memory\[0\] must have shape"),
        ({"layers": [0]}, TypeError, r"layers\[0\] must be of type DecoderLayer"),
        ({"past": [torch.zeros(1, 2, 1, 16)]}, ValueError, "ancestors must hold one tensor"),
        (
            {"past": [torch.zeros(1, 2, 1, 15)], "ancestors": [torch.zeros(2, 1, dtype=torch.int64)]},
            ValueError,
            r"past\[0\] must have shape",
        ),
        (
            {"past": [torch.zeros(1, 2, 1, 16)], "ancestors": [torch.full((2, 1), 1)]},
            ValueError,
            r"ancestors\[0\] must be",
        ),
        (
            {"past": [torch.zeros(1, 2, 1, 16)], "ancestors": [torch.zeros(2, 1)]},
            TypeError,
            r"ancestors\[0\] must have",
        ),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_errors_name_the_argument(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    if changed.get("states", torch.zeros(1)).is_floating_point():
        skip_without(backend, torch.float32)
    search = Search(8, 2, 1, 2, (1,), 4)
    step(search, backend)
    with pytest.raises(error, match=message):
        step(search, backend, **changed)


@pytest.mark.parametrize("field", DecoderLayer._fields)
def test_a_parameter_of_the_wrong_shape_is_named(field: str) -> None:
    search = Search(8, 2, 1, 2, (1,), 4)
    layer = parameters(search.stack, torch.float32)[0]
    broken = layer._replace(**{field: (getattr(layer, field)[0], torch.zeros(5))})
    with pytest.raises(ValueError, match=rf"layers\[0\].{field}\[1\] must have shape"):
        step(search, layers=[broken])


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_step_is_clean_under_sanitizers(tmp_path: Path, seed: int) -> None:
    """Random steps through the same C++ with AddressSanitizer and UBSan, against the formula."""
    assert_clean("decoder_driver.cpp", ("cpu/decoder/decoder.cpp",), tmp_path, seed, 60)
