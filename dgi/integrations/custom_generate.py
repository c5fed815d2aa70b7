"""The search of a trie as ``generate``'s own ``custom_generate``: one argument in a call that is there already."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers.generation import logits_process

from dgi.integrations.generation import NORMALIZERS, ConstrainedGeneration, search
from dgi.integrations.tokens import CodeTokens, EndTokens
from dgi_kernels import NodeScores, Trie, checks
from dgi_kernels.beam import beam_widths
from dgi_kernels.trie.filters import Filters, check_filters
from dgi_kernels.trie.node_scores import check_node_scores
from dgi_kernels.types import Backend

# Criteria that generate makes itself of the length and the end tokens, both of which the trie decides.
_OWN_CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")


class TrieSearch:
    """For ``generate(custom_generate=...)``: :func:`constrained_generate` in a call of ``generate`` that exists.

    It takes the place of a ``prefix_allowed_tokens_fn`` or a logits processor. The other arguments of the call stay:
    beams, results and settings are those of ``generate``, which returns a :class:`ConstrainedGeneration` with
    ``return_dict_in_generate=True``, else its sequences. The same limits hold as for :func:`constrained_generate`. Each
    prompt is read once, although ``generate`` repeats it for every beam.

    Args:
        trie: the semantic IDs, on the model's device.
        token_offsets: L integers; code c of level j is token ``token_offsets[j] + c``.
        token_ids: in place of offsets, L integer tensors (K_j,); code c of level j is token ``token_ids[j][c]``.
        eos_token_id: the token that follows a complete semantic ID, or several, or None.
        num_beams: beams per level, such as ``[10, 50, 80]``, the last as many as ``generate`` is asked for; default its
            number on every level.
        normalize, filters, node_scores, strength, backend: as for :func:`constrained_generate`.

    Raises:
        ValueError, TypeError: an argument that does not fit; when called also for what ``generate`` was given.
    """

    def __init__(
        self,
        trie: Trie,
        token_offsets: Sequence[int] | None = None,
        *,
        token_ids: Sequence[Tensor] | None = None,
        eos_token_id: EndTokens = None,
        num_beams: Sequence[int] | None = None,
        normalize: Literal["vocabulary", "full", "children"] = "vocabulary",
        filters: Filters = None,
        node_scores: NodeScores | None = None,
        strength: float | Tensor = 1.0,
        backend: Backend = "auto",
    ) -> None:
        self.tokens = CodeTokens(trie, token_offsets, token_ids, eos_token_id)
        checks.choice("normalize", normalize, NORMALIZERS)
        self.trie, self.normalize = trie, normalize
        self.widths = None if num_beams is None else beam_widths(num_beams, trie.depth)
        self.filters, self.node_scores, self.strength, self.backend = filters, node_scores, strength, backend

    @classmethod
    def of_sequences(cls, sequences: Iterable[Sequence[int]], **options: Any) -> TrieSearch:
        """For the sequences that ``generate`` may return, as the dict tries of GENRE, TIGER or LETTER are given them.

        Args:
            sequences: for each item the token that the decoder starts with, the tokens of its semantic ID, the end
                token.
            **options: the arguments of :class:`TrieSearch` behind ``eos_token_id``.

        Raises:
            ValueError: a sequence has fewer than three tokens, or they begin or end with different ones.
        """
        rows = [list(row) for row in sequences]
        if any(len(row) < 3 for row in rows):
            raise ValueError("sequences must have a start token, a semantic ID and an end token; one has fewer than 3")
        for name, place in (("begin", 0), ("end", -1)):
            if len(tokens := {row[place] for row in rows}) != 1:
                raise ValueError(f"sequences must all {name} with the same token; got {sorted(tokens)[:5]}")
        trie = Trie.from_codes([row[1:-1] for row in rows])
        return cls(trie, [0] * trie.depth, eos_token_id=int(rows[0][-1]), **options)

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: Sequence[Any],
        generation_config: transformers.GenerationConfig,
        **model_kwargs: Any,
    ) -> ConstrainedGeneration | Tensor:
        """What ``generate`` calls when all is prepared, with ``input_ids`` (B * M, T)."""
        beams, returned = generation_config.num_beams, generation_config.num_return_sequences
        widths = beam_widths(beams, self.trie.depth) if self.widths is None else self.widths
        if widths[-1] != beams:
            raise ValueError(f"num_beams of the search must end with the {beams} of generate; got {widths}")
        if returned > beams:
            raise ValueError(f"num_return_sequences must be at most num_beams, {beams}; got {returned}")
        _check_call(logits_processor, stopping_criteria)
        length, needed = generation_config.max_length, input_ids.shape[1] + self.trie.depth + bool(self.tokens.ends)
        if length is not None and length < needed:
            raise ValueError(
                f"max_new_tokens must be at least {self.trie.depth + bool(self.tokens.ends)}, that a semantic ID may "
                f"end; generate would stop at {length - input_ids.shape[1]}"
            )
        repeated = max(beams, returned)
        prompt, kwargs = _once_each(input_ids, model_kwargs, repeated)
        filters = check_filters(self.filters, self.trie, len(prompt))
        check_node_scores(self.node_scores, self.strength, self.trie, len(prompt))
        found = search(
            model,
            prompt,
            [_for_requests(processor, repeated) for processor in logits_processor],
            generation_config,
            kwargs,
            tokens=self.tokens,
            widths=widths,
            returned=returned,
            normalize=self.normalize,
            options={
                "filters": filters,
                "node_scores": self.node_scores,
                "strength": self.strength,
                "backend": self.backend,
            },
        )
        return found if generation_config.return_dict_in_generate else found.sequences


def _check_call(logits_processor: Sequence[Any], stopping_criteria: Sequence[Any]) -> None:
    if any(isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor) for processor in logits_processor):
        raise ValueError("prefix_allowed_tokens_fn must not be given with a TrieSearch: the trie says what is allowed")
    for criterion in stopping_criteria:
        if type(criterion).__name__ not in _OWN_CRITERIA:
            raise ValueError(
                f"stopping_criteria must not be given with a TrieSearch: the trie says where semantic IDs end; got "
                f"{type(criterion).__name__}"
            )


def _for_requests(processor: Any, repeated: int) -> Any:
    """The processor, for one row per request in place of one per beam."""
    lengths = getattr(processor, "prompt_ignore_length", None)
    if isinstance(lengths, Tensor) and repeated > 1:
        processor = copy.copy(processor)
        processor.prompt_ignore_length = lengths[::repeated]
    return processor


def _once_each(input_ids: Tensor, kwargs: dict[str, Any], repeated: int) -> tuple[Tensor, dict[str, Any]]:
    """One row per request again, of inputs that ``generate`` has repeated for every beam."""
    if repeated == 1:
        return input_ids, kwargs
    if kwargs.get("mm_encoder_outputs") is not None:
        raise ValueError("mm_encoder_outputs cannot be followed with several beams; call constrained_generate")
    rows = len(input_ids)

    def once(value: Any, dim: int = 0) -> Any:
        if not isinstance(value, Tensor) or value.ndim <= dim or value.shape[dim] != rows:
            return value
        return value[::repeated] if dim == 0 else value[:, ::repeated]

    found = {name: once(value) for name, value in kwargs.items() if name not in ("encoder_outputs", "position_ids")}
    if "position_ids" in kwargs:
        positions = kwargs["position_ids"]
        found["position_ids"] = once(positions, 1 if positions is not None and positions.ndim == 3 else 0)
    if "encoder_outputs" in kwargs:
        encoded = copy.copy(kwargs["encoder_outputs"])
        for name in () if encoded is None else [*encoded.keys()]:
            encoded[name] = once(encoded[name])
        found["encoder_outputs"] = encoded
    return input_ids[::repeated], found
