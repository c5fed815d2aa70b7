"""A T5 decoder's step in a search: one position of every beam, the memory's keys and values made once for a request.

transformers' own caches hold a row for each sequence, and so a copy of the memory for each beam. Here the beams of a
request are the rows of one attention to its memory. Only the attentions are done by hand, with T5's own maps and
position biases; norms and feed-forward layers are T5's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi.model.decoders import Prefixes


class T5Cache(NamedTuple):
    """What a search keeps: for each block the memory's keys and values (B, heads, S, width), and its mask (B, S)."""

    memory: list[tuple[Tensor, Tensor]]
    mask: Tensor
    prefixes: Prefixes = Prefixes()


def start(stack: Any, memory: Tensor, mask: Tensor) -> T5Cache:
    """The cache of a search with the decoder ``stack`` over ``memory`` (B, S, d_model)."""
    maps = [block.layer[1].EncDecAttention for block in stack.block]
    return T5Cache([(_heads(of.k(memory), of), _heads(of.v(memory), of)) for of in maps], mask)


def step(stack: Any, cache: T5Cache, states: Tensor, parents: Tensor | None) -> tuple[Tensor, T5Cache]:
    """``states`` (B, M, d_model) through all blocks and the last norm, and the cache for the next step."""
    prefixes = cache.prefixes.continued(parents)
    left, bias = [], None
    for number, (block, (keys, values)) in enumerate(zip(stack.block, cache.memory, strict=True)):
        to_prefix, to_memory = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
        if to_prefix.has_relative_attention_bias:  # in T5 the first block's serves all, in umT5 each has one
            length = len(prefixes.past) + 1
            bias = to_prefix.compute_bias(length, length)[:, :, -1:]
        normed = block.layer[0].layer_norm(states)
        own = torch.cat([to_prefix.k(normed), to_prefix.v(normed)], -1)
        positions = torch.stack([*prefixes.of_layer(number), own], 2).flatten(0, 1)  # (B M, t, 2 inner)
        queries = to_prefix.q(normed).flatten(0, 1).unsqueeze(1)
        before = [_heads(x, to_prefix) for x in positions.chunk(2, -1)]
        mixed = _attention(queries, before[0], before[1], bias, to_prefix)
        states = states + to_prefix.o(mixed.view(*states.shape[:2], -1))
        queries = to_memory.q(block.layer[1].layer_norm(states))
        states = states + to_memory.o(_attention(queries, keys, values, cache.mask[:, None, None], to_memory))
        states = block.layer[2](states)
        left.append(own)
    return stack.final_layer_norm(states), cache._replace(prefixes=prefixes.extended(torch.stack(left)))


def _heads(x: Tensor, attention: Any) -> Tensor:
    """(n, t, inner) -> (n, heads, t, width)."""
    return x.unflatten(-1, (attention.n_heads, attention.key_value_proj_dim)).transpose(1, 2)


def _attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, attention: Any) -> Tensor:
    """(n, a, inner) queries over keys and values in heads -> (n, a, inner); T5 does not scale its scores."""
    mixed = F.scaled_dot_product_attention(_heads(queries, attention), keys, values, attn_mask=mask, scale=1.0)
    return mixed.transpose(1, 2).flatten(2)
