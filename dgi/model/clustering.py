"""K-means under the quantizer's own rule, for codebooks that start where the residuals are."""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels import kmeans
from dgi_kernels.types import Metric


def cosine_kmeans(
    points: Tensor,
    clusters: int,
    *,
    metric: Metric = "cosine",
    iterations: int = 20,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`dgi_kernels.kmeans` by the cosine (or another metric), as a call that takes a generator.

    Centres keep the length of their points' mean, since the quantizer subtracts them from residuals.

    Args:
        points: (N, D) floating-point, N >= 1.
        clusters: number of centres K; may exceed N (the surplus are perturbed copies of points).
        metric: of :func:`dgi_kernels.assign_codes`.
        iterations: at most so many rounds of assignment and update.
        generator: source of the random choices; None for torch's default generator.

    Returns:
        (K, D) centres in the dtype of ``points``.
    """
    if len(points) == 0:
        raise ValueError("points must hold at least one row; got none")
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator))
    return kmeans(points, clusters, metric=metric, iterations=iterations, tol=0.0, seed=seed).centroids.to(points.dtype)
