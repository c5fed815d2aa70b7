"""A Hugging Face T5-family model as encoder and decoder: T5, Flan-T5, ByT5, mT5, umT5.

An item's vector is ``z = W · mean_t T5Encoder(text)_t``, a query's the same over the tokens of the query followed by
those of the titles in its history (mean pooling and a linear map, as Sentence-T5, arXiv 2108.08877).  The query's
encoder states are the memory that T5's decoder attends to while it reads BOS, z̃_1, …

``config.pretrained`` is the name of a model on the Hugging Face hub or a folder as ``save_pretrained`` writes it.  A
folder that holds a configuration and a tokenizer but no weights gives a model with random weights: so a model is made
from a configuration, and so a checkpoint is rebuilt before its own weights are loaded.  Weights are read from
safetensors only, never from pickles.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from dgi.config import ModelConfig
from dgi.data import Catalog
from dgi.data.batches import Batch
from dgi.model import t5_steps
from dgi.model.encoders import QueryEncoding
from dgi_kernels.files import atomic_write

try:
    import transformers
except ImportError as error:
    raise ModuleNotFoundError(
        f"encoder \"t5\" needs the package transformers: pip install 'dgi-kernels[hf]' ({error})"
    ) from error

FAMILY = ("t5", "mt5", "umt5")
MAX_SEQUENCE = 512  # the length that T5 was pretrained at

_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".h5", ".msgpack"}

logger = logging.getLogger(__name__)


class T5Encoder(nn.Module):
    """Items and queries through one T5 encoder.

    Features are token ids (N, T) int64, padded on the right with the tokenizer's pad token.  A query reads its own
    tokens, then its history's, oldest title first; beyond :data:`MAX_SEQUENCE` tokens the oldest are dropped.

    Args:
        config: the model's configuration; ``max_tokens`` bounds one text, its end token included.
        transformer: a T5-family model; its encoder is taken over, not copied.
        tokenizer: the tokenizer that goes with it.

    Attributes:
        width: d_model, the width of the memory.

    Raises:
        ValueError: ``transformer`` is of another family, or ``tokenizer`` has no pad token or too many tokens for it.
    """

    reads_item_vectors = False

    def __init__(
        self,
        config: ModelConfig,
        transformer: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
    ) -> None:
        super().__init__()
        backbone: Any = transformer.config
        _check_family("transformer", backbone)
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer must have a pad token; it has none")
        if len(tokenizer) > backbone.vocab_size:
            raise ValueError(
                f"tokenizer must have at most the {backbone.vocab_size} tokens that the model embeds; "
                f"got {len(tokenizer)}"
            )
        self.config = config
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.pad: int = tokenizer.pad_token_id
        self.width: int = backbone.d_model
        stack: Any = transformer.encoder
        self.stack: Any = stack.train()  # from_pretrained leaves it in evaluation mode, as no new module is
        self.output = nn.Linear(self.width, config.dim)

    @classmethod
    def from_pretrained(cls, config: ModelConfig) -> T5Encoder:
        """Load encoder and tokenizer of ``config.pretrained``; ValueError where that is not possible."""
        transformer = _load(transformers.AutoModelForTextEncoding, config.pretrained)
        with _loading(config.pretrained):
            tokenizer = transformers.AutoTokenizer.from_pretrained(config.pretrained)
        return cls(config, transformer, tokenizer)

    def save_backbone(self, folder: str | os.PathLike[str]) -> None:
        """Write T5's configuration and the tokenizer, not the weights, into ``folder``.

        With the folder as ``config.pretrained``, :meth:`from_pretrained` and :meth:`T5Decoder.from_pretrained` rebuild
        the modules, without a network, ready for the weights of a checkpoint.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            self.backbone.save_pretrained(scratch)
            self.tokenizer.save_pretrained(scratch)
            for path in Path(scratch).iterdir():
                with atomic_write(folder / path.name) as file:
                    file.write(path.read_bytes())

    def prepare_items(self, catalog: Catalog) -> Tensor:
        return self._tokenize(catalog.texts)

    def prepare_queries(self, texts: Sequence[str], vectors: np.ndarray | None = None) -> Tensor | None:
        return self._tokenize(texts) if any(texts) else None

    def encode_items(self, features: Tensor) -> Tensor:
        return self._encode(features).vector

    def encode_queries(self, batch: Batch, item_vectors: Tensor | None) -> QueryEncoding:
        """Read the query's text and its history's texts; ``item_vectors`` are not used."""
        # A row of padding behind the items' is what -1, "no item", picks.
        titles = nn.functional.pad(batch.item_features, (0, 0, 0, 1), value=self.pad)
        history = titles[batch.histories].flatten(1)
        if batch.query_features is None:
            return self._encode(_newest(history, self.pad, MAX_SEQUENCE))
        room = MAX_SEQUENCE - (batch.query_features != self.pad).sum(1, keepdim=True)
        return self._encode(torch.cat([batch.query_features, _newest(history, self.pad, room)], 1))

    def _tokenize(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), T) token ids; a blank text has none, so that it reads as no text at all."""
        filled = [text for text in texts if text.strip()]
        ids = iter(
            self.tokenizer(filled, truncation=True, max_length=self.config.max_tokens)["input_ids"] if filled else []
        )
        rows = [next(ids) if text.strip() else [] for text in texts]
        width = max(1, max(map(len, rows), default=1))
        padded = [row + [self.pad] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).reshape(-1, width)

    def _encode(self, tokens: Tensor) -> QueryEncoding:
        tokens, real = _pack(tokens, tokens != self.pad)
        states = _run(self.stack, self.stack.embed_tokens(tokens), attention_mask=real)
        weights = real.to(states.dtype).unsqueeze(-1)
        return QueryEncoding(self.output((states * weights).sum(1) / weights.sum(1)), states, real)


class T5Decoder(nn.Module):
    """T5's decoder over BOS, z̃_1, …, with cross-attention to the memory of :class:`T5Encoder`.

    BOS is learnable and starts as the embedding of the pad token, which T5's decoder starts with.  The decoder reads
    vectors, so its word embeddings are dropped.

    Args:
        config: the model's configuration.
        transformer: a T5-family model with a decoder, which is taken over, not copied.

    Raises:
        ValueError: ``transformer`` is of another family or has no decoder.
    """

    def __init__(self, config: ModelConfig, transformer: transformers.PreTrainedModel) -> None:
        super().__init__()
        backbone: Any = transformer.config
        _check_family("transformer", backbone)
        if not hasattr(transformer, "decoder"):
            raise ValueError(f"transformer must have a decoder; got {type(transformer).__name__}")
        words = cast(nn.Embedding, transformer.get_input_embeddings()).weight
        self.bos = nn.Parameter(words[backbone.pad_token_id].detach().clone())
        same = config.dim == backbone.d_model
        self.input: nn.Module = nn.Identity() if same else nn.Linear(config.dim, backbone.d_model)
        stack: Any = transformer.decoder
        stack.embed_tokens = None
        self.stack: Any = stack.train()
        self.floats_per_position = 2 * backbone.num_heads * backbone.d_kv * len(stack.block)
        self.output = nn.Linear(backbone.d_model, config.dim)

    @classmethod
    def from_pretrained(cls, config: ModelConfig) -> T5Decoder:
        """Load the decoder of ``config.pretrained``; ValueError where that is not possible."""
        return cls(config, _load(transformers.AutoModel, config.pretrained))

    def forward(self, inputs: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        states = torch.cat([self.bos.expand(len(inputs), 1, -1), self.input(inputs)], 1)
        return self.output(
            _run(self.stack, states, encoder_hidden_states=memory, encoder_attention_mask=mask, use_cache=False)
        )

    def start_search(self, memory: Tensor, mask: Tensor) -> t5_steps.T5Cache:
        return t5_steps.start(self.stack, memory, mask)

    def search_step(
        self, cache: t5_steps.T5Cache, inputs: Tensor | None, parents: Tensor | None
    ) -> tuple[Tensor, t5_steps.T5Cache]:
        states = self.bos.expand(len(cache.mask), 1, -1) if inputs is None else self.input(inputs)
        states, cache = t5_steps.step(self.stack, cache, states, parents)
        return self.output(states), cache


def _run(stack: Any, embedded: Tensor, **context: Any) -> Tensor:
    """States (B, T, d_model) of ``embedded``, as many; transformers cannot reshape a batch of none."""
    return stack(inputs_embeds=embedded, **context).last_hidden_state if len(embedded) else embedded


def _pack(tokens: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's real tokens to its left end, in their order, and cut what no row needs or T5 cannot read.

    A row without any keeps one pad token, so that no attention and no mean runs over nothing.
    """
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
    longest = int(real.sum(1).max()) if len(real) else 0
    order = order[:, : min(max(longest, 1), MAX_SEQUENCE)]
    real = real.gather(1, order)
    first = torch.arange(real.shape[1], device=real.device) == 0
    return tokens.gather(1, order), real | (first & ~real.any(1, keepdim=True))


def _newest(history: Tensor, pad: int, room: int | Tensor) -> Tensor:
    """``history`` (B, T) with all but the last ``room`` real tokens of each row made padding."""
    from_newest = (history != pad).flip(1).cumsum(1).flip(1)
    return torch.where(from_newest <= room, history, pad)


def _check_family(name: str, backbone: Any) -> None:
    if backbone.model_type not in FAMILY:
        raise ValueError(f"{name} must be a T5-family model ({', '.join(FAMILY)}); got a {backbone.model_type!r} model")


def _load(auto: Any, pretrained: str) -> transformers.PreTrainedModel:
    """A model of the class that ``auto`` picks, in float32: pretrained, or random where the folder holds no weights."""
    with _loading(pretrained):
        backbone = transformers.AutoConfig.from_pretrained(pretrained)
    _check_family("pretrained", backbone)
    folder = Path(pretrained)
    if folder.is_dir() and not any(path.suffix in _WEIGHT_SUFFIXES for path in folder.iterdir()):
        logger.info("%s holds no weights: the model starts from random ones", folder)
        return auto.from_config(backbone, dtype=torch.float32)
    with _loading(pretrained):
        return auto.from_pretrained(pretrained, dtype=torch.float32, use_safetensors=True)


@contextlib.contextmanager
def _loading(pretrained: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers, tokenizers and safetensors raise all kinds, even bare Exceptions
        raise ValueError(
            f"pretrained must be a T5-family model that can be loaded; {pretrained!r} cannot: {error}\n"
            "Give a folder with config.json, the tokenizer's files and, unless the model is to start from random "
            "weights, model.safetensors; or the name of a model on the Hugging Face hub, downloaded before "
            f"(hf download {pretrained}) where there is no network."
        ) from error
