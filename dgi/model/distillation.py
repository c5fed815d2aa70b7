"""Next-token targets from a softmax over items: what a prefix's items have together, its next code should have.

``T_j(k) = Σ_{n: c(n)_{<j} = c_{<j}, c(n)_j = k} P(n | q)  /  Σ_{n: c(n)_{<j} = c_{<j}} P(n | q)``

with c the codes of the item clicked. It is the softmax over all items as a distribution over codes, level by level.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    left, left_codes = probabilities, item_codes.expand(len(codes), -1, -1)  # of items below each row's own prefix
    prefix, own_prefix = codes.new_zeros(len(item_codes)), codes.new_zeros(len(codes))
    targets = []
    for level, size in enumerate(sizes):
        summed = left.new_zeros(len(codes), size).scatter_add_(1, left_codes[..., level], left)
        own = torch.zeros_like(summed).scatter_(1, codes[:, level, None], 1)
        total = summed.sum(1, keepdim=True)
        softened = torch.where(total > _LEAST, summed / total.clamp(min=_LEAST), own)
        targets.append(share * softened + (1 - share) * own)
        if level + 1 == len(sizes):
            break
        if not _narrows(left.device):
            left = left * (item_codes[:, level] == codes[:, level, None])
            continue
        of_both = torch.cat([prefix * size + item_codes[:, level], own_prefix * size + codes[:, level]])
        prefix, own_prefix = torch.unique(of_both, return_inverse=True)[1].split([len(item_codes), len(codes)])
        members = _members(prefix, own_prefix)
        left = probabilities.gather(1, members.clamp(min=0)) * (members >= 0)
        left_codes = item_codes[members.clamp(min=0)]
    return targets


def _narrows(device: torch.device) -> bool:
    """Whether to gather the items below each prefix. Where their number would have to be waited for, all items stay,
    those of other prefixes with probability 0."""
    return device.type == "cpu"


def _members(group: Tensor, own: Tensor) -> Tensor:
    """(B, S) the items n with ``group[n] == own[b]`` for every row b, then -1; S the most that a row has."""
    counts = torch.bincount(group, minlength=int(own.max()) + 1 if len(own) else 0)
    ends, sizes = counts.cumsum(0)[own], counts[own]
    place = torch.arange(int(sizes.max()) if len(own) else 0, device=own.device)
    at = (ends - sizes)[:, None] + place
    return torch.where(place < sizes[:, None], group.argsort(stable=True)[at.clamp(max=len(group) - 1)], -1)
