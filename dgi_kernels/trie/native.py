"""Calls into the compiled extension: trie construction and sets of items in C++."""

from __future__ import annotations

import torch
from torch import Tensor


def code_ranges(codes: Tensor) -> Tensor:
    """The least and the greatest code of each column: ``codes`` (N, L) of any integer dtype and strides -> (2, L) int64.

    Of no rows 0 and -1.
    """
    return torch.ops.dgi_kernels.code_ranges(codes)


def trie_arrays(codes: Tensor, ranges: Tensor, token_dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor],
                                                                                   Tensor | None, Tensor | None]:
    """As :func:`reference.trie_arrays`; ``ranges`` from :func:`code_ranges`."""
    depth = codes.shape[1]
    arrays = torch.ops.dgi_kernels.trie_arrays(codes, ranges, token_dtype == torch.int16)
    item_start, item_order = arrays[2 * depth:]
    return (arrays[:depth], arrays[depth:2 * depth], item_start if len(item_start) else None,
            item_order if len(item_order) or not len(codes) else None)


def item_words(rows: Tensor, size: int, item_order: Tensor | None) -> Tensor:
    """As :func:`reference.item_words`."""
    return torch.ops.dgi_kernels.item_words(rows.contiguous(), size, item_order)
