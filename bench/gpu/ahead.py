"""Compiles all Triton kernels that the stages will launch, in a process for each core, into Triton's cache.

Which these are the rehearsal finds: it runs the stages' own functions with their real sizes, on tensors that have none.
A kernel is compiled as a launch would compile it, up to the launch itself, so that the cache is hit by construction.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import triton
from triton_code import TYPES, Launch

from .rehearsal import FakeGpu, pretended_gpu
from .session import Session, explain
from .stages import Stage, chosen, function_of

SECONDS_EACH = 6.0  # of one core, for one kernel
DTYPES = {kind: dtype for dtype, kind in TYPES.items()}


class Pointer:
    """Stands for a tensor where nothing is launched."""

    def __init__(self, dtype: torch.dtype, *, aligned: bool) -> None:
        self.dtype, self.address = dtype, 0 if aligned else 1

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return 0


class NoDriver:
    """What Triton asks of a GPU before it launches: nothing but its architecture."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def arguments(launch: Launch) -> dict[str, object]:
    """Arguments that Triton specialises as it did those of the launch that was noted."""
    constants, values = dict(launch.constants), {}
    for i, (name, kind) in enumerate(launch.signature):
        aligned = i in launch.aligned
        if kind == "constexpr":
            values[name] = constants[name]
        elif kind in DTYPES:
            values[name] = Pointer(DTYPES[kind], aligned=aligned)
        elif kind == "fp32":
            values[name] = 1.5
        else:
            values[name] = (1 << 32 if kind == "i64" else 0) + (32 if aligned else 33)
    return values


def compile_one(launch: Launch, arch: int) -> tuple[float, str]:
    """Compile a kernel into the cache; return the seconds it took, and what went wrong."""
    start = time.perf_counter()
    try:
        triton.runtime.driver.set_active(NoDriver(arch))
        launch.function().run(grid=(1,), warmup=True, **arguments(launch), **dict(launch.options))
    except Exception as error:  # noqa: BLE001  one that does not compile is reported; the others go on
        return time.perf_counter() - start, explain(error)
    return time.perf_counter() - start, ""


def compile_all(
    wanted: Sequence[Launch], arch: int, jobs: int, ptxas: str | None = None
) -> Iterator[tuple[Launch, float, str]]:
    """Each launch when it is done; by another ``ptxas`` than Triton's own if there is one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gpu.ahead"])
    with ProcessPoolExecutor(jobs, context, use_ptxas, (ptxas,)) as pool:
        futures = {pool.submit(compile_one, launch, arch): launch for launch in wanted}
        try:
            for future in as_completed(futures):
                yield futures[future], *future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def use_ptxas(path: str | None) -> None:
    """In a process that has compiled nothing yet: Triton asks for the version once."""
    if path is not None:
        os.environ["TRITON_PTXAS_PATH"] = path


def launches_of(stages: Sequence[Stage], failed: Callable[[str], None]) -> dict[str, list[Launch]]:
    """For each stage the kernels that no earlier one launches; ``failed`` hears of what fails without a GPU already.

    One that needs the extension is left out where there is none yet.
    """
    from dgi_kernels import _extension

    found: dict[str, list[Launch]] = {}
    seen: set[Launch] = set()
    for stage in stages:
        if not stage.gpu or (stage.built and _extension.load_error is not None):
            continue
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(io.StringIO()),
            pretended_gpu() as launches,
        ):
            session = Session(stage.name, Path(folder), FakeGpu())
            with session.guarded(stage.name):
                function_of(stage)(session)
        for problem in session.problems:
            failed(f"{stage.name} fails without a GPU already: {problem}")
        found[stage.name] = [launch for launch in launches.noted if launch not in seen]
        seen.update(found[stage.name])
    return found


def planned_seconds(kernels: int, cores: int) -> int:
    return round(5 + SECONDS_EACH * kernels / cores)


def other_ptxas(given: Sequence[str]) -> list[str]:
    """Assemblers of other versions than the one that Triton carries: those given, and the CUDA toolkit's."""
    own = triton.knobs.nvidia.ptxas
    found = {own.version: own.path}
    for path in (*given, os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "ptxas")):
        tool = triton.knobs.NvidiaTool.from_path(path)
        if tool is not None:
            found.setdefault(tool.version, path)
    return [path for version, path in found.items() if version != own.version]


def is_flash(launch: Launch) -> bool:
    """A kernel with products of its own, which ptxas turns into wgmma."""
    return {"b_n", "b_k", "b_d"} <= set(dict(launch.constants))


def run(session: Session) -> None:
    """Compile for the stages of this run, the checks first, and for each further ptxas the checks again."""
    stages, options = chosen(session.options["runs"], session.options["only"]), session.options
    by_stage = launches_of(stages, session.fail)
    batches: list[tuple[list[Launch], str | None]] = [([x for kernels in by_stage.values() for x in kernels], None)]
    if any(stage.name == "ptxas" for stage in stages):
        checked = [x for x in launches_of(chosen([], ["check"]), session.fail)["check"] if is_flash(x)]
        batches += [(checked, path) for path in other_ptxas(options["ptxas"])]
    session.say(
        f"{sum(len(wanted) for wanted, _ in batches)} kernels to compile: "
        + ", ".join(f"{name} {len(kernels)}" for name, kernels in by_stage.items())
        + "".join(f", by {path} {len(wanted)}" for wanted, path in batches[1:])
    )
    if options["rehearse"]:
        return
    major, minor = torch.cuda.get_device_capability()
    for wanted, path in batches:
        done = 0
        for launch, seconds, problem in compile_all(wanted, 10 * major + minor, options["jobs"], path):
            done += not problem
            print(f"{launch.name()} {launch.constants} {launch.options}: {seconds:.1f} s {problem}", flush=True)
            if problem:
                session.fail(f"{launch.name()} {launch.constants} does not compile: {problem}")
        session.say(f"    {done} of {len(wanted)} compiled by {path or 'the ptxas that Triton carries'}")
