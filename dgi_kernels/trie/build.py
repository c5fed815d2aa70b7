"""From what callers give - codes, item ids, sizes - to the level-order arrays of a trie."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from dgi_kernels import backend as backends
from dgi_kernels import checks
from dgi_kernels.trie import native, reference
from dgi_kernels.trie.arrays import END, TrieArrays, count_dtype, token_dtype

INTEGER_DTYPES = (*checks.INDEX_DTYPES, torch.uint16, torch.uint32)
MAX_CODEBOOK_SIZE = 2**31 - 1  # tokens are int32 at most


def build_arrays(codes: Tensor, item_ids: Tensor | None, sizes: tuple[int, ...], backend: str) -> TrieArrays:
    """Build the arrays from padded ``codes`` (N, L) of any integer dtype, L >= 1, and ``item_ids`` (N,) int64.

    All backends give the same arrays.
    """
    native_or_not = backends.choose("trie_build", backend, codes.device) == "native"
    make = native.trie_arrays if native_or_not else reference.trie_arrays
    tokens, child_start, item_start, item_order = make(codes, token_dtype(sizes), count_dtype(len(codes)))
    return TrieArrays.make(tuple(tokens), tuple(child_start), item_start, item_order, item_ids, len(codes))


def code_ranges(codes: Tensor) -> tuple[list[int], list[int]]:
    """The least and the greatest code of each column of ``codes`` (N, L); 0 and -1 where there is no row."""
    native_or_not = backends.choose("trie_build", "auto", codes.device) == "native"
    low, high = (native.code_ranges if native_or_not else reference.code_ranges)(codes).tolist()
    return low, high


def integer_tensor(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """Take integers as a tensor, an array or a (nested) sequence; return int64 on ``device`` (default: where they are).

    What is empty holds no number of the wrong kind, so that ``[]`` and ``torch.tensor([])`` do as well.
    """
    return integers(name, value, device).to(torch.int64)


def integers(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """As :func:`integer_tensor`, of the dtype and in the memory of a tensor or an array, wherever that can be."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} must be a dense tensor with data; got layout {value.layout} on {value.device}")
        if value.dtype not in INTEGER_DTYPES:
            if value.numel():
                raise TypeError(f"{name} must hold integers; got dtype {value.dtype}")
            value = value.long()
        return value.detach().to(device=device)
    if isinstance(value, (set, frozenset, range)):
        value = list(value)
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise TypeError(
            f"{name} must be an integer tensor, array or sequence; got {type(value).__name__} ({error})"
        ) from None
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers that fit in 64 bits; got {_kind(value, array)}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit in int64; got {array.max()}")
    if array.dtype.kind not in "iu" or array.dtype == np.uint64:  # empty, or larger than torch's integers
        array = array.astype(np.int64)
    shareable = array.flags.writeable and array.dtype.isnative
    if not shareable or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")  # what torch cannot share
    return torch.from_numpy(array).to(device)


def _kind(value: object, array: np.ndarray) -> str:
    return f"dtype {array.dtype}" if isinstance(value, np.ndarray) else f"{type(value).__name__} of {array.dtype}"


def padded_codes(name: str, codes: object, device: torch.device | None = None) -> Tensor:
    """Take codes as an (N, L) tensor or array, or as a sequence of N sequences; return (N, L) integers, -1 where ended.

    Either may have -1 behind the end of a sequence. A tensor or an array is not copied.

    Raises:
        TypeError: not integers, or not such a collection.
        ValueError: a negative code, an empty sequence, no sequence at all (the depth would be unknown).
    """
    if isinstance(codes, (Tensor, np.ndarray)):
        table = integers(name, codes, device)
        if table.ndim != 2 or table.shape[1] == 0:
            raise ValueError(f"{name} must have shape (N, L) with L >= 1; got {tuple(table.shape)}")
        if min(code_ranges(table)[0]) < 0:
            _check_ends(name, table)
        return table
    if not isinstance(codes, Sequence) or isinstance(codes, (str, bytes)):
        raise TypeError(
            f"{name} must be an (N, L) integer tensor or array, or a list of sequences; got {type(codes).__name__}"
        )
    if not codes:
        raise ValueError(
            f"{name} must hold at least one sequence; an empty trie needs a tensor of shape (0, L), for its depth"
        )
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
    _check_ends(name, table)
    return table.to(device)


def _check_ends(name: str, table: Tensor) -> None:
    """The only negative codes of ``table`` (N, L) are -1 behind the end of a sequence, as a trie gives codes back."""
    ends = table == END
    first, later = ends[:, :1], ends[:, 1:]
    misplaced = torch.cat([first, torch.zeros_like(later)], 1)
    misplaced[:, :-1] |= ends[:, :-1] & ~later
    _refuse(name, table, (table < 0) & (~ends | misplaced), "must not be negative, but for -1 behind a sequence's end")


def _flatten(sequences: Sequence[object]) -> object:
    if all(isinstance(sequence, Tensor) for sequence in sequences):
        return torch.cat([sequence.flatten().cpu() for sequence in sequences])  # type: ignore[attr-defined]
    if all(isinstance(sequence, np.ndarray) for sequence in sequences):
        return np.concatenate([sequence.ravel() for sequence in sequences])  # type: ignore[attr-defined]
    return list(chain.from_iterable(sequences))  # type: ignore[arg-type]


def checked_sizes(name: str, codes: Tensor, codebook_sizes: object) -> tuple[int, ...]:
    """Return the codebook sizes of padded ``codes``, given or inferred as the largest code + 1, and check the codes."""
    depth, largest = codes.shape[1], code_ranges(codes)[1]
    if codebook_sizes is None:
        codebook_sizes = [code + 1 for code in largest]
    given = integer_tensor("codebook_sizes", codebook_sizes)
    if given.shape != (depth,):
        raise ValueError(
            f"codebook_sizes must have one size per level, shape ({depth},) for these codes; got {tuple(given.shape)}"
        )
    sizes = tuple(given.tolist())
    if min(sizes) < 0 or max(sizes) > MAX_CODEBOOK_SIZE:
        raise ValueError(f"codebook_sizes must be from 0 to {MAX_CODEBOOK_SIZE} (tokens are int32); got {sizes}")
    if any(code >= size for code, size in zip(largest, sizes, strict=True)):
        limit = torch.tensor(sizes, device=codes.device)
        _refuse(name, codes, codes.long() >= limit, f"must be less than its level's codebook size, {sizes}")
    return sizes


def _refuse(name: str, table: Tensor, bad: Tensor, rule: str) -> None:
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(f"{name}[{row}][{column}] {rule}; got {table[row, column].item()}")


def checked_ids(name: str, item_ids: object, rows: int, device: torch.device) -> Tensor | None:
    """Return ``rows`` distinct item ids as int64, in memory of their own; None where they are 0, 1, 2, …"""
    if item_ids is None:
        return None
    ids = integer_tensor(name, item_ids, device)
    if ids.shape != (rows,):
        raise ValueError(f"{name} must have one id per item, shape ({rows},); got {tuple(ids.shape)}")
    if torch.equal(ids, torch.arange(rows, device=device)):
        return None
    ordered = ids.sort().values
    repeated = ordered[1:] == ordered[:-1]
    if repeated.any():
        raise ValueError(f"{name} must be distinct; {ordered[1:][repeated][0].item()} appears more than once")
    return ids.clone()
