"""One step of a pre-norm transformer decoder in plain PyTorch, by what the positions before it have left.

x += A_o attention(A_i norm(x); prefix)     x += C_o attention(C_q norm(x); memory)     x += F_o gelu(F_i norm(x))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.decoder.layer import DecoderLayer


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
        queries, own = F.linear(_norm(states, layer.self_norm, eps), *layer.self_in).tensor_split([states.shape[2]], 2)
        prefix = [
            before[index].gather(1, of.unsqueeze(-1).expand(-1, -1, before.shape[-1]))
            for before, of in zip(past, ancestors, strict=True)
        ]
        left.append(own)
        states = states + F.linear(_to_prefix(queries, torch.stack([*prefix, own], 2), heads), *layer.self_out)
        queries = F.linear(_norm(states, layer.cross_norm, eps), *layer.query)
        states = states + F.linear(_to_memory(queries, slots, mask, heads), *layer.cross_out)
        hidden = F.gelu(F.linear(_norm(states, layer.feed_norm, eps), *layer.feed_in))
        states = states + F.linear(hidden, *layer.feed_out)
    return states, torch.stack(left)


def _norm(x: Tensor, norm: tuple[Tensor, Tensor], eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *norm, eps)


def _to_prefix(queries: Tensor, keys_values: Tensor, heads: int) -> Tensor:
    """Every beam (B, M, D) to the t positions (B, M, t, 2 D) of its prefix."""
    keys, values = keys_values.flatten(0, 1).chunk(2, -1)
    mixed = _attention(queries.flatten(0, 1).unsqueeze(1), keys, values, None, heads)
    return mixed.view(queries.shape)


def _to_memory(queries: Tensor, keys_values: Tensor, mask: Tensor, heads: int) -> Tensor:
    """All beams (B, M, D) of a request to its memory (B, S, 2 D); 0 where that is nothing but padding, which some of
    torch's kernels make NaN."""
    keys, values = keys_values.chunk(2, -1)
    mixed = _attention(queries, keys, values, mask[:, None, None], heads)
    return mixed.masked_fill(~mask.any(1)[:, None, None], 0)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """(n, a, D) queries, (n, b, D) keys and values -> (n, a, D)."""
    queries, keys, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)
