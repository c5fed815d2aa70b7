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
    rows = len(probabilities)
    group, own_group = codes.new_zeros(len(item_codes)), codes.new_zeros(rows)  # prefixes so far, of items and rows
    targets, left, left_codes = [], probabilities, item_codes.expand(rows, -1, -1)  # of the items below own prefixes
    for level, size in enumerate(sizes):
        if level:
            members = _members(group, own_group)
            below = members >= 0
            members = members.clamp(min=0)
            left, left_codes = probabilities.gather(1, members) * below, item_codes[members]
        summed = left.new_zeros(rows, size).scatter_add_(1, left_codes[..., level], left)
        own = F.one_hot(codes[:, level], size).to(summed.dtype)
        total = summed.sum(1, keepdim=True)
        softened = torch.where(total > _LEAST, summed / total.clamp(min=_LEAST), own)
        targets.append(share * softened + (1 - share) * own)
        of_both = torch.cat([group * size + item_codes[:, level], own_group * size + codes[:, level]])
        group, own_group = torch.unique(of_both, return_inverse=True)[1].split([len(group), rows])
    return targets


def _members(group: Tensor, own: Tensor) -> Tensor:
    """(B, S) the items n with ``group[n] == own[b]`` for every row b, then -1; S the most that a row has."""
    counts = torch.bincount(group, minlength=int(own.max()) + 1 if len(own) else 0)
    ends, sizes = counts.cumsum(0)[own], counts[own]
    place = torch.arange(int(sizes.max()) if len(own) else 0, device=own.device)
    at = (ends - sizes)[:, None] + place
    return torch.where(place < sizes[:, None], group.argsort(stable=True)[at.clamp(max=len(group) - 1)], -1)
