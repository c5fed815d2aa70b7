"""Tiles of the Triton kernels that were measured on a GPU, in place of those that the launchers' tables hold.

A launcher asks :func:`pick` with the name of a pass (``"cosine.forward"``) and the dimensions of its tiles. What was
measured lies beside this file, one JSON file a GPU model, named after it (``nvidia-h200.json`` for "NVIDIA H200"):

    {"cosine.forward": {"64": [128, 64, 8, 3]}, "cosine.chunk_bytes": 33554432}

A tile is [rows or codes owned, those of a step, warps, stages]; what a file leaves out stays as the launcher has it.
``DGI_TILES`` in the environment names another file, by its path or by its name here; ``none`` means no file. The file
``four-warps.json`` has no program of more than one warpgroup.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

FOLDER = Path(__file__).parent
FALLBACK = "four-warps"
NUMBERS = ("cosine.chunk_bytes", "cosine.kept_bytes", "quantize.chunk_bytes")  # settings that are no tiles
PASSES = (
    "cosine.forward",
    "cosine.weight",
    "cosine.products",
    "quantize.forward",
    "quantize.probabilities",
    "quantize.weights",
    "softmax",
    "noise",
)


class Tiles(NamedTuple):
    """A program of a flash form owns some rows of one operand and passes over those of the other in steps."""

    owned: int
    step: int
    warps: int
    stages: int


class Measured(NamedTuple):
    """What one file holds: tiles by pass and dimensions, and numbers by name."""

    tiles: Mapping[tuple[str, int], Tiles]
    numbers: Mapping[str, int]


NOTHING = Measured({}, {})
_override: Measured | None = None


def pick(name: str, size: int, default: Tiles, device: torch.device) -> Tiles:
    """The tiles of a pass for ``size`` dimensions (codes, for noise and softmax): measured ones, or the default."""
    return _measured(device).tiles.get((name, size), default)


def number(name: str, default: int, device: torch.device) -> int:
    """A setting that is no tile, measured or the default."""
    return _measured(device).numbers.get(name, default)


@contextlib.contextmanager
def override(source: str | Mapping[str, object]) -> Iterator[None]:
    """Take the tiles of another file, or of a mapping like one, inside a ``with``: to measure them."""
    global _override
    before = _override
    _override = parse(source, "override") if isinstance(source, Mapping) else read(source)
    try:
        yield
    finally:
        _override = before


def _measured(device: torch.device) -> Measured:
    if _override is not None:
        return _override
    if device.type != "cuda":
        return NOTHING
    named = os.environ.get("DGI_TILES")
    return read(named) if named else _of_model(device)


@functools.cache
def _of_model(device: torch.device) -> Measured:
    path = FOLDER / f"{file_name(torch.cuda.get_device_name(device))}.json"
    return read(str(path)) if path.exists() else NOTHING


def file_name(model: str) -> str:
    """``"NVIDIA H200"`` -> ``"nvidia-h200"``"""
    return re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")


@functools.cache
def read(source: str) -> Measured:
    """The tiles of a file, given by its path or by its name in this folder; none for "none".

    Raises:
        ValueError: there is no such file, or what it holds are no tiles; the message names the entry.
    """
    if source == "none":
        return NOTHING
    path = next((path for path in (FOLDER / f"{source}.json", Path(source)) if path.is_file()), None)
    if path is None:
        raise ValueError(
            f"no tiles {source!r}: DGI_TILES must be a file's path, none, or one of "
            f"{', '.join(sorted(path.stem for path in FOLDER.glob('*.json')))}"
        )
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return parse(entries, str(path))


def parse(entries: object, where: str) -> Measured:
    """Check what a file holds."""
    if not isinstance(entries, Mapping):
        raise ValueError(f"{where} must hold one object of passes; got {type(entries).__name__}")
    tiles, numbers = {}, {}
    for name, value in entries.items():
        if name in NUMBERS:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{where}: {name} must be a positive integer; got {value!r}")
            numbers[name] = value
        elif name not in PASSES or not isinstance(value, Mapping):
            raise ValueError(
                f"{where}: {name!r} must be one of {', '.join((*PASSES, *NUMBERS))}, a pass with tiles by dimensions"
            )
        else:
            for size, tile in value.items():
                tiles[name, int(size)] = _tile(tile, f"{where}: {name}, {size}")
    return Measured(tiles, numbers)


def _tile(value: object, where: str) -> Tiles:
    if not (isinstance(value, (list, tuple)) and len(value) == 4 and all(isinstance(x, int) and x > 0 for x in value)):
        raise ValueError(f"{where}: a tile is [owned, step, warps, stages], four positive integers; got {value!r}")
    tile = Tiles(*value)
    for name, number in zip(("owned", "step", "warps"), tile[:3], strict=True):
        if number & (number - 1):
            raise ValueError(f"{where}: {name} must be a power of two; got {number}")
    if tile.warps > 32:
        raise ValueError(f"{where}: at most 32 warps; got {tile.warps}")
    return tile
