"""Lloyd's algorithm over the kernels of a backend: start, assign, update, restart empty clusters, stop.

    code_n = argmin_k cost(x_n, c_k)        c_k = sum_{n: code_n = k} w_n x_n / sum_{n: code_n = k} w_n

Codes are those of :func:`dgi_kernels.assign_codes`, called in batches: nothing of size N x K is formed, and points in
16 bits are converted a batch at a time. A backend may find the same codes by bounds that it keeps from round to round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import checks, noise
from dgi_kernels.clustering.options import KMeansOptions
from dgi_kernels.clustering.result import KMeans
from dgi_kernels.gumbel import gumbel_noise
from dgi_kernels.progress import Progress
from dgi_kernels.quantize import assign_codes
from dgi_kernels.types import Backend

BATCH = 65536  # points assigned at once
# K-means++ draws its seeds from a random sample of the points: more points make no better start and take longer.
SAMPLE_PER_CLUSTER, SMALLEST_SAMPLE = 16, 8192
NEGLIGIBLE = 1e-12  # relative to the variance: the cost of a point that is where its centroid is
APART = 0.01  # of a point's norm: how far copies of it begin from it, where there are more clusters than points


class Kernels(Protocol):
    """What a backend has: see the reference."""

    def cluster_sums(
        self, x: Tensor, codes: Tensor, weights: Tensor | None, clusters: int
    ) -> tuple[Tensor, Tensor]: ...

    def cluster_costs(
        self, x: Tensor, codes: Tensor, weights: Tensor | None, centroids: Tensor, options: KMeansOptions
    ) -> tuple[Tensor, Tensor]: ...

    def bounded_codes(self, x: Tensor, options: KMeansOptions) -> Callable[[Tensor], Tensor | None] | None: ...

    def kmeans_seeds(self, x: Tensor, weights: Tensor | None, uniform: Tensor) -> Tensor: ...


def run(
    x: Tensor,
    init: Tensor | str,
    weights: Tensor | None,
    seed: Tensor,
    options: KMeansOptions,
    kernels: Kernels,
    backend: Backend,
    progress: Progress,
) -> KMeans:
    """(N, D) -> KMeans; ``init`` is (K, D), ``"kmeans++"`` or ``"random"``, ``weights`` (N,) float64 or None."""
    centroids = start(x, init, weights, seed, options, kernels) if isinstance(init, str) else init.clone()
    codes, done = None, 0
    variance = _variance(x, weights, options, kernels)
    nearest = _assigner(x, options, kernels, backend)
    apart = NEGLIGIBLE * (1.0 if options.metric == "cosine" else variance * x.shape[1])
    for done in range(options.iterations + 1):
        before, codes = codes, nearest(centroids)
        if done == options.iterations or (before is not None and torch.equal(before, codes)):
            break  # the codes are those of the centroids
        moved = _update(x, codes, weights, centroids, apart, options, kernels)
        shift = float((moved - centroids).double().square().sum())
        centroids = moved
        progress.update()
        if shift <= options.tol * variance:
            codes, done = nearest(centroids), done + 1
            break
    assert codes is not None
    _, inertia = kernels.cluster_costs(x, codes, weights, centroids, options)
    return KMeans(centroids, codes, inertia.to(centroids.dtype), done)


def _assigner(x: Tensor, options: KMeansOptions, kernels: Kernels, backend: Backend) -> Callable[[Tensor], Tensor]:
    """What finds the codes (N,) of centroids (K, D), round after round."""
    bounded = kernels.bounded_codes(x, options)

    def nearest(centroids: Tensor) -> Tensor:
        codes = None if bounded is None else bounded(centroids)
        return assign(x, centroids, options, backend) if codes is None else codes

    return nearest


def assign(x: Tensor, centroids: Tensor, options: KMeansOptions, backend: Backend) -> Tensor:
    """(N, D), (K, D) -> (N,) int64."""
    codes = x.new_empty(len(x), dtype=torch.int64)
    for first in range(0, len(x), BATCH):
        batch = x[first : first + BATCH].to(centroids.dtype)
        codes[first : first + BATCH] = assign_codes(
            batch, [centroids], metric=options.metric, eps=options.eps, backend=backend
        )[:, 0]
    return codes


def start(
    x: Tensor, init: str, weights: Tensor | None, seed: Tensor, options: KMeansOptions, kernels: Kernels
) -> Tensor:
    """(N, D) -> the first centroids (K, D): points of different places as far as there are as many."""
    clusters = options.clusters
    size = max(SAMPLE_PER_CLUSTER * clusters, SMALLEST_SAMPLE) if init == "kmeans++" else clusters
    chosen = _sample(x, size, weights, seed, options.level)
    sample = x[chosen].to(checks.compute_dtype(x.dtype))
    if init == "kmeans++":
        # by cosine the distance of directions, ||x^ - c^||^2 = 2 (1 - cos)
        points = F.normalize(sample, dim=1, eps=options.eps) if options.metric == "cosine" else sample
        is_whole = weights is not None and len(sample) == int((weights > 0).sum())
        own = weights[chosen] if weights is not None and is_whole else None  # a sample is drawn by weight
        trials = 2 + int(math.log(clusters))
        words = noise.random_words(seed, 2 * options.level + 1, clusters, trials, noise.STREAM_KMEANS, 0)
        rows = kernels.kmeans_seeds(points, own, (words.double() + 0.5) * 2.0**-32)
        rows = rows[rows >= 0]
    else:
        rows = torch.arange(len(sample), device=x.device)
    centroids = sample[rows]
    missing = clusters - len(rows)
    if missing > 0:  # fewer different points than clusters
        is_left = torch.ones(len(sample), dtype=torch.bool, device=x.device).index_fill(0, rows, False)
        order = torch.cat([is_left.nonzero()[:, 0], torch.arange(len(sample), device=x.device)])
        copied = sample[order[torch.arange(missing, device=x.device) % len(order)]]
        away = gumbel_noise(
            seed,
            2 * options.level + 1,
            missing,
            x.shape[1],
            stream=noise.STREAM_KMEANS,
            row_offset=clusters,
            device=x.device,
        ).to(copied.dtype)
        length = torch.linalg.vector_norm(copied, dim=1, keepdim=True).clamp(min=options.eps)
        centroids = torch.cat([centroids, copied + APART * length * away / x.shape[1] ** 0.5])
    return centroids.contiguous()


def _sample(x: Tensor, size: int, weights: Tensor | None, seed: Tensor, level: int) -> Tensor:
    """At most ``size`` rows in ascending order, without replacement, each draw in proportion to the weights.

    The largest of log w + g, g ~ Gumbel(0, 1), are such a sample.
    """
    if size >= len(x) and weights is None:
        return torch.arange(len(x), device=x.device)
    keys = gumbel_noise(seed, 2 * level, 1, len(x), stream=noise.STREAM_KMEANS, device=x.device)[0]
    if weights is not None:
        keys = keys + weights.log().to(keys.dtype)
        size = min(size, int((weights > 0).sum()))
    return keys.topk(min(size, len(x))).indices.sort().values


def _update(
    x: Tensor,
    codes: Tensor,
    weights: Tensor | None,
    centroids: Tensor,
    apart: float,
    options: KMeansOptions,
    kernels: Kernels,
) -> Tensor:
    """The means of the clusters (K, D). An empty cluster moves to a point far, by more than ``apart``, from its
    centroid, and stays where there is none."""
    sums, mass = kernels.cluster_sums(x, codes, weights, options.clusters)
    empty = (mass == 0).nonzero()[:, 0]
    means = (sums / mass.unsqueeze(1)).to(centroids.dtype)
    if len(empty):
        costs, _ = kernels.cluster_costs(x, codes, weights, centroids, options)
        costs = costs if weights is None else costs * weights
        if options.metric == "dot":
            costs = costs - costs.min()  # a dot product has no smallest cost
        largest, rows = costs.topk(min(len(empty), len(x)))
        rows = rows[largest > apart]
        means[empty] = centroids[empty]
        means[empty[: len(rows)]] = x[rows].to(centroids.dtype)
    return means


def _variance(x: Tensor, weights: Tensor | None, options: KMeansOptions, kernels: Kernels) -> float:
    """The mean over the columns of their (weighted) variance: that of one cluster of all points."""
    codes = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    sums, mass = kernels.cluster_sums(x, codes, weights, 1)
    mean = (sums / mass).to(checks.compute_dtype(x.dtype))
    _, total = kernels.cluster_costs(x, codes, weights, mean, replace(options, metric="euclidean"))
    return float(total / mass) / max(1, x.shape[1])
