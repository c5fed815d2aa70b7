"""Scaled cosine logits and their cross-entropy in plain PyTorch (paper eq. 10, 13).

    s_k = scale * h^ . w^_k,    x^ = x / max(||x||_2, eps)
    loss = cross_entropy(s, target)

Inputs arrive checked and in the compute dtype (float32, or float64 for float64 inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cosine_logits(h: Tensor, weight: Tensor, scale: float | Tensor, eps: float) -> Tensor:
    """(..., D), (K, D) -> (..., K)."""
    return scale * (F.normalize(h, dim=-1, eps=eps) @ F.normalize(weight, dim=-1, eps=eps).T)


def cosine_cross_entropy(h: Tensor, weight: Tensor, target: Tensor, scale: float | Tensor, ignore_index: int,
                         reduction: str, label_smoothing: float, eps: float) -> Tensor:
    """(N, D), (K, D), (N,) int64 -> () or (N,); a target out of range gives NaN for its row."""
    logits = cosine_logits(h, weight, scale, eps)
    ignored = target == ignore_index
    wild = ~ignored & ((target < 0) | (target >= weight.shape[0]))
    loss = F.cross_entropy(logits, target.masked_fill(ignored | wild, -100), ignore_index=-100, reduction="none",
                           label_smoothing=label_smoothing)
    loss = loss.masked_fill(wild, torch.nan)
    if reduction == "mean":
        return loss.sum() / (~ignored).sum()
    return loss.sum() if reduction == "sum" else loss
