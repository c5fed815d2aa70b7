"""Encoders: items to vectors, queries with their history to a vector and a memory for the decoder.

:class:`Encoder` is what the model asks of one.  Built in are :class:`SequenceEncoder`, over words or precomputed
vectors, and :class:`dgi.model.t5.T5Encoder`.
"""

from __future__ import annotations

import logging
import re
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgi.config import WORDS_1, WORDS_2, ModelConfig
from dgi.data import Catalog
from dgi.data.batches import Batch
from dgi.model.causal import causal_states, request_ends
from dgi.model.layers import Encoder as TransformerEncoder
from dgi.model.layers import EncoderLayer
from dgi.model.tokenizer import Tokenizer
from dgi.model.words import split_words

_WORD = re.compile(r"\w+")
# The package's own tokenizers: what models of any version were trained with must never change.
SPLITTERS: dict[str, Callable[[str], list[str]]] = {
    WORDS_1: lambda text: _WORD.findall(text.lower()),
    WORDS_2: split_words,
}

logger = logging.getLogger("dgi")


class QueryEncoding(NamedTuple):
    """B encoded queries: ``vector`` (B, dim) z_q, ``memory`` (B, S, width) and ``mask`` (B, S), True where real."""

    vector: Tensor
    memory: Tensor
    mask: Tensor


class Encoder(Protocol):
    """The members that a module needs to serve as ``DGIModel(config, encoder=…)``.

    Attributes:
        width: width of the memory.
        reads_item_vectors: whether ``encode_queries`` reads the vectors of the history's items.

    Features of integers (num_items, T) may be wider for one set of items than for another; what fills them up at the
    end is 0, or the encoder's attribute ``pad``.
    """

    width: int
    reads_item_vectors: bool

    def prepare_items(self, catalog: Catalog) -> Tensor:
        """Features (num_items, ...) of a catalog, made once, on the CPU."""

    def prepare_queries(self, texts: Sequence[str], vectors: np.ndarray | None = None) -> Tensor | None:
        """Features (n, ...) of query texts or their precomputed vectors, on the CPU; None where no row has a query."""

    def encode_items(self, features: Tensor) -> Tensor:
        """Vectors z (N, dim) of items."""

    def encode_queries(self, batch: Batch, item_vectors: Tensor | None) -> QueryEncoding:
        """Encode a batch's queries; ``item_vectors`` (U, dim) of its items, None unless ``reads_item_vectors``."""


def hash_words(texts: Sequence[str], vocabulary_size: int, max_tokens: int, tokenizer: str = WORDS_2) -> Tensor:
    """Words of each text as hash buckets: (len(texts), T) int64, 0 for padding, T the longest text's length.

    CRC-32 of the word in UTF-8 picks one of ``vocabulary_size - 1`` buckets, so there is no vocabulary to store. What a
    word is, ``tokenizer`` says: ``words-2``, of any script (:mod:`dgi.model.words`), or ``words-1``.
    """
    split = SPLITTERS[tokenizer]
    return _padded(
        [
            [
                1 + zlib.crc32(word.encode(errors="surrogatepass")) % (vocabulary_size - 1)
                for word in split(text)[:max_tokens]
            ]
            for text in texts
        ]
    )


def _padded(rows: list[list[int]]) -> Tensor:
    """(len(rows), T) int64, filled up with 0."""
    width = max(1, max(map(len, rows), default=1))
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int64).reshape(-1, width)


def transformer_encoder(config: ModelConfig, layers: int) -> nn.TransformerEncoder:
    """Pre-norm transformer layers of the configured width."""
    layer = EncoderLayer(
        config.dim, config.attention_heads, 4 * config.dim, config.dropout, "gelu", batch_first=True, norm_first=True
    )
    return TransformerEncoder(layer, layers, norm=nn.LayerNorm(config.dim), enable_nested_tensor=False)


class TextTower(nn.Module):
    """(N, T) hashed words to (N, dim): word embeddings, transformer layers, mean over the words."""

    def __init__(self, config: ModelConfig, vocabulary_size: int | None = None) -> None:
        super().__init__()
        size = config.vocabulary_size if vocabulary_size is None else vocabulary_size
        self.words = nn.Embedding(size, config.dim, padding_idx=0)
        self.layers = transformer_encoder(config, config.text_layers) if config.text_layers else None
        self.output = nn.Linear(config.dim, config.dim)
        with torch.no_grad():
            self.words.weight *= config.word_scale
            if self.layers is None:  # beside short words a long bias would be most of every vector
                self.output.bias.mul_(config.word_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.layers is None:
            return self.output(F.embedding_bag(tokens, self.words.weight, mode="mean", padding_idx=0))
        real = tokens > 0
        # A text without words still attends to its padding, so that no softmax runs over nothing.
        states = self.layers(self.words(tokens), src_key_padding_mask=~real & real.any(1, keepdim=True))
        weights = real.to(states.dtype).unsqueeze(-1)
        return self.output((states * weights).sum(1) / weights.sum(1).clamp(min=1))


class VectorTower(nn.Module):
    """(N, vector_dim) precomputed vectors to (N, dim): a linear map plus a correction by two layers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.vector_dim, config.dim)
        self.correction = nn.Sequential(
            nn.Linear(config.vector_dim, 4 * config.dim),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(4 * config.dim, config.dim),
        )

    def start(self, vectors: Tensor) -> None:
        """Project on the first principal axes of ``vectors`` (N, vector_dim), with no correction yet."""
        for parameter in (*self.linear.parameters(), *self.correction[-1].parameters()):
            parameter.zero_()
        axes = principal_axes(vectors, self.linear.out_features)
        self.linear.weight[: axes.shape[1]] = axes.T

    def forward(self, vectors: Tensor) -> Tensor:
        return self.linear(vectors) + self.correction(vectors)


def principal_axes(vectors: Tensor, most: int) -> Tensor:
    """(V, min(most, V)) unit axes, the first ones first, of the second moments of ``vectors`` (N, V).

    Not of the covariance: a cosine has its origin at 0.
    """
    axes = torch.linalg.eigh(vectors.double().T @ vectors.double()).eigenvectors  # rising
    return axes.flip(1)[:, :most].to(vectors.dtype)


@torch.no_grad()
def start_at_principal_axes(model: nn.Module, catalog: Catalog) -> None:
    """Let a new model's items start at the principal axes of the catalog's vectors, where its configuration says so.

    A model of another encoder, and one with ``principal_axes=False``, stays as it is.

    Args:
        model: a :class:`dgi.DGIModel` or :class:`dgi.DualEncoder` that has not been trained.
        catalog: its items with their vectors (N, vector_dim).
    """
    encoder = getattr(model, "encoder", None)
    if isinstance(encoder, SequenceEncoder) and encoder.config.principal_axes:
        encoder.start(catalog)


class SequenceEncoder(nn.Module):
    """Items through a tower; queries through a transformer over [summary, query, history oldest to newest].

    With ``config.causal`` the transformer is causal, over [summary, history], and the newest item's state is the query.

    The tower is :class:`TextTower` or :class:`VectorTower` by ``config.encoder``; it reads the query texts too.

    Args:
        config: the model's configuration.
        tokenizer: the tokenizer that ``config.tokenizer`` names, where it is open already.
    """

    reads_item_vectors = True

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        self.config = config
        if tokenizer is None and config.encoder == "text" and config.tokenizer not in SPLITTERS:
            tokenizer = Tokenizer.open(config.tokenizer)
        self.tokenizer = tokenizer
        self.tower: nn.Module = (
            TextTower(config, None if tokenizer is None else tokenizer.size + 1)
            if config.encoder == "text"
            else VectorTower(config)
        )
        self.width = config.dim
        self.summary = nn.Parameter(torch.randn(config.dim) / config.dim**0.5)
        self.positions = nn.Parameter(0.02 * torch.randn(config.max_history + 2, config.dim))
        self.layers = transformer_encoder(config, config.history_layers)
        self.output = nn.Linear(config.dim, config.dim)
        self.drop = config.dropout if config.causal else 0.0
        self.corrects = config.starts_at_vectors
        if self.corrects:  # a request's vector is the mean of what it reads, until there is something to correct
            for parameter in self.output.parameters():
                nn.init.zeros_(parameter)

    def start(self, catalog: Catalog) -> None:
        """Start at the principal axes of the catalog's vectors, if the tower reads vectors."""
        if isinstance(self.tower, VectorTower):
            self.tower.start(self.prepare_items(catalog))

    def prepare_items(self, catalog: Catalog) -> Tensor:
        if self.config.encoder == "text":
            tokens = self._tokens(catalog.texts)
            empty = (tokens == 0).all(1).nonzero().flatten().tolist()
            if empty:
                logger.warning(
                    "%d of %d items have a text without a word that the model reads, and so the same "
                    "vector; the first is item %r with %r",
                    len(empty),
                    len(catalog),
                    catalog.ids[empty[0]],
                    catalog.texts[empty[0]],
                )
            return tokens
        if catalog.vectors is None:
            raise ValueError('the catalog has no vectors, which encoder "vectors" reads; give them beside the items')
        return _checked_vectors("item vectors", catalog.vectors, self.config.vector_dim)

    def prepare_queries(self, texts: Sequence[str], vectors: np.ndarray | None = None) -> Tensor | None:
        if self.config.encoder == "text":
            return self._tokens(texts) if any(texts) else None
        return None if vectors is None else _checked_vectors("query vectors", vectors, self.config.vector_dim)

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), T) int64 rows of the tower's embedding, 0 for padding."""
        config = self.config
        if self.tokenizer is None:
            return hash_words(texts, config.vocabulary_size, config.max_tokens, config.tokenizer)
        return _padded([[token + 1 for token in row] for row in self.tokenizer.rows(texts, config.max_tokens)])

    def encode_items(self, features: Tensor) -> Tensor:
        return self.tower(features)

    def encode_queries(self, batch: Batch, item_vectors: Tensor | None) -> QueryEncoding:
        if item_vectors is None:
            raise ValueError("item_vectors must be the vectors of the batch's items; got None")
        if self.config.causal:
            return self._encode_causally(batch, item_vectors)
        size, history = batch.histories.shape
        known = batch.histories >= 0
        items = (
            item_vectors[batch.histories.clamp(min=0)]
            if len(item_vectors)
            else item_vectors.new_zeros(size, history, self.width)
        )
        # Positions count from the newest item back, whatever the length of the history.
        newest_first = torch.arange(history, 0, -1, device=known.device)
        states = [self.summary.expand(size, 1, -1) + self.positions[0], items + self.positions[1 + newest_first]]
        mask = [known.new_ones(size, 1), known]
        queries = None
        if batch.query_features is not None:
            queries = self.tower(batch.query_features).unsqueeze(1)
            states.insert(1, queries + self.positions[1])
            mask.insert(1, (batch.query_features != 0).any(1, keepdim=True))
        real = torch.cat(mask, 1)
        memory = self.layers(torch.cat(states, 1), src_key_padding_mask=~real)
        vector = self.output(memory[:, 0])
        if self.corrects:
            read = torch.cat([items] if queries is None else [queries, items], 1) * real[:, 1:, None]
            vector = vector + read.sum(1) / real[:, 1:].sum(1, keepdim=True).clamp(min=1)
        return QueryEncoding(vector, memory, real)

    def _encode_causally(self, batch: Batch, item_vectors: Tensor) -> QueryEncoding:
        if batch.query_features is not None:
            raise ValueError("the model is causal and reads histories alone; requests must have no queries")
        if batch.histories.shape[1] > self.config.max_history:
            raise ValueError(
                f"histories must have at most max_history = {self.config.max_history} items; "
                f"got {batch.histories.shape[1]}"
            )
        states = causal_states(batch.histories, item_vectors, self.summary, self.positions, self.layers, self.drop)
        row, place = request_ends(batch)
        seen = torch.arange(states.shape[1], device=place.device) <= place.unsqueeze(1)
        return QueryEncoding(self.output(states[row, place]), states[row], seen)


def _checked_vectors(name: str, vectors: np.ndarray, width: int) -> Tensor:
    if vectors.ndim != 2 or vectors.shape[1] != width:
        raise ValueError(f"{name} must have shape (N, {width}), as the model's vector_dim; got {vectors.shape}")
    return torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32))
