"""Log-sum-exp in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def log_normalizer(logits: Tensor) -> Tensor:
    """``logits`` (..., V) in the compute dtype, float32 or float64 -> (...)."""
    finite = logits.nan_to_num(nan=-torch.inf, posinf=torch.finfo(logits.dtype).max, neginf=-torch.inf)
    if finite.shape[-1] == 0:
        return finite.sum(-1) - torch.inf
    return finite.logsumexp(-1)
