"""One step of a pre-norm transformer decoder in plain PyTorch, by what the positions before it have left.

x += A_o attention(A_i norm(x); prefix)     x += C_o attention(C_q norm(x); memory)     x += F_o gelu(F_i norm(x))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.decoder.layer import DecoderLayer
from dgi_kernels.transformer import attention, norm


def decoder_step(
    states: Tensor,
    layers: Sequence[DecoderLayer],
    memory: Sequence[Tensor],
    mask: Tensor,
    past: Sequence[Tensor],
    ancestors: Sequence[Tensor],
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As :func:`dgi_kernels.decoder_step`, on arguments that are checked."""
    left = []
    for index, (layer, slots) in enumerate(zip(layers, memory, strict=True)):
        queries, own = F.linear(norm(states, layer.self_norm, eps), *layer.self_in).tensor_split([states.shape[2]], 2)
        prefix = [
            before[index].gather(1, of.unsqueeze(-1).expand(-1, -1, before.shape[-1]))
            for before, of in zip(past, ancestors, strict=True)
        ]
        left.append(own)
        states = states + F.linear(_to_prefix(queries, torch.stack([*prefix, own], 2), heads), *layer.self_out)
        queries = F.linear(norm(states, layer.cross_norm, eps), *layer.query)
        states = states + F.linear(attention(queries, slots, mask, heads), *layer.cross_out)
        hidden = F.gelu(F.linear(norm(states, layer.feed_norm, eps), *layer.feed_in))
        states = states + F.linear(hidden, *layer.feed_out)
    return states, torch.stack(left)


def _to_prefix(queries: Tensor, keys_values: Tensor, heads: int) -> Tensor:
    """Every beam (B, M, D) to the t positions (B, M, t, 2 D) of its prefix."""
    mixed = attention(queries.flatten(0, 1).unsqueeze(1), keys_values.flatten(0, 1), None, heads)
    return mixed.view(queries.shape)
