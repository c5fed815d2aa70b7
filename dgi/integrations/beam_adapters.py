"""The beam search of other people's code, done by our steps: same names, arguments and results, and exact.

Each is theirs but for what it does with the trie: theirs compares every beam and code with every item, samples
candidates, or leaves prefixes that no item has. Where fewer semantic IDs exist than beams, the others have code 0 and
log-probability -inf (probability 0), so that their models can still embed the codes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dgi_kernels import Beams, Trie, beam_step
from dgi_kernels.beam import beam_widths


def extend_beams(
    trie: Trie, logits: Tensor, generated: Tensor | None, log_probas: Tensor | None, num_beams: int, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of a search that keeps codes in place of nodes, as most code does.

    Args:
        trie: the semantic IDs.
        logits: (B * M, K) of each beam, or (B, M, K).
        generated: (B, M, t) codes so far. At the start None, where M is 1, or no codes (B, M, 0) of any M: all beams
            are one then, and the logits of the first are read.
        log_probas: (B, M) of these; at the start None, or not read.
        num_beams: how many to keep, M'.
        **options: of :func:`dgi_kernels.beam_step`, such as ``normalize`` and ``filters``.

    Returns:
        The codes (B, M', t + 1), their log-probabilities (B, M'), and for each the row of its parent among the B * M,
        (B * M',), to reorder a cache by.
    """
    if generated is None or log_probas is None or generated.shape[2] == 0:
        requests = logits.shape[0] if generated is None else generated.shape[0]
        logits = logits.reshape(requests, -1, logits.shape[-1])[:, :1]
        beams = trie.root(requests)
        generated = beams.nodes.new_empty(*beams.nodes.shape, 0)
    else:
        nodes = trie.find(generated)
        beams = Beams(nodes, nodes, nodes, log_probas, generated.shape[2])
    batch, width = beams.nodes.shape
    found = beam_step(
        trie, logits.unflatten(0, (batch, -1)) if logits.ndim == 2 else logits, beams, num_beams=num_beams, **options
    )
    codes, parents = _extended(generated, found)
    first_rows = width * torch.arange(batch, device=parents.device).unsqueeze(1)
    return codes, found.scores, (first_rows + parents).flatten()


def _extended(generated: Tensor, found: Beams) -> tuple[Tensor, Tensor]:
    """The codes (B, M', t + 1) of the beams found, and their parents (B, M'); 0 where there is none."""
    parents = found.parents.clamp(min=0)
    before = generated.gather(1, parents.unsqueeze(2).expand(-1, -1, generated.shape[2]))
    return torch.cat([before, found.tokens.clamp(min=0).unsqueeze(2)], dim=2), parents


class SidGrBeamSearch:
    """``BeamSearch`` of NVIDIA's recsys-examples, ``examples/sid_gr``; ``prefix_valid_check`` is what it says here.

    Args:
        beam_width: one number, or one per level such as ``[10, 50, 80]``.
        num_hierarchies: the number of levels L.
        codebook_sizes: L sizes.
        codebooks: (num_items, L) the semantic IDs of all items.
        prefix_valid_check, record_history: taken as theirs takes them; the first is always done.
        trie: in place of ``codebooks``, a trie that is built already.
    """

    beams: Beams | None
    generated_sids: Tensor | None
    accumulated_log_probs: Tensor | None
    parent_indices: list[Tensor]
    history_topk_sids: list[Tensor]

    def __init__(
        self,
        beam_width: int | Sequence[int],
        num_hierarchies: int,
        codebook_sizes: Sequence[int],
        codebooks: Tensor | None = None,
        prefix_valid_check: bool = True,
        record_history: bool = False,
        *,
        trie: Trie | None = None,
    ) -> None:
        if (codebooks is None) == (trie is None):
            raise ValueError("exactly one of codebooks and trie must be given")
        self.trie: Trie = trie or Trie.from_codes(codebooks, codebook_sizes=codebook_sizes)  # type: ignore[arg-type]
        if self.trie.depth != num_hierarchies:
            raise ValueError(f"the trie must have num_hierarchies, {num_hierarchies}, levels; got {self.trie.depth}")
        self.beam_widths = beam_widths(
            [*beam_width] if isinstance(beam_width, Sequence) else beam_width, num_hierarchies
        )
        self.num_hierarchies, self.codebook_sizes = num_hierarchies, list(codebook_sizes)
        self.record_history = record_history
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        self.step, self.beams = 0, None
        self.generated_sids = self.accumulated_log_probs = None
        self.parent_indices, self.history_topk_sids = [], []

    def propagate(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities (B, W, K) -> the codes (B, W', step) and their log-probabilities (B, W')."""
        if self.step == self.num_hierarchies:
            raise ValueError("Reached the last hierarchy, please call reset to start a new generation")
        beams, before = self.beams or self.trie.root(len(log_probs)), self.generated_sids
        before = beams.nodes.new_empty(*beams.nodes.shape, 0) if before is None else before
        kept = min(self.beam_widths[self.step], log_probs.shape[1] * log_probs.shape[2])
        self.beams = beam_step(self.trie, log_probs, beams, num_beams=kept, normalize="none")
        self.generated_sids, parents = _extended(before, self.beams)
        self.accumulated_log_probs, self.step = self.beams.scores, self.step + 1
        self.parent_indices.append(parents)
        self.history_topk_sids += [self.generated_sids] if self.record_history else []
        return self.generated_sids, self.beams.scores

    def get_sids(self, step: int | None = None) -> Tensor | None:
        """The codes (B, W, step), or those (B, W) of one level."""
        if step is None or step == -1 or self.generated_sids is None:
            return self.generated_sids if step is None else None
        if step >= self.step:
            raise ValueError(f"Step {step} is not valid, current step is {self.step}")
        return self.generated_sids[:, :, step]

    def get_log_probs(self) -> Tensor | None:
        """The log-probabilities (B, W)."""
        return self.accumulated_log_probs


def trie_of_codebooks(model: Any) -> Trie:
    """The ``codebooks`` (num_items, L) of a model as a trie, on their device; built when first asked for, and kept."""
    kept = model.__dict__.get("_trie_of_codebooks")
    if kept is None or kept[0] is not model.codebooks:
        sizes = [model.num_embeddings_per_hierarchy] * model.codebooks.shape[1]
        kept = model.codebooks, Trie.from_codes(model.codebooks, codebook_sizes=sizes)
        model.__dict__["_trie_of_codebooks"] = kept
    return kept[1]


class _HasCodebooks:
    def trie_of_codebooks(self) -> Trie:
        """The semantic IDs as a trie, on their device."""
        return trie_of_codebooks(self)


class GridBeamSearch(_HasCodebooks):
    """The step of GRID's ``SemanticIDGenerativeRecommender``: a mixin, ``class Model(GridBeamSearch, TheirModel)``, or
    ``TheirModel._beam_search_one_step = GridBeamSearch._beam_search_one_step``."""

    top_k_for_generation: int

    def _beam_search_one_step(
        self,
        candidate_logits: Tensor,
        generated_ids: Tensor | None,
        marginal_log_prob: Tensor | None,
        past_key_values: Any,
        hierarchy: int,
        batch_size: int,
    ) -> tuple[Tensor, Tensor, Any]:
        """Logits (B * M, K), codes (B, M, t) and probabilities (B, M) -> (B, M, t + 1), (B, M), the cache."""
        log_probas = None if marginal_log_prob is None else marginal_log_prob.log()
        codes, scores, rows = extend_beams(
            trie_of_codebooks(self), candidate_logits, generated_ids, log_probas, self.top_k_for_generation
        )
        return codes, scores.exp(), _reordered(past_key_values, None if generated_ids is None else rows)


class RqVaeGeneration(_HasCodebooks):
    """``generate`` of RQ-VAE-Recommender's encoder-decoder: a mixin. Theirs draws 64 candidates per beam at random."""

    top_k_for_generation: int
    num_hierarchies: int

    @torch.no_grad()
    def generate(self, attention_mask: Tensor, input_ids: Tensor, user_id: Tensor | None = None) -> tuple[Any, Any]:
        """The best codes (B, M, L) and their log-probabilities (B, M)."""
        model: Any = self
        encoded, mask = model.encoder_forward_pass(attention_mask=attention_mask, input_ids=input_ids, user_id=user_id)
        cache, generated, log_probas, width = _reordered(None, None), None, None, self.top_k_for_generation
        for level in range(self.num_hierarchies):
            hidden, cache = model.decoder_forward_pass(
                future_ids=None if generated is None else generated.flatten(0, 1),
                encoder_output=encoded,
                attention_mask_for_encoder=mask,
                use_cache=True,
                past_key_values=cache,
            )
            logits = model.decoder_mlp[level](hidden[:, -1])
            trie = trie_of_codebooks(self)
            start = generated is None
            generated, log_probas, rows = extend_beams(trie, logits, generated, log_probas, width)
            cache = _reordered(cache, None if start else rows)
            if start:
                encoded, mask = (part.repeat_interleave(width, dim=0) for part in (encoded, mask))
        return generated, log_probas


def _reordered(cache: Any, rows: Tensor | None) -> Any:
    """The cache by ``rows``; an empty one at the start, where beams come to be, as both codes have it."""
    if rows is None:
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache

        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    if cache is not None:
        cache.reorder_cache(rows)
    return cache
