"""The built-in layers are torch's: the same parameters and bits without dropout, the same function with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from dgi.model import layers
from dgi.model.layers import DecoderLayer, Encoder, EncoderLayer
from dgi_kernels import encoder_layers, why_not

OPTIONS: dict[str, Any] = {"activation": "gelu", "batch_first": True, "norm_first": True}
PADDING = torch.tensor([[False] * 6, [False] * 2 + [True] * 4])


def pair(kind: type, torchs: type, dropout: float) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    own = kind(16, 4, 32, dropout, **OPTIONS)
    torch.manual_seed(3)
    return own, torchs(16, 4, 32, dropout, **OPTIONS)


def encoded(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, src_key_padding_mask=PADDING)


def decoded(layer: nn.Module, x: Tensor) -> Tensor:
    future = torch.ones(3, 3, dtype=torch.bool).triu(1)
    return layer(x[:, :3], x.flip(1), tgt_mask=future, memory_key_padding_mask=PADDING)


KINDS = [(EncoderLayer, nn.TransformerEncoderLayer, encoded), (DecoderLayer, nn.TransformerDecoderLayer, decoded)]


@pytest.mark.parametrize(("kind", "torchs", "run"), KINDS, ids=["encoder", "decoder"])
@pytest.mark.parametrize("training", [False, True])
def test_without_dropout_the_bits_are_torchs(kind: type, torchs: type, run: Any, training: bool) -> None:
    own, other = pair(kind, torchs, 0.0 if training else 0.5)
    x = torch.randn(2, 6, 16)
    assert torch.equal(run(own.train(training), x), run(other.train(training), x))
    assert own.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "torchs", "run"), KINDS, ids=["encoder", "decoder"])
def test_training_with_next_to_no_dropout_is_torchs_without(kind: type, torchs: type, run: Any) -> None:
    """One element in 1e8 is dropped: every map, mask, norm and residual must be in its place."""
    own, other = pair(kind, torchs, 1e-8)
    other.eval()
    x = torch.randn(2, 6, 16, requires_grad=True)
    upstream = torch.randn(run(other, x).shape)
    results = []
    for layer in (own, other):
        out = run(layer, x)
        results.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], upstream)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "torchs", "run"), KINDS, ids=["encoder", "decoder"])
def test_dropout_is_unbiased_and_governed_by_torchs_seed(
    kind: type, torchs: type, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other = pair(kind, torchs, 0.2)
    x = torch.randn(2, 6, 16)

    def mean(layer: nn.Module, times: int = 400) -> Tensor:
        torch.manual_seed(1)
        return torch.stack([run(layer, x) for _ in range(times)]).mean(0)

    with torch.no_grad():
        assert torch.equal(mean(own, 2), mean(own, 2)) and not torch.equal(mean(own, 1), mean(own, 2))
        ours, torchs_own = mean(own), mean(other)
        assert (ours - torchs_own).abs().mean() < 0.05  # of values of size 1
        monkeypatch.setattr(layers, "why_not", lambda *_: "no kernel")
        assert torch.equal(mean(own, 3), mean(other, 3))  # torch's own path, with its random numbers


def stack(**options: Any) -> Encoder:
    """Two layers and a norm, none of whose parameters is what a new one has."""
    layer = EncoderLayer(16, 4, 32, 0.1, **{**OPTIONS, **options})
    made = Encoder(layer, 2, norm=nn.LayerNorm(16), enable_nested_tensor=False).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call of the op."""
    made: list[int] = []

    def counted(*args: Any, **options: Any) -> Tensor:
        made.append(1)
        return encoder_layers(*args, **options)

    monkeypatch.setattr(layers, "encoder_layers", counted)
    return made


@torch.no_grad()
def test_an_encoder_is_one_call_without_gradients(calls: list[int]) -> None:
    if why_not("encoder_layers", "native", "cpu", torch.float32) is not None:
        pytest.skip("needs the extension")
    made, x = stack(), torch.randn(2, 6, 16)
    torch.testing.assert_close(made(x, src_key_padding_mask=PADDING), layer_by_layer(made, x))
    assert len(calls) == 1
    plain = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.1, **OPTIONS), 2, norm=nn.LayerNorm(16))
    assert made.state_dict().keys() == plain.state_dict().keys()


def layer_by_layer(made: Encoder, x: Tensor) -> Tensor:
    padding = PADDING if x.ndim == 3 else PADDING[1]
    return nn.TransformerEncoder.forward(made, x, src_key_padding_mask=padding)


def unusual(change: Callable[[Encoder], object], **options: Any) -> Callable[[], Encoder]:
    def make() -> Encoder:
        made = stack(**options)
        change(made)
        return made

    return make


UNUSUAL: dict[str, Callable[[], Encoder]] = {
    "a hook": unusual(lambda made: made.layers[1].register_forward_hook(lambda *_: None)),
    "a hook inside": unusual(lambda made: made.layers[0].linear1.register_forward_hook(lambda _, __, y: y + 1)),
    "a hook before": unusual(lambda made: made.layers[1].self_attn.register_forward_pre_hook(lambda *_: None)),
    "pruning": unusual(lambda made: prune.l1_unstructured(made.layers[0].linear1, "weight", 0.5)),
    "a weight's norm": unusual(lambda made: nn.utils.parametrizations.weight_norm(made.layers[0].linear2)),
    "other norms": unusual(lambda made: setattr(made.layers[1].norm1, "eps", 1.0)),
    "eps of one norm": unusual(lambda made: setattr(made.layers[0].norm2, "eps", 1.0)),
    "ReLU": unusual(lambda _: None, activation="relu"),
    "norms behind": unusual(lambda _: None, norm_first=False),
    "no bias": unusual(lambda _: None, bias=False),
}


@torch.no_grad()
@pytest.mark.parametrize("name", UNUSUAL)
def test_layers_that_are_not_as_the_op_takes_them_are_torchs(name: str, calls: list[int]) -> None:
    made, x = UNUSUAL[name](), torch.randn(2, 6, 16)
    got = made(x, src_key_padding_mask=PADDING)
    assert not calls
    torch.testing.assert_close(got, layer_by_layer(made, x))


def test_calls_that_the_op_does_not_serve_are_torchs(calls: list[int]) -> None:
    """With gradients, in training, in float64, under autocast, with a mask, of one sequence, on the meta device."""
    made, x = stack(), torch.randn(2, 6, 16)
    assert made(x, src_key_padding_mask=PADDING).requires_grad
    with torch.no_grad():
        made.train()(x, src_key_padding_mask=PADDING)
        made.eval()
        future = nn.Transformer.generate_square_subsequent_mask(6)
        made(x, mask=future, src_key_padding_mask=PADDING.float())
        torch.testing.assert_close(made(x[1], src_key_padding_mask=PADDING[1]), layer_by_layer(made, x[1]))
        with torch.autocast("cpu", torch.bfloat16):
            made(x, src_key_padding_mask=PADDING)
        made.double()(x.double(), src_key_padding_mask=PADDING)
        assert made.to("meta")(x.to("meta"), src_key_padding_mask=PADDING.to("meta")).is_meta
    assert not calls
