"""Sorting rows of codes in plain PyTorch: least significant column first, each pass stable."""

from __future__ import annotations

import torch
from torch import Tensor


def trie_sort(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the rows of ``codes`` lexicographically and say where neighbours part.

    Args:
        codes: (N, L) int64, -1 where a sequence has ended.

    Returns:
        ``order`` (N,) int64, the stable lexicographic order of the rows, and ``first_diff`` (N,) int64: for sorted row
        i the first column in which it differs from sorted row i - 1, L where they are equal, 0 for i = 0.
    """
    rows, depth = codes.shape
    order = torch.arange(rows, device=codes.device)
    for column in reversed(codes.unbind(dim=1)):
        order = order[column[order].argsort(stable=True)]
    ordered = codes[order]
    differs = ordered[1:] != ordered[:-1]
    column_or_end = torch.where(differs, torch.arange(depth, device=codes.device), depth)
    first_diff = torch.zeros_like(order)
    first_diff[1:] = column_or_end.amin(dim=1)
    return order, first_diff
