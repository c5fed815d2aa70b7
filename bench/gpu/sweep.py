"""Other tiles of the flash kernels, timed; the fastest of each pass are written as a file that the launchers read.

The file lies among the results as tiles-<GPU model>.json. Put into dgi_kernels/tiles/<GPU model>.json it is used on
such GPUs from then on; DGI_TILES=<file> uses it at once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import NamedTuple

import torch

from dgi_kernels import cosine_cross_entropy, tiles
from dgi_kernels.cosine import triton as cosine_launchers
from dgi_kernels.quantize import triton_forms as quantize_forms

from . import cosine, quantize
from .device import Step
from .session import Session

# pass -> dimensions -> tiles to try beside those of the tables: [owned, step, warps, stages]
CANDIDATES: dict[str, dict[int, list[tuple[int, int, int, int]]]] = {
    "cosine.forward": {
        64: [(64, 64, 4, 2), (128, 64, 8, 3)],
    },
    "cosine.weight": {
        64: [(64, 64, 4, 3), (128, 64, 8, 3)],
    },
    "cosine.products": {
        256: [(128, 128, 8, 3), (128, 256, 8, 3)],
        1024: [(128, 128, 8, 3), (128, 256, 8, 4)],
    },
    "quantize.forward": {64: [(64, 32, 4, 2), (128, 64, 8, 2)]},
    "quantize.probabilities": {64: [(64, 32, 4, 2), (128, 64, 8, 2)]},
    "quantize.weights": {64: [(64, 32, 4, 2), (128, 64, 8, 2)]},
}
ROUNDS = 3
CHUNKS = (64 << 20, 128 << 20, 256 << 20)


class Case(NamedTuple):
    """A call whose time a pass of ``names`` is part of, and the tiles that its launchers take now."""

    names: tuple[str, ...]
    size: int
    now: dict[str, tiles.Tiles]
    step: Step


def cases(session: Session) -> list[Case]:
    gpu, found = session.gpu, []
    for d, size in ((256, 256), (768, 1024)):
        step = cosine.step(cosine_cross_entropy, cosine.inputs(gpu, 32768, 4096, d, "flat"))
        now = {"cosine.products": cosine_launchers.fused.fused_tiles(d, torch.device(gpu.device))}
        found.append(Case(tuple(now), size, now, step))
    step = cosine.step(cosine_cross_entropy, cosine.inputs(gpu, 32768, 4096, 64, "flat"))
    config = cosine_launchers.flash_config(64, torch.device(gpu.device))[1]._asdict()
    now = {f"cosine.{name}": tile for name, tile in config.items()}
    found.append(Case(tuple(now), 64, now, step))
    step = quantize.step(quantize.ours, *quantize.inputs(gpu, 16384, 64, "flat"))
    config = quantize_forms.flash_config(64, torch.device(gpu.device))[1]._asdict()
    now = {f"quantize.{name}": tile for name, tile in config.items() if tile is not None}
    found.append(Case(tuple(now), 64, now, step))
    return found


def run(session: Session) -> None:
    won: dict[str, object] = {}
    for case in cases(session):
        for name in case.names:
            with session.guarded(f"{name} {case.size}"):
                best = fastest(session, case, name)
                if best != case.now[name]:
                    won.setdefault(name, {})[str(case.size)] = list(best)  # type: ignore[index]
                write(session, won)
    for name, step in large(session).items():
        with session.guarded(name):
            size = chunk(session, name, step)
            if size is not None:
                won[name] = size
            write(session, won)
    session.say(f"tiles that were faster: {json.dumps(won)}")


def fastest(session: Session, case: Case, name: str) -> tiles.Tiles:
    """Of one pass with the others as they are; slower by less than 2 % is no reason to change."""
    best, best_seconds = case.now[name], 0.0
    for tile in (case.now[name], *(tiles.Tiles(*t) for t in CANDIDATES.get(name, {}).get(case.size, []))):
        if tile == case.now[name] and best_seconds:
            continue
        with tiles.override({name: {str(case.size): list(tile)}}):
            step = functools.partial(case.step)  # another one for each tile, as the rehearsal tells them apart
            try:
                session.gpu.seconds(step)
                seconds = min(session.gpu.seconds(step, 3) for _ in range(ROUNDS if session.gpu.here else 1))
            except Exception as error:  # noqa: BLE001  a tile that does not fit is a result, too
                session.say(f"{name} D={case.size} {list(tile)}: {type(error).__name__}: {str(error)[:120]}")
                continue
        session.add("tiles", {"pass": name, "D": case.size, "tile": str(list(tile))}, "ours", [seconds])
        session.say(f"{name} D={case.size} {list(tile)}: {1e3 * seconds:.4g} ms")
        if not best_seconds or seconds < 0.98 * best_seconds:
            best, best_seconds = tile, seconds
    return best


def large(session: Session) -> dict[str, Callable[[], object]]:
    """Calls of the chunked forms."""
    gpu = session.gpu
    return {
        "cosine.chunk_bytes": cosine.step(cosine_cross_entropy, cosine.inputs(gpu, 32768, 4096, 768, "flat")),
        "quantize.chunk_bytes": quantize.step(quantize.ours, *quantize.inputs(gpu, 16384, 256, "flat")),
    }


def chunk(session: Session, name: str, step: Step) -> int | None:
    """The memory of a chunk that is fastest; None for the launcher's own."""
    best: int | None = None
    best_seconds = 0.0
    for size in (None, *CHUNKS):
        with tiles.override({} if size is None else {name: size}):
            run = functools.partial(step)
            session.gpu.seconds(run)
            seconds = min(session.gpu.seconds(run) for _ in range(ROUNDS if session.gpu.here else 1))
        session.add("tiles", {"pass": name, "bytes": size or 0}, "ours", [seconds])
        session.say(f"{name} {'as it is' if size is None else size >> 20}: {1e3 * seconds:.4g} ms")
        if not best_seconds or seconds < 0.98 * best_seconds:
            best, best_seconds = size, seconds
    return best


def write(session: Session, won: dict[str, object]) -> None:
    model = tiles.file_name(torch.cuda.get_device_name())
    (session.folder / f"tiles-{model}.json").write_text(json.dumps(won, indent=1) + "\n")
    tiles.parse(won, "what was measured")
