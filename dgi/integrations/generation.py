"""Generating semantic IDs with a Hugging Face model: the preparation of ``generate``, and a beam search of our own.

``generate`` itself prepares the inputs, as for greedy search with one row per request, and hands over to our search by
its ``custom_generate``: wrapped models, keywords, generation settings, encoders and positions are its business.
What is saved against ``generate`` with a constraint:
    - the prompt (or the encoder's input and cross-attention) is read once per request, not once per beam;
    - after a step only what beams do not share is reordered in the cache;
    - no mask and no top-k over beams x vocabulary, unless a setting asks for logits processors.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from dgi.integrations.hypotheses import Found, Hypotheses, StepScores
from dgi.integrations.model_steps import ModelSteps
from dgi.integrations.settings import REFUSED_ARGUMENTS, Processing, check_given, check_settings
from dgi.integrations.tokens import CodeTokens, EndTokens
from dgi_kernels import NodeScores, Trie, beam_search, checks, log_normalizer
from dgi_kernels.backend import checks_values
from dgi_kernels.beam import beam_widths
from dgi_kernels.trie.filters import Filters, check_filters
from dgi_kernels.trie.node_scores import check_node_scores
from dgi_kernels.types import Backend, Normalize

NORMALIZERS = ("vocabulary", "full", "children")
_NEEDED = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation", "_expand_inputs_for_generation")


class _Generation(NamedTuple):
    sequences: Tensor
    sequences_scores: Tensor
    codes: Tensor
    nodes: Tensor


class ConstrainedGeneration(_Generation):
    """The best R semantic IDs of each of B requests, best first; dead rows, where there are fewer, come last.

    A tuple whose elements also have names, as attributes and, as in the outputs of ``generate``, as string keys:
    ``result["sequences"]``.

    Attributes:
        sequences: (B * R, T) int64 token ids as ``generate`` returns them: the prompt (of an encoder-decoder the start
            tokens), the codes, the end token if there is one; then padding. A dead row is all padding behind the
            prompt.
        sequences_scores: (B * R,) float32 log-probability / (number of new tokens) ** length_penalty; -inf if dead.
        codes: (B, R, L) int64, -1 behind the end of a shorter semantic ID and in dead rows.
        nodes: (B, R) int64 leaves of the trie, -1 if dead; ``trie.items(nodes, trie.depth)`` lists their items.
    """

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)
        if key not in self._fields:
            raise KeyError(key)
        return getattr(self, key)

    def __contains__(self, key: object) -> bool:
        return key in self._fields if isinstance(key, str) else any(key is value for value in self)

    def keys(self) -> tuple[str, ...]:
        """The names of the elements, which ``dict(result)`` asks for."""
        return self._fields

    def get(self, key: str, default: Any = None) -> Any:
        """The element of that name, or ``default``."""
        return getattr(self, key) if key in self._fields else default


@torch.no_grad()
def constrained_generate(
    model: torch.nn.Module,
    trie: Trie,
    input_ids: Tensor,
    *,
    token_offsets: Sequence[int] | None = None,
    token_ids: Sequence[Tensor] | None = None,
    num_beams: int | Sequence[int],
    num_return_sequences: int | None = None,
    eos_token_id: EndTokens = None,
    attention_mask: Tensor | None = None,
    normalize: Literal["vocabulary", "full", "children"] = "vocabulary",
    length_penalty: float | None = None,
    early_stopping: bool | Literal["never"] | None = None,
    filters: Filters = None,
    node_scores: NodeScores | None = None,
    strength: float | Tensor = 1.0,
    backend: Backend = "auto",
    **generate_arguments: Any,
) -> ConstrainedGeneration:
    """Generate semantic IDs by beam search with an encoder-decoder or decoder-only model of transformers.

    With ``normalize="vocabulary"`` and an ``eos_token_id``, or semantic IDs that are all L codes long, sequences and
    scores are those of ``model.generate(input_ids, num_beams=num_beams, num_return_sequences=R,
    eos_token_id=eos_token_id, max_new_tokens=L (+ 1 with an end token),
    logits_processor=[TrieLogitsProcessor(...)], ...)`` with the same further arguments, to rounding, but for dead rows,
    which ``generate`` fills with repetitions and tokens of no semantic ID. A model whose outputs for a row depend on
    the other rows of the batch gives other scores, since it reads each prompt once here.

    Args:
        model: the model, in evaluation mode; also one wrapped by peft, ``torch.compile`` or DistributedDataParallel.
        trie: the semantic IDs, on the device of ``input_ids``.
        input_ids: (B, T) the encoder's input, or the prompts, padded on the left.
        token_offsets: L integers; code c of level j is token ``token_offsets[j] + c``.
        token_ids: in place of offsets, L integer tensors (K_j,); code c of level j is token ``token_ids[j][c]``.
        num_beams: beams per request M; the model's own setting is not read. Or L of them, how many run on behind each
            level, such as ``[10, 50, 80]``; then M is the last.
        num_return_sequences: R, how many to return per request; default all M.
        eos_token_id: the token that follows a complete semantic ID; the model's own setting is not read. Its
            log-probability counts as ``generate`` counts it (with ``normalize="vocabulary"``): a semantic ID that ends
            early leaves the beam and competes with others by its penalised score. With several tokens, each may
            follow, and a semantic ID may be found once per end token. With None nothing follows, and a shorter
            semantic ID ends for free.
        attention_mask: (B, T), 0 at padding; default: as ``generate`` makes it, which tells the padding of
            decoder-only models by their padding token, and none of an encoder's input since transformers 5.
        normalize: ``"vocabulary"``: log-softmax over the whole vocabulary, as ``generate``; ``"full"``: over the codes
            of the level; ``"children"``: over the codes that the trie allows. With the latter two the end is free.
        length_penalty: the score is divided by (number of new tokens, the end token included) ** length_penalty. It
            changes the order only where semantic IDs differ in length. Default: the model's setting, else 1.
        early_stopping: False, True or ``"never"``: when ``generate`` stops looking for better ones among the longer
            semantic IDs; with ``eos_token_id`` and ``normalize="vocabulary"`` only. Default: the model's setting, else
            False.
        filters: one TrieFilter for all requests, or one (or None) per request.
        node_scores, strength: what semantic IDs add by the weights of their items, as in
            :func:`dgi_kernels.beam_step`; it is part of the scores, length penalty included.
        backend: of the beam steps.
        **generate_arguments: what ``generate`` takes too: inputs of the model (``token_type_ids``,
            ``decoder_input_ids``, ``encoder_outputs``, images and so on), ``generation_config``, ``logits_processor``,
            and settings, which like those of the model's ``generation_config`` are followed (penalties, suppressed,
            forced and bad tokens, ``use_cache`` and so on) or refused by name (sampling, guidance and so on). Logits
            processors cost a pass over beams x vocabulary per step.

    Returns:
        ConstrainedGeneration.

    Raises:
        ValueError, TypeError: an argument that does not fit, a keyword that neither ``generate`` nor the model knows,
            a setting that cannot be followed, or a model whose cache cannot be reordered.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.
    """
    tokens = CodeTokens(trie, token_offsets, token_ids, eos_token_id)
    checks.tensor("input_ids", input_ids, dtypes=checks.INDEX_DTYPES, ndim=2)
    if trie.device != input_ids.device:
        raise ValueError(f"trie must be on {input_ids.device}, as input_ids; it is on {trie.device}")
    batch = len(input_ids)
    if batch == 0:
        raise ValueError(f"input_ids must hold at least one request; got shape {tuple(input_ids.shape)}")
    widths = beam_widths(num_beams, trie.depth)
    returned = (
        widths[-1]
        if num_return_sequences is None
        else checks.integer("num_return_sequences", num_return_sequences, low=1, high=widths[-1])
    )
    checks.choice("normalize", normalize, NORMALIZERS)
    if length_penalty is not None:
        checks.number("length_penalty", length_penalty)
    if early_stopping not in (None, False, True, "never"):
        raise ValueError(f"early_stopping must be False, True or 'never'; got {early_stopping!r}")
    filters = check_filters(filters, trie, batch)
    check_node_scores(node_scores, strength, trie, batch)
    options: dict[str, Any] = {"filters": filters, "node_scores": node_scores, "strength": strength, "backend": backend}
    if attention_mask is not None:
        checks.tensor("attention_mask", attention_mask, like=input_ids)
        checks.shape("attention_mask", attention_mask, tuple(input_ids.shape), "that of input_ids")
        generate_arguments["attention_mask"] = attention_mask
    results: list[ConstrainedGeneration] = []

    def run(
        model: Any,
        prompt: Tensor,
        logits_processor: Sequence[Any],
        stopping_criteria: object,
        generation_config: transformers.GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor:
        """What ``generate`` calls when all is prepared, with one row per request."""
        results.append(
            search(
                model,
                prompt,
                logits_processor,
                generation_config,
                model_kwargs,
                tokens=tokens,
                widths=widths,
                returned=returned,
                normalize=normalize,
                length_penalty=length_penalty,
                early_stopping=early_stopping,
                options=options,
            )
        )
        return results[0].sequences

    arguments = _arguments(generate_arguments, widths[-1], returned, eos_token_id, trie.depth + bool(tokens.ends))
    _innermost(model).generate(input_ids=input_ids.long(), custom_generate=run, **arguments)
    if not results:
        raise TypeError(
            f"model must be one whose generate runs what custom_generate gives; that of {type(model).__name__} does not"
        )
    return results[0]


def search(
    model: Any,
    prompt: Tensor,
    logits_processor: Sequence[Any],
    generation_config: transformers.GenerationConfig,
    model_kwargs: dict[str, Any],
    *,
    tokens: CodeTokens,
    widths: list[int],
    returned: int,
    normalize: Literal["vocabulary", "full", "children"],
    length_penalty: float | None = None,
    early_stopping: bool | Literal["never"] | None = None,
    options: dict[str, Any],
) -> ConstrainedGeneration:
    """The search, from what ``generate`` has prepared for one row per request.

    Args:
        model, prompt, logits_processor, generation_config, model_kwargs: as ``generate`` hands them over.
        tokens: the trie and how its codes are spelt.
        widths: M of each level.
        returned: R.
        normalize, length_penalty, early_stopping: as for :func:`constrained_generate`.
        options: of the beam steps.
    """
    trie, batch = tokens.trie, len(prompt)
    _check_model(model)
    _check_prompts(model, prompt, model_kwargs.get("attention_mask"))
    check_settings(generation_config, tokens, prompt.shape[1], trie.depth)
    processing = Processing(logits_processor, widths, prompt.shape[1], trie.depth)
    if normalize != "vocabulary" and processing.processors:
        names = ", ".join(sorted({type(processor).__name__ for processor in processing.processors}))
        raise ValueError(f'normalize must be "vocabulary" where settings ask for {names}; got {normalize!r}')
    steps = ModelSteps(model, prompt, model_kwargs)

    def step(depth: int, codes: Tensor | None, parents: Tensor | None) -> StepScores:
        if codes is None or parents is None:
            logits = steps.first()
            tokens.check_vocabulary(logits.shape[-1])
        else:
            logits = steps.next(tokens.spell(codes.clamp(min=0), depth - 1), parents.clamp(min=0))
        if processing.at(depth):
            return StepScores(processing(depth, steps.sequences, logits), True)
        return StepScores(logits, False)

    penalty = generation_config.length_penalty if length_penalty is None else length_penalty
    penalty = 1.0 if penalty is None else penalty
    if normalize == "vocabulary" and tokens.ends:
        early = generation_config.early_stopping if early_stopping is None else early_stopping
        found = Hypotheses(trie, tokens, batch, widths, penalty, early or False, **options).run(step)
    else:
        found = _search(trie, tokens, step, batch, widths, normalize, penalty, options)
    found = Found(*(value[:, :returned] for value in found))
    pad = generation_config.pad_token_id
    return _result(trie, tokens, prompt, found, pad if isinstance(pad, int) else None)


def _arguments(
    given: dict[str, Any], num_beams: int, returned: int, eos_token_id: EndTokens, length: int
) -> dict[str, Any]:
    """The keywords for ``generate``: those given, and those of a search with one row per request."""
    check_given(given)
    arguments = {name: value for name, value in given.items() if name not in REFUSED_ARGUMENTS}
    ends = eos_token_id if eos_token_id is None or isinstance(eos_token_id, int) else list(eos_token_id)
    own = {"num_beams": 1, "num_return_sequences": 1, "eos_token_id": ends, "max_new_tokens": length}
    encoded = arguments.get("encoder_outputs")
    if isinstance(encoded, transformers.utils.ModelOutput):
        arguments["encoder_outputs"] = copy.copy(encoded)  # generate would repeat the caller's own for every beam
    elif isinstance(encoded, tuple):
        arguments["encoder_outputs"] = BaseModelOutput(*encoded)
    config = arguments.get("generation_config")
    if config is None:
        return {**arguments, **own}
    if not isinstance(config, transformers.GenerationConfig):
        raise TypeError(f"generation_config must be a GenerationConfig; got {type(config).__name__}")
    for name, value in (("num_beams", num_beams), ("num_return_sequences", returned)):
        if getattr(config, name, None) not in (None, 1, value):
            raise ValueError(
                f"generation_config must not ask for {name}={getattr(config, name)} where {name} is {value}"
            )
    config = copy.deepcopy(config)
    arguments |= {"generation_config": config, **config.update(**own)}
    if ends is None:  # which in a configuration means the model's own
        arguments["eos_token_id"] = None
    return arguments


def _innermost(model: Any) -> Any:
    """The model that has ``generate``: DistributedDataParallel hides it."""
    while (
        isinstance(model, torch.nn.Module)
        and not hasattr(model, "generate")
        and isinstance(getattr(model, "module", None), torch.nn.Module)
    ):
        model = model.module
    if not callable(getattr(model, "generate", None)):
        raise TypeError(f"model must be a transformers model with a generate method; got {type(model).__name__}")
    return model


def _check_model(model: Any) -> None:
    for name in _NEEDED:
        if not hasattr(model, name):
            raise TypeError(
                f"model must have {name}, as those of transformers 5 have; {type(model).__name__} of "
                f"transformers {transformers.__version__} has none"
            )
    modes = getattr(model, "_supported_generation_modes", None)
    if modes is not None and "beam_search" not in [str(getattr(mode, "value", mode)) for mode in modes]:
        raise ValueError(
            f"model must support beam search; {type(model).__name__} supports "
            f"{', '.join(str(getattr(mode, 'value', mode)) for mode in modes)} only"
        )


def _check_prompts(model: Any, prompt: Tensor, mask: Tensor | None) -> None:
    if prompt.shape[1] == 0:
        raise ValueError(f"input_ids must hold prompts of at least one token; got shape {tuple(prompt.shape)}")
    if (
        not model.config.is_encoder_decoder
        and mask is not None
        and mask.ndim == 2
        and checks_values(mask.device)
        and not mask[:, -1].all()
    ):
        raise ValueError(
            "input_ids must be padded on the left (tokenizer.padding_side = 'left'); attention_mask ends "
            "with 0 in a row"
        )


def _search(
    trie: Trie,
    tokens: CodeTokens,
    step: Any,
    batch: int,
    widths: list[int],
    normalize: Normalize | Literal["vocabulary"],
    length_penalty: float,
    options: dict[str, Any],
) -> Found:
    """The best semantic IDs where ending costs nothing: :func:`dgi_kernels.beam_search`."""

    def level(depth: int, codes: Tensor | None, parents: Tensor | None) -> Tensor:
        scores = step(depth, codes, parents)
        logits = tokens.level(scores.vocabulary, depth)
        if normalize != "vocabulary" or scores.processed:
            return logits
        return logits - log_normalizer(scores.vocabulary).unsqueeze(-1)

    found = beam_search(
        trie,
        level,
        batch_size=batch,
        num_beams=widths,
        **options,
        normalize="none" if normalize == "vocabulary" else normalize,
    )
    lengths = (found.codes >= 0).sum(dim=2) + bool(tokens.ends)
    scores = found.scores / lengths.clamp(min=1) ** length_penalty
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    codes = found.codes.gather(1, order.unsqueeze(2).expand_as(found.codes))
    return Found(codes, scores, torch.zeros_like(order))


def _result(trie: Trie, tokens: CodeTokens, prompt: Tensor, found: Found, pad: int | None) -> ConstrainedGeneration:
    nodes = trie.find(found.codes).masked_fill(found.scores == -torch.inf, -1)
    padding = next(token for token in (pad, *tokens.ends, 0) if token is not None)
    spelt = tokens.encode(found.codes, padding)
    if tokens.ends:  # the end token behind the codes of live rows
        lengths = (found.codes >= 0).sum(dim=2, keepdim=True)
        behind = torch.arange(spelt.shape[2] + 1, device=spelt.device) == lengths
        spelt = torch.nn.functional.pad(spelt, (0, 1), value=padding)
        spelt = torch.where(behind & (nodes >= 0).unsqueeze(2), tokens.end_of(found.ends).unsqueeze(2), spelt)
    sequences = torch.cat([prompt.repeat_interleave(spelt.shape[1], dim=0), spelt.flatten(0, 1)], dim=1)
    return ConstrainedGeneration(sequences, found.scores.flatten(), found.codes, nodes)
