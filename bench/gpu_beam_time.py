"""Estimated times of beam steps on one H200, for gpu_time.py: bytes and instructions of the first kernel, and the chain
of dependent loads, barriers and sorting stages of those behind, which no throughput bounds.

The constants of a chain are those of published microbenchmarks of Hopper, in cycles at 1.7 GHz.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import cuda_code
from machine_code import Kept, Usage

CYCLE = 1 / 1.7e9
CANDIDATE = (
    1200  # from a candidate's number to its key: five loads from the L2 and the shared memory, one after another
)
READ = 700  # a load from the L2 under load
PASS = 1500  # beside its keys, a round of the select: a histogram of 2,048 bins cleared, summed and searched
BARRIER = 90  # a stage of the sort: one comparison a thread and a barrier
THREADS, HELD, AT_ONCE = 512, 8, 8  # of a select; keys that a thread holds; those it reads side by side
SLICE, BLOCKS, LEAST = 4096, 264, 4  # as csrc/cuda/beam_step.h has them
PASSES = 3  # over all keys: their extent, one or two digits, collecting


@dataclass(frozen=True)
class BeamCase:
    """B requests of M beams, candidates a request in truth and at most, logits a beam and bytes of one."""

    name: str
    requests: int
    beams: int
    candidates: int
    most: int
    codes: int
    size: int
    target: float  # ms


CASES = (
    BeamCase("beam B=64 M=50 V=2048, last", 64, 50, 60, 300, 2048, 2, 0.015),
    BeamCase("beam B=64 M=50 V=2048, middle", 64, 50, 7000, 50 * 600, 2048, 2, 0.025),
    BeamCase("beam B=4 M=256 V=151936", 4, 256, 256 * 1024, 256 * 1024, 151_936, 2, 0.120),
)


@dataclass(frozen=True)
class Step:
    """An estimated step in a graph: milliseconds of its launches."""

    case: BeamCase
    launches: dict[str, float]
    floor: float


def select_seconds(keys: int, *, made: bool, wanted: int) -> float:
    """One block: ``made`` of candidates, else read."""
    a_thread = math.ceil(keys / THREADS)
    first = a_thread * CANDIDATE if made else math.ceil(a_thread / AT_ONCE) * READ
    beyond = max(0, a_thread - HELD) * (CANDIDATE if made else READ / AT_ONCE) * PASSES
    room = max(256, 2 ** math.ceil(math.log2(2 * wanted)))
    bits = math.log2(room) if keys > room else math.log2(max(2, keys))
    return CYCLE * (first + beyond + PASSES * PASS + bits * (bits + 1) / 2 * BARRIER)


def slices_of(case: BeamCase) -> int:
    each = min(math.ceil(case.most / SLICE) * case.requests, BLOCKS) // case.requests
    return each if each >= LEAST else 1


def steps(kept: Kept, device_memory: float, issue: float) -> Iterator[Step]:
    """``device_memory`` in bytes a second, ``issue`` in instructions of a lane."""
    compiler = cuda_code.nvcc()
    if compiler is None:
        return
    ((_, _, usages),) = cuda_code.usages(compiler, [90], 1, kept, "beam.cu")
    (parents,) = [usage for name, usage in usages.items() if name == PARENTS]
    for case in CASES:
        yield step(case, parents, device_memory, issue)


PARENTS = "parents_kernel<LogitRows<BFloat16, false>, int, NoSets>"


def step(case: BeamCase, parents: Usage, device_memory: float, issue: float) -> Step:
    logits = case.requests * case.beams * case.codes
    read = case.size * logits / device_memory
    seconds = {"parents": max(read, logits * parents.per_element / issue) + 2e-6}
    slices = slices_of(case)
    if slices > 1:
        seconds["slice"] = select_seconds(math.ceil(case.candidates / slices), made=True, wanted=case.beams)
        kept = slices * (case.beams + case.beams // 4 + 39) // 8 * 8
        seconds["merge"] = select_seconds(kept, made=False, wanted=case.beams)
    else:
        seconds["select"] = select_seconds(case.candidates, made=True, wanted=case.beams)
    return Step(case, {name: 1e3 * s for name, s in seconds.items()}, 1e3 * read)
