"""K-means: every backend against Lloyd's algorithm in NumPy, the start, weights, empty clusters, awkward inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dgi_kernels import KMeans, assign_codes, kmeans, residual_kmeans, why_not
from dgi_kernels.clustering import implementation

from .clustering_cases import METRICS, clustered, costs, lloyd
from .near import assert_near
from .shapes import name_of

BACKENDS = ("reference", "native")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    problem = why_not("kmeans", request.param, "cpu", torch.float32)
    if problem is not None:
        pytest.skip(problem)
    return request.param


def without_empty_clusters(
    x: Tensor, weights: Tensor | None, metric: str, rounds: int
) -> tuple[Tensor, tuple[np.ndarray, np.ndarray, float]]:
    """Five points from which no cluster loses all its points, and what Lloyd's algorithm makes of them."""
    for _ in range(100):
        start = x[torch.randperm(len(x))[:5]]
        try:
            return start, lloyd(x, start, weights, metric, rounds)
        except ValueError:
            continue
    raise AssertionError("each start leaves a cluster empty")


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("metric", METRICS)
def test_against_lloyd_in_numpy(metric: str, dtype: torch.dtype, weighted: bool, backend: str) -> None:
    x = clustered(700, 6, 13).to(dtype)
    weights = torch.rand(700).to(dtype) * (torch.rand(700) > 0.2) if weighted else None
    # by dot products the longest centroids take all points soon
    rounds = 1 if metric == "dot" else 4
    start, (centroids, codes, inertia) = without_empty_clusters(x, weights, metric, rounds)
    result = kmeans(x, 5, metric=metric, iterations=rounds, init=start, weights=weights, tol=0.0, backend=backend)
    exact = {"dtype": torch.float64 if dtype == torch.float64 else torch.float32}
    assert_near("centroids", result.centroids, torch.from_numpy(centroids), **exact)
    assert result.centroids.dtype == exact["dtype"] and result.codes.dtype == torch.int64
    assert (result.codes.numpy() == codes).mean() > 0.995  # the others are ties within rounding
    assert_near("inertia", result.inertia, torch.tensor(inertia, dtype=torch.float64), **exact)


@pytest.mark.parametrize("metric", METRICS)
def test_codes_and_inertia_are_those_of_the_centroids(metric: str, backend: str) -> None:
    x, weights = clustered(300, 8, 5), torch.rand(300)
    for iterations in (0, 3, 100):
        result = kmeans(x, 8, metric=metric, iterations=iterations, weights=weights, seed=1, backend=backend)
        assert torch.equal(result.codes, assign_codes(x, [result.centroids], metric=metric, backend=backend)[:, 0])
        inertia = (weights.double().numpy() * costs(x, result.centroids, metric).min(1)).sum()
        assert_near("inertia", result.inertia, torch.tensor(inertia).double())
        assert result.iterations <= iterations


def test_it_stops_where_nothing_changes_and_where_centroids_hardly_move(backend: str) -> None:
    x = clustered(500, 4, 6, spread=0.05)
    converged = kmeans(x, 4, iterations=1000, tol=0.0, seed=0, backend=backend)
    assert converged.iterations < 30
    again = kmeans(x, 4, init=converged.centroids, tol=0.0, backend=backend)
    assert torch.equal(again.centroids, converged.centroids) and again.iterations == 1
    assert kmeans(x, 4, iterations=1000, tol=1e9, seed=0, backend=backend).iterations == 1


def test_the_same_seed_gives_the_same_bits(backend: str) -> None:
    x = clustered(2000, 30, 9)
    first, second = (kmeans(x, 40, seed=7, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:3], second[:3], strict=True))
    assert not torch.equal(first.centroids, kmeans(x, 40, seed=8, backend=backend).centroids)
    torch.manual_seed(3)
    third = kmeans(x, 40, backend=backend)
    torch.manual_seed(3)
    assert torch.equal(third.centroids, kmeans(x, 40, backend=backend).centroids)


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    x, threads = clustered(5000, 20, 33), torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(kmeans(x, 64, seed=5, backend="native"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(runs[0][:3], runs[1][:3], strict=True))


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_start_finds_clusters_that_are_far_apart(metric: str, backend: str) -> None:
    """Random points miss one of 16 such clusters nearly always; Lloyd's algorithm then never finds it."""
    places = torch.linalg.qr(torch.randn(16, 16)).Q * 10
    x = (places.repeat_interleave(20, 0) + 0.01 * torch.randn(320, 16))[torch.randperm(320)]
    result = kmeans(x, 16, metric=metric, seed=2, backend=backend)
    assert np.unique(costs(places, result.centroids, metric).argmin(1)).size == 16
    assert result.inertia < 0.01 * len(x)


def test_seeds_are_drawn_by_weighted_squared_distance(backend: str) -> None:
    """The first two seeds, over many draws, against the probabilities of K-means++; then the best of two draws."""
    x, weights = torch.tensor([[0.0], [1.0], [3.0], [3.0]]), torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    for trials, odds in ((1, 9 / 11), (2, 1 - (2 / 11) ** 2)):  # of the row at 3 after the one at 0
        uniform = torch.rand(800, 2, trials, dtype=torch.float64)
        seeds = torch.stack([implementation(backend).kmeans_seeds(x, weights, each) for each in uniform])
        first = seeds[:, 0].bincount(minlength=4) / len(seeds)
        torch.testing.assert_close(first, torch.tensor([0.25, 0.5, 0.0, 0.25]), atol=0.08, rtol=0)
        second = seeds[seeds[:, 0] == 0, 1]
        assert abs(float((second == 3).double().mean()) - odds) < 0.1 * (2 - trials) + 0.05
    assert implementation(backend).kmeans_seeds(x[:1], None, uniform[0]).tolist() == [0, -1]


def test_a_weight_counts_as_copies(backend: str) -> None:
    x, counts = clustered(200, 5, 4), torch.randint(0, 4, (200,))
    start = x[:6]
    weighted = kmeans(x, 6, init=start, weights=counts.float(), tol=0.0, iterations=5, backend=backend)
    copies = kmeans(x.repeat_interleave(counts, 0), 6, init=start, tol=0.0, iterations=5, backend=backend)
    torch.testing.assert_close(weighted.centroids, copies.centroids)
    torch.testing.assert_close(weighted.inertia, copies.inertia)


def test_an_empty_cluster_restarts_at_the_point_that_costs_most(backend: str) -> None:
    x = torch.cat([torch.randn(50, 2), torch.tensor([[40.0, 40.0]])])
    start = torch.tensor([[0.0, 0.0], [-500.0, 0.0]])
    result = kmeans(x, 2, init=start, iterations=3, tol=0.0, backend=backend)
    assert torch.equal(result.centroids[1], x[-1]) and result.codes.bincount().tolist() == [50, 1]


@pytest.mark.parametrize("metric", METRICS)
def test_more_clusters_than_points(metric: str, backend: str) -> None:
    x = torch.randn(5, 4)
    result = kmeans(x, 12, metric=metric, seed=0, backend=backend)
    assert result.centroids.shape == (12, 4) and result.centroids.isfinite().all()
    if metric != "dot":
        assert len(result.centroids.unique(dim=0)) == 12
        assert result.inertia < 1e-6 and len(result.codes.unique()) == 5


@pytest.mark.parametrize("metric", METRICS)
def test_points_that_are_all_alike(metric: str, backend: str) -> None:
    x = torch.full((40, 3), 1.25)
    result = kmeans(x, 4, metric=metric, seed=0, backend=backend)
    assert result.centroids.isfinite().all()
    if metric != "dot":
        assert result.inertia < 1e-5
    zeros = kmeans(torch.zeros(10, 3), 4, metric=metric, seed=0, backend=backend)
    assert zeros.centroids.isfinite().all()


def test_far_from_the_origin(backend: str) -> None:
    x = clustered(400, 5, 8, spread=1.0, offset=1000.0)
    result = kmeans(x, 5, seed=0, iterations=10, backend=backend)
    exact = costs(x, result.centroids, "euclidean")
    assert (exact.argmin(1) == result.codes.numpy()).all()
    assert_near("inertia", result.inertia, torch.tensor(exact.min(1).sum()).double())


def test_one_row_one_cluster_strides_and_wide_rows(backend: str) -> None:
    one = kmeans(torch.tensor([[3.0, 4.0]]), 1, seed=0, backend=backend)
    assert torch.equal(one.centroids, torch.tensor([[3.0, 4.0]])) and one.inertia == 0
    x = torch.randn(70, 300).T[::2, :33]
    strided, packed = (kmeans(points, 7, seed=4, backend=backend) for points in (x, x.contiguous()))
    assert torch.equal(strided.centroids, packed.centroids)


def test_a_sample_is_enough_for_the_start(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr("dgi_kernels.clustering.lloyd.SMALLEST_SAMPLE", 50)
    x = clustered(3000, 8, 6, spread=0.01)
    weights = (torch.arange(3000) % 2).float()
    result = kmeans(x, 8, seed=1, weights=weights, backend=backend)
    assert result.centroids.shape == (8, 6) and result.centroids.isfinite().all()
    assert (costs(result.centroids, x[1::2], "euclidean").min(1) < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_residual_levels(dtype: torch.dtype, backend: str) -> None:
    x = clustered(600, 10, 12).to(dtype)
    codebooks, codes = residual_kmeans(x, [8, 5, 3], seed=3, backend=backend)
    assert [tuple(c.shape) for c in codebooks] == [(8, 12), (5, 12), (3, 12)] and codes.shape == (600, 3)
    assert torch.equal(codes, assign_codes(x.float(), codebooks, metric="euclidean", backend=backend))
    residual, errors = x.double(), []
    for level, codebook in enumerate(codebooks):
        residual = residual - codebook.double()[codes[:, level]]
        errors.append(float(residual.square().sum()))
    assert errors == sorted(errors, reverse=True)
    first = kmeans(x, 8, seed=3, backend=backend)
    assert torch.equal(first.centroids, codebooks[0])
    again = residual_kmeans(x, iter((8, 5, 3)), seed=3, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(codebooks, again[0], strict=True))


def test_both_backends_make_the_same_clusters() -> None:
    x = clustered(1500, 20, 16)
    ours, plain = (kmeans(x, 30, seed=9, backend=name) for name in ("native", "reference"))
    assert ours.iterations == plain.iterations
    assert_near("centroids", ours.centroids, plain.centroids.double())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(0, 3)}, ValueError, "x must have at least one row"),
        ({"x": torch.zeros(3)}, ValueError, "x must have 2 dimensions"),
        ({"x": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "x must have dtype"),
        ({"x": torch.tensor([[1.0, float("nan")]])}, ValueError, "x must be finite; 1 of 2"),
        ({"x": torch.tensor([[1.0, float("inf")], [-float("inf"), 0]])}, ValueError, "x must be finite; 2 of 4"),
        ({"clusters": 0}, ValueError, "clusters must be at least 1"),
        ({"clusters": 2.0}, TypeError, "clusters must be an integer"),
        ({"metric": "manhattan"}, ValueError, "metric must be one of"),
        ({"iterations": -1}, ValueError, "iterations must be at least 0"),
        ({"init": "best"}, ValueError, "init must be one of"),
        ({"init": torch.zeros(3, 2)}, ValueError, "init must have shape"),
        ({"init": torch.full((2, 2), float("nan"))}, ValueError, "init must be finite"),
        ({"weights": torch.ones(3)}, ValueError, "weights must have shape"),
        ({"weights": -torch.ones(4)}, ValueError, "weights must be at least 0"),
        ({"weights": torch.zeros(4)}, ValueError, "not all of them 0"),
        ({"tol": -1.0}, ValueError, "tol must be within"),
        ({"seed": 0.5}, TypeError, "seed must be an integer"),
        ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"x": torch.randn(4, 2), "clusters": 2} | change
    with pytest.raises(error, match=message):
        kmeans(**arguments)


@pytest.mark.parametrize(
    ("sizes", "error"), [([], ValueError), (3, TypeError), ([2, 0], ValueError), (torch.tensor([2]), TypeError)]
)
def test_wrong_sizes_are_named(sizes: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="sizes"):
        residual_kmeans(torch.randn(4, 2), sizes)  # type: ignore[arg-type]


def test_the_result_is_a_named_tuple_without_history() -> None:
    x = torch.randn(20, 3, requires_grad=True)
    result = kmeans(x, 3, seed=0)
    assert isinstance(result, KMeans) and not result.centroids.requires_grad and not result.inertia.requires_grad
