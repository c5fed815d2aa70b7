"""Next-token targets from a softmax over items: what a prefix's items have together, its next code should have.

``T_j(k) = Σ_{n: c(n)_{<j} = c_{<j}, c(n)_j = k} P(n | q)  /  Σ_{n: c(n)_{<j} = c_{<j}} P(n | q)``

with c the codes of the item clicked. It is the softmax over all items as a distribution over codes, level by level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST = 1e-9  # of a prefix that the softmax gives nothing


@torch.no_grad()
def code_targets(
    probabilities: Tensor, item_codes: Tensor, codes: Tensor, sizes: Sequence[int], share: float
) -> list[Tensor]:
    """Target distributions (B, K_j) of every level: ``share`` of T_j, and the rest on the code itself.

    Args:
        probabilities: (B, N) of all items.
        item_codes: (N, m) int64 their codes.
        codes: (B, m) int64 codes of the items clicked.
        sizes: K_j of every level.
        share: from 0 to 1.
    """
    targets, left = [], probabilities
    for level, size in enumerate(sizes):
        summed = left.new_zeros(len(left), size).index_add_(1, item_codes[:, level], left)
        own = F.one_hot(codes[:, level], size).to(summed.dtype)
        total = summed.sum(1, keepdim=True)
        softened = torch.where(total > _LEAST, summed / total.clamp(min=_LEAST), own)
        targets.append(share * softened + (1 - share) * own)
        left = left * (item_codes[:, level] == codes[:, level : level + 1])
    return targets
