"""What a vector costs under a code: the formula of every metric, once for all implementations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.types import Metric

SMALLEST_AMPLITUDE = 1e-5  # what balanced codes add to half the range of the costs


def pair_costs(x: Tensor, codebook: Tensor, metric: Metric, eps: float) -> Tensor:
    """(..., D), (K, D) -> (..., K) what each vector costs under each code; by the cosine less 1."""
    if metric == "euclidean":
        return torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist").square()
    if metric == "cosine":
        x, codebook = F.normalize(x, dim=-1, eps=eps), F.normalize(codebook, dim=-1, eps=eps)
    return -(x @ codebook.T)
