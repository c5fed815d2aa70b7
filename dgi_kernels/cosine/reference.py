"""Scaled cosine logits and their cross-entropy in plain PyTorch (paper eq. 10, 13).

    s_k = scale * h^ . w^_k + b_k,    x^ = x / max(||x||_2, eps)
    loss = cross_entropy(s, target),    log normalizer = logsumexp(s)

Inputs arrive checked and in the compute dtype (float32, or float64 for float64 inputs).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.cosine.options import Columns, LossOptions


def cosine_logits(h: Tensor, weight: Tensor, scale: float | Tensor, eps: float) -> Tensor:
    """(..., D), (K, D) -> (..., K)."""
    return scale * (F.normalize(h, dim=-1, eps=eps) @ F.normalize(weight, dim=-1, eps=eps).T)


def cosine_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float | Tensor,
    columns: Columns,
    options: LossOptions,
) -> tuple[Tensor, Tensor | None]:
    """(N, D), (K, D), (N,) int64 -> loss () or (N,), log normalizer (N,) if wanted.

    A target out of range gives NaN for its row.
    """
    logits = cosine_logits(h, weight, scale, options.eps)
    if columns.bias is not None:
        logits = logits + columns.bias
    ignored = target == options.ignore_index
    wild = ~ignored & ((target < 0) | (target >= weight.shape[0]))
    label = target.masked_fill(ignored | wild, -100)
    smoothing = options.label_smoothing
    if columns.same_as is None or weight.shape[0] == 0:
        loss = F.cross_entropy(logits, label, ignore_index=-100, reduction="none", label_smoothing=smoothing)
    else:
        repeated = repeated_columns(label, columns.same_as)
        logits = logits.masked_fill(repeated, -torch.inf)
        loss = F.cross_entropy(logits, label, ignore_index=-100, reduction="none")
        if smoothing:
            even = -logits.log_softmax(-1).masked_fill(repeated, 0).sum(-1) / (~repeated).sum(-1)
            loss = (1 - smoothing) * loss + smoothing * even.masked_fill(label == -100, 0)
    loss = options.reduce(loss.masked_fill(wild, torch.nan), target)
    if not options.return_log_normalizer:
        return loss, None
    return loss, logits.logsumexp(-1).masked_fill(ignored, 0).masked_fill(wild, torch.nan)


def repeated_columns(label: Tensor, same_as: Tensor) -> Tensor:
    """(N, K) which columns have the id of the row's target and are not the target; none where the label is -100."""
    row = label.clamp(min=0)
    repeated = (same_as == same_as[row].unsqueeze(-1)).scatter(-1, row.unsqueeze(-1), False)
    return repeated & (label != -100).unsqueeze(-1)
