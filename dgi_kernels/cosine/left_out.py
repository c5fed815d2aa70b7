"""Columns that leave a row's softmax although the row's target is not among the columns.

The fused loss leaves out the columns with the id of the target and never the target itself.  Where the target is
elsewhere its place is taken by the first column with its id, and log Z + log(1 - exp(-nll)) is without that one too,
with no cancellation; where no column has the id, by a column more, whose bias leaves it no weight beside any other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LEAST = -1e30  # bias of the column more: not -inf, so that a row without any other column has no NaN


class Columns(NamedTuple):
    """Which of K columns stand for the item of each of N rows.

    Attributes:
        ids: (K + 1,) int64 ids in [0, K), alike where the items are; K for the column more.
        first: (N,) the first column with the row's item; K where there is none.
        row_ids: (N,) the id of the row's item, as in ``ids``; K where there is none.
    """

    ids: Tensor
    first: Tensor
    row_ids: Tensor

    @property
    def found(self) -> Tensor:
        return self.first < len(self.ids) - 1


def find(items: Tensor, columns: Tensor) -> Columns:
    """``items`` (N,) and ``columns`` (K,) int64: the item of each row, and of each column."""
    count = columns.shape[0]
    values, order = columns.sort(stable=True)
    ids = torch.cat([torch.searchsorted(values, columns), columns.new_full((1,), count)])
    if count == 0:
        nowhere = torch.zeros_like(items)
        return Columns(ids, nowhere, nowhere)
    at = torch.searchsorted(values, items).clamp(max=count - 1)
    found = values[at] == items
    return Columns(ids, torch.where(found, order[at], count), torch.where(found, at, count))


def without_target(nll: Tensor, log_normalizer: Tensor, where: Tensor) -> Tensor:
    """(N,) the log normalizers; those ``where`` is true without the target's term, -inf if there is no other."""
    share = -torch.expm1(-torch.where(where, nll, 1.0))  # of all but the target
    has_others = share > 0
    less = log_normalizer + torch.where(has_others, share, 1.0).log()
    return torch.where(where, less.masked_fill(~has_others, -torch.inf), log_normalizer)
