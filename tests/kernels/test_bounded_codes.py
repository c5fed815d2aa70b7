"""K-means' codes by bounds (C++): those of all distances in float64, whatever the centroids have done meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgi_kernels import assign_codes, kmeans, why_not
from dgi_kernels.clustering import lloyd, native
from dgi_kernels.clustering.options import KMeansOptions

from .clustering_cases import clustered
from .sanitizers import assert_clean
from .shapes import name_of

pytestmark = pytest.mark.skipif(
    why_not("kmeans", "native", "cpu", torch.float32) is not None, reason="the native backend is not available: -"
)


def exact(x: Tensor, centroids: Tensor) -> Tensor:
    """The first of the nearest, in float64."""
    return torch.cdist(x.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)


def moved(x: Tensor, codes: Tensor, centroids: Tensor) -> Tensor:
    sums, mass = native.cluster_sums(x, codes, None, len(centroids))
    return torch.where((mass > 0).unsqueeze(1), sums / mass.unsqueeze(1), centroids.double()).float()


CASES = {
    "n3000-d16-k40": (3000, 16, 40, 0.3, 0.0),
    "n1000-d5-k17": (1000, 5, 17, 0.5, 0.0),
    "n700-d33-k300": (700, 33, 300, 0.5, 0.0),
    "far": (2000, 12, 30, 0.3, 1000.0),
    "n1": (1, 4, 3, 0.3, 0.0),
    "d1-k1": (50, 1, 1, 0.3, 0.0),
    "d256": (600, 256, 24, 0.3, 0.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("case", CASES)
def test_codes_of_each_round_are_the_nearest(case: str, dtype: torch.dtype) -> None:
    n, d, k, spread, offset = CASES[case]
    x = clustered(n, 2 * k, d, spread, offset).to(dtype)
    centroids = x[torch.randint(n, (k,))].float() + 0.01 * torch.randn(k, d)
    bounded = native.BoundedCodes(x)
    for _ in range(12):
        codes = bounded(centroids)
        assert codes is not None
        assert torch.equal(codes, exact(x.float(), centroids))
        centroids = moved(x, codes, centroids)


def test_bounds_survive_what_centroids_may_do() -> None:
    """Steps of every size, a few of them large, centroids that change places, and those that do not move at all."""
    x = clustered(2500, 60, 8, spread=0.4)
    centroids = x[:96].clone()
    bounded = native.BoundedCodes(x)
    for step in range(30):
        assert torch.equal(bounded(centroids), exact(x, centroids))  # type: ignore[arg-type]
        centroids = centroids + 10.0 ** -(step % 5) * 0.1 * torch.randn_like(centroids)
        if step % 3 == 1:
            centroids[torch.randint(96, (5,))] = x[torch.randint(len(x), (5,))]
        if step % 7 == 2:
            centroids = centroids[torch.randperm(96)]
        if step % 4 == 3:
            assert torch.equal(bounded(centroids), exact(x, centroids))  # type: ignore[arg-type]


def test_of_equal_distances_the_lowest_code_wins() -> None:
    """Points and centroids on a grid, each centroid twice: all sums are exact, and nearly all points have ties."""
    x = torch.randint(-3, 4, (1500, 3)).float()
    centroids = torch.randint(-3, 4, (20, 3)).float().repeat(2, 1)
    bounded = native.BoundedCodes(x)
    for _ in range(8):
        assert torch.equal(bounded(centroids), exact(x, centroids))  # type: ignore[arg-type]
        centroids[torch.randint(40, (2,))] += torch.randint(-1, 2, (2, 3))


def test_bounds_do_save_products() -> None:
    """Codes that are kept are of the last round with products for the row: most rows have none at the end."""
    x = clustered(4000, 400, 8, spread=0.02)
    centroids = x[:400].clone()
    bounded = native.BoundedCodes(x)
    bounded(centroids)
    bounded.near[:, 1:] = -1  # nothing but the best: a row that is measured again finds more
    bounded(centroids + 1e-4)
    assert (bounded.near[:, 1] < 0).double().mean() > 0.5


@pytest.mark.parametrize("size", [1e25, 0.0])
def test_numbers_that_overflow_and_rows_that_are_long(size: float) -> None:
    x = size * torch.randn(300, 6)
    start = x[:5].clone()
    result = kmeans(x, 5, init=start, iterations=3, tol=0.0, backend="native")
    assert torch.equal(result.codes, assign_codes(x, [result.centroids], metric="euclidean")[:, 0])
    assert (native.BoundedCodes(x)(start) is None) == (size > 1)
    assert native.BoundedCodes(torch.zeros(9, 257))(torch.zeros(2, 257)) is None


def test_kmeans_is_that_of_plain_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, through restarts of empty clusters."""
    x = clustered(5000, 90, 24, spread=0.5)
    start = torch.cat([x[:60], x[:4] + 1000])
    by_bounds = kmeans(x, 64, init=start, iterations=20, tol=0.0, backend="native")
    monkeypatch.setattr(native, "bounded_codes", lambda x, options: None)
    plain = kmeans(x, 64, init=start, iterations=20, tol=0.0, backend="native")
    assert all(torch.equal(a, b) for a, b in zip(by_bounds[:3], plain[:3], strict=True))
    assert by_bounds.iterations == plain.iterations


def test_of_distances_of_at_most_float32_alone() -> None:
    options = {metric: KMeansOptions(2, metric, 1, 0.0, 1e-12) for metric in ("euclidean", "cosine", "dot")}  # type: ignore[arg-type]
    x = torch.randn(4, 3)
    assert native.bounded_codes(x, options["euclidean"]) is not None
    assert native.bounded_codes(x.double(), options["euclidean"]) is None
    assert native.bounded_codes(x, options["cosine"]) is native.bounded_codes(x, options["dot"]) is None
    assert lloyd.assign(x, x, options["euclidean"], "native").tolist() == [0, 1, 2, 3]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_kernel_is_clean_under_sanitizers(tmp_path: Path, seed: int) -> None:
    """Random rounds with AddressSanitizer and UBSan: each code and each bound that is kept against all distances."""
    assert_clean("bounded_driver.cpp", ("cpu/clustering/bounded.cpp",), tmp_path, seed, 100)
