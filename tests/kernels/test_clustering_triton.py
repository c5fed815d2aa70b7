"""Balanced codes and K-means in Triton: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dgi_kernels import assign_codes, balanced_codes, kmeans, residual_kmeans

from .clustering_cases import METRICS, clustered, lloyd
from .interpreter import DEVICE, DTYPES, INTERPRETED, choose_form, launcher, run_in_the_interpreter, runs
from .near import assert_near
from .shapes import name_of
from .test_balanced_codes import assert_same_but_for_ties, letter


@launcher
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of everything, and several parts, of few vectors."""
    from dgi_kernels.clustering import triton

    if INTERPRETED:
        monkeypatch.setattr(triton, "TILE", (16, 32, 16))
    monkeypatch.setattr(triton, "CHUNK_COSTS", 500)


@pytest.fixture
def rows_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, the nearest codes of 32 rows by one program: float32 has one for each row, which takes 6 ms."""
    from dgi_kernels.quantize import triton_forms

    if INTERPRETED:
        choose_form(monkeypatch, triton_forms, "flash", step=16)


@runs
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("metric", METRICS)
def test_balanced_against_the_loop_over_the_whole_matrix(metric: str) -> None:
    x = clustered(67, 12, 19).to(DEVICE)
    codebook = x[:37] + 0.1 * torch.randn(37, 19, device=DEVICE)
    for epsilon, iterations in ((0.003, 1), (0.003, 10), (0.5, 3)):
        codes = balanced_codes(
            x, codebook, metric=metric, epsilon=epsilon, iterations=iterations, backend="triton"
        ).cpu()
        assert_same_but_for_ties(codes, letter(x.cpu(), codebook.cpu(), metric, epsilon, iterations))


@runs
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_balanced_dtypes_and_strides(dtype: torch.dtype) -> None:
    wide = clustered(12, 3, 200).to(DEVICE, dtype).T
    x, codebook = wide[::2, 1:], wide[1:40:2, 1:]
    codes = balanced_codes(x, codebook, iterations=5, backend="triton")
    assert_same_but_for_ties(codes.cpu(), letter(x.cpu(), codebook.cpu(), "euclidean", 0.003, 5))
    assert torch.equal(codes, balanced_codes(x.contiguous(), codebook.contiguous(), iterations=5, backend="triton"))


@runs
@pytest.mark.usefixtures("small_tiles")
def test_far_codes_and_vectors_far_from_the_origin() -> None:
    """Codes e^-600 away from all vectors in the first rounds, and squares that cancel."""
    x = clustered(90, 6, 8, offset=300.0).to(DEVICE)
    codebook = torch.cat([x[:10], 300 + 50 * torch.randn(6, 8, device=DEVICE)])
    codes = balanced_codes(x, codebook, iterations=20, backend="triton").cpu()
    assert_same_but_for_ties(codes, letter(x.cpu(), codebook.cpu(), "euclidean", 0.003, 20), tolerance=0.05)


@runs
@pytest.mark.parametrize("metric", METRICS)
def test_without_a_round_the_codes_are_the_nearest(metric: str) -> None:
    x, codebook = torch.randn(60, 9, device=DEVICE), torch.randn(70, 9, device=DEVICE)
    codes = balanced_codes(x, codebook, metric=metric, iterations=0, backend="triton")
    assert torch.equal(codes, assign_codes(x, [codebook], metric=metric, backend="reference")[:, 0])
    assert balanced_codes(x[:0], codebook, backend="triton").shape == (0,)


@runs
@pytest.mark.parametrize("bias", [0.0, -1e4])
def test_sums_of_rows_and_columns_in_parts(bias: float, small_tiles: None) -> None:
    """The kernel itself: rows that are no multiple of a block, and numbers that only a running maximum holds."""
    from dgi_kernels.clustering.triton import log_sums

    for rows, columns, dim in ((1, 300, 5), (70, 1, 40), (33, 129, 16)):
        x, y = torch.randn(rows, dim, device=DEVICE), 30 * torch.randn(columns, dim, device=DEVICE)
        b = bias + 10 * torch.randn(columns, device=DEVICE)
        exact = (x.double() @ y.double().T + b.double()).logsumexp(1)
        torch.testing.assert_close(log_sums(x, y, b).double(), exact, rtol=2e-6, atol=5e-4)


def points(rows: int, dim: int, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points, weights, and points of each place to start from: no cluster loses all of its own."""
    places = 4 * torch.randn(clusters, dim)
    x = places[torch.arange(rows) % clusters] + 0.3 * torch.randn(rows, dim)
    return x.to(DEVICE), (0.1 + torch.rand(rows)).to(DEVICE), x[:clusters].to(DEVICE)


@runs
@pytest.mark.usefixtures("rows_in_tiles")
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_kmeans_against_lloyd_in_numpy(metric: str) -> None:
    x, weights, start = points(301, 6, 7)
    result = kmeans(x, 7, metric=metric, init=start, iterations=3, weights=weights, tol=0.0, backend="triton")
    centroids, codes, inertia = lloyd(x.cpu(), start.cpu(), weights.cpu(), metric, 3)
    assert_near("centroids", result.centroids.cpu(), torch.from_numpy(centroids), dtype=torch.float32)
    assert (result.codes.cpu().numpy() == codes).mean() > 0.995
    assert_near("inertia", result.inertia.cpu(), torch.tensor(inertia, dtype=torch.float64), dtype=torch.float32)
    again = kmeans(x, 7, metric=metric, init=start, iterations=3, weights=weights, tol=0.0, backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(result[:3], again[:3], strict=True))


@runs
@pytest.mark.usefixtures("rows_in_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_residual_kmeans_from_its_own_start(dtype: torch.dtype) -> None:
    x = clustered(200, 4, 8, spread=0.1).to(DEVICE, dtype)
    codebooks, codes = residual_kmeans(x, [4, 5], seed=1, iterations=4, backend="triton")
    left = x.float()
    for level, codebook in enumerate(codebooks):
        assert codebook.dtype == torch.float32
        distance = (left.double()[:, None] - codebook.double()).square().sum(-1)
        own = distance.gather(1, codes[:, level, None])[:, 0]
        assert bool((own <= distance.min(1).values * (1 + 1e-5)).all())
        left = left - codebook[codes[:, level]]
    assert float(left.square().mean()) < 0.5 * float(x.float().var())
    assert np.unique(codes[:, 0].cpu().numpy()).size == 4


@runs
def test_an_empty_cluster_restarts_at_the_point_that_costs_most() -> None:
    x = torch.cat([torch.randn(50, 2), torch.tensor([[40.0, 40.0]])]).to(DEVICE)
    start = torch.tensor([[0.0, 0.0], [-500.0, 0.0]], device=DEVICE)
    result = kmeans(x, 2, init=start, iterations=3, tol=0.0, backend="triton")
    assert torch.equal(result.centroids[1], x[-1]) and result.codes.bincount().tolist() == [50, 1]
