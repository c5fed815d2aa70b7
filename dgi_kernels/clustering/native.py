"""Calls into the compiled extension: clustering in C++ (``csrc/cpu/clustering``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgi_kernels._extension import fake_kernel
from dgi_kernels.clustering.options import KMeansOptions
from dgi_kernels.enums import METRICS
from dgi_kernels.types import Metric


def cluster_sums(x: Tensor, codes: Tensor, weights: Tensor | None, clusters: int) -> tuple[Tensor, Tensor]:
    """(N, D), (N,), (N,) -> (K, D) sums of w x and (K,) sums of w in each cluster, float64."""
    return torch.ops.dgi_kernels.cluster_sums(x, codes, weights, clusters)


def cluster_costs(
    x: Tensor, codes: Tensor, weights: Tensor | None, centroids: Tensor, options: KMeansOptions
) -> tuple[Tensor, Tensor]:
    """(N, D), (N,), (N,), (K, D) -> the costs (N,) of the points under their codes and their weighted sum, float64."""
    return torch.ops.dgi_kernels.cluster_costs(x, codes, weights, centroids, options.metric_number, options.eps)


def kmeans_seeds(x: Tensor, weights: Tensor | None, uniform: Tensor) -> Tensor:
    """K-means++: (N, D), (N,), (K, trials) in (0, 1) -> (K,) rows, -1 once no point is away from those chosen."""
    return torch.ops.dgi_kernels.kmeans_seeds(x.contiguous(), weights, uniform)


NEAR = 8  # codes that bounds keep of each point, as csrc/cpu/clustering/clustering_cpu.h has them


class BoundedCodes:
    """The nearest centroids of points (N, D), round after round: no products for points that bounds decide."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.near = x.new_empty((len(x), NEAR), dtype=torch.int32)
        self.rest = x.new_empty(len(x), dtype=torch.float32)
        self.before: Tensor | None = None

    def __call__(self, centroids: Tensor) -> Tensor | None:
        """(K, D) float32 -> (N,) int64; None where numbers are too large, or rows too long."""
        codes = self.x.new_empty(len(self.x), dtype=torch.int64)
        found = torch.ops.dgi_kernels.bounded_codes(self.x, centroids, self.before, self.near, self.rest, codes)
        self.before = centroids if found else None
        return codes if found else None


def bounded_codes(x: Tensor, options: KMeansOptions) -> BoundedCodes | None:
    """Bounds hold for distances alone."""
    return BoundedCodes(x) if options.metric == "euclidean" and x.dtype != torch.float64 else None


@fake_kernel("bounded_codes")
def _(x: Tensor, centroids: Tensor, before: Tensor | None, near: Tensor, rest: Tensor, codes: Tensor) -> bool:
    return True


@fake_kernel("cluster_sums")
def _(x: Tensor, codes: Tensor, weights: Tensor | None, clusters: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((clusters, x.shape[1]), dtype=torch.float64), x.new_empty(clusters, dtype=torch.float64)


@fake_kernel("cluster_costs")
def _(
    x: Tensor, codes: Tensor, weights: Tensor | None, centroids: Tensor, metric: int, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], dtype=torch.float64), x.new_empty((), dtype=torch.float64)


@fake_kernel("kmeans_seeds")
def _(x: Tensor, weights: Tensor | None, uniform: Tensor) -> Tensor:
    return uniform.new_empty(uniform.shape[0], dtype=torch.int64)


def unique_codes(codes: Tensor, z: Tensor, codebooks: Sequence[Tensor], metric: Metric, eps: float) -> Tensor:
    """(N, m), (N, D), m of (K_j, D), all float32 or all float64 -> (N, m) int64."""
    joined = torch.cat(list(codebooks))
    sizes = [len(codebook) for codebook in codebooks]
    return torch.ops.dgi_kernels.unique_codes(
        codes.contiguous(), z.contiguous(), joined, sizes, METRICS.index(metric), eps
    )


def balanced_codes(x: Tensor, codebook: Tensor, metric: Metric, eps: float, epsilon: float, iterations: int) -> Tensor:
    """(N, D), (K, D), both float32 or both float64 -> (N,) int64."""
    return torch.ops.dgi_kernels.balanced_codes(
        x.contiguous(), codebook.contiguous(), METRICS.index(metric), eps, epsilon, iterations
    )


@fake_kernel("unique_codes")
def _(codes: Tensor, z: Tensor, codebooks: Tensor, sizes: list[int], metric: int, eps: float) -> Tensor:
    return torch.empty_like(codes)


@fake_kernel("balanced_codes")
def _(x: Tensor, codebook: Tensor, metric: int, eps: float, epsilon: float, iterations: int) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.int64)
