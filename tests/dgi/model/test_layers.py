"""The built-in layers are torch's: the same parameters and bits without dropout, the same function with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dgi.model import layers
from dgi.model.layers import DecoderLayer, EncoderLayer

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
