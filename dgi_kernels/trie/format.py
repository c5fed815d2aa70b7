"""The trie's file: written whole, versioned, checksummed, without pickle; ``README.md`` in this folder specifies it.

A checksum finds accidents.  Every invariant that a search relies on is checked besides, so that even a file made to
harm cannot make one read outside of an array.
"""

from __future__ import annotations

import hashlib
import json
import mmap as mapping
import os
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dgi_kernels.files import atomic_write
from dgi_kernels.trie.build import END, MAX_CODEBOOK_SIZE, TrieArrays

MAGIC = b"DGITRIE\n"
VERSION = 1
PREFIX = struct.Struct("<8sIIQ")  # magic, version, bytes of the JSON header, bytes of the whole file
DIGEST_BYTES = hashlib.sha256().digest_size
ALIGNMENT = 64
STORED_DTYPES: dict[str, np.dtype[np.signedinteger[Any]]] = {"int32": np.dtype("<i4"), "int64": np.dtype("<i8")}


class TrieFormatError(ValueError):
    """A trie file or state is truncated, altered, of another version, or does not describe a trie."""


def named_arrays(arrays: TrieArrays) -> dict[str, Tensor]:
    """The arrays by the names that files use, in the order in which files hold them."""
    levels = {f"tokens.{t}": tokens for t, tokens in enumerate(arrays.tokens)}
    levels |= {f"child_start.{t}": starts for t, starts in enumerate(arrays.child_start)}
    return {**levels, "item_start": arrays.item_start, "item_order": arrays.item_order, "item_ids": arrays.item_ids}


def arrays_by_name(named: Mapping[str, Tensor], depth: int) -> TrieArrays:
    """The inverse of :func:`named_arrays`."""
    return TrieArrays(tuple(named[f"tokens.{t}"] for t in range(depth)),
                      tuple(named[f"child_start.{t}"] for t in range(depth)),
                      named["item_start"], named["item_order"], named["item_ids"])


def write(path: str | os.PathLike[str], arrays: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write named int32 and int64 vectors and JSON data to ``path``, whole or not at all."""
    listing = [[name, str(array.dtype).removeprefix("torch."), len(array)] for name, array in arrays.items()]
    header = json.dumps({"meta": meta, "arrays": listing}, separators=(",", ":")).encode()
    sizes = [PREFIX.size + len(header), *(array.nbytes for array in arrays.values())]
    total = sum(map(_aligned, sizes)) + DIGEST_BYTES
    with atomic_write(path) as file:
        digest = hashlib.sha256()
        _put(file, digest, PREFIX.pack(MAGIC, VERSION, len(header), total) + header)
        for array in arrays.values():
            _put(file, digest, _little_endian(array))
        file.write(digest.digest())


def _put(file: BinaryIO, digest: Any, data: bytes | memoryview) -> None:
    for part in (data, bytes(_aligned(len(data)) - len(data))):
        file.write(part)
        digest.update(part)


def _little_endian(array: Tensor) -> memoryview:
    values = array.cpu().contiguous().numpy()
    return values.astype(values.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def read(path: str | os.PathLike[str], mmap: bool) -> tuple[TrieArrays, tuple[int, ...], bool]:
    """Read what :func:`write` wrote, in memory or mapped from the file; return what the constructor of Trie takes."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < PREFIX.size + DIGEST_BYTES:
            raise TrieFormatError(f"{path}: truncated or no trie file: it has {size} bytes")
        if mmap:
            # A private, writable mapping: torch has no read-only tensors, and what is written never reaches the file.
            data: Any = mapping.mmap(file.fileno(), 0, access=mapping.ACCESS_COPY)
        else:
            data = bytearray(size)
            if file.readinto(data) != size:
                raise TrieFormatError(f"{path}: changed while it was read")
    try:
        return checked_state(*_parse(data))
    except TrieFormatError as error:
        raise TrieFormatError(f"{path}: {error}") from None


def _parse(data: Any) -> tuple[dict[str, Tensor], Any]:
    magic, version, header_bytes, total = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise TrieFormatError("no trie file: it does not begin with the trie's magic number")
    if version != VERSION:
        raise TrieFormatError(f"format version {version}; this library reads version {VERSION}")
    if total != len(data):
        raise TrieFormatError(f"truncated or altered: it has {len(data)} bytes and should have {total}")
    view = memoryview(data)
    if hashlib.sha256(view[:-DIGEST_BYTES]).digest() != view[-DIGEST_BYTES:]:
        raise TrieFormatError("altered: its checksum does not match")
    try:
        header = json.loads(bytes(view[PREFIX.size:PREFIX.size + header_bytes]))
        return _map_arrays(data, _aligned(PREFIX.size + header_bytes), header["arrays"]), header["meta"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise TrieFormatError(f"the header cannot be read: {error}") from None


def _map_arrays(data: Any, offset: int, listing: list[list[Any]]) -> dict[str, Tensor]:
    """The arrays that the header lists, each at the next aligned offset; together they fill the file."""
    arrays: dict[str, Tensor] = {}
    for name, dtype, length in listing:
        stored = STORED_DTYPES[dtype]
        if not isinstance(length, int) or length < 0 or offset + length * stored.itemsize > len(data) - DIGEST_BYTES:
            raise ValueError(f"array {name} of {length} elements exceeds the file")
        values = np.frombuffer(data, stored, count=length, offset=offset)
        arrays[name] = torch.from_numpy(values.astype(stored.newbyteorder("="), copy=False))
        offset += _aligned(values.nbytes)
    if offset != len(data) - DIGEST_BYTES:
        raise ValueError(f"its arrays end at byte {offset}, not at the checksum")
    return arrays


def checked_state(arrays: Mapping[str, Tensor], meta: Mapping[str, Any]) -> tuple[TrieArrays, tuple[int, ...], bool]:
    """Check that arrays and meta describe a trie; return what the constructor of Trie takes."""
    sizes, inferred = _checked_meta(meta)
    depth = len(sizes)
    expected = {f"tokens.{t}" for t in range(depth)} | {f"child_start.{t}" for t in range(depth)}
    expected |= {"item_start", "item_order", "item_ids"}
    if not isinstance(arrays, Mapping):
        raise TrieFormatError(f"the arrays must be a mapping from names to tensors; got {type(arrays).__name__}")
    if set(arrays) != expected:
        raise TrieFormatError(f"the wrong arrays for depth {depth}: {sorted(map(str, set(arrays) ^ expected))}")
    for name, array in arrays.items():
        dtype = torch.int32 if name.startswith("tokens") else torch.int64
        if not isinstance(array, Tensor) or array.dtype != dtype or array.ndim != 1:
            raise TrieFormatError(f"array {name} must be a vector of {dtype}")
    trie = arrays_by_name(arrays, depth)
    nodes = 1
    ended = trie.item_ids.new_zeros(1, dtype=torch.bool)
    for t in range(depth):
        _check_runs(f"child_start.{t}", trie.child_start[t], nodes, len(trie.tokens[t]), may_be_empty=t == 0)
        ended = _check_tokens(t, trie.tokens[t], trie.child_start[t], sizes[t], ended)
        nodes = len(trie.tokens[t])
    _check_runs("item_start", trie.item_start, nodes, len(trie.item_ids))
    _check_permutation(trie.item_order, len(trie.item_ids))
    return trie, sizes, inferred


def _checked_meta(meta: Mapping[str, Any]) -> tuple[tuple[int, ...], bool]:
    if not isinstance(meta, Mapping) or set(meta) != {"codebook_sizes", "sizes_inferred"}:
        raise TrieFormatError("meta must hold codebook_sizes and sizes_inferred")
    sizes, inferred = meta["codebook_sizes"], meta["sizes_inferred"]
    if not isinstance(sizes, (list, tuple)) or not sizes or not all(map(_is_size, sizes)):
        raise TrieFormatError(f"codebook_sizes must be a list of sizes, one per level; got {sizes!r}")
    if not isinstance(inferred, bool):
        raise TrieFormatError(f"sizes_inferred must be true or false; got {inferred!r}")
    return tuple(sizes), inferred


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_CODEBOOK_SIZE


def _check_runs(name: str, starts: Tensor, runs: int, total: int, may_be_empty: bool = False) -> None:
    """``starts`` (runs + 1,) cuts 0 … total into runs, none of them empty; only the root of an empty trie has none."""
    shortest = 0 if may_be_empty and total == 0 else 1
    if len(starts) != runs + 1 or starts[0] != 0 or starts[-1] != total or bool((starts.diff() < shortest).any()):
        raise TrieFormatError(f"array {name} does not cut {total} elements into {runs} runs")


def _check_tokens(t: int, tokens: Tensor, starts: Tensor, size: int, ended: Tensor) -> Tensor:
    """The tokens of a run ascend, within the codebook; -1 ends a sequence for good. Return which nodes have ended."""
    if len(tokens) and not (int(tokens.min()) >= END and int(tokens.max()) < size):
        raise TrieFormatError(f"tokens.{t} holds codes outside of its codebook of {size}")
    first_of_run = torch.zeros_like(tokens, dtype=torch.bool)
    first_of_run[starts[:-1][starts[:-1] < len(tokens)]] = True
    if bool(((tokens.diff() <= 0) & ~first_of_run[1:]).any()):
        raise TrieFormatError(f"tokens.{t} holds codes that do not ascend below a node")
    ends = tokens == END
    below_ended = ended.repeat_interleave(starts.diff())
    if bool((below_ended & ~ends).any()) or (t == 0 and bool(ends.any())):
        raise TrieFormatError(f"tokens.{t} holds codes after the end of a sequence, or an empty sequence")
    return ends


def _check_permutation(order: Tensor, total: int) -> None:
    if len(order) != total:
        raise TrieFormatError(f"item_order has {len(order)} elements for {total} items")
    seen = torch.zeros(total, dtype=torch.bool, device=order.device)
    if total and not (int(order.min()) >= 0 and int(order.max()) < total):
        raise TrieFormatError("item_order holds rows that do not exist")
    seen[order] = True
    if not bool(seen.all()):
        raise TrieFormatError("item_order repeats a row")
