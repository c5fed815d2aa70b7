"""Clustering in plain PyTorch.

    assign   code_n = argmin_k cost(x_n, c_k)         cost = ||x - c||^2,  1 - cos(x, c),  -x . c
    update   c_k = sum_{n: code_n = k} w_n x_n / sum_{n: code_n = k} w_n

Points arrive checked, in any floating-point dtype, weights in float64 or None, centroids in the compute dtype.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.clustering.costs import SMALLEST_AMPLITUDE, pair_costs
from dgi_kernels.clustering.options import KMeansOptions
from dgi_kernels.types import Metric


def cluster_sums(x: Tensor, codes: Tensor, weights: Tensor | None, clusters: int) -> tuple[Tensor, Tensor]:
    """(N, D), (N,), (N,) -> (K, D) sums of w x and (K,) sums of w in each cluster, float64.

    Rows are sorted by code first: sums by atomic additions, as ``index_add_`` makes them on GPUs, differ from run to
    run.
    """
    order = codes.argsort(stable=True)
    counts = torch.bincount(codes, minlength=clusters)
    w = x.new_ones(len(x), dtype=torch.float64) if weights is None else weights
    sums = torch.segment_reduce((w.unsqueeze(1) * x)[order], "sum", lengths=counts, axis=0)
    return sums, torch.segment_reduce(w[order], "sum", lengths=counts, axis=0)


def cluster_costs(
    x: Tensor, codes: Tensor, weights: Tensor | None, centroids: Tensor, options: KMeansOptions
) -> tuple[Tensor, Tensor]:
    """(N, D), (N,), (N,), (K, D) -> the costs (N,) of the points under their codes and their weighted sum, float64."""
    x, c = x.double(), centroids.double()[codes]
    if options.metric == "euclidean":
        costs = (x - c).square().sum(dim=1)
    elif options.metric == "dot":
        costs = -(x * c).sum(dim=1)
    else:
        cosines = (F.normalize(x, dim=1, eps=options.eps) * F.normalize(c, dim=1, eps=options.eps)).sum(dim=1)
        costs = (1 - cosines).clamp(min=0)
    return costs, (costs if weights is None else costs * weights).sum()


def bounded_codes(x: Tensor, options: KMeansOptions) -> None:
    """There are no bounds here: each round compares all points with all centroids."""


def kmeans_seeds(x: Tensor, weights: Tensor | None, uniform: Tensor) -> Tensor:
    """K-means++: (N, D), (N,), (K, trials) in (0, 1) -> (K,) rows, -1 once no point is away from those chosen.

    Of each round's draws the one that leaves the smallest sum of costs is chosen (greedy, as in scikit-learn).
    """
    x = x.double()
    weights = x.new_ones(len(x)) if weights is None else weights
    cost, rows = weights, []
    for i, draws in enumerate(uniform):
        sums = cost.cumsum(0)
        if not sums[-1] > 0:
            break
        drawn = torch.searchsorted(sums, (draws if i > 0 else draws[:1]) * sums[-1], right=True)
        drawn = drawn.clamp(max=int(cost.nonzero()[-1]))
        distances = [weights * (x - x[row]).square().sum(dim=1) for row in drawn]
        left = [torch.minimum(cost, distance) if i > 0 else distance for distance in distances]
        best = int(torch.stack([costs.sum() for costs in left]).argmin())
        rows.append(drawn[best])
        cost = left[best]
    found = torch.stack(rows) if rows else x.new_empty(0, dtype=torch.int64)
    return F.pad(found, (0, len(uniform) - len(found)), value=-1)


def balanced_codes(x: Tensor, codebook: Tensor, metric: Metric, eps: float, epsilon: float, iterations: int) -> Tensor:
    """(N, D), (K, D) -> (N,) int64, Sinkhorn's algorithm over the whole of s (N, K), in float64.

    s = -cost / (epsilon amplitude);  f = -log sum_k exp(s + g);  g = -log sum_n exp(s + f);  argmax_k s + g
    """
    if len(x) == 0:
        return x.new_empty(0, dtype=torch.int64)
    cost = pair_costs(x.double(), codebook.double(), metric, eps)
    s = -cost / (epsilon * ((cost.max() - cost.min()) / 2 + SMALLEST_AMPLITUDE))
    g = s.new_zeros(len(codebook))
    for _ in range(iterations):
        f = -torch.logsumexp(s + g, dim=1)
        g = -torch.logsumexp(s + f.unsqueeze(1), dim=0)
    return (s + g).argmax(dim=1)


def unique_codes(codes: Tensor, z: Tensor, codebooks: Sequence[Tensor], metric: Metric, eps: float) -> Tensor:
    """(N, m), (N, D), m of (K_j, D) -> (N, m) int64, row by row in Python; see :func:`dgi_kernels.unique_codes`."""
    return _Unique(codes, z, codebooks, metric, eps).codes()


class _Unique:
    """Rows that keep their ID, then moves within the last level, the last two, and so on."""

    def __init__(self, codes: Tensor, z: Tensor, codebooks: Sequence[Tensor], metric: Metric, eps: float) -> None:
        self.z, self.codebooks, self.metric, self.eps = z, codebooks, metric, eps
        self.ids = [tuple(row) for row in codes.tolist()]
        self.device = codes.device
        self.sizes = [len(codebook) for codebook in codebooks]
        self.count: Counter[tuple[int, ...]] = Counter()  # rows with each prefix

    def codes(self) -> Tensor:
        levels = len(self.sizes)
        shared: dict[tuple[int, ...], list[int]] = {}
        for row, own in enumerate(self.ids):
            shared.setdefault(own, []).append(row)
        left = []
        for own, rows in shared.items():
            costs = [self.cost(row, levels - 1)[own[-1]] for row in rows] if len(rows) > 1 else [0.0]
            keeper = min(zip(costs, rows, strict=True))[1]
            self.place(keeper, own)
            left += [row for row in rows if row != keeper]
        for depth in reversed(range(levels)):
            prefixes: dict[tuple[int, ...], list[int]] = {}
            for row in sorted(left):
                prefixes.setdefault(self.ids[row][:depth], []).append(row)
            left = [row for prefix, rows in prefixes.items() for row in self.move(prefix, rows)]
        return torch.tensor(self.ids, device=self.device).reshape(-1, levels)

    def move(self, prefix: tuple[int, ...], rows: list[int]) -> list[int]:
        """Move rows to free IDs that begin with their ``prefix``, the nearest pair first; return those left."""
        depth = len(prefix)
        costs = {row: self.cost(row, depth) for row in rows}
        while costs and self.has_room(prefix):
            pairs = [
                (costs[row][code], row, code)
                for row in costs
                for code in range(self.sizes[depth])
                if self.has_room((*prefix, code))
            ]
            _, row, code = min(pairs)
            own = (*prefix, code)
            for level in range(depth + 1, len(self.sizes)):
                below = self.cost(row, level, own)
                own = (*own, min((below[k], k) for k in range(len(below)) if self.has_room((*own, k)))[1])
            self.place(row, own)
            del costs[row]
        return list(costs)

    def cost(self, row: int, level: int, own: tuple[int, ...] | None = None) -> list[float]:
        """What each code of a level costs the residual that a row's codes leave for it."""
        residual = self.z[row]
        for codebook, code in zip(self.codebooks[:level], own or self.ids[row], strict=False):
            residual = residual - codebook[code]
        return pair_costs(residual.double().unsqueeze(0), self.codebooks[level].double(), self.metric, self.eps)[
            0
        ].tolist()

    def has_room(self, prefix: tuple[int, ...]) -> bool:
        return self.count[prefix] < math.prod(self.sizes[len(prefix) :])

    def place(self, row: int, own: tuple[int, ...]) -> None:
        self.ids[row] = own
        for depth in range(len(own) + 1):
            self.count[own[:depth]] += 1
