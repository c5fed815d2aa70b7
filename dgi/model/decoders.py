"""Decoders: hidden state h_j from the query and the codes before j.

A decoder is a module with ``forward(inputs, memory, mask)``: ``inputs`` (B, t, dim) are the vectors of the first t
codes (z̃_1 … z̃_t in training, ``e_{j, c_j}`` in search), the result (B, t + 1, dim) is h_1 … h_{t+1}.  One that is a
:class:`CachedDecoder` too is searched without reading prefixes and memory again for every beam.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from dgi.config import ModelConfig
from dgi.model import layers
from dgi_kernels import DecoderLayer, decoder_step


@runtime_checkable
class CachedDecoder(Protocol):
    """What a decoder may have beside ``forward``, so that a search takes one position at a time.

    The hidden states must be those of ``forward``.  A search in training mode, and a decoder of a class that overrides
    ``forward`` alone, go through ``forward``.

    Attributes:
        floats_per_position: how many numbers a step leaves for each beam; as many requests are searched at once as
            memory allows.
    """

    floats_per_position: int

    def start_search(self, memory: Tensor, mask: Tensor) -> Any:
        """What a search keeps of B requests' memory (B, S, width) and its mask (B, S), True where real."""

    def search_step(self, cache: Any, inputs: Tensor | None, parents: Tensor | None) -> tuple[Tensor, Any]:
        """Read one position of every beam.

        Args:
            cache: what :meth:`start_search` or the step before returned.
            inputs: (B, M, dim) the vectors of the codes that the beams have just got; None in the first step.
            parents: (B, M) int64 the beam of the step before that each one continues, 0 where it is dead; None in the
                first step.

        Returns:
            Hidden states (B, M, dim), with M = 1 in the first step, and the cache for the next step.
        """


def caches(decoder: nn.Module) -> bool:
    """Whether a search may take a decoder's steps with a cache, in place of its ``forward``."""
    if decoder.training or not isinstance(decoder, CachedDecoder):
        return False
    # A forward that is overridden without the step, or hooks on it, would not be seen.
    newest = next(kind for kind in type(decoder).__mro__ if {"forward", "search_step"} & vars(kind).keys())
    hooked = decoder._forward_hooks or decoder._forward_pre_hooks
    return "search_step" in vars(newest) and "forward" not in vars(decoder) and not hooked


class Prefixes(NamedTuple):
    """What every position so far has left of its beams, and where each beam of today finds what its prefix left.

    Attributes:
        past: for each position (layers, B, M_p, width), M_p its number of beams.
        ancestors: for each position (B, M) int64, the beam of that position that each beam of today descends from.
    """

    past: tuple[Tensor, ...] = ()
    ancestors: tuple[Tensor, ...] = ()

    def continued(self, parents: Tensor | None) -> Prefixes:
        """Those of beams that continue ``parents`` (B, M); None in the first step, where there is nothing before."""
        if parents is None:
            return self
        return Prefixes(self.past, (*(of.gather(1, parents) for of in self.ancestors), parents))

    def extended(self, left: Tensor) -> Prefixes:
        """With what today's position leaves: (layers, B, M, width)."""
        return Prefixes((*self.past, left), self.ancestors)

    def of_layer(self, layer: int) -> list[Tensor]:
        """For each position (B, M, width): what one layer left of each beam's prefix."""
        return [
            left[layer].gather(1, of.unsqueeze(-1).expand(-1, -1, left.shape[-1]))
            for left, of in zip(self.past, self.ancestors, strict=True)
        ]


class DecoderCache(NamedTuple):
    """What a search with :class:`TransformerDecoder` keeps; see :func:`dgi_kernels.decoder_step`."""

    layers: list[DecoderLayer]
    memory: list[Tensor]
    mask: Tensor
    prefixes: Prefixes = Prefixes()


class TransformerDecoder(nn.Module):
    """Pre-norm transformer decoder over BOS, z̃_1, …, with cross-attention to the query's memory."""

    def __init__(self, config: ModelConfig, memory_width: int) -> None:
        super().__init__()
        self.heads = config.attention_heads
        self.floats_per_position = 2 * config.dim * config.decoder_layers
        self.bos = nn.Parameter(torch.randn(config.dim) / config.dim**0.5)
        self.positions = nn.Parameter(0.02 * torch.randn(len(config.codebook_sizes), config.dim))
        # Residual vectors shrink from level to level; the norm gives every level the same say.
        self.input = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, config.dim))
        self.memory = nn.Identity() if memory_width == config.dim else nn.Linear(memory_width, config.dim)
        layer = layers.DecoderLayer(
            config.dim,
            config.attention_heads,
            4 * config.dim,
            config.dropout,
            "gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerDecoder(layer, config.decoder_layers, norm=nn.LayerNorm(config.dim))
        self.output = nn.Linear(config.dim, config.dim)

    def forward(self, inputs: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        bos = self.bos.to(inputs.dtype).expand(len(inputs), 1, -1)
        states = torch.cat([bos, self.input(inputs)], 1) + self.positions[: inputs.shape[1] + 1]
        future = torch.ones(states.shape[1], states.shape[1], dtype=torch.bool, device=states.device).triu(1)
        # Told that the mask is causal, torch need not compare it, which would wait for the device.
        states = self.layers(
            states, self.memory(memory), tgt_mask=future, tgt_is_causal=True, memory_key_padding_mask=~mask
        )
        return self.output(states)

    def start_search(self, memory: Tensor, mask: Tensor) -> DecoderCache:
        memory, width = self.memory(memory), self.bos.shape[0]
        keys_values = [
            nn.functional.linear(memory, part.in_proj_weight[width:], part.in_proj_bias[width:])
            for part in (layer.multihead_attn for layer in self.layers.layers)
        ]
        return DecoderCache([_parameters(layer, width) for layer in self.layers.layers], keys_values, mask)

    def search_step(
        self, cache: DecoderCache, inputs: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, DecoderCache]:
        prefixes = cache.prefixes.continued(parents)
        if inputs is None:
            states = (self.bos + self.positions[0]).expand(len(cache.mask), 1, -1)
        else:
            states = self.input(inputs) + self.positions[len(prefixes.past)]
        states, left = decoder_step(states, cache.layers, cache.memory, cache.mask, *prefixes, heads=self.heads)
        hidden = self.output(cast(nn.LayerNorm, self.layers.norm)(states))
        return hidden, cache._replace(prefixes=prefixes.extended(left))


def _parameters(layer: nn.TransformerDecoderLayer, width: int) -> DecoderLayer:
    prefix, memory = layer.self_attn, layer.multihead_attn

    return DecoderLayer(
        layers.pair(layer.norm1),
        (prefix.in_proj_weight, prefix.in_proj_bias),
        layers.pair(prefix.out_proj),
        layers.pair(layer.norm2),
        (memory.in_proj_weight[:width], memory.in_proj_bias[:width]),
        layers.pair(memory.out_proj),
        layers.pair(layer.norm3),
        layers.pair(layer.linear1),
        layers.pair(layer.linear2),
    )
