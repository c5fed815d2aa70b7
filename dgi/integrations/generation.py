"""Generating semantic IDs with a Hugging Face model without ``generate``: its steps, driven by our beam search.

What is saved against ``generate`` with a constraint:
    - the prompt (or the encoder's input and cross-attention) is read once per request, not once per beam;
    - after a step only what beams do not share is reordered in the cache: never the prompt, never cross-attention;
    - no mask and no top-k over beams x vocabulary: of the logits one log-sum-exp is taken, and the trie's children.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from dgi.integrations.tokens import CodeTokens
from dgi_kernels import Beams, Trie, beam_search, beam_step, checks
from dgi_kernels.backend import checks_values
from dgi_kernels.trie.arrays import END
from dgi_kernels.trie.filters import Filters, check_filters

NORMALIZERS = ("vocabulary", "full", "children")
_CHUNK = 2**21  # logits whose exponentials are held at once; larger temporaries cost page faults

# (depth, tokens, parents) -> logits (B, W, V) over the vocabulary; tokens and parents as for beam_search
VocabularyStep = Callable[[int, Tensor | None, Tensor | None], Tensor]


class ConstrainedGeneration(NamedTuple):
    """The best R semantic IDs of each of B requests, best first; dead rows, where there are fewer, come last.

    Attributes:
        sequences: (B * R, T) int64 token ids as ``generate`` returns them: the prompt (of an encoder-decoder the start
            token), the codes, the end token if there is one; then padding. A dead row is all padding behind the prompt.
        sequences_scores: (B * R,) float32 log-probability / (number of new tokens) ** length_penalty; -inf if dead.
        codes: (B, R, L) int64, -1 behind the end of a shorter semantic ID and in dead rows.
        nodes: (B, R) int64 leaves of the trie, -1 if dead; ``trie.items(nodes, trie.depth)`` lists their items.
    """

    sequences: Tensor
    sequences_scores: Tensor
    codes: Tensor
    nodes: Tensor


@torch.no_grad()
def constrained_generate(model: transformers.PreTrainedModel, trie: Trie, input_ids: Tensor, *,
                         token_offsets: Sequence[int], num_beams: int, num_return_sequences: int | None = None,
                         eos_token_id: int | None = None, attention_mask: Tensor | None = None,
                         normalize: str = "vocabulary", length_penalty: float = 1.0,
                         early_stopping: bool | str = False, filters: Filters = None, backend: str = "auto",
                         **model_inputs: Any) -> ConstrainedGeneration:
    """Generate semantic IDs by beam search with an encoder-decoder or decoder-only model that has a key-value cache.

    With ``normalize="vocabulary"`` the results are those of ``model.generate(..., num_beams=num_beams,
    max_new_tokens=L (+ 1 with an end token), logits_processor=[TrieLogitsProcessor(...)])``, to rounding, but for dead
    rows, which ``generate`` fills with repetitions and tokens of no semantic ID.

    Args:
        model: the model, in evaluation mode.
        trie: the semantic IDs, on the model's device.
        input_ids: (B, T) the encoder's input, or the prompts, padded on the left.
        token_offsets: L integers; code c of level j is token ``token_offsets[j] + c``.
        num_beams: beams per request M.
        num_return_sequences: R, how many to return per request; default all M.
        eos_token_id: the token that follows a complete semantic ID. Its log-probability counts as ``generate`` counts
            it (with ``normalize="vocabulary"``): a semantic ID that ends early leaves the beam and competes with others
            by its penalised score. With None nothing follows, and a shorter semantic ID ends for free.
        attention_mask: (B, T), 0 at padding; default: where ``input_ids`` is not the model's padding token.
        normalize: ``"vocabulary"``: log-softmax over the whole vocabulary, as ``generate``; ``"full"``: over the codes
            of the level; ``"children"``: over the codes that the trie allows. With the latter two the end is free.
        length_penalty: the score is divided by (number of new tokens, the end token included) ** length_penalty. It
            changes the order only where semantic IDs differ in length.
        early_stopping: False, True or ``"never"``: when ``generate`` stops looking for better ones among the longer
            semantic IDs; with ``eos_token_id`` and ``normalize="vocabulary"`` only.
        filters: one TrieFilter for all requests, or one (or None) per request.
        backend: of the beam steps.
        **model_inputs: passed on to the encoder, or to the model when it reads the prompts.

    Returns:
        ConstrainedGeneration.

    Raises:
        ValueError, TypeError: an argument that does not fit, or a model without a cache that can be reordered.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.
    """
    tokens = CodeTokens(trie, token_offsets, eos_token_id)
    checks.tensor("input_ids", input_ids, dtypes=checks.INDEX_DTYPES, ndim=2)
    if trie.device != input_ids.device:
        raise ValueError(f"trie must be on {input_ids.device}, as input_ids; it is on {trie.device}")
    checks.integer("num_beams", num_beams, low=1)
    returned = num_beams if num_return_sequences is None else checks.integer(
        "num_return_sequences", num_return_sequences, low=1, high=num_beams)
    checks.choice("normalize", normalize, NORMALIZERS)
    checks.number("length_penalty", length_penalty)
    if early_stopping not in (False, True, "never"):
        raise ValueError(f"early_stopping must be False, True or 'never'; got {early_stopping!r}")
    batch = len(input_ids)
    if batch == 0:
        raise ValueError(f"input_ids must hold at least one request; got shape {tuple(input_ids.shape)}")
    filters = check_filters(filters, trie, batch)
    if attention_mask is None:
        attention_mask = _mask_of(model, input_ids)
    checks.tensor("attention_mask", attention_mask, like=input_ids)
    checks.shape("attention_mask", attention_mask, tuple(input_ids.shape), "that of input_ids")

    drive = _EncoderDecoder if model.config.is_encoder_decoder else _DecoderOnly
    driver = drive(model, input_ids, attention_mask, model_inputs)

    def step(depth: int, codes: Tensor | None, parents: Tensor | None) -> Tensor:
        if codes is None or parents is None:
            logits = driver.first()
            tokens.check_vocabulary(logits.shape[-1])
            return logits
        return driver.next(codes.clamp(min=0) + tokens.offsets[depth - 1], parents.clamp(min=0))

    if normalize == "vocabulary" and tokens.end is not None:
        search = _Hypotheses(trie, tokens, batch, num_beams, length_penalty, early_stopping)
        codes, scores = search.run(step, filters, backend)
    else:
        codes, scores = _search(trie, tokens, step, batch, num_beams, normalize, length_penalty, filters, backend)
    codes, scores = codes[:, :returned], scores[:, :returned]
    nodes = trie.find(codes).masked_fill(scores == -torch.inf, -1)
    sequences = torch.cat([driver.prompt.repeat_interleave(returned, dim=0),
                           _spell(codes, nodes, tokens, _padding(model, tokens.end)).flatten(0, 1)], dim=1)
    return ConstrainedGeneration(sequences, scores.flatten(), codes, nodes)


def _search(trie: Trie, tokens: CodeTokens, step: VocabularyStep, batch: int, num_beams: int, normalize: str,
            length_penalty: float, filters: Filters, backend: str) -> tuple[Tensor, Tensor]:
    """Codes (B, M, L) and scores (B, M) where ending costs nothing: :func:`dgi_kernels.beam_search`."""
    def level(depth: int, codes: Tensor | None, parents: Tensor | None) -> Tensor:
        logits = step(depth, codes, parents)
        scores = tokens.level(logits, depth)
        return scores - log_normalizer(logits).unsqueeze(-1) if normalize == "vocabulary" else scores

    found = beam_search(trie, level, batch_size=batch, num_beams=num_beams, filters=filters, backend=backend,
                        normalize="none" if normalize == "vocabulary" else normalize)
    lengths = (found.codes >= 0).sum(dim=2) + (tokens.end is not None)
    scores = found.scores / lengths.clamp(min=1) ** length_penalty
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return _rows(found.codes, order), scores


class _Hypotheses:
    """The beam search of ``generate``: beams that run, and the best M hypotheses that have ended.

    Each step ranks the continuations of the running beams, ends among them. An end among the first M becomes a
    hypothesis, with its score penalised for length; the first M that are no ends run on. A request whose running beams
    cannot, by the estimate of ``early_stopping``, beat its worst hypothesis takes no more.
    """

    def __init__(self, trie: Trie, tokens: CodeTokens, batch: int, num_beams: int, length_penalty: float,
                 early_stopping: bool | str) -> None:
        self.trie, self.tokens, self.num_beams = trie, tokens, num_beams
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.running = trie.root(batch)
        self.running_codes = torch.empty(batch, 1, 0, dtype=torch.int64, device=trie.device)
        self.scores = torch.full((batch, num_beams), -torch.inf, device=trie.device)
        self.codes = torch.full((batch, num_beams, trie.depth), END, device=trie.device)
        self.improving = torch.ones(batch, 1, dtype=torch.bool, device=trie.device)

    def run(self, step: VocabularyStep, filters: Filters, backend: str) -> tuple[Tensor, Tensor]:
        """Search the whole depth and once more for the ends; return codes (B, M, L) and scores (B, M)."""
        for depth in range(self.trie.depth + 1):
            start = depth == 0
            logits = step(depth, None if start else self.running.tokens, None if start else self.running.parents)
            self._extend(logits, filters, backend)
        return self.codes, self.scores

    def _extend(self, logits: Tensor, filters: Filters, backend: str) -> None:
        depth, width, end = self.running.depth, self.num_beams, self.tokens.end
        normalizer = log_normalizer(logits)
        end_logp = (logits[..., end] - normalizer).nan_to_num(nan=-torch.inf).float()
        if depth < self.trie.depth:
            # With an end as good as its parent, so no less than it will be, twice the beams hold all that can count:
            # there is at most one end per parent, and behind M better ones it is none of the first M.
            found = beam_step(self.trie, self.tokens.level(logits, depth), self.running, num_beams=2 * width,
                              log_normalizer=normalizer, filters=filters, backend=backend)
        else:
            parents = torch.arange(self.running.nodes.shape[1], device=logits.device).expand_as(self.running.nodes)
            found = self.running._replace(tokens=torch.full_like(parents, END), parents=parents)
        parents = found.parents.long().clamp(min=0)
        ends = (found.nodes >= 0) & (found.tokens < 0)
        scores = found.scores + end_logp.gather(1, parents).masked_fill(~ends, 0)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        ends, parents = ends.gather(1, order), parents.gather(1, order)
        codes = torch.cat([_rows(self.running_codes, parents), found.tokens.gather(1, order).long().unsqueeze(2)], 2)
        self._finish(codes, scores, ends, depth)

        runs = ends.to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
        place = order.gather(1, runs)
        self.running = Beams(found.nodes.gather(1, place), found.tokens.gather(1, place),
                             found.parents.gather(1, place), scores.gather(1, runs), depth + 1)
        self.running_codes = _rows(codes, runs)
        self._look_ahead(depth + 1)

    def _finish(self, codes: Tensor, scores: Tensor, ends: Tensor, depth: int) -> None:
        """Take the ends among the first M (of those sorted by score) into the hypotheses."""
        first = torch.arange(ends.shape[1], device=ends.device) < self.num_beams
        taken = ends & first & self.improving
        if self.early_stopping is True:
            taken &= self.scores[:, -1:] == -torch.inf
        codes = torch.nn.functional.pad(codes, (0, self.trie.depth - codes.shape[2]), value=END)[..., : self.trie.depth]
        penalised = (scores / (depth + 1) ** self.length_penalty).masked_fill(~taken, -torch.inf)
        scores, order = torch.cat([self.scores, penalised], 1).sort(dim=1, descending=True, stable=True)
        self.scores = scores[:, : self.num_beams]
        self.codes = _rows(torch.cat([self.codes, codes], 1), order[:, : self.num_beams])
        self.codes = self.codes.masked_fill((self.scores == -torch.inf).unsqueeze(2), END)

    def _look_ahead(self, depth: int) -> None:
        """Close the requests whose best running beam, by the estimate, is no better than their worst hypothesis."""
        longest = self.early_stopping == "never" and self.length_penalty > 0
        length = self.trie.depth + 1 if longest else depth
        best = self.running.scores[:, :1] / length ** self.length_penalty
        self.improving = self.improving & (best > self.scores[:, -1:])


class _EncoderDecoder:
    """The steps of an encoder-decoder; ``prompt`` (B, 1) is the start token."""

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor, model_inputs: dict[str, Any]) -> None:
        self.model, self.mask = model, attention_mask
        self.states = model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, **model_inputs)[0]
        start = model.generation_config.decoder_start_token_id
        if start is None:
            raise ValueError("model must have a decoder_start_token_id in its generation_config; it has none")
        self.prompt = input_ids.new_full((len(input_ids), 1), start, dtype=torch.int64)
        self.cache: Any = None

    def first(self) -> Tensor:
        return self._forward(self.prompt).unflatten(0, (-1, 1))

    def next(self, tokens: Tensor, parents: Tensor) -> Tensor:
        width, before = tokens.shape[1], len(self.mask) // len(tokens)
        rows = _flat_rows(parents, before)
        if before != width:  # from one row per request to one per beam
            self.states, self.mask = self.states.index_select(0, rows), self.mask.index_select(0, rows)
            self.cache.reorder_cache(rows)
        else:
            _reorder(self.cache.self_attention_cache, rows, shared=1)  # the beams of a request share cross-attention
        return self._forward(tokens.reshape(-1, 1)).unflatten(0, (-1, width))

    def _forward(self, tokens: Tensor) -> Tensor:
        output = self.model(encoder_outputs=(self.states,), attention_mask=self.mask, decoder_input_ids=tokens,
                            past_key_values=self.cache, use_cache=True, return_dict=True)
        self.cache = _checked_cache(output, transformers.EncoderDecoderCache)
        return output.logits[:, -1]


class _DecoderOnly:
    """The steps of a decoder-only model; ``prompt`` (B, T) is its input."""

    def __init__(self, model: Any, input_ids: Tensor, attention_mask: Tensor, model_inputs: dict[str, Any]) -> None:
        self.model, self.prompt, self.mask, self.inputs = model, input_ids.long(), attention_mask, model_inputs
        if input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must hold prompts of at least one token; got shape {tuple(input_ids.shape)}")
        if checks_values(input_ids.device) and not attention_mask[:, -1].all():
            raise ValueError("input_ids must be padded on the left (tokenizer.padding_side = 'left'); attention_mask "
                             "ends with 0 in a row")
        self.cache: Any = None
        parameters = inspect.signature(model.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)

    def first(self) -> Tensor:
        return self._forward(self.prompt, self.inputs).unflatten(0, (-1, 1))

    def next(self, tokens: Tensor, parents: Tensor) -> Tensor:
        width, before = tokens.shape[1], len(self.mask) // len(tokens)
        rows = _flat_rows(parents, before)
        if before != width:  # from one row per request to one per beam
            self.mask, self.positions = self.mask.index_select(0, rows), self.positions.index_select(0, rows)
            self.cache.reorder_cache(rows)
        else:
            _reorder(self.cache, rows, shared=self.prompt.shape[1])
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(tokens.reshape(-1, 1), {}).unflatten(0, (-1, width))

    def _forward(self, tokens: Tensor, inputs: dict[str, Any]) -> Tensor:
        positions = {"position_ids": self.positions} if self.takes_positions else {}
        output = self.model(input_ids=tokens, attention_mask=self.mask, past_key_values=self.cache, use_cache=True,
                            return_dict=True, **positions, **self.last_only, **inputs)
        self.cache = _checked_cache(output, transformers.Cache)
        return output.logits[:, -1]


def _checked_cache(output: Any, kind: type) -> Any:
    cache = getattr(output, "past_key_values", None)
    if not isinstance(cache, kind):
        raise TypeError(f"model must return its key-value cache as a {kind.__name__} of transformers; "
                        f"got {type(cache).__name__}")
    return cache


def _flat_rows(parents: Tensor, before: int) -> Tensor:
    """(B * M,) for each beam the row, of ``before`` per request, of its parent (B, M)."""
    first = before * torch.arange(len(parents), device=parents.device).unsqueeze(1)
    return (first + parents.long()).flatten()


def _reorder(cache: Any, rows: Tensor, shared: int) -> None:
    """Let the cache follow the beams; in its first ``shared`` positions those of a request are all the same."""
    for layer in cache.layers:
        if type(layer) is DynamicLayer and layer.get_seq_length() > shared:  # others keep more than keys and values
            for states in cast(tuple[Tensor, Tensor], (layer.keys, layer.values)):
                states[:, :, shared:] = states[:, :, shared:].index_select(0, rows)
        else:
            layer.reorder_cache(rows)


def log_normalizer(logits: Tensor) -> Tensor:
    """Log-sum-exp (B, W) of ``logits`` (B, W, V) over the vocabulary, in float32 or better."""
    rows = logits.flatten(0, 1).split(max(1, _CHUNK // max(1, logits.shape[2])))
    return torch.cat([_log_sum_exp(part) for part in rows]).view(logits.shape[:2])


def _log_sum_exp(logits: Tensor) -> Tensor:
    """Log-sum-exp (n,) of ``logits`` (n, V).

    exp is taken of nothing below -80: what it would add is lost in rounding anyway, and its denormal results made
    torch.logsumexp 15 times slower on peaked logits.
    """
    best = logits.amax(dim=1, keepdim=True).to(checks.compute_dtype(logits.dtype))
    return (logits - best).clamp_(min=-80).exp_().sum(dim=1).log_() + best.squeeze(1)


def _rows(values: Tensor, place: Tensor) -> Tensor:
    """``values`` (B, W, n) at ``place`` (B, M) along the second dimension."""
    return values.gather(1, place.unsqueeze(2).expand(-1, -1, values.shape[2]))


def _mask_of(model: Any, input_ids: Tensor) -> Tensor:
    """1 where there is no padding, as ``generate`` tells it: a padding token that also ends sequences tells nothing."""
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id is None or config.pad_token_id in ends:
        return torch.ones_like(input_ids)
    return (input_ids != config.pad_token_id).long()


def _padding(model: Any, end: int | None) -> int:
    """The token that fills up sequences: the model's padding, else the end token, else 0."""
    return next(token for token in (model.generation_config.pad_token_id, end, 0) if token is not None)


def _spell(codes: Tensor, nodes: Tensor, tokens: CodeTokens, pad: int) -> Tensor:
    """The tokens (B, R, L or L + 1) of ``codes`` (B, R, L), the end token behind those of live rows."""
    spelt = tokens.encode(codes, pad)
    if tokens.end is None:
        return spelt
    lengths = (codes >= 0).sum(dim=2, keepdim=True)
    behind = torch.arange(codes.shape[2] + 1, device=codes.device) == lengths
    return torch.nn.functional.pad(spelt, (0, 1), value=pad).masked_fill(behind & (nodes >= 0).unsqueeze(2), tokens.end)
