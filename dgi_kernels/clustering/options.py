"""The options of K-means, passed whole from the public function to the loop and to every implementation."""

from __future__ import annotations

from dataclasses import dataclass

from dgi_kernels.enums import METRICS
from dgi_kernels.types import Metric


@dataclass(frozen=True)
class KMeansOptions:
    """What :func:`dgi_kernels.kmeans` is told besides tensors; checked there.

    Attributes:
        clusters: K.
        metric: a name of :data:`METRICS`.
        iterations: at most so many rounds of assignment and update.
        tol: a round that moves the centroids by less, squared and relative to the variance, is the last.
        eps: lower bound of the norms that the cosine divides by.
        level: of the noise: each level of residual K-means draws other numbers.
    """

    clusters: int
    metric: Metric
    iterations: int
    tol: float
    eps: float
    level: int = 0

    @property
    def metric_number(self) -> int:
        return METRICS.index(self.metric)
