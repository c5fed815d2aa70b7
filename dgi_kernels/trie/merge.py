"""One trie of several: shards of a catalog, built apart, become the trie of the whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgi_kernels import backend as backends
from dgi_kernels.trie import build, native
from dgi_kernels.trie.arrays import TrieArrays, count_dtype, token_dtype


def merged_sizes(name: str, sizes: Sequence[tuple[int, ...]], inferred: Sequence[bool]) -> tuple[int, ...]:
    """The codebook sizes of the whole: those given, which must agree and be enough, else the largest inferred.

    Raises:
        ValueError: they do not.
    """
    depths = sorted({len(of_shard) for of_shard in sizes})
    if len(depths) > 1:
        raise ValueError(
            f"{name} must have one depth; got {depths}: build shards of shorter sequences from tables with -1 behind "
            "their ends"
        )
    given = sorted({of_shard for of_shard, guess in zip(sizes, inferred, strict=True) if not guess})
    if len(given) > 1:
        raise ValueError(f"{name} must agree in their codebook sizes; got {given[0]} and {given[1]}")
    largest = tuple(map(max, zip(*sizes, strict=True)))
    if given and largest != given[0]:
        raise ValueError(f"{name} must have codes below the codebook sizes {given[0]}; those of one need {largest}")
    return largest


def merged_ids(name: str, shards: Sequence[TrieArrays], renumber: bool) -> Tensor | None:
    """The ids of all rows, shard by shard; None where they are 0, 1, 2, …"""
    if renumber or len(shards) == 1:
        return None if renumber else shards[0].item_ids
    first = 0
    for shard in shards:  # without an array where they count on from shard to shard
        low, high = shard.id_bounds
        counted = shard.item_ids is None or bool((shard.item_ids.diff() == 1).all())
        if shard.num_items and not (counted and (low, high) == (first, first + shard.num_items - 1)):
            break
        first += shard.num_items
    else:
        return None
    ids = torch.cat([shard.ids() for shard in shards])
    ordered = ids.sort().values
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        raise ValueError(
            f"{name} must hold items of distinct ids; {int(ordered[1:][repeated][0])} is in two of them. Where each "
            "shard counts its rows from 0, renumber=True counts on from shard to shard"
        )
    return ids


def merge_arrays(
    shards: Sequence[TrieArrays], item_ids: Tensor | None, sizes: tuple[int, ...], backend: str
) -> TrieArrays:
    """The arrays that a build of all shards' codes would give.

    In C++ the shards' arrays are walked together: besides the result nothing is held. The reference builds anew from
    all codes.
    """
    device, rows = shards[0].device, sum(shard.num_items for shard in shards)
    if backends.choose("trie_build", backend, device) != "native":
        codes = torch.cat([shard.codes(token_dtype(sizes)) for shard in shards])
        return build.build_arrays(codes, item_ids, sizes, "reference")
    tokens, child_start, item_start, item_order = native.trie_merge(
        [tokens.to(token_dtype(sizes)) for shard in shards for tokens in shard.tokens],
        [starts for shard in shards for starts in shard.child_start],
        [shard.item_start for shard in shards],
        [shard.item_order for shard in shards],
        [shard.num_items for shard in shards],
        count_dtype(rows),
    )
    return TrieArrays.make(tuple(tokens), tuple(child_start), item_start, item_order, item_ids, rows)
