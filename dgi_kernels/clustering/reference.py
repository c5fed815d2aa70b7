"""Clustering in plain PyTorch.

    assign   code_n = argmin_k cost(x_n, c_k)         cost = ||x - c||^2,  1 - cos(x, c),  -x . c
    update   c_k = sum_{n: code_n = k} w_n x_n / sum_{n: code_n = k} w_n

Points arrive checked, in any floating-point dtype, weights in float64 or None, centroids in the compute dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.clustering.options import KMeansOptions


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


def kmeans_seeds(x: Tensor, weights: Tensor | None, uniform: Tensor) -> Tensor:
    """K-means++: (N, D), (N,), (K,) in (0, 1) -> (K,) rows, -1 once no point is away from those drawn."""
    x = x.double()
    weights = x.new_ones(len(x)) if weights is None else weights
    cost, rows = weights, []
    for i, u in enumerate(uniform):
        sums = cost.cumsum(0)
        if not sums[-1] > 0:
            break
        row = torch.searchsorted(sums, u * sums[-1], right=True).clamp(max=int(cost.nonzero()[-1]))
        rows.append(row)
        distance = weights * (x - x[row]).square().sum(dim=1)
        cost = distance if i == 0 else torch.minimum(cost, distance)
    found = torch.stack(rows) if rows else x.new_empty(0, dtype=torch.int64)
    return F.pad(found, (0, len(uniform) - len(found)), value=-1)
