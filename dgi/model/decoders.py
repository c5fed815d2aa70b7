"""The built-in decoder: hidden state h_j from the query and the codes before j.

A decoder is a module with ``forward(inputs, memory, mask)``: ``inputs`` (B, t, dim) are the vectors of the first t
codes (z̃_1 … z̃_t in training, ``e_{j, c_j}`` in search), the result (B, t + 1, dim) is h_1 … h_{t+1}.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dgi.config import ModelConfig


class TransformerDecoder(nn.Module):
    """Pre-norm transformer decoder over BOS, z̃_1, …, with cross-attention to the query's memory."""

    def __init__(self, config: ModelConfig, memory_width: int) -> None:
        super().__init__()
        self.bos = nn.Parameter(torch.randn(config.dim) / config.dim**0.5)
        self.positions = nn.Parameter(0.02 * torch.randn(len(config.codebook_sizes), config.dim))
        # Residual vectors shrink from level to level; the norm gives every level the same say.
        self.input = nn.Sequential(nn.LayerNorm(config.dim), nn.Linear(config.dim, config.dim))
        self.memory = nn.Identity() if memory_width == config.dim else nn.Linear(memory_width, config.dim)
        layer = nn.TransformerDecoderLayer(
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
        states = self.layers(states, self.memory(memory), tgt_mask=future, memory_key_padding_mask=~mask)
        return self.output(states)
