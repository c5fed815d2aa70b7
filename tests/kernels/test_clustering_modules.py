"""Quantizers that follow the data: against vector-quantize-pytorch where it is installed, and by formula."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import ResidualVectorQuantizer, VectorQuantizer, balanced_codes

from .clustering_cases import clustered

CASES = {
    "moving averages": ({}, {}),
    "cosine": ({"metric": "cosine"}, {"use_cosine_sim": True}),
    "straight through": ({"gradient": "straight_through"}, {"rotation_trick": False}),
    "gradients": ({"learnable_codebook": True}, {"learnable_codebook": True, "ema_update": False}),
    "weights": ({"decay": 0.95, "commitment_weight": 0.25}, {"decay": 0.95, "commitment_weight": 0.25}),
}


def steps(module: torch.nn.Module, batches: list[Tensor], mask: Tensor | None = None) -> list[Tensor]:
    """What a module returns in three steps of training and one of evaluation, and the gradients of its input."""
    found: list[Tensor] = []
    parameters = list(module.parameters())
    for batch in batches:
        x = batch.clone().requires_grad_()
        quantized, codes, loss = module(x) if mask is None else module(x, mask=mask)
        total = (quantized * torch.arange(quantized.numel()).view_as(quantized).cos()).sum() + loss.sum()
        found += [quantized.detach(), codes, loss.detach(), *torch.autograd.grad(total, (x, *parameters))]
        with torch.no_grad():
            for parameter, gradient in zip(parameters, found[len(found) - len(parameters) :], strict=True):
                parameter -= 0.1 * gradient
    module.eval()
    quantized, codes, _ = module(batches[0])
    return [*found, quantized.detach(), codes]


def assert_alike(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.view_as(mine), rtol=1e-4, atol=1e-5)


# The peer's loss of masked rows by the cosine compares codes of norm 1 with vectors of any norm: that is not followed.
@pytest.mark.parametrize(("case", "masked"), [*((case, False) for case in CASES), ("moving averages", True)])
def test_as_vector_quantize_pytorch(case: str, masked: bool) -> None:
    peers = pytest.importorskip("vector_quantize_pytorch")
    options, theirs = CASES[case]
    ours = VectorQuantizer(8, 12, **options)
    peer = peers.VectorQuantize(8, 12, **theirs)
    with torch.no_grad():
        peer._codebook.embed.copy_(ours.codebook.unsqueeze(0))
        peer._codebook.embed_avg.copy_(ours.sums.unsqueeze(0))
    batches = [clustered(60, 9, 8).view(4, 15, 8) for _ in range(3)]
    mask = torch.rand(4, 15) < 0.7 if masked else None
    assert_alike(steps(ours, batches, mask), steps(peer, batches, mask))
    torch.testing.assert_close(ours.codebook, peer.codebook, rtol=1e-4, atol=1e-5)


def test_residual_levels_as_vector_quantize_pytorch() -> None:
    peers = pytest.importorskip("vector_quantize_pytorch")
    ours, peer = ResidualVectorQuantizer(8, [12, 12, 12]), peers.ResidualVQ(dim=8, num_quantizers=3, codebook_size=12)
    with torch.no_grad():
        for level, layer in zip(ours.levels, peer.layers, strict=True):
            layer._codebook.embed.copy_(level.codebook.unsqueeze(0))
            layer._codebook.embed_avg.copy_(level.sums.unsqueeze(0))
    batches = [clustered(60, 9, 8).view(4, 15, 8) for _ in range(3)]
    assert_alike(steps(ours, batches), steps(peer, batches))


def test_moving_averages_by_formula() -> None:
    quantizer, x = VectorQuantizer(5, 7, decay=0.9, eps=1e-3), torch.randn(40, 5)
    before = copy.deepcopy(quantizer)
    quantized, codes, loss = quantizer(x)
    nearest = torch.cdist(x, before.codebook).argmin(1)
    assert torch.equal(codes, nearest) and torch.equal(quantized, before.codebook[nearest])
    torch.testing.assert_close(loss, (x - quantized).square().mean())
    one_hot = F.one_hot(nearest, 7).float()
    counts = 0.9 * before.counts + 0.1 * one_hot.sum(0)
    sums = 0.9 * before.sums + 0.1 * one_hot.T @ x
    smooth = (counts + 1e-3) / (counts.sum() + 7e-3) * counts.sum()
    torch.testing.assert_close(quantizer.codebook, sums / smooth.unsqueeze(1))
    quantizer.eval()
    still = quantizer.codebook.clone()
    assert quantizer(x)[2] == 0 and torch.equal(quantizer.codebook, still)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_start_by_kmeans_is_near_the_data(metric: str) -> None:
    x = clustered(400, 6, 8, spread=0.05)
    quantizer = VectorQuantizer(8, 6, metric=metric, kmeans_init=True)
    assert not quantizer.is_started
    loss = quantizer(x)[2]
    assert quantizer.is_started and loss < 0.05 * x.square().mean()
    if metric == "euclidean":
        assert quantizer(x + 100)[2] > 1000, "it starts once"
    again = VectorQuantizer(8, 6, metric=metric, kmeans_init=True)
    again.load_state_dict(quantizer.state_dict())
    assert again.is_started and torch.equal(again.eval()(x)[1], quantizer.eval()(x)[1])


def test_dead_codes_move_onto_vectors_of_the_batch() -> None:
    x = torch.randn(30, 4)
    quantizer = VectorQuantizer(4, 8, dead_below=0.5, decay=0.5)
    with torch.no_grad():
        quantizer.codebook[3:] = 100.0 + torch.arange(5.0).unsqueeze(1)  # nothing is near these five
    for _ in range(3):
        quantizer(x)
    moved = quantizer.codebook[3:]
    assert torch.cdist(moved, x).amin(1).max() < 3.0
    assert len(quantizer.eval()(x)[1].unique()) > 3
    few = VectorQuantizer(4, 8, dead_below=50.0)
    few(x[:2])  # more dead codes than vectors
    assert few.codebook.isfinite().all()


def test_balanced_codes_in_training_alone() -> None:
    x = clustered(200, 3, 6)
    quantizer = VectorQuantizer(6, 10, balanced=0.05)
    with torch.no_grad():
        quantizer.codebook.copy_(x[:10] + torch.randn(10, 6))
    codebook = quantizer.codebook.clone()
    assert torch.equal(quantizer(x)[1], balanced_codes(x, codebook, epsilon=0.05))
    quantizer.eval()
    assert torch.equal(quantizer(x)[1], torch.cdist(x, quantizer.codebook).argmin(1))


def test_a_learnable_codebook_and_the_encoder_get_gradients() -> None:
    quantizer = ResidualVectorQuantizer(6, [5, 4], learnable_codebook=True)
    x = torch.randn(20, 6, requires_grad=True)
    quantized, codes, losses = quantizer(x)
    assert codes.shape == (20, 2) and losses.shape == (2,)
    (quantized.square().mean() + losses.sum()).backward()
    assert x.grad is not None and all(level.codebook.grad.abs().sum() > 0 for level in quantizer.levels)
    assert torch.equal(quantized, sum(c[codes[:, i]] for i, c in enumerate(quantizer.codebooks)))


def test_sixteen_bits_no_rows_and_repeated_bits() -> None:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 6, kmeans_init=True, dead_below=1.0)
    again = copy.deepcopy(quantizer)
    x = torch.randn(50, 4).bfloat16()
    results = []
    for module in (quantizer, again):
        torch.manual_seed(1)
        results.append(module(x))
    assert results[0][0].dtype == torch.bfloat16 and results[0][2].dtype == torch.float32
    assert torch.equal(quantizer.codebook, again.codebook) and torch.equal(results[0][1], results[1][1])
    quantized, codes, loss = quantizer(torch.zeros(0, 4))
    assert quantized.shape == (0, 4) and codes.shape == (0,) and loss == 0
    masked = quantizer(x, mask=torch.zeros(50, dtype=torch.bool))
    assert (masked[0] == 0).all() and (masked[1] == -1).all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"codebook_size": 0}, ValueError, "codebook_size must be at least 1"),
        ({"metric": "dot"}, ValueError, "metric must be one of"),
        ({"gradient": "none"}, ValueError, "gradient must be one of"),
        ({"metric": "cosine", "learnable_codebook": True}, ValueError, "learnable_codebook must be False"),
        ({"decay": 1.5}, ValueError, "decay must be within"),
        ({"balanced": 0.0}, ValueError, "balanced must be positive"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VectorQuantizer(**({"dim": 4, "codebook_size": 3} | options))


def test_wrong_inputs_are_named() -> None:
    quantizer = VectorQuantizer(4, 3)
    with pytest.raises(ValueError, match="x must have shape"):
        quantizer(torch.randn(5, 3))
    with pytest.raises(ValueError, match="mask must have shape"):
        quantizer(torch.randn(5, 4), mask=torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="codebook_sizes must hold"):
        ResidualVectorQuantizer(4, [])
