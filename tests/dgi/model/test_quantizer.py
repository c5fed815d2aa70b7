"""ResidualQuantizer: K-means initialisation, batched assignment, revival of dead codes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dgi.model.ablations import inner_product_residual_quantize
from dgi.model.clustering import cosine_kmeans
from dgi.model.quantizer import ResidualQuantizer
from dgi_kernels import assign_codes, gumbel_noise, residual_quantize
from dgi_kernels.enums import METRICS
from dgi_kernels.types import Metric


def clustered(rows: int, clusters: int, dim: int, spread: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    centres = torch.linalg.qr(torch.randn(dim, clusters))[0].T * 3.0
    labels = torch.arange(rows) % clusters
    return centres[labels] + spread * torch.randn(rows, dim), labels, centres


def test_kmeans_lowers_its_objective_and_ends_at_means() -> None:
    points, _, _ = clustered(400, 6, 8, 0.3)
    generator = torch.Generator().manual_seed(0)
    one = cosine_kmeans(points, 6, iterations=1, generator=generator.manual_seed(0))
    many = cosine_kmeans(points, 6, iterations=30, generator=generator.manual_seed(0))

    def spread(centres: torch.Tensor) -> float:
        return float((1 - (F.normalize(points, dim=-1) @ F.normalize(centres, dim=-1).T).amax(1)).mean())

    assert spread(many) <= spread(one) + 1e-6
    labels = (F.normalize(points, dim=-1) @ F.normalize(many, dim=-1).T).argmax(1)
    for k in labels.unique():
        torch.testing.assert_close(many[k], points[labels == k].mean(0), rtol=1e-4, atol=1e-4)


def test_kmeans_with_more_clusters_than_points_gives_distinct_centres() -> None:
    points = torch.randn(5, 4)
    centres = cosine_kmeans(points, 12, iterations=3)
    assert centres.shape == (12, 4) and centres.isfinite().all()
    assert len(torch.unique(centres, dim=0)) == 12


def test_kmeans_repeats_from_the_same_generator_and_refuses_no_points() -> None:
    points = torch.randn(50, 4)
    runs = [cosine_kmeans(points, 7, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*runs)
    with pytest.raises(ValueError, match="points"):
        cosine_kmeans(points[:0], 3)


def test_initialisation_on_residuals_reconstructs_better_level_by_level() -> None:
    z, _, _ = clustered(600, 8, 16, 0.5)
    quantizer = ResidualQuantizer(16, (8, 8, 8))
    quantizer.initialize(z, generator=torch.Generator().manual_seed(0))
    result = quantizer(z, mode="hard", noise=False)
    errors = [float((z - result.quantized[:, :levels].sum(1)).square().sum(1).mean()) for levels in range(4)]
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.5 * errors[0]


def test_assignment_in_batches_equals_assignment_at_once() -> None:
    quantizer = ResidualQuantizer(6, (9, 4))
    z = torch.randn(23, 6)
    assert torch.equal(quantizer.assign(z, batch_size=5), quantizer(z, mode="hard", noise=False).codes)
    assert quantizer.assign(z[:0]).shape == (0, 2)


def test_counts_decay_and_dead_codes_move_onto_residuals() -> None:
    quantizer = ResidualQuantizer(4, (5, 3))
    codes = torch.tensor([[0, 1], [0, 2], [1, 1]])
    for _ in range(400):
        quantizer.count(codes)
    used = [{0, 1}, {1, 2}]
    before = [codebook.detach().clone() for codebook in quantizer.codebooks]
    residuals = torch.randn(6, 2, 4)
    assert quantizer.revive(residuals) == 3 + 1
    for level, codebook in enumerate(quantizer.codebooks):
        for k in range(len(codebook)):
            if k in used[level]:
                assert torch.equal(codebook[k], before[level][k])
            else:
                assert (residuals[:, level] == codebook[k]).all(1).any()
    assert quantizer.revive(residuals) == 0


def test_revival_with_fewer_rows_than_dead_codes() -> None:
    quantizer = ResidualQuantizer(4, (8,))
    quantizer.code_counts[0].zero_()
    assert quantizer.revive(torch.randn(3, 1, 4)) == 3


def test_inner_product_ablation_keeps_what_the_op_promises() -> None:
    """Guards against the copy of the op that it was: float32 alone, NaN for no rows, codes off by an ulp, no seed."""
    z, codebook = torch.randn(9, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    soft = inner_product_residual_quantize(z, [codebook], 0.6, noise=False)
    assert soft.log_normalizer.dtype == soft.usage[0].dtype == torch.float64
    torch.testing.assert_close(soft.log_normalizer[:, 0], (z @ codebook.T / 0.6).logsumexp(1), rtol=1e-12, atol=1e-12)
    assert inner_product_residual_quantize(z[:0], [codebook]).usage[0].tolist() == [0.0] * 5
    through = inner_product_residual_quantize(z.float(), [codebook.float()], mode="straight_through", seed=3)
    assert torch.equal(through.quantized[:, 0], codebook.float()[through.sampled[:, 0]])
    hard = inner_product_residual_quantize(z, [codebook], mode="hard", seed=3)
    noise = gumbel_noise(3, 0, 9, 5).double()
    assert torch.equal(hard.codes[:, 0], (z @ codebook.T).argmax(1))
    assert torch.equal(hard.sampled[:, 0], (z @ codebook.T + noise).argmax(1))


def test_initial_residuals_of_the_ablation_are_those_of_its_own_codes() -> None:
    """Guards against cosine residuals: the second codebook must start where the quantizer's own first level leads."""
    torch.manual_seed(0)
    z = torch.randn(300, 4) * torch.rand(300, 1) * 3
    quantizer = ResidualQuantizer(4, (6, 300), similarity="inner_product")
    quantizer.initialize(z, generator=torch.Generator().manual_seed(1), iterations=0)
    left = z - quantizer.codebooks[0][quantizer.assign(z)[:, 0]]
    apart = torch.cdist(quantizer.codebooks[1], left, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
    assert (apart < 1e-5).all()  # without an iteration the centres are residuals


@pytest.mark.parametrize("metric", METRICS)
def test_a_quantizer_by_a_metric(metric: Metric) -> None:
    """Its logits, codes and first centres go by the metric, and γ scales all of them."""
    quantizer = ResidualQuantizer(4, (6, 5), metric=metric, initial_scale=3.0, eps=1e-12)
    z = torch.randn(2, 30, 4) + 5
    quantizer.initialize(z.flatten(0, 1), generator=torch.Generator().manual_seed(1), iterations=60)
    result = quantizer(z, 0.7, seed=3)
    expected = residual_quantize(z, list(quantizer.codebooks), 3.0, 0.7, metric=metric, seed=3)
    torch.testing.assert_close(result.quantized, expected.quantized)
    result.quantized.square().sum().backward()
    assert quantizer.log_scale.grad is not None and quantizer.log_scale.grad.abs() > 0
    assert torch.equal(quantizer.assign(z), assign_codes(z, list(quantizer.codebooks), metric=metric))
    if metric == "euclidean":  # a fixed point of Lloyd's algorithm by distances
        nearest = torch.cdist(z.flatten(0, 1), quantizer.codebooks[0]).argmin(1)
        means = torch.stack([z.flatten(0, 1)[nearest == k].mean(0) for k in range(6)])
        torch.testing.assert_close(quantizer.codebooks[0].detach(), means, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="^metric must be one of"):
        ResidualQuantizer(4, (6, 5), metric="hamming")  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_inner_product_ablation_follows_its_formula(mode: str) -> None:
    z, codebooks = torch.randn(7, 4), [torch.randn(5, 4), torch.randn(3, 4)]
    result = inner_product_residual_quantize(z, codebooks, 0.6, mode=mode, seed=11)
    residual = z.double()
    for level, codebook in enumerate(codebooks):
        logits = residual @ codebook.double().T
        noisy = logits if mode == "hard" else logits + gumbel_noise(11, level, 7, len(codebook)).double()
        soft = torch.softmax(noisy / 0.6, -1)
        emitted = soft @ codebook.double() if mode == "soft" else codebook.double()[noisy.argmax(-1)]
        torch.testing.assert_close(result.quantized[:, level].double(), emitted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.residuals[:, level].double(), residual, rtol=1e-4, atol=1e-5)
        assert torch.equal(result.codes[:, level], logits.argmax(-1))
        residual = residual - emitted
