"""Gumbel-Softmax in plain PyTorch (paper eq. 6): softmax((logits + g) / tau).

Inputs arrive checked and in the compute dtype (float32, or float64 for float64 inputs); the noise ``g`` is an input.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gumbel_softmax(logits: Tensor, noise: Tensor, tau: float | Tensor, hard: bool) -> Tensor:
    """(..., K), (..., K) -> (..., K)."""
    noisy = logits + noise
    p = (noisy / tau).softmax(dim=-1)
    if not hard:
        return p
    one_hot = F.one_hot(noisy.argmax(dim=-1), logits.shape[-1]).to(p.dtype)
    return one_hot + (p - p.detach())
