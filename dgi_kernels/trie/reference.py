"""Trie construction and sets of items in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def code_ranges(codes: Tensor) -> Tensor:
    """The least and the greatest code of each column: ``codes`` (N, L) of any integer dtype -> (2, L) int64.

    Of no rows 0 and -1.
    """
    if len(codes) == 0:
        return torch.tensor([[0], [-1]], device=codes.device).expand(-1, codes.shape[1])
    return torch.stack(codes.long().aminmax(dim=0))


def trie_arrays(
    codes: Tensor, token_dtype: torch.dtype, count_dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor | None, Tensor | None]:
    """Derive the level-order arrays from padded codes.

    Sort the rows lexicographically.  A node at depth t is a maximal run of sorted rows that share their first t codes,
    so it begins at each row whose first difference from the row before lies in the first t columns.

    Args:
        codes: (N, L) integers, -1 where a sequence has ended.
        token_dtype: int16 or int32.
        count_dtype: int32 or int64.

    Returns:
        ``tokens`` and ``child_start`` of each depth, ``item_start`` and ``item_order``, as in :class:`TrieArrays`; the
        last two None where they are 0, 1, 2, …
    """
    order, first_diff = trie_sort(codes.long())
    rows, depth = codes.shape
    tokens, child_start = [], []
    starts = torch.zeros(1, dtype=torch.int64, device=codes.device)  # first sorted row of each node; here of the root
    for t in range(depth):
        child_rows = (first_diff <= t).nonzero().squeeze(1)
        child_start.append(_closed(torch.searchsorted(child_rows, starts), len(child_rows)).to(count_dtype))
        tokens.append(codes[order[child_rows], t].to(token_dtype))
        starts = child_rows
    in_order = torch.equal(order, torch.arange(rows, device=order.device))
    return (
        tokens,
        child_start,
        None if len(starts) == rows else _closed(starts, rows).to(count_dtype),
        None if in_order else order.to(count_dtype),
    )


def trie_sort(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the rows of ``codes`` (N, L) int64 lexicographically, the last column first, and say where neighbours part.

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


def _closed(starts: Tensor, end: int) -> Tensor:
    return torch.cat([starts, starts.new_tensor([end])])


def find_children(tokens: Tensor, child_start: Tensor, nodes: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Look for the child of each of ``nodes`` (…) int64 (-1: none) by its code, by binary search in its run of tokens.

    Returns:
        ``places``, the first child whose token is not less, or the end of the run; and whether it is that of the code.
        Of a node -1 0 and False.
    """
    if len(tokens) == 0:
        return torch.zeros_like(nodes), torch.zeros_like(nodes, dtype=torch.bool)
    low, end = child_start[nodes.clamp(min=0)].long(), child_start[nodes.clamp(min=0) + 1].long()
    high = end
    for _ in range(len(tokens).bit_length()):
        middle = (low + high) // 2
        right = (low < high) & (tokens[middle.clamp(max=len(tokens) - 1)] < codes)
        low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
    found = (nodes >= 0) & (low < end) & (tokens[low.clamp(max=len(tokens) - 1)] == codes)
    return torch.where(nodes >= 0, low, 0), found


def run_starts(ranks: Tensor, words: Tensor, runs: Tensor) -> Tensor:
    """The places of the ones that as many ones come before as ``runs`` (…) int64 say: run i begins at that of i.

    Args:
        ranks: (blocks,) int64, the number of ones before each block.
        words: (blocks, words) int64, the bits.
        runs: (…), each less than there are ones.
    """
    block = torch.searchsorted(ranks, runs, right=True) - 1
    before = runs - ranks[block]
    through = count_ones(words[block]).cumsum(-1)  # ones up to each word of the block
    word = (through <= before.unsqueeze(-1)).sum(-1)
    before = before - torch.where(word > 0, through.gather(-1, (word - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1), 0)
    bits, place = words[block, word], 64 * (words.shape[1] * block + word)
    for half in (32, 16, 8, 4, 2, 1):
        low = count_ones(bits & (1 << half) - 1)
        above = before >= low
        bits, before = torch.where(above, bits >> half, bits), torch.where(above, before - low, before)
        place = torch.where(above, place + half, place)
    return place


def count_ones(words: Tensor) -> Tensor:
    """The number of bits that are 1 in each int64."""
    words = words - (words >> 1 & 0x5555555555555555)
    words = (words & 0x3333333333333333) + (words >> 2 & 0x3333333333333333)
    words = words + (words >> 4) & 0x0F0F0F0F0F0F0F0F
    return words * 0x0101010101010101 >> 56


def item_set(members: Tensor, item_order: Tensor | None, words: int, block_words: int) -> tuple[Tensor, Tensor]:
    """The bits of ``members`` (N,) bool, given by row, in the leaf order, and the ranks of their blocks.

    Returns:
        (words,) int64, bit p % 64 of word p // 64 that of place p, and (words / block_words,) int64, the number of
        members before each block.
    """
    by_place = members if item_order is None else members[item_order]
    bits = torch.nn.functional.pad(by_place, (0, 64 * words - len(by_place))).view(words, 64)
    place = torch.arange(64, device=bits.device)
    per_block = bits.view(-1, 64 * block_words).sum(1)
    return (bits.long() << place).sum(1), per_block.cumsum(0) - per_block
