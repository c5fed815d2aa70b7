"""Calls into the compiled extension: the sort of trie construction in C++."""

from __future__ import annotations

import torch
from torch import Tensor


def trie_sort(codes: Tensor) -> tuple[Tensor, Tensor]:
    """``codes`` (N, L) int64 on the CPU, at least -1 -> ``order``, ``first_diff`` (N,) int64.

    ``order`` is the stable lexicographic order of the rows; ``first_diff[i]`` the first column in which sorted row i
    differs from sorted row i - 1, L where they are equal, 0 for i = 0.
    """
    return torch.ops.dgi_kernels.trie_sort(codes.contiguous())
