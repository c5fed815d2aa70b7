"""The language model's side of a search: logits for the beams of each step, from inputs that ``generate`` has prepared.

Requests are read once each, not once per beam.  After a step only what beams do not share is reordered in the cache:
never the prompt, never cross-attention.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

# The names under which models keep what they have read; the first that is there is what generate reorders too.
# From transformers 5.24 on most call it "cache".
CACHE_NAMES = ("cache", "past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_PREPARATION = frozenset(inspect.signature(transformers.GenerationMixin.prepare_inputs_for_generation).parameters)


class ModelSteps:
    """The steps of a model, as ``generate`` takes them.

    Args:
        model: the model inside all wrappers, as ``generate`` hands it over.
        prompt: (B, T) int64 what the decoder reads first: the prompts, or the start tokens of an encoder-decoder.
        model_kwargs: the model's inputs for B rows, as ``generate`` hands them over.
    """

    def __init__(self, model: Any, prompt: Tensor, model_kwargs: dict[str, Any]) -> None:
        self.model, self.prompt, self.kwargs = model, prompt, dict(model_kwargs)
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        self.sequences = prompt  # (rows, T + t) the prompts and what has been chosen since
        self.width: int | None = None  # beams per request; None before there are any
        self.shared: list[int] = []  # per layer of the cache, how many positions the beams of a request share
        if self.kwargs.get("use_cache") and any(hasattr(type(part), "_setup_cache") for part in model.modules()):
            raise _not_reordered(model, "keeps states in its modules, which follow no beams")
        if hasattr(model, "_get_initial_cache_position"):  # transformers 4 counts positions itself
            self.kwargs = model._get_initial_cache_position(prompt.shape[1], prompt.device, self.kwargs)

    def first(self) -> Tensor:
        """Read the prompts; logits (B, 1, V)."""
        options = {"is_first_iteration": True} if "is_first_iteration" in _PREPARATION else {}
        return self._forward(options).unsqueeze(1)

    def next(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Logits (B, M, V) behind ``tokens`` (B, M) int64, each of which follows beam ``parents`` (B, M) of before."""
        batch, width = tokens.shape
        before = len(self.sequences) // batch
        rows = _flat_rows(parents, before)
        if self.width is None:  # from one row per request to one per beam
            self._expand(rows, width)
        elif before != width:
            self._resize(rows, before * batch)
        elif width > 1:
            self._reorder(rows)
        self.width = width
        self.sequences = torch.cat([self.sequences.index_select(0, rows), tokens.reshape(-1, 1)], dim=1)
        options = {}
        if "next_sequence_length" in _PREPARATION:
            options["next_sequence_length"] = 1 if self.kwargs.get("use_cache") else None
        return self._forward(options).unflatten(0, (batch, width))

    def _forward(self, options: dict[str, Any]) -> Tensor:
        inputs = self.model.prepare_inputs_for_generation(self.sequences, **options, **self.kwargs)
        outputs = self.model(**inputs, return_dict=True)
        self.kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.kwargs, is_encoder_decoder=self.is_encoder_decoder
        )
        return outputs.logits[:, -1].to(self.prompt.device)

    def _expand(self, rows: Tensor, width: int) -> None:
        """Repeat the inputs of each request ``width`` times, and what the model keeps of it."""
        _, self.kwargs = self.model._expand_inputs_for_generation(
            expand_size=width, is_encoder_decoder=self.is_encoder_decoder, input_ids=self.prompt, **self.kwargs
        )
        cache = self._own_cache()
        if cache is not None:
            self.shared = [layer.get_seq_length() if type(layer) is DynamicLayer else 0 for layer in cache.layers]
        self._reorder_all(rows)

    def _resize(self, rows: Tensor, count: int) -> None:
        """From ``count`` rows to those of other beams, more or fewer: of the inputs, and of what the model keeps."""

        def of_rows(value: Any) -> Any:
            own = isinstance(value, Tensor) and value.ndim > 0 and len(value) == count
            return value.index_select(0, rows) if own else value

        for name, value in self.kwargs.items():
            if name in CACHE_NAMES or name == "cache_position":
                continue
            if isinstance(value, transformers.utils.ModelOutput):
                value = type(value)(**{key: of_rows(part) for key, part in value.items()})
            self.kwargs[name] = of_rows(value)
        self._reorder_all(rows)

    def _reorder(self, rows: Tensor) -> None:
        """Let what the model keeps follow the beams; those of a request share its prompt and its cross-attention."""
        cache = self._own_cache()
        if cache is None:
            self._reorder_all(rows)
            return
        for layer, length in zip(cast(list[Any], cache.layers), self.shared, strict=True):
            if type(layer) is DynamicLayer and layer.get_seq_length() > length:  # others keep more than keys and values
                for states in cast(tuple[Tensor, Tensor], (layer.keys, layer.values)):
                    states[..., length:, :] = states[..., length:, :].index_select(0, rows)
            else:
                layer.reorder_cache(rows)

    def _own_cache(self) -> Cache | None:
        """The cache that grows with the beams, where it is one of transformers' own kind, whose layers are known."""
        cache = next((self.kwargs[name] for name in CACHE_NAMES[:2] if name in self.kwargs), None)
        if hasattr(self.model, "_reorder_cache"):
            return None
        if isinstance(cache, transformers.EncoderDecoderCache):
            cache = cache.self_attention_cache
        known = isinstance(cache, Cache) and type(cache).reorder_cache is Cache.reorder_cache
        return cache if known else None

    def _reorder_all(self, rows: Tensor) -> None:
        """Let all that the model keeps follow ``rows``, as ``generate`` does it."""
        name = next((name for name in CACHE_NAMES if name in self.kwargs), None)
        if name is None:
            return
        cache = self.kwargs[name]
        if (
            isinstance(cache, Cache)
            and not type(cache).__module__.startswith("transformers.cache_utils")
            and type(cache).reorder_cache is Cache.reorder_cache
        ):
            raise _not_reordered(self.model, f"has a {type(cache).__name__} of its own, which leaves out what it adds")
        if hasattr(self.model, "_reorder_cache"):
            self.kwargs[name] = self.model._reorder_cache(cache, rows)
        elif hasattr(cache, "reorder_cache"):
            cache.reorder_cache(rows)
        else:
            raise _not_reordered(self.model, f"keeps it as {name!r}, a {type(cache).__name__}")


def _not_reordered(model: Any, how: str) -> TypeError:
    return TypeError(
        "model must keep what it has read in a cache that can be reordered; "
        f"{type(model).__name__} {how}: give use_cache=False"
    )


def _flat_rows(parents: Tensor, before: int) -> Tensor:
    """(B * M,) for each beam the row, of ``before`` per request, of its parent (B, M)."""
    first = before * torch.arange(len(parents), device=parents.device).unsqueeze(1)
    return (first + parents.long()).flatten()
