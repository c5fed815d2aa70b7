"""From codes to level-order arrays.

Sort the items' codes lexicographically.  A node at depth t is a maximal run of sorted rows that share their first t
codes, so it begins at each row whose first difference from the row before lies in the first t columns.  Nodes of one
depth are numbered in that order: the children of a node become a contiguous run of the next depth, sorted by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dgi_kernels import backend as backends
from dgi_kernels import checks
from dgi_kernels.trie import native, reference

END = -1  # the token of a sequence that has ended; it sorts before every code
INTEGER_DTYPES = (*checks.INDEX_DTYPES, torch.uint16, torch.uint32)
MAX_CODEBOOK_SIZE = 2**31 - 1  # tokens are int32


class TrieArrays(NamedTuple):
    """The arrays of a trie of depth L over N items; n_t is the number of nodes at depth t, and n_0 = 1 (the root)."""

    tokens: tuple[Tensor, ...]  # tokens[t]: (n_{t+1},) int32, the edges out of depth t; -1 marks the end of a sequence
    child_start: tuple[Tensor, ...]  # child_start[t]: (n_t + 1,) int64, node i of depth t has children [s[i], s[i+1])
    item_start: Tensor  # (n_L + 1,) int64: leaf i holds the items [s[i], s[i+1]) of the leaf order
    item_order: Tensor  # (N,) int64: the row, as given at build, of each item in leaf order
    item_ids: Tensor  # (N,) int64: the id of each row, as given at build


def sort_rows(codes: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Run ``trie_sort`` (see :func:`reference.trie_sort`) on the backend chosen; all of them agree bit for bit."""
    if backends.choose("trie_build", backend, codes.device) == "native":
        return native.trie_sort(codes)
    return reference.trie_sort(codes)


def build_arrays(codes: Tensor, item_ids: Tensor, backend: str) -> TrieArrays:
    """Build the arrays from padded ``codes`` (N, L) int64, L >= 1, and ``item_ids`` (N,) int64."""
    order, first_diff = sort_rows(codes, backend)
    rows, depth = codes.shape
    tokens, child_start = [], []
    starts = torch.zeros(1, dtype=torch.int64, device=codes.device)  # first sorted row of each node; here of the root
    for t in range(depth):
        child_rows = (first_diff <= t).nonzero().squeeze(1)
        child_start.append(_closed(torch.searchsorted(child_rows, starts), len(child_rows)))
        tokens.append(codes[order[child_rows], t].to(torch.int32))
        starts = child_rows
    return TrieArrays(tuple(tokens), tuple(child_start), _closed(starts, rows), order, item_ids)


def _closed(starts: Tensor, end: int) -> Tensor:
    return torch.cat([starts, starts.new_tensor([end])])


def integer_tensor(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """Take integers as a tensor, an array or a (nested) sequence; return int64 on ``device`` (default: where they are).

    What is empty holds no number of the wrong kind, so that ``[]`` and ``torch.tensor([])`` do as well.
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} must be a dense tensor with data; got layout {value.layout} on {value.device}")
        if value.numel() and value.dtype not in INTEGER_DTYPES:
            raise TypeError(f"{name} must hold integers; got dtype {value.dtype}")
        return value.detach().to(device=device, dtype=torch.int64)
    if isinstance(value, (set, frozenset, range)):
        value = list(value)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise TypeError(f"{name} must be an integer tensor, array or sequence; got {type(value).__name__} "
                        f"({error})") from None
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers that fit in 64 bits; got {_kind(value, array)}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit in int64; got {array.max()}")
    return torch.from_numpy(np.array(array, dtype=np.int64)).to(device)


def _kind(value: object, array: np.ndarray) -> str:
    return f"dtype {array.dtype}" if isinstance(value, np.ndarray) else f"{type(value).__name__} of {array.dtype}"


def padded_codes(name: str, codes: object, device: torch.device | None = None) -> Tensor:
    """Take codes as an (N, L) tensor or array, or as a sequence of N sequences; return (N, L) int64, -1 where ended.

    Raises:
        TypeError: not integers, or not such a collection.
        ValueError: a negative code, an empty sequence, no sequence at all (the depth would be unknown).
    """
    if isinstance(codes, (Tensor, np.ndarray)):
        table = integer_tensor(name, codes, device)
        if table.ndim != 2 or table.shape[1] == 0:
            raise ValueError(f"{name} must have shape (N, L) with L >= 1; got {tuple(table.shape)}")
        _refuse(name, table, table < 0, "must not be negative (give sequences of unequal length as a list)")
        return table
    if not isinstance(codes, Sequence) or isinstance(codes, (str, bytes)):
        raise TypeError(f"{name} must be an (N, L) integer tensor or array, or a list of sequences; "
                        f"got {type(codes).__name__}")
    if not codes:
        raise ValueError(f"{name} must hold at least one sequence; an empty trie needs a tensor of shape (0, L), "
                         "for its depth")
    return _pad(name, codes, device)


def _pad(name: str, sequences: Sequence[object], device: torch.device | None) -> Tensor:
    try:
        lengths = torch.tensor(list(map(len, sequences)))  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be a list of sequences; one of them has no length") from None
    if int(lengths.min()) == 0:
        raise ValueError(f"{name}[{int(lengths.argmin())}] is empty: a sequence needs at least one code")
    flat = integer_tensor(name, _flatten(sequences), torch.device("cpu"))
    if flat.shape != (int(lengths.sum()),):  # of lists of lists, the first level is all that has been undone
        raise ValueError(f"{name} must be a list of flat sequences of integers; got sequences of sequences")
    column = torch.arange(int(lengths.max()))
    inside = column < lengths.unsqueeze(1)
    table = torch.full(inside.shape, END, dtype=torch.int64)
    table[inside] = flat
    _refuse(name, table, inside & (table < 0), "must not be negative")
    return table.to(device)


def _flatten(sequences: Sequence[object]) -> object:
    if all(isinstance(sequence, Tensor) for sequence in sequences):
        return torch.cat([sequence.flatten().cpu() for sequence in sequences])  # type: ignore[attr-defined]
    if all(isinstance(sequence, np.ndarray) for sequence in sequences):
        return np.concatenate([sequence.ravel() for sequence in sequences])  # type: ignore[attr-defined]
    return list(chain.from_iterable(sequences))  # type: ignore[arg-type]


def checked_sizes(name: str, codes: Tensor, codebook_sizes: object) -> tuple[int, ...]:
    """Return the codebook sizes of padded ``codes``, given or inferred as the largest code + 1, and check the codes."""
    depth = codes.shape[1]
    if codebook_sizes is None:
        codebook_sizes = codes.amax(dim=0) + 1 if len(codes) else [0] * depth
    given = integer_tensor("codebook_sizes", codebook_sizes)
    if given.shape != (depth,):
        raise ValueError(f"codebook_sizes must have one size per level, shape ({depth},) for these codes; "
                         f"got {tuple(given.shape)}")
    sizes = tuple(given.tolist())
    if min(sizes) < 0 or max(sizes) > MAX_CODEBOOK_SIZE:
        raise ValueError(f"codebook_sizes must be from 0 to {MAX_CODEBOOK_SIZE} (tokens are int32); got {sizes}")
    limit = torch.tensor(sizes, device=codes.device)
    _refuse(name, codes, codes >= limit, f"must be less than its level's codebook size, {sizes}")
    return sizes


def _refuse(name: str, table: Tensor, bad: Tensor, rule: str) -> None:
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}[{row}][{column}] {rule}; got {table[row, column].item()}")


def checked_ids(name: str, item_ids: object, rows: int, device: torch.device) -> Tensor:
    """Return ``rows`` distinct item ids as int64; None numbers the rows 0, 1, …"""
    if item_ids is None:
        return torch.arange(rows, device=device)
    ids = integer_tensor(name, item_ids, device)
    if ids.shape != (rows,):
        raise ValueError(f"{name} must have one id per item, shape ({rows},); got {tuple(ids.shape)}")
    ordered = ids.sort().values
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        raise ValueError(f"{name} must be distinct; {ordered[1:][repeated][0].item()} appears more than once")
    return ids
