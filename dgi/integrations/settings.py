"""Which settings of ``generate`` a search of a trie follows, and which it refuses by name.

Followed: the penalties and prohibitions that ``generate`` makes logits processors of, and those of beam search itself.
Not read: what sampling alone reads (temperature, top_k and so on), as ``generate`` with ``do_sample=False``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.generation import logits_process

from dgi.integrations.tokens import CodeTokens

# Arguments of generate that have no place here, and why.
REFUSED_ARGUMENTS = {
    "assistant_model": "the model is asked once per level as it is",
    "custom_generate": "constrained_generate is one itself",
    "max_length": "the depth of the trie decides the length",
    "max_new_tokens": "the depth of the trie decides the length",
    "negative_prompt_ids": "guidance would read the prompts a second time",
    "cache": "it reads the prompts itself",
    "past_key_values": "it reads the prompts itself",
    "prefix_allowed_tokens_fn": "the trie says which tokens are allowed",
    "stopping_criteria": "the trie says where semantic IDs end",
    "streamer": "beams are known at the end only",
}

# Settings that would change the results, or ask for what is not returned: the values that do not, and what to do.
_REFUSED_SETTINGS: dict[str, tuple[tuple[Any, ...], str]] = {
    "do_sample": ((False,), "beams are searched, not sampled: give do_sample=False"),
    "renormalize_logits": ((False,), 'give renormalize_logits=False; normalize="children" does this'),
    "guidance_scale": ((1,), "guidance would read the prompts a second time"),
    "watermarking_config": ((), "a semantic ID bears no watermark"),
    "num_beam_groups": ((1,), "there is one group of beams"),
    "diversity_penalty": ((0,), "there is one group of beams"),
    "penalty_alpha": ((0,), "contrastive search is another search"),
    "constraints": ((), "the trie is the constraint"),
    "force_words_ids": ((), "the trie is the constraint"),
    "dola_layers": ((), "logits are those of the last layer"),
    "low_memory": ((False,), "beams are searched together"),
    "token_healing": ((False,), "heal the prompts before"),
    "stop_strings": ((), "the trie says where semantic IDs end"),
    "max_time": ((), "half a semantic ID is none"),
    "use_mtp": ((False,), "the model is asked for one token at a time"),
    "prompt_lookup_num_tokens": ((), "the model is asked for one token at a time"),
    "assistant_early_exit": ((), "the model is asked for one token at a time"),
    "prefill_chunk_size": ((), "prompts are read at once"),
    "cache_implementation": (("dynamic",), "the cache must grow from requests to beams"),
    "output_attentions": ((False,), "they are not returned"),
    "output_hidden_states": ((False,), "they are not returned"),
    "output_logits": ((False,), "they are not returned"),
}


def check_given(arguments: Mapping[str, Any]) -> None:
    """Refuse keywords that cannot be followed before anything is done: of some ``generate`` would ask for more."""
    for name, reason in REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(f"{name} must not be given to constrained_generate: {reason}")
    for name in _REFUSED_SETTINGS:
        _check_setting(name, arguments.get(name))


def check_settings(config: transformers.GenerationConfig, tokens: CodeTokens, prompt_length: int, depth: int) -> None:
    """Refuse what cannot be followed, and what would leave no semantic ID at all; the message names the setting."""
    for name in _REFUSED_SETTINGS:
        _check_setting(name, getattr(config, name, None))
    forced_end, ends = _listed(config.forced_eos_token_id), tokens.ends
    if forced_end and not set(forced_end) & set(ends):
        raise ValueError(
            f"forced_eos_token_id={config.forced_eos_token_id} cannot be followed: it must be one of "
            f"eos_token_id, {ends or None}; give forced_eos_token_id=None or that eos_token_id"
        )
    forced_start = config.forced_bos_token_id
    if forced_start is not None and prompt_length == 1:
        first = tokens.decode(torch.tensor([[forced_start]], device=tokens.device))
        if not 0 <= int(first) < tokens.sizes[0]:
            raise ValueError(
                f"forced_bos_token_id={forced_start} cannot be followed: it would stand where the "
                "semantic ID begins; give forced_bos_token_id=None and decoder_input_ids that end with it"
            )
    least = max(config.min_length or 0, prompt_length + (config.min_new_tokens or 0))
    if ends and least > prompt_length + depth:
        name = "min_new_tokens" if config.min_new_tokens else "min_length"
        raise ValueError(
            f"{name}={getattr(config, name)} cannot be followed: a semantic ID of {depth} codes ends "
            f"before; give {name}=0"
        )


def _check_setting(name: str, value: Any) -> None:
    harmless, reason = _REFUSED_SETTINGS[name]
    if value is not None and value not in harmless:
        raise ValueError(f"{name}={value!r} (a keyword, or of a generation_config) cannot be followed: {reason}")


class Processing:
    """The logits processors that ``generate`` makes of its settings, applied to all beams of a step.

    Args:
        processors: those of ``generate``, made for one row per request.
        widths: M of each level; a processor sees B * M rows, as in ``generate``, M of the level before (in the first
            step that of the first).
        prompt_length: the number of tokens before the semantic ID.
        depth: that of the trie.
    """

    def __init__(self, processors: Sequence[Any], widths: Sequence[int], prompt_length: int, depth: int) -> None:
        self.widths, self.prompt_length, self.depth = widths, prompt_length, depth
        self.processors = list(processors)
        self._by_width = {width: [_for_beams(processor, width) for processor in processors] for width in {*widths}}

    def at(self, depth: int) -> list[Any]:
        """The processors that change anything in the step that chooses the token behind ``depth`` codes."""
        return [
            processor
            for processor in self._by_width[self._rows(depth)]
            if (depth == self.depth or not isinstance(processor, logits_process.ForcedEOSTokenLogitsProcessor))
            and (depth == 0 or not isinstance(processor, logits_process.ForcedBOSTokenLogitsProcessor))
        ]

    def _rows(self, depth: int) -> int:
        """How many rows of a request a processor sees behind ``depth`` codes."""
        return self.widths[max(0, depth - 1)]

    def __call__(self, depth: int, sequences: Tensor, logits: Tensor) -> Tensor:
        """Processed log-probabilities (B, W, V) float32 of ``logits`` (B, W, V) behind ``sequences`` (B * W, t)."""
        batch, width = logits.shape[:2]
        scores = logits.float().log_softmax(dim=-1).flatten(0, 1)
        repeats = self._rows(depth) // width  # the first step has one row per request
        if repeats > 1:
            sequences, scores = (value.repeat_interleave(repeats, dim=0) for value in (sequences, scores))
        for processor in self.at(depth):
            scores = processor(sequences, scores)
        return scores.unflatten(0, (batch, -1))[:, :width]


def _for_beams(processor: Any, num_beams: int) -> Any:
    """The processor, for one row per beam in place of one per request."""
    lengths = getattr(processor, "prompt_ignore_length", None)
    if isinstance(lengths, Tensor):
        processor = copy.copy(processor)
        processor.prompt_ignore_length = lengths.repeat_interleave(num_beams)
    return processor


def _listed(value: int | Sequence[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, Sequence) else [value]
