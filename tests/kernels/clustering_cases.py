"""Points for clustering, and independent oracles in float64 that share nothing with the code under test."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

METRICS = ("euclidean", "cosine", "dot")


def clustered(rows: int, clusters: int, dim: int, spread: float = 0.3, offset: float = 0.0) -> Tensor:
    """Points around ``clusters`` places, all of them ``offset`` away from 0."""
    places = torch.randn(clusters, dim)
    return offset + places[torch.randint(clusters, (rows,))] + spread * torch.randn(rows, dim)


def costs(x: Tensor, codebook: Tensor, metric: str, eps: float = 1e-12) -> np.ndarray:
    """(N, D), (K, D) -> (N, K) what each point costs under each code."""
    x, c = x.double().numpy(), codebook.double().numpy()
    if metric == "euclidean":
        return ((x[:, None] - c[None]) ** 2).sum(-1)
    products = np.einsum("nd,kd->nk", x, c)
    if metric == "dot":
        return -products
    norms = [np.maximum(np.sqrt((v**2).sum(-1)), eps) for v in (x, c)]
    return 1 - products / norms[0][:, None] / norms[1][None]


def lloyd(
    x: Tensor, centroids: Tensor, weights: Tensor | None, metric: str, rounds: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Centroids, codes and inertia after so many rounds of K-means in which no cluster may lose all its points."""
    points, c = x.double().numpy(), centroids.double()
    w = np.ones(len(points)) if weights is None else weights.double().numpy()
    for _ in range(rounds):
        codes = costs(x, c, metric).argmin(1)
        if not (np.bincount(codes, w, len(c)) > 0).all():
            raise ValueError("a cluster is empty")
        c = torch.from_numpy(np.stack([np.average(points[codes == k], 0, w[codes == k]) for k in range(len(c))]))
    final = costs(x, c, metric)
    return c.numpy(), final.argmin(1), float((w * final.min(1)).sum())
