"""Ranking by a sum of what beams, vectors and popularity say, with weights chosen on validation data.

``score(n) = log P(semantic ID of n) + λ · cos(q, n) + β · b_n − α · log(1 + clicks of n) − log(items of that ID)``

with b_n the item's bias, if the model has learnt one. λ, β and α are chosen together, by NDCG@10, with the weight w of
the guide of :mod:`dgi.retrieval.guide`, which the beams are kept by. One search for each w finds the candidates of all
other settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dgi.data import Interactions
from dgi.retrieval.index import MAX_ITEM_SCORE, DGIIndex
from dgi.retrieval.search import Searcher
from dgi_kernels.beam import beam_widths

COSINE_WEIGHTS = (0.0, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 40.0, 60.0, 80.0, 120.0, 200.0, 400.0)
# Where the item softmax is of cos(q, n) / τ + b_n, the sum has 1 of the beam's and λτ of this one's log-probabilities.
TEMPERATURE = 0.05
BIAS_SHARES = (0.0, 0.5, 1.0, 2.0)  # β = share · λτ
POPULARITY_SHARES = (0.0, -0.25, -0.1, 0.1, 0.25, 0.5)  # α = share · (1 + λτ)
GUIDE_WEIGHTS = (0.0, 40.0, 160.0)
K = 10  # settings are chosen by NDCG at 10


@dataclass(frozen=True)
class RankingWeights:
    """Weights of the sum, and of the guide; where all of the sum are 0 the ranking is lexicographic.

    Attributes:
        cosine, bias, popularity: λ, β and α.
        guide: w, which is no part of the sum.
    """

    cosine: float = 0.0
    bias: float = 0.0
    popularity: float = 0.0
    guide: float = 0.0

    @property
    def lexicographic(self) -> bool:
        """Whether there is no sum."""
        return not (self.cosine or self.bias or self.popularity)

    def item_scores(self, bias: Tensor | None, counts: Tensor | None) -> Tensor:
        """(N,) float32: β · b_n − α · log(1 + clicks), or a 0 of any shape where neither counts."""
        scores = torch.zeros(())
        if self.bias and bias is not None:
            scores = scores + self.bias * bias.detach().float().cpu()
        if self.popularity and counts is not None:
            scores = scores - self.popularity * counts.float().cpu().log1p()
        return scores

    def applied(self, index: DGIIndex, bias: Tensor | None, counts: Tensor | None) -> DGIIndex:
        """The index with these weights, which searches go by from then on."""
        scores = self.item_scores(bias, counts)
        scores = scores - scores.mean()
        kept = None if scores.ndim == 0 else scores.clamp(-MAX_ITEM_SCORE, MAX_ITEM_SCORE).to(index.vectors.device)
        return index.replaced(cosine_weight=self.cosine, item_scores=kept, guide_weight=self.guide)


@dataclass(frozen=True, eq=False)
class Candidates:
    """What one search of n requests found: all items below its beams, (n, C) each, and how many share an ID."""

    items: Tensor
    scores: Tensor
    cosines: Tensor
    log_share: Tensor

    @classmethod
    def find(cls, searcher: Searcher, queries: Interactions, **search: Any) -> Candidates:
        """Search with ``search`` as :meth:`dgi.Searcher.search_interactions` takes it, but for the order."""
        widest = max(beam_widths(search.get("num_beams", 50), searcher.index.trie.depth))
        items_of_id = searcher.index.items_of_id()
        k = min(len(searcher.index), widest * int(items_of_id.max()))
        found = searcher.search_interactions(queries, k=k, order="lexicographic", **search)
        share = items_of_id.float().log()[found.items.clamp(min=0)]
        return cls(found.items, found.scores, found.cosines, share)

    def ranked(self, weights: RankingWeights, item_scores: Tensor, k: int) -> Tensor:
        """(n, k) the best items by the sum; the order of the search where all weights are 0."""
        if weights.lexicographic:
            return self.items[:, :k]
        scores = self._sums(weights, item_scores)
        best = scores.topk(min(k, scores.shape[1]), dim=1).indices
        return self.items.gather(1, best)

    def _sums(self, weights: RankingWeights, item_scores: Tensor) -> Tensor:
        own = item_scores[self.items.clamp(min=0)] if item_scores.ndim else item_scores
        return self.scores + weights.cosine * self.cosines + own - self.log_share  # padding stays at -inf

    def with_target(self, targets: Tensor) -> tuple[Candidates, Tensor]:
        """Those of the requests that have found their target (n,), and the places where it is among them."""
        is_target = self.items == targets.unsqueeze(1)
        rows = is_target.any(1).nonzero().flatten()
        parts = (part[rows] for part in (self.items, self.scores, self.cosines, self.log_share))
        return Candidates(*parts), is_target[rows].to(torch.uint8).argmax(1)

    def gains(self, places: Tensor, weights: RankingWeights, item_scores: Tensor, k: int) -> Tensor:
        """(n,) float64 what the target at each of ``places`` gains in NDCG@k by its rank in the sum; of equal sums the
        first candidate is the better one."""
        ranks = places
        if not weights.lexicographic:
            scores = self._sums(weights, item_scores)
            own, before = scores.gather(1, places.unsqueeze(1)), torch.arange(scores.shape[1]) < places.unsqueeze(1)
            ranks = ((scores > own) | ((scores == own) & before)).sum(1)
        return torch.where(ranks < k, 1 / (ranks.double() + 2).log2(), 0.0)


def choose_weights(
    searcher: Searcher,
    validation: Interactions,
    *,
    counts: Tensor | None = None,
    cosine: Sequence[float] = COSINE_WEIGHTS,
    bias: Sequence[float] = BIAS_SHARES,
    popularity: Sequence[float] = POPULARITY_SHARES,
    guide: Sequence[float] = GUIDE_WEIGHTS,
    **search: Any,
) -> tuple[RankingWeights, Mapping[RankingWeights, float]]:
    """Choose the weights of the sum by NDCG@10.

    Args:
        searcher: model, index and catalog.
        validation: what was neither trained on nor will be tested on.
        counts: (N,) clicks of the items in training; without them α is 0.
        cosine, guide: the λ and w to try.
        bias, popularity: the shares to try, see :data:`BIAS_SHARES` and :data:`POPULARITY_SHARES`.
        **search: ``num_beams``, ``exclude_history`` and ``progress`` of :meth:`dgi.Searcher.search_interactions`.

    Returns:
        The best weights, the first of equals, and the NDCG@10 of all.

    Raises:
        ValueError: there are no interactions or no weights.
    """
    if len(validation) == 0 or len(cosine) == 0 or len(guide) == 0:
        raise ValueError(
            f"there must be interactions and weights; got {len(validation)} interactions, {len(cosine)} weights of the "
            f"cosine and {len(guide)} of the guide"
        )
    own = searcher.model.item_bias
    targets = torch.from_numpy(validation.items)
    tried = {}
    for of_guide in sorted(guide):
        found, places = Candidates.find(searcher, validation, guide_weight=of_guide, **search).with_target(targets)
        for value in sorted(cosine):
            biases = bias if value and own is not None else (0.0,)
            powers = popularity if value and counts is not None else (0.0,)
            for of_bias, of_popularity in itertools.product(biases, powers):
                logs = value * TEMPERATURE
                weights = RankingWeights(value, of_bias * logs, of_popularity * (1.0 + logs), of_guide)
                gains = found.gains(places, weights, weights.item_scores(own, counts), K)
                tried[weights] = float(gains.sum()) / len(validation)
    return max(tried, key=tried.__getitem__), tried


def hit_rate_and_ndcg(items: Tensor, targets: Tensor) -> tuple[float, float]:
    """Of (n, k) results with one target each."""
    hits = items == targets[:, None]
    gains = hits.double() / torch.arange(2, items.shape[1] + 2).double().log2()
    return float(hits.any(1).double().mean()), float(gains.sum(1).mean())
