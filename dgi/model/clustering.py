"""K-means under the quantizer's own rule, for codebooks that start where the residuals are."""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels import assign_codes
from dgi_kernels.types import Metric


def cosine_kmeans(
    points: Tensor,
    clusters: int,
    *,
    metric: Metric = "cosine",
    iterations: int = 20,
    generator: torch.Generator | None = None,
    batch_size: int = 65536,
) -> Tensor:
    """Lloyd's algorithm under the quantizer's own rule: assign by cosine (or another metric), move each centre to the
    mean of its points.

    Centres keep the length of that mean, since the quantizer subtracts them from residuals.  A cluster that loses
    all its points restarts at a random one, so every centre is used where there are enough distinct points.

    Args:
        points: (N, D) floating-point, N >= 1.
        metric: of :func:`dgi_kernels.assign_codes`.
        clusters: number of centres K; may exceed N (the surplus are perturbed copies of random points).
        iterations: rounds of assignment and update.
        generator: source of the random choices.
        batch_size: points assigned at once.

    Returns:
        (K, D) centres in the dtype of ``points``.
    """
    if len(points) == 0:
        raise ValueError("points must hold at least one row; got none")
    centres = _random_points(points, clusters, generator)
    for _ in range(iterations):
        labels = torch.cat([assign_codes(batch, [centres], metric=metric)[:, 0] for batch in points.split(batch_size)])
        counts = torch.bincount(labels, minlength=clusters)
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        centres = sums / counts.clamp(min=1).unsqueeze(1)
        empty = counts == 0
        if empty.any():
            centres[empty] = _random_points(points, int(empty.sum()), generator)
    return centres


def _random_points(points: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` distinct rows where there are as many, else repeats, told apart by 1 % of noise."""
    order = torch.randperm(len(points), generator=generator).to(points.device)
    chosen = points[order.repeat(-(-count // len(points)))[:count]].clone()
    if count > len(points):
        noise = torch.randn(chosen.shape, generator=generator, dtype=points.dtype).to(points.device)
        chosen += 0.01 * chosen.norm(dim=1, keepdim=True) * noise / points.shape[1] ** 0.5
    return chosen
