"""A pre-norm transformer encoder in plain PyTorch.

x += A_o attention(A_i norm(x))     x += F_o gelu(F_i norm(x))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.encoder.layer import EncoderLayer
from dgi_kernels.transformer import attention, norm


def encoder_layers(states: Tensor, layers: Sequence[EncoderLayer], mask: Tensor, heads: int, eps: float) -> Tensor:
    """As :func:`dgi_kernels.encoder_layers`, on arguments that are checked."""
    for layer in layers:
        packed = F.linear(norm(states, layer.self_norm, eps), *layer.self_in)
        queries, keys_values = packed.tensor_split([states.shape[2]], 2)
        states = states + F.linear(attention(queries, keys_values, mask, heads), *layer.self_out)
        hidden = F.gelu(F.linear(norm(states, layer.feed_norm, eps), *layer.feed_in))
        states = states + F.linear(hidden, *layer.feed_out)
    return states
