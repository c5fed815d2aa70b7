"""The beam search of ``generate`` over a trie: beams that run on, and the best semantic IDs that have ended.

Nothing is as large as beams x vocabulary but the logits: of those one log-sum-exp is taken, and the trie's children.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgi.integrations.tokens import CodeTokens
from dgi_kernels import Beams, NodeScores, Trie, beam_step, log_normalizer
from dgi_kernels.trie.arrays import END
from dgi_kernels.trie.filters import Filters
from dgi_kernels.types import Backend


class StepScores(NamedTuple):
    """What the beams of one step may go on with.

    Attributes:
        vocabulary: (B, W, V) logits, or log-probabilities where ``processed``.
        processed: whether logits processors have been applied: then the scores need no normaliser and may be positive.
    """

    vocabulary: Tensor
    processed: bool


# (depth, codes, parents) -> StepScores; codes and parents as for beam_search
Step = Callable[[int, Tensor | None, Tensor | None], StepScores]


class Found(NamedTuple):
    """The best M semantic IDs of B requests, best first; dead rows have score -inf.

    Attributes:
        codes: (B, M, L) int64, -1 behind the end of a shorter one and in dead rows.
        scores: (B, M) float32, penalised for length.
        ends: (B, M) int64, which of the end tokens follows.
    """

    codes: Tensor
    scores: Tensor
    ends: Tensor


class Hypotheses:
    """Beams and hypotheses of all requests.

    Each step ranks the continuations of the running beams, ends among them. Where M_t beams survive its level, an end
    among the first M_t becomes a hypothesis, with its score penalised for length; the first M_t that are no ends run
    on. Of the hypotheses the best M are kept, as many as survive the last level. A request whose running beams cannot,
    by the estimate of ``early_stopping``, beat its worst hypothesis takes no more.

    Args:
        trie: the trie.
        tokens: the spelling of its codes, with at least one end token.
        batch: requests B.
        widths: M_t of each level, L numbers.
        length_penalty, early_stopping: as for ``generate``.
        filters, backend, node_scores, strength: of the beam steps. With a strength below 0 scores may rise, so that no
            request is closed.
    """

    def __init__(
        self,
        trie: Trie,
        tokens: CodeTokens,
        batch: int,
        widths: list[int],
        length_penalty: float,
        early_stopping: bool | str,
        filters: Filters,
        backend: Backend,
        node_scores: NodeScores | None = None,
        strength: float | Tensor = 1.0,
    ) -> None:
        self.trie, self.tokens, self.widths = trie, tokens, widths
        num_beams = widths[-1]
        self.length_penalty, self.early_stopping = length_penalty, early_stopping
        self.options: dict[str, Any] = {
            "filters": filters,
            "backend": backend,
            "node_scores": node_scores,
            "strength": strength,
        }
        rises = torch.as_tensor(strength, device=trie.device) < 0 if node_scores is not None else torch.tensor(False)
        self.may_rise = rises.to(trie.device).expand(batch).unsqueeze(1)
        self.running = trie.root(batch)
        self.running_codes = torch.empty(batch, 1, 0, dtype=torch.int64, device=trie.device)
        self.found = Found(
            torch.full((batch, num_beams, trie.depth), END, device=trie.device),
            torch.full((batch, num_beams), -torch.inf, device=trie.device),
            torch.zeros(batch, num_beams, dtype=torch.int64, device=trie.device),
        )
        self.improving = torch.ones(batch, 1, dtype=torch.bool, device=trie.device)

    def run(self, step: Step) -> Found:
        """Search the whole depth, and once more for the ends."""
        for depth in range(self.trie.depth + 1):
            start = depth == 0
            scores = step(depth, None if start else self.running.tokens, None if start else self.running.parents)
            self._extend(self._processed(scores.vocabulary) if scores.processed else self._ranked(scores.vocabulary))
        return self.found

    def _ranked(self, logits: Tensor) -> _Candidates:
        """The candidates by ``logits`` (B, W, V), all that can count."""
        depth = self.running.depth
        normalizer = log_normalizer(logits)
        end_scores = (self.tokens.of_ends(logits) - normalizer.unsqueeze(-1)).nan_to_num(nan=-torch.inf).float()
        if depth == self.trie.depth:
            return self._with_ends(self._all_end(), end_scores)
        # With an end as good as its parent, so no less than it will be, as many as there are parents and survivors hold
        # all that can count: there is at most one end of the trie per parent, and behind M_t better candidates it is
        # none of the first M_t.
        return self._with_ends(
            beam_step(
                self.trie,
                self.tokens.level(logits, depth),
                self.running,
                num_beams=self.widths[depth] + self.running.nodes.shape[1],
                log_normalizer=normalizer,
                **self.options,
            ),
            end_scores,
        )

    def _processed(self, scores: Tensor) -> _Candidates:
        """The candidates by processed ``scores`` (B, W, V), where an end may be better than its parent."""
        depth = self.running.depth
        end_scores = self.tokens.of_ends(scores).nan_to_num(nan=-torch.inf)
        if depth == self.trie.depth:
            return self._with_ends(self._all_end(), end_scores)
        level, width = self.tokens.level(scores, depth), self.running.nodes.shape[1]
        codes, ends = (
            beam_step(
                self.trie,
                values,
                self.running,
                num_beams=count,
                normalize="none",
                **self.options,
            )
            for values, count in (
                (level, 2 * self.widths[depth] + width),
                (torch.full_like(level[:1, :1], -torch.inf).expand_as(level), width),
            )
        )
        codes = codes._replace(
            nodes=codes.nodes.masked_fill(codes.tokens < 0, -1),
            scores=codes.scores.masked_fill(codes.tokens < 0, -torch.inf),
        )
        return self._with_ends(
            Beams(
                torch.cat([codes.nodes, ends.nodes], 1),
                torch.cat([codes.tokens, ends.tokens], 1),
                torch.cat([codes.parents, ends.parents], 1),
                torch.cat([codes.scores, ends.scores], 1),
                depth + 1,
            ),
            end_scores,
        )

    def _all_end(self) -> Beams:
        """Behind the last code: every beam is its own parent, and all end."""
        parents = torch.arange(self.running.nodes.shape[1], device=self.trie.device).expand_as(self.running.nodes)
        return self.running._replace(tokens=torch.full_like(parents, END), parents=parents)

    def _with_ends(self, found: Beams, end_scores: Tensor) -> _Candidates:
        """``found`` with each end once per end token, at its score (B, W, n); sorted by score."""
        parents = found.parents.long().clamp(min=0)
        ends = (found.nodes >= 0) & (found.tokens < 0)
        of_parents = _rows(end_scores, parents)
        first, *others = of_parents.unbind(-1)
        place = torch.arange(ends.shape[1], device=ends.device).expand_as(ends)
        scores = torch.cat(
            [found.scores + first.masked_fill(~ends, 0)]
            + [(found.scores + other).masked_fill(~ends, -torch.inf) for other in others],
            dim=1,
        )
        number = torch.arange(1 + len(others), device=ends.device).repeat_interleave(ends.shape[1])
        place = place.repeat(1, 1 + len(others))
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        place = place.gather(1, order)
        parents, tokens = parents.gather(1, place), found.tokens.gather(1, place)
        codes = torch.cat([_rows(self.running_codes, parents), tokens.long().unsqueeze(2)], dim=2)
        return _Candidates(
            found.nodes.gather(1, place),
            tokens,
            found.parents.gather(1, place),
            scores,
            codes,
            ends.gather(1, place),
            number[order],
        )

    def _width(self, depth: int) -> int:
        """M_t of the step behind ``depth`` codes; behind the last code all end."""
        return self.widths[min(depth, self.trie.depth - 1)]

    def _extend(self, candidates: _Candidates) -> None:
        depth = self.running.depth
        self._finish(candidates, depth)
        runs = candidates.is_end.to(torch.uint8).argsort(dim=1, stable=True)[:, : self._width(depth)]
        self.running = Beams(
            candidates.nodes.gather(1, runs),
            candidates.tokens.gather(1, runs),
            candidates.parents.gather(1, runs),
            candidates.scores.gather(1, runs),
            depth + 1,
        )
        self.running_codes = _rows(candidates.codes, runs)
        self._look_ahead(depth + 1)

    def _finish(self, candidates: _Candidates, depth: int) -> None:
        """Take the ends among the first M candidates into the hypotheses."""
        first = torch.arange(candidates.is_end.shape[1], device=self.trie.device) < self._width(depth)
        taken = candidates.is_end & first & self.improving
        if self.early_stopping is True:
            taken &= self.found.scores[:, -1:] == -torch.inf
        codes = torch.nn.functional.pad(candidates.codes, (0, self.trie.depth - candidates.codes.shape[2]), value=END)
        penalised = (candidates.scores / (depth + 1) ** self.length_penalty).masked_fill(~taken, -torch.inf)
        scores, order = torch.cat([self.found.scores, penalised], 1).sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, : self.widths[-1]], order[:, : self.widths[-1]]
        codes = _rows(torch.cat([self.found.codes, codes[..., : self.trie.depth]], 1), order)
        codes = codes.masked_fill((scores == -torch.inf).unsqueeze(2), END)
        self.found = Found(codes, scores, torch.cat([self.found.ends, candidates.end_number], 1).gather(1, order))

    def _look_ahead(self, depth: int) -> None:
        """Close the requests whose best running beam, by the estimate, is no better than their worst hypothesis."""
        longest = self.early_stopping == "never" and self.length_penalty > 0
        length = self.trie.depth + 1 if longest else depth
        best = self.running.scores[:, :1] / length**self.length_penalty
        self.improving = self.improving & ((best > self.found.scores[:, -1:]) | self.may_rise)


class _Candidates(NamedTuple):
    """Continuations (B, C) of the running beams, sorted by score: what :class:`Beams` has, and more.

    Attributes:
        codes: (B, C, t) int64 all codes since the start, -1 for an end.
        is_end: (B, C) bool whether it is the end of a semantic ID.
        end_number: (B, C) int64 by which of the end tokens.
    """

    nodes: Tensor
    tokens: Tensor
    parents: Tensor
    scores: Tensor
    codes: Tensor
    is_end: Tensor
    end_number: Tensor


def _rows(values: Tensor, place: Tensor) -> Tensor:
    """``values`` (B, W, n) at ``place`` (B, M) along the second dimension."""
    return values.gather(1, place.unsqueeze(2).expand(-1, -1, values.shape[2]))
