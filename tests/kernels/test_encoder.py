"""encoder_layers against torch's own encoder in float64."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgi_kernels import BackendUnavailable, EncoderLayer, encoder_layers, why_not

from .near import assert_near
from .sanitizers import assert_clean
from .shapes import name_of

BACKENDS = [(name, dtype) for name in ("reference", "native") for dtype in (torch.float32, torch.float64)]
# D, heads, layers, B, S
CASES = (
    (64, 4, 2, 3, 12),
    (8, 2, 1, 1, 1),
    (36, 6, 2, 2, 70),
    (20, 5, 3, 40, 3),
    (6, 1, 1, 17, 33),
    (128, 4, 4, 1, 11),
)


def torch_encoder(dim: int, heads: int, layers: int) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(dim, heads, 3 * dim + 1, 0.0, "gelu", batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).double().eval()
    for parameter in stack.parameters():  # biases and norms must matter
        nn.init.normal_(parameter, std=0.3)
    return stack


def parameters(stack: nn.TransformerEncoder, dtype: torch.dtype) -> list[EncoderLayer]:
    def pair(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return weight.detach().to(dtype), bias.detach().to(dtype)

    def of(part: nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
        return pair(part.weight, part.bias)

    return [
        EncoderLayer(
            of(layer.norm1),
            pair(layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias),
            of(layer.self_attn.out_proj),
            of(layer.norm2),
            of(layer.linear1),
            of(layer.linear2),
        )
        for layer in stack.layers
    ]


class Sequences:
    """Random sequences with padding, and an encoder."""

    def __init__(self, dim: int, heads: int, layers: int, batch: int, length: int) -> None:
        self.stack, self.heads = torch_encoder(dim, heads, layers), heads
        self.states = torch.randn(batch, length, dim, dtype=torch.float64)
        self.mask = torch.rand(batch, length) < 0.7
        self.mask[:, :1] = True

    def run(self, backend: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Tensor:
        given = {"states": self.states.to(dtype), "mask": self.mask, "heads": self.heads}
        return encoder_layers(**{"layers": parameters(self.stack, dtype), **given, **changed}, backend=backend)


def skip_without(backend: str, dtype: torch.dtype = torch.float32) -> None:
    problem = why_not("encoder_layers", backend, "cpu", dtype)
    if problem is not None:
        pytest.skip(problem)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"D{case[0]}-B{case[3]}-S{case[4]}")
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=name_of)
def test_equals_the_encoder_of_torch(backend: str, dtype: torch.dtype, case: tuple[int, ...]) -> None:
    skip_without(backend, dtype)
    sequences = Sequences(*case)
    with torch.enable_grad():  # not its fast path, which leaves padding out
        want = sequences.stack(sequences.states, src_key_padding_mask=~sequences.mask).detach()
    assert_near("states", sequences.run(backend, dtype), want, sequences.run("reference", dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_half_precision(dtype: torch.dtype) -> None:
    sequences = Sequences(*CASES[0])
    got = sequences.run("auto", dtype)
    assert got.dtype == dtype
    assert_near("states", got, sequences.run("reference", torch.float64), factor=10)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_strides_do_not_matter(backend: str) -> None:
    skip_without(backend)

    def strided(x: Tensor) -> Tensor:
        return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]

    sequences = Sequences(*CASES[3])
    layers = [
        EncoderLayer(*((strided(weight), strided(bias)) for weight, bias in layer))
        for layer in parameters(sequences.stack, torch.float32)
    ]
    changed = {"states": strided(sequences.states.float()), "mask": strided(sequences.mask), "layers": layers}
    torch.testing.assert_close(sequences.run(backend, **changed), sequences.run(backend))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_padding_matters_to_no_other_place(backend: str) -> None:
    """Nor does a sequence of nothing but padding become NaN."""
    skip_without(backend)
    sequences = Sequences(16, 4, 2, 3, 9)
    sequences.mask[0] = False
    first = sequences.run(backend)
    sequences.states[~sequences.mask] = torch.randn_like(sequences.states[~sequences.mask])
    again = sequences.run(backend)
    assert first.isfinite().all() and torch.equal(first[sequences.mask], again[sequences.mask])


def test_a_sequence_has_the_same_bits_alone_and_with_any_threads() -> None:
    skip_without("native")
    sequences = Sequences(32, 4, 2, 37, 9)
    together = sequences.run("native")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(sequences.run("native"), together)
    finally:
        torch.set_num_threads(threads)
    row = random.randrange(37)
    own = slice(row, row + 1)
    alone = sequences.run("native", states=sequences.states[own].float(), mask=sequences.mask[own])
    assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
def test_no_requests_and_no_places(backend: str, batch: int, length: int) -> None:
    skip_without(backend)
    assert Sequences(8, 2, 2, batch, length).run(backend).shape == (batch, length, 8)


def test_the_reference_has_gradients_and_auto_takes_it_for_them() -> None:
    sequences = Sequences(4, 2, 1, 2, 3)
    layers = parameters(sequences.stack, torch.float64)
    states = sequences.states.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: encoder_layers(x, layers, sequences.mask, heads=2, backend="reference"), (states,)
    )
    wanted = states.detach().float().requires_grad_()
    assert sequences.run("auto", states=wanted).requires_grad
    if why_not("encoder_layers", "native", "cpu", torch.float32) is None:
        with pytest.raises(BackendUnavailable, match="gives no gradients"):
            sequences.run("native", states=wanted)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"states": torch.zeros(2, 8)}, ValueError, "states must have 3 dimensions"),
        ({"states": torch.zeros(2, 4, 8, dtype=torch.int64)}, TypeError, "states must have dtype"),
        ({"heads": 3}, ValueError, "heads must divide the width 8"),
        ({"heads": 0}, ValueError, "heads must be"),
        ({"eps": 0.0}, ValueError, "eps must be"),
        ({"mask": torch.ones(2, 4)}, TypeError, "mask must have dtype"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"layers": []}, ValueError, "layers must not be empty"),
        ({"layers": [0]}, TypeError, r"layers\[0\] must be of type EncoderLayer"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_errors_name_the_argument(backend: str, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    if changed.get("states", torch.zeros(1)).is_floating_point():
        skip_without(backend)
    sequences = Sequences(8, 2, 1, 2, 4)
    sequences.run(backend)
    with pytest.raises(error, match=message):
        sequences.run(backend, **changed)


@pytest.mark.parametrize("field", EncoderLayer._fields)
def test_a_parameter_of_the_wrong_shape_is_named(field: str) -> None:
    sequences = Sequences(8, 2, 1, 2, 4)
    layer = parameters(sequences.stack, torch.float32)[0]
    broken = layer._replace(**{field: (getattr(layer, field)[0], torch.zeros(5))})
    with pytest.raises(ValueError, match=rf"layers\[0\].{field}\[1\] must have shape"):
        sequences.run("auto", layers=[broken])


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_layers_are_clean_under_sanitizers(tmp_path: Path, seed: int) -> None:
    """Random sequences through the same C++ with AddressSanitizer and UBSan, against the formula."""
    assert_clean("encoder_driver.cpp", ("cpu/encoder/encoder.cpp",), tmp_path, seed, 60)
