"""Generative retrieval with semantic IDs that do not change in training: two-stage (TIGER-like) and DSI-like."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from dgi.config import InputKind, ModelConfig
from dgi.data import Catalog
from dgi.data.batches import Batch
from dgi.model.clustering import cosine_kmeans
from dgi.model.dgi_model import DGIModel, DGIOutput
from dgi.model.encoders import Encoder, SequenceEncoder
from dgi_kernels import residual_kmeans, unique_codes

CodeKind = Literal["residual", "atomic", "hierarchical", "given"]


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
        hidden = self.hidden_states(vectors[:, :-1], query)
        return output._replace(codes=codes, hidden=hidden)


class CodeEncoder(SequenceEncoder):
    """The built-in transformer over the history, an item being the sum of learned vectors of its codes, as TIGER reads.

    Args:
        config: the model's configuration, with the sizes of the codes.
        codes: (num_items, m) int64.
    """

    def __init__(self, config: ModelConfig, codes: Tensor) -> None:
        super().__init__(dataclasses.replace(config, encoder="text", text_layers=0))
        self.codes = codes
        self.tower = _CodeTower(config)

    def prepare_items(self, catalog: Catalog) -> Tensor:
        if len(catalog) != len(self.codes):
            raise ValueError(f"catalog must have the {len(self.codes)} items of the codes; got {len(catalog)}")
        return self.codes

    def prepare_queries(self, texts: Sequence[str], vectors: np.ndarray | None = None) -> Tensor | None:
        if any(texts):
            raise ValueError("a model of semantic IDs reads histories; requests must have no query texts")
        return None


class _CodeTower(nn.Module):
    """Codes (N, m) to (N, d)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        tables = [nn.Embedding(size, config.dim) for size in config.codebook_sizes]
        for table in tables:
            nn.init.normal_(table.weight, std=0.02)
        self.levels = nn.ModuleList(tables)

    def forward(self, codes: Tensor) -> Tensor:
        return torch.stack([level(codes[:, place]) for place, level in enumerate(self.levels)]).sum(0)


def given_codes_model(config: ModelConfig, vectors: Tensor, seed: int) -> FixedCodesModel:
    """TIGER's second stage: semantic IDs by residual K-means of given ``vectors`` (N, D), no two alike, in and out.

    The history's items are read by their codes (:class:`CodeEncoder`), and nothing but codes is learnt.
    """
    codebooks, codes = residual_kmeans(vectors.float(), config.codebook_sizes, metric="euclidean", seed=seed)
    codes = unique_codes(codes, vectors.float(), codebooks, metric="euclidean")
    return FixedCodesModel(config, codes, CodeEncoder(config, codes))


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
        model.item_codes.copy_(distinct_codes(model, z))
    elif kind == "atomic":
        with torch.no_grad():
            model.quantizer.codebooks[0].copy_(z)
    return model


def distinct_codes(model: DGIModel, z: Tensor) -> Tensor:
    """The quantizer's codes (N, m) of ``z``; where there are as many semantic IDs as items, no two alike."""
    codes, quantizer = model.quantizer.assign(z), model.quantizer
    codebooks = [codebook.detach().cpu() for codebook in quantizer.codebooks]
    if math.prod(map(len, codebooks)) < len(z):
        return codes
    return unique_codes(codes.cpu(), z.float().cpu(), codebooks, metric=quantizer.metric, eps=quantizer.eps).to(
        codes.device
    )


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
