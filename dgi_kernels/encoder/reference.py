"""A pre-norm transformer encoder in plain PyTorch.

x += A_o attention(A_i norm(x))     x += F_o gelu(F_i norm(x))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.encoder.layer import EncoderLayer


def encoder_layers(states: Tensor, layers: Sequence[EncoderLayer], mask: Tensor, heads: int, eps: float) -> Tensor:
    """As :func:`dgi_kernels.encoder_layers`, on arguments that are checked."""
    for layer in layers:
        packed = F.linear(_norm(states, layer.self_norm, eps), *layer.self_in)
        states = states + F.linear(_attention(packed, mask, heads), *layer.self_out)
        hidden = F.gelu(F.linear(_norm(states, layer.feed_norm, eps), *layer.feed_in))
        states = states + F.linear(hidden, *layer.feed_out)
    return states


def _norm(x: Tensor, norm: tuple[Tensor, Tensor], eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *norm, eps)


def _attention(packed: Tensor, mask: Tensor, heads: int) -> Tensor:
    """(B, S, 3 D) queries, keys and values -> (B, S, D); 0 where all is padding, which some of torch's kernels make
    NaN."""
    queries, keys, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in packed.chunk(3, -1))
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None])
    return mixed.transpose(1, 2).flatten(2).masked_fill(~mask.any(1)[:, None, None], 0)
