"""Calls into the compiled extension: trie construction and sets of items in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgi_kernels._extension import fake_kernel

Arrays = tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]


def code_ranges(codes: Tensor) -> Tensor:
    """As :func:`reference.code_ranges`, for any strides."""
    return torch.ops.dgi_kernels.code_ranges(codes)


def trie_arrays(codes: Tensor, token_dtype: torch.dtype, count_dtype: torch.dtype) -> Arrays:
    """As :func:`reference.trie_arrays`, for any strides."""
    narrow = token_dtype == torch.int16, count_dtype == torch.int32
    return _by_kind(torch.ops.dgi_kernels.trie_arrays(codes, *narrow), codes.shape[1])


def trie_merge(
    tokens: Sequence[Tensor],
    child_start: Sequence[Tensor],
    item_start: Sequence[Tensor | None],
    item_order: Sequence[Tensor | None],
    items: list[int],
    count_dtype: torch.dtype,
) -> Arrays:
    """What :func:`trie_arrays` gives for the codes of several tries, one behind the other, from their arrays.

    ``tokens`` and ``child_start`` of every level of the first, then of the next; the others once for each.
    """
    starts, orders = (
        [torch.empty(0, dtype=torch.int32) if array is None else array for array in arrays]
        for arrays in (item_start, item_order)
    )
    narrow = count_dtype == torch.int32
    arrays = torch.ops.dgi_kernels.trie_merge(list(tokens), list(child_start), starts, orders, items, narrow)
    return _by_kind(arrays, len(tokens) // len(items))


def _by_kind(arrays: list[Tensor], depth: int) -> Arrays:
    item_start, item_order = (array if len(array) else None for array in arrays[2 * depth :])
    return arrays[:depth], arrays[depth : 2 * depth], item_start, item_order


def find_children(tokens: Tensor, child_start: Tensor, nodes: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`reference.find_children`."""
    shape = nodes.shape
    places, found = torch.ops.dgi_kernels.find_children(
        tokens, child_start, nodes.flatten().contiguous(), codes.flatten().contiguous()
    )
    return places.view(shape), found.view(shape)


def child_masks(tokens: Tensor, child_start: Tensor, codes: int) -> Tensor:
    """Which of ``codes`` codes the children of each node have: (nodes, codes / 32 rounded up) int32, bit c % 32 of word
    c / 32 for code c."""
    return torch.ops.dgi_kernels.child_masks(tokens, child_start, codes)


def parent_set(words: Tensor, ranks: Tensor, starts: Tensor, parents: int) -> tuple[Tensor, Tensor]:
    """As :func:`starts.parent_set`: words and ranks."""
    return torch.ops.dgi_kernels.parent_set(words, ranks, starts, parents)


def run_marks(starts: Tensor) -> Tensor:
    """Marks of ``starts`` (leaves + 1,) of int32 or int64; see ``starts.py``."""
    return torch.ops.dgi_kernels.run_marks(starts)


def run_starts(starts: Tensor, runs: Tensor) -> Tensor:
    """Where each of ``runs`` (…) starts, from marks."""
    return torch.ops.dgi_kernels.run_starts(starts, runs.flatten().contiguous()).view(runs.shape)


def item_set(members: Tensor, item_order: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`reference.item_set`, of as many words as there must be."""
    return torch.ops.dgi_kernels.item_set(members.contiguous(), item_order)


@fake_kernel("code_ranges")
def _(codes: Tensor) -> Tensor:
    return codes.new_empty((2, codes.shape[1]), dtype=torch.int64)


@fake_kernel("find_children")
def _(tokens: Tensor, child_start: Tensor, nodes: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(nodes), torch.empty_like(nodes, dtype=torch.bool)


@fake_kernel("child_masks")
def _(tokens: Tensor, child_start: Tensor, codes: int) -> Tensor:
    return tokens.new_empty((child_start.shape[0] - 1, (codes + 31) // 32), dtype=torch.int32)


@fake_kernel("item_set")
def _(members: Tensor, item_order: Tensor | None) -> tuple[Tensor, Tensor]:
    return _fake_set(members, members.shape[0])


@fake_kernel("parent_set")
def _(words: Tensor, ranks: Tensor, starts: Tensor, parents: int) -> tuple[Tensor, Tensor]:
    return _fake_set(words, parents)


@fake_kernel("run_starts")
def _(starts: Tensor, runs: Tensor) -> Tensor:
    return torch.empty_like(runs)


def _fake_set(like: Tensor, places: int) -> tuple[Tensor, Tensor]:
    blocks = places // 512 + 1
    return like.new_empty(8 * blocks, dtype=torch.int64), like.new_empty(blocks, dtype=torch.int64)
