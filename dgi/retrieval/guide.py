"""Guided beams: what the codes so far say of the cosine, added to what the decoder says of them.

Results are ranked by a sum in which the cosine of query and item counts, while beams are kept by the decoder's score
alone, so that near items are lost before they are ranked. A guide is a vector v_{j,k} of every code, such that
``v_{1,c_1} + … + v_{t,c_t}`` is near the unit vectors of the items below the prefix c_1 … c_t, and beams are kept by

    ``Σ_j log P(c_j | q, c_{<j}) + w · ẑ_q · v_{j,c_j}``

In a request this takes one product of its vector with each codebook of guides, whatever the size of the catalog. The
scores of the beams that are left are then the decoder's again. This is not in the paper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import BeamResult, HiddenStates, cosine_logits, log_normalizer

Step = Callable[[int, Tensor | None, Tensor | None], Tensor | HiddenStates]
MAX_WEIGHT = 1e4  # beyond it nothing else counts, and scores lose their last digits
_ROWS = 1 << 16  # items whose rest is in memory at once


def fit_guides(vectors: Tensor, codes: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The mean, over the items with code k at level j, of what the levels before have left of their vectors.

    Unlike the model's codebooks they are of the items as they are, with codes that have been moved or kept.

    Args:
        vectors: (N, d) float32 unit vectors of the items, on the CPU, where the order of sums is always the same.
        codes: (N, m) int64, -1 behind the end of a semantic ID.
        sizes: K_j of every level.

    Returns:
        m tensors (K_j, d) float32; 0 for codes that no item has.
    """
    guides: list[Tensor] = []
    for level, size in enumerate(sizes):
        sums, counts = vectors.new_zeros(size, vectors.shape[1]), torch.zeros(size, dtype=torch.int64)
        for rows, own in zip(vectors.split(_ROWS), codes.split(_ROWS), strict=True):
            known = own[:, level] >= 0
            rest = rows[known]
            for guide, column in zip(guides, own[known].T, strict=False):
                rest = rest - guide[column]
            sums.index_add_(0, own[known, level], rest)
            counts += torch.bincount(own[known, level], minlength=size)
        guides.append(sums / counts.clamp(min=1).unsqueeze(1))
    return tuple(guides)


class Guide:
    """The guides of a batch of requests.

    Args:
        query: (B, d) vectors of the requests, of any length.
        guides: of :func:`fit_guides`.
        weight: w, what the cosine counts.
    """

    def __init__(self, query: Tensor, guides: Sequence[Tensor], weight: float) -> None:
        with torch.autocast(query.device.type, enabled=False):
            unit = weight * F.normalize(query.float(), dim=1)
            self.scores = [unit @ guide.T for guide in guides]  # (B, K_j)

    def guided(self, step: Step) -> Step:
        """The step of a search with ``normalize="none"``: log-probabilities and what the guide adds to them."""

        def log_probabilities(depth: int, tokens: Tensor | None, parents: Tensor | None) -> Tensor:
            found = step(depth, tokens, parents)
            with torch.autocast(self.scores[depth].device.type, enabled=False):
                if isinstance(found, HiddenStates):  # in float32 whatever their dtype, as a search without a guide
                    found = cosine_logits(found.h.float(), found.codebook.float(), found.scale, eps=found.eps)
                logits = found.float()
                return (logits - log_normalizer(logits).unsqueeze(-1)).add_(self.scores[depth].unsqueeze(1))

        return log_probabilities

    def without(self, beams: BeamResult) -> BeamResult:
        """The beams with what the guide has added taken off, in the order that it has given them."""
        left = beams.scores
        for scores, codes in zip(self.scores, beams.codes.unbind(2), strict=True):
            left = left - scores.gather(1, codes.clamp(min=0)).masked_fill(codes < 0, 0)
        return beams._replace(scores=left)
