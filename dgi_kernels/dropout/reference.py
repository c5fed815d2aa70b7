"""Dropout and attention with dropout in plain PyTorch; the mask is a function of seed and place."""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels.noise import STREAM_ATTENTION, STREAM_DROPOUT, WORD, random_words


def kept(rows: int, columns: int, p: float, seed: Tensor, stream: int) -> Tensor:
    """(rows, columns) bool: element (n, k) is kept where its uniform word is at least p 2**32."""
    words = random_words(seed, 0, rows, columns, stream, 0)
    return words >= min(round(p * 2**32), WORD)


def dropout(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    """``x`` (N, K) -> residual + x / (1 - p) where kept, else residual."""
    rows, columns = x.shape
    dropped = torch.where(kept(rows, columns, p, seed, STREAM_DROPOUT), x * (1 / (1 - p)), 0)
    return dropped if residual is None else residual + dropped


def attention(
    queries: Tensor, keys_values: Tensor | None, mask: Tensor | None, heads: int, causal: bool, p: float, seed: Tensor
) -> Tensor:
    """As :func:`dgi_kernels.attention`, on arguments that are checked."""
    q, k, v = queries.chunk(3, -1) if keys_values is None else (queries, *keys_values.chunk(2, -1))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, heads, T, S)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril()
    if mask is not None:
        seen = seen & mask[:, None, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)  # a row that sees nothing is 0
    keep = kept(weights.shape[:-1].numel(), weights.shape[-1], p, seed, STREAM_ATTENTION).view(weights.shape)
    mixed = torch.where(keep, weights * (1 / (1 - p)), 0) @ v
    return mixed.transpose(1, 2).flatten(2)
