"""Which row stands at each place of a leaf order: int32 or int64, or three bytes each, the lowest first, below 2^24."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

PACKED = torch.uint8  # (3 N,)
MAX_ROWS = 2**24


def packed_rows(rows: Tensor) -> Tensor:
    """Rows (N,) of int32 or int64, each less than N, in three bytes each where they fit, else as they are."""
    if len(rows) > MAX_ROWS:
        return rows
    four = rows.to(torch.int32).view(torch.uint8).view(-1, 4)
    return (four[:, :3] if sys.byteorder == "little" else four.flip(1)[:, :3]).flatten()


def plain_rows(rows: Tensor) -> Tensor:
    """The rows (N,), as int32 if they were packed."""
    return rows if rows.dtype != PACKED else _number(rows.view(-1, 3).to(torch.int32))


def rows_at(rows: Tensor, places: Tensor) -> Tensor:
    """The rows at ``places`` (…) int64; (…) int64."""
    return rows[places].long() if rows.dtype != PACKED else _number(rows.view(-1, 3)[places].long())


def _number(parts: Tensor) -> Tensor:
    return parts[..., 0] | parts[..., 1] << 8 | parts[..., 2] << 16
