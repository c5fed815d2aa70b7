"""What K-means returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KMeans(NamedTuple):
    """The result of :func:`dgi_kernels.kmeans`.

    Attributes:
        centroids: (K, D), float32 (float64 for float64 points).
        codes: (N,) int64, the nearest centroid of each point.
        inertia: 0-d, in the dtype of the centroids: the weighted sum of the points' costs.
        iterations: rounds that moved centroids.
    """

    centroids: Tensor
    codes: Tensor
    inertia: Tensor
    iterations: int
