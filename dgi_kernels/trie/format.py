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
from dgi_kernels.trie.arrays import END, TrieArrays, count_dtype, token_dtype
from dgi_kernels.trie.build import MAX_CODEBOOK_SIZE
from dgi_kernels.trie.rows import MAX_ROWS, plain_rows
from dgi_kernels.trie.rows import PACKED as PACKED_ROWS
from dgi_kernels.trie.starts import MARKS, marks_length, plain_starts

MAGIC = b"DGITRIE\n"
VERSION = 3
OLDEST_VERSION = 2  # had no packed arrays
PREFIX = struct.Struct("<8sIIQ")  # magic, version, bytes of the JSON header, bytes of the whole file
DIGEST_BYTES = hashlib.sha256().digest_size
ALIGNMENT = 64
STORED_DTYPES: dict[str, np.dtype[np.integer[Any]]] = {
    "int16": np.dtype("<i2"),
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "uint8": np.dtype("<u1"),
    "uint64": np.dtype("<u8"),
}
META = {"codebook_sizes", "sizes_inferred", "num_items", "max_degree", "max_items", "id_bounds"}
PACKED = {"item_start": MARKS, "item_order": PACKED_ROWS}  # these two may be packed
OPTIONAL = {"item_start", "item_order", "item_ids"}  # left out where they are 0, 1, 2, …


class TrieFormatError(ValueError):
    """A trie file or state is truncated, altered, of another version, or does not describe a trie."""


def state(trie: TrieArrays, sizes: tuple[int, ...], inferred: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays by the names that files use, and what else a trie is made of."""
    return trie.named(), {
        "codebook_sizes": list(sizes),
        "sizes_inferred": inferred,
        "num_items": trie.num_items,
        "max_degree": list(trie.max_degree),
        "max_items": list(trie.max_items),
        "id_bounds": list(trie.id_bounds),
    }


def write(path: str | os.PathLike[str], arrays: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write named vectors of integers and JSON data to ``path``, whole or not at all."""
    listing = [[name, str(array.dtype).removeprefix("torch."), len(array)] for name, array in arrays.items()]
    header = json.dumps({"meta": meta, "arrays": listing}, separators=(",", ":")).encode()
    sizes = [PREFIX.size + len(header) + DIGEST_BYTES, *(array.nbytes for array in arrays.values())]
    total = sum(map(_aligned, sizes)) + DIGEST_BYTES
    start = PREFIX.pack(MAGIC, VERSION, len(header), total) + header
    with atomic_write(path) as file:
        digest = hashlib.sha256()
        _put(file, digest, start + hashlib.sha256(start).digest())
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


def read(path: str | os.PathLike[str], mmap: bool, verify: bool) -> tuple[TrieArrays, tuple[int, ...], bool]:
    """Read what :func:`write` wrote, in memory or mapped from the file.

    Returns:
        The arrays, the codebooks' sizes, and whether they were inferred.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < PREFIX.size + 2 * DIGEST_BYTES:
            raise TrieFormatError(f"{path}: truncated or no trie file: it has {size} bytes")
        if mmap:
            # A private, writable mapping: torch has no read-only tensors, and what is written never reaches the file.
            data: Any = mapping.mmap(file.fileno(), 0, access=mapping.ACCESS_COPY)
        else:
            data = bytearray(size)
            if file.readinto(data) != size:
                raise TrieFormatError(f"{path}: changed while it was read")
    try:
        return checked_state(*_parse(data, verify), verify)
    except TrieFormatError as error:
        raise TrieFormatError(f"{path}: {error}") from None


def _parse(data: Any, verify: bool) -> tuple[dict[str, Tensor], Any]:
    magic, version, header_bytes, total = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise TrieFormatError("no trie file: it does not begin with the trie's magic number")
    if not OLDEST_VERSION <= version <= VERSION:
        raise TrieFormatError(f"format version {version}; this library reads versions {OLDEST_VERSION} to {VERSION}")
    if total != len(data):
        raise TrieFormatError(f"truncated or altered: it has {len(data)} bytes and should have {total}")
    view, end = memoryview(data), PREFIX.size + header_bytes
    if hashlib.sha256(view[:end]).digest() != view[end : end + DIGEST_BYTES]:
        raise TrieFormatError("altered: the checksum of its header does not match")
    if verify and hashlib.sha256(view[:-DIGEST_BYTES]).digest() != view[-DIGEST_BYTES:]:
        raise TrieFormatError("altered: its checksum does not match")
    try:
        header = json.loads(bytes(view[PREFIX.size : end]))
        return _map_arrays(data, _aligned(end + DIGEST_BYTES), header["arrays"]), header["meta"]
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


def checked_state(
    arrays: Mapping[str, Tensor], meta: Mapping[str, Any], verify: bool = True
) -> tuple[TrieArrays, tuple[int, ...], bool]:
    """Check that arrays and meta describe a trie; without ``verify`` only that their names, types and sizes do."""
    sizes, inferred, num_items = _checked_meta(meta)
    depth = len(sizes)
    required = {f"{kind}.{t}" for kind in ("tokens", "child_start") for t in range(depth)}
    if not isinstance(arrays, Mapping):
        raise TrieFormatError(f"the arrays must be a mapping from names to tensors; got {type(arrays).__name__}")
    wrong = (set(arrays) ^ required) - OPTIONAL if required <= set(arrays) else set(arrays) ^ required
    if wrong:
        raise TrieFormatError(f"the wrong arrays for depth {depth}: {sorted(map(str, wrong))}")
    for name, array in arrays.items():
        dtype = (
            torch.int64
            if name == "item_ids"
            else token_dtype(sizes)
            if name.startswith("tokens")
            else count_dtype(num_items)
        )
        if not isinstance(array, Tensor) or array.dtype not in (dtype, PACKED.get(name)) or array.ndim != 1:
            raise TrieFormatError(f"array {name} must be a vector of {dtype}")
    trie = TrieArrays(
        tuple(arrays[f"tokens.{t}"] for t in range(depth)),
        tuple(arrays[f"child_start.{t}"] for t in range(depth)),
        arrays.get("item_start"),
        arrays.get("item_order"),
        arrays.get("item_ids"),
        num_items,
        tuple(meta["max_degree"]),
        tuple(meta["max_items"]),
        tuple(meta["id_bounds"]),
    )
    _check_sizes(trie)
    if verify:
        _check_structure(trie, sizes)
    return trie, sizes, inferred


def _checked_meta(meta: Mapping[str, Any]) -> tuple[tuple[int, ...], bool, int]:
    if not isinstance(meta, Mapping) or set(meta) != META:
        raise TrieFormatError(f"meta must hold {', '.join(sorted(META))}")
    sizes, inferred = meta["codebook_sizes"], meta["sizes_inferred"]
    if not isinstance(sizes, (list, tuple)) or not sizes or not all(map(_is_size, sizes)):
        raise TrieFormatError(f"codebook_sizes must be a list of sizes, one per level; got {sizes!r}")
    if not isinstance(inferred, bool):
        raise TrieFormatError(f"sizes_inferred must be true or false; got {inferred!r}")
    if not _is_count(meta["num_items"]):
        raise TrieFormatError(f"num_items must be a number of items; got {meta['num_items']!r}")
    for name, length in (("max_degree", len(sizes)), ("max_items", len(sizes) + 1)):
        numbers = meta[name]
        if not isinstance(numbers, (list, tuple)) or len(numbers) != length or not all(map(_is_count, numbers)):
            raise TrieFormatError(f"{name} must be a list of {length} numbers; got {numbers!r}")
    bounds = meta["id_bounds"]
    if not isinstance(bounds, (list, tuple)) or [type(bound) for bound in bounds] != [int, int]:
        raise TrieFormatError(f"id_bounds must be two numbers; got {bounds!r}")
    return tuple(sizes), inferred, meta["num_items"]


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_CODEBOOK_SIZE


def _check_sizes(trie: TrieArrays) -> None:
    """The arrays fit each other in size, so far as their lengths tell; that takes no time."""
    nodes = 1
    for t, (starts, tokens) in enumerate(zip(trie.child_start, trie.tokens, strict=True)):
        _check_length(f"child_start.{t}", starts, nodes + 1)
        nodes = len(tokens)
    if trie.item_start is not None:
        packed = trie.item_start.dtype == MARKS
        _check_length("item_start", trie.item_start, marks_length(nodes, trie.num_items) if packed else nodes + 1)
    elif nodes != trie.num_items:
        raise TrieFormatError(f"there must be item_start, or as many leaves as items, {trie.num_items}; got {nodes}")
    if trie.item_order is not None:
        packed = trie.item_order.dtype == PACKED_ROWS
        _check_length("item_order", trie.item_order, 3 * min(trie.num_items, MAX_ROWS) if packed else trie.num_items)
    if trie.item_ids is not None:
        _check_length("item_ids", trie.item_ids, trie.num_items)


def _check_length(name: str, array: Tensor, length: int) -> None:
    if len(array) != length:
        raise TrieFormatError(f"array {name} has {len(array)} elements; it must have {length}")


def _check_structure(trie: TrieArrays, sizes: tuple[int, ...]) -> None:
    ended = torch.zeros(1, dtype=torch.bool, device=trie.device)
    for t in range(trie.depth):
        _check_runs(f"child_start.{t}", trie.child_start[t], len(trie.tokens[t]), may_be_empty=t == 0)
        ended = _check_tokens(t, trie.tokens[t], trie.child_start[t], sizes[t], ended)
    item_start = trie.item_start
    if item_start is not None:
        item_start = plain_starts(item_start, trie.num_items, count_dtype(trie.num_items))
        _check_length("item_start, unpacked,", item_start, len(trie.tokens[-1]) + 1)
        _check_runs("item_start", item_start, trie.num_items)
    if trie.item_order is not None:
        _check_permutation(plain_rows(trie.item_order))
    made = TrieArrays.make(trie.tokens, trie.child_start, item_start, None, trie.item_ids, trie.num_items)
    if trie.item_start is not None and trie.item_start.dtype == MARKS:
        packed = made.item_start
        if packed is None or packed.dtype != MARKS or not torch.equal(packed, trie.item_start):
            raise TrieFormatError("item_start is not packed as the starts that it holds should be")
    for name in ("max_degree", "max_items", "id_bounds"):
        if getattr(made, name) != getattr(trie, name):
            raise TrieFormatError(f"{name} is {getattr(trie, name)}, but that of the arrays {getattr(made, name)}")


def _check_runs(name: str, starts: Tensor, total: int, may_be_empty: bool = False) -> None:
    """``starts`` cuts 0 … total into runs, none of them empty; only the root of an empty trie has none."""
    ascends = starts[1:] >= starts[:-1] if may_be_empty and total == 0 else starts[1:] > starts[:-1]
    if starts[0] != 0 or starts[-1] != total or not bool(ascends.all()):
        raise TrieFormatError(f"array {name} does not cut {total} elements into {len(starts) - 1} runs")


def _check_tokens(t: int, tokens: Tensor, starts: Tensor, size: int, ended: Tensor) -> Tensor:
    """The tokens of a run ascend, within the codebook; -1 ends a sequence for good. Return which nodes have ended."""
    if len(tokens) and not (int(tokens.min()) >= END and int(tokens.max()) < size):
        raise TrieFormatError(f"tokens.{t} holds codes outside of its codebook of {size}")
    first_of_run = torch.zeros_like(tokens, dtype=torch.bool)
    first_of_run[starts[:-1][starts[:-1] < len(tokens)].long()] = True
    if bool(((tokens[1:] <= tokens[:-1]) & ~first_of_run[1:]).any()):
        raise TrieFormatError(f"tokens.{t} holds codes that do not ascend below a node")
    ends = tokens == END
    below_ended = ended.repeat_interleave(starts.diff())
    if bool((below_ended & ~ends).any()) or (t == 0 and bool(ends.any())):
        raise TrieFormatError(f"tokens.{t} holds codes after the end of a sequence, or an empty sequence")
    return ends


def _check_permutation(order: Tensor) -> None:
    if len(order) and not (int(order.min()) >= 0 and int(order.max()) < len(order)):
        raise TrieFormatError("item_order holds rows that do not exist")
    seen = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    seen[order.long()] = True
    if not bool(seen.all()):
        raise TrieFormatError("item_order repeats a row")
