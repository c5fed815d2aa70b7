"""Generative retrieval with semantic IDs that do not change in training: two-stage (TIGER-like) and DSI-like."""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dgi.config import InputKind, ModelConfig
from dgi.data.batches import Batch
from dgi.model.clustering import cosine_kmeans
from dgi.model.dgi_model import DGIModel, DGIOutput
from dgi.model.encoders import Encoder

CodeKind = Literal["residual", "atomic", "hierarchical"]


class FixedCodesModel(DGIModel):
    """A decoder over given semantic IDs; codebooks are what it learns of the codes, as embeddings and output heads.

    Args:
        config: with the sizes of the given codes.
        codes: (num_items, m) int64.
        encoder: see :class:`dgi.DGIModel`.

    Attributes:
        item_codes: buffer (num_items, m).
    """

    item_codes: Tensor

    def __init__(self, config: ModelConfig, codes: Tensor, encoder: Encoder | None = None) -> None:
        super().__init__(config, encoder)
        if codes.ndim != 2 or codes.shape[1] != self.depth:
            raise ValueError(f"codes must have shape (num_items, {self.depth}); got {tuple(codes.shape)}")
        self.register_buffer("item_codes", codes)

    def initialize(self, z: Tensor, *, generator: torch.Generator | None = None) -> None:
        """The codes are given, and the codebooks are the maker's business."""

    def forward(
        self,
        batch: Batch,
        *,
        tau: float = 1.0,
        seed: int | Tensor | None = None,
        row_offset: int = 0,
        inputs: InputKind = "hard",
        fixed: bool = True,
    ) -> DGIOutput:
        """The decoder reads the codes' vectors, as it does in search; there is no quantizer to train."""
        output, query = self.encode_clicks(batch)
        codes = self.item_codes[output.item_rows]
        vectors = torch.stack([self.quantizer.embed(codes[:, j], j) for j in range(self.depth)], 1)
        hidden = self.decoder(vectors[:, :-1], query.memory, query.mask)
        return output._replace(codes=codes, hidden=hidden)


def fixed_codes_model(
    kind: CodeKind, config: ModelConfig, z: Tensor, generator: torch.Generator, encoder: Encoder | None = None
) -> FixedCodesModel:
    """A model with semantic IDs made of the vectors ``z`` (num_items, d) of the items.

    Args:
        kind: ``residual``: K-means of residuals, as DGI starts from and TIGER has them; ``atomic``: one code per item;
            ``hierarchical``: clusters of clusters, the last code being an item's place in its cluster. The two are
            DSI's naive and structured identifiers.
        config: sizes of ``residual`` codes, and number of levels of ``hierarchical`` ones.
        encoder: taken over by the model.
    """
    if kind == "atomic":
        codes = torch.arange(len(z), device=z.device).unsqueeze(1)
    elif kind == "hierarchical":
        codes = hierarchical_codes(z, len(config.codebook_sizes), generator=generator)
    else:
        codes = torch.zeros(len(z), len(config.codebook_sizes), dtype=torch.int64, device=z.device)
    if kind != "residual":
        config = dataclasses.replace(config, codebook_sizes=tuple(int(size) for size in codes.max(0).values + 1))
    model = FixedCodesModel(config, codes, encoder)
    if kind == "residual":
        model.quantizer.initialize(z, generator=generator)
        model.item_codes.copy_(model.quantizer.assign(z))
    elif kind == "atomic":
        with torch.no_grad():
            model.quantizer.codebooks[0].copy_(z)
    return model


def hierarchical_codes(z: Tensor, levels: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Codes (N, levels) by clusters of clusters: DSI's structured identifiers.

    Every cluster is cut by K-means of the cosine into as many parts as N items need to be told apart with codebooks of
    one size; the last code is the place of an item in its cluster, so that semantic IDs are unique.
    """
    branches = max(2, int(np.ceil(len(z) ** (1 / levels))))
    codes = torch.zeros(len(z), levels, dtype=torch.int64)
    _split(z.detach().float().cpu(), torch.arange(len(z)), 0, branches, codes, generator)
    return codes.to(z.device)


def _split(
    z: Tensor, rows: Tensor, level: int, branches: int, codes: Tensor, generator: torch.Generator | None
) -> None:
    if level == codes.shape[1] - 1:
        codes[rows, level] = torch.arange(len(rows))
        return
    if len(rows) <= branches:
        parts = torch.arange(len(rows))
    else:
        centres = cosine_kmeans(z[rows], branches, iterations=10, generator=generator)
        unit = torch.nn.functional.normalize(centres, dim=1)
        parts = (z[rows] @ unit.T).argmax(1)
    codes[rows, level] = parts
    for part in parts.unique():
        _split(z, rows[parts == part], level + 1, branches, codes, generator)
