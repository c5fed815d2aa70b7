"""Runs the stages: bench/gpu.sh calls it, which says what the options mean.

Each stage is a process of its own, forked from one that has torch and Triton already, so that a fault of the GPU in one
does not reach the next. A stage that has reached its limit is interrupted, and killed if it does not end; what it had
measured is written by then. OUTDIR gets few files, so that they can be carried away whole:

    summary.txt      what passed, failed, was cut, was not reached
    table.txt        the figures, as lines
    results.tar.gz   every JSON file, table and log; made anew every few seconds
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from . import stages as table
from .stages import Stage

ROOT = Path(__file__).resolve().parents[2]
CORES = 16  # of the machine that seconds are planned for
GRACE = 12  # seconds for an interrupted stage to end
ARCHIVE_EVERY = 10
REHEARSED_AT_ONCE = 2
CONTEXT = multiprocessing.get_context("forkserver")


class Clock:
    """The time that stages are held to."""

    def now(self) -> float:
        return time.monotonic()

    def finished(self, process: BaseProcess, seconds: float) -> bool:
        """Wait at most so long for a stage; whether it has ended."""
        process.join(max(0.0, seconds))
        return not process.is_alive()


class StubClock(Clock):
    """The rehearsal's: a stage's limit is reached when the stage says that it has stalled, and not before."""

    def __init__(self, stall: Path | None = None) -> None:
        self.stall = stall
        self.skipped = 0.0

    def now(self) -> float:
        return time.monotonic() + self.skipped

    def finished(self, process: BaseProcess, seconds: float) -> bool:
        end = time.monotonic() + 600  # a rehearsal that neither ends nor stalls is itself at fault
        while process.is_alive() and time.monotonic() < end:
            if self.stall is not None and self.stall.exists():
                self.skipped += seconds
                return False
            process.join(0.05)
        return not process.is_alive()


class Run:
    """One run of some stages into a folder."""

    def __init__(self, out: Path, options: Mapping[str, Any], clock: Clock) -> None:
        self.out, self.options, self.clock = out, options, clock
        self.work = Path(tempfile.mkdtemp(prefix="dgi-gpu-"))
        self.end = clock.now() + options["budget"]
        self.failed = False
        self.archived = 0.0
        self.lock = threading.Lock()
        self.building: subprocess.Popen | None = None
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.txt").write_text("")

    def say(self, line: str) -> None:
        print(line, flush=True)
        with open(self.out / "summary.txt", "a") as summary:
            summary.write(line + "\n")

    def fail(self, line: str) -> None:
        self.failed = True
        self.say(line)

    def build(self) -> None:
        """Start the extension's build, unless one that loads was carried along."""
        check = (
            "from dgi_kernels import _extension as e; import sys; print(e.load_error or '', end=''); "
            f"sys.exit(bool(e.load_error) or not (e.has_cuda or {self.options['rehearse']}))"
        )
        if shutil.which("nvidia-smi"):
            self.aside("nvidia-smi", "nvidia-smi")
        carried = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
        if carried.returncode == 0:
            self.say("built    the extension that was carried along loads")
            self.aside("info", sys.executable, "-m", "dgi_kernels.info")
            return
        print(f"the extension is built: {carried.stdout or carried.stderr or 'it has no CUDA kernels'}", flush=True)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        with open(self.work / "build.log", "w") as log:
            self.building = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)

    def aside(self, name: str, *command: str) -> None:
        """Run something that only says where we are; nobody waits for it."""
        with open(self.work / f"{name}.log", "w") as log:
            subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def wait_for_build(self) -> None:
        if self.building is None:
            return
        start, limit = time.monotonic(), 240 if not self.options["rehearse"] else 1500
        try:
            status: int | None = self.building.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.building.pid, signal.SIGKILL)
            status = None
        self.building = None
        if status == 0:
            self.say(f"built    the extension ({time.monotonic() - start:.0f} s after it was needed)")
            self.aside("info", sys.executable, "-m", "dgi_kernels.info")
        else:
            self.fail("FAILED   build: " + ("cut" if status is None else tail(self.work / "build.log")))

    def stage(self, stage: Stage) -> None:
        """Run one within its limit, and note the outcome."""
        if stage.built:
            self.wait_for_build()
        left = self.end - self.clock.now()
        if left < min(10, stage.planned):
            self.fail(f"NOT REACHED  {stage.name}: {stage.what}")
            return
        start = self.clock.now()
        process = self.start(stage, self.work, None)
        finished, end = False, start + min(stage.limit, left)
        try:
            while not finished and self.clock.now() < end:
                finished = self.clock.finished(process, min(ARCHIVE_EVERY, end - self.clock.now()))
                self.archive()
        finally:
            if not finished:
                interrupt(process)
        seconds = self.clock.now() - start
        if not finished:
            self.fail(f"CUT      {stage.name} after {seconds:.0f} s; {len(left_by(self.work, stage))} results of it")
        elif process.exitcode == 0:
            self.say(f"ok       {stage.name} ({seconds:.0f} s)")
        else:
            problem = problem_of(self.work, stage) or tail(self.work / f"{stage.name}.log")
            self.fail(f"FAILED   {stage.name} ({seconds:.0f} s): {problem}")
        self.archive(now=True)

    def start(self, stage: Stage, work: Path, stall: Path | None) -> BaseProcess:
        process = CONTEXT.Process(target=child, args=(stage, work, {**self.options, "stall": stall}))
        process.start()
        return process

    def rehearse_cut(self, stage: Stage) -> None:
        """A stage once more, so slow after its first results that it is cut: those must be there."""
        if not stage.leaves:
            return
        work = Path(tempfile.mkdtemp(prefix="dgi-gpu-cut-"))
        clock = StubClock(work / "stalled")
        process = self.start(stage, work, clock.stall)
        finished = clock.finished(process, stage.limit)
        if not finished:
            interrupt(process)
        results = left_by(work, stage)
        if finished or not results:
            ended = f"it ended before that: {tail(work / f'{stage.name}.log')}"
            self.fail(f"FAILED   {stage.name}, cut: {ended if finished else 'nothing is left of it'}")
        else:
            self.say(f"ok       {stage.name}, cut: {len(results)} results of it")
        shutil.rmtree(work)

    def archive(self, *, now: bool = False) -> None:
        """Pack all that there is into one file, whole or not at all."""
        with self.lock:
            if now or time.monotonic() - self.archived >= ARCHIVE_EVERY:
                self.archived = time.monotonic()
                self.pack()

    def pack(self) -> None:
        partial = self.out / ".results.part"
        with tarfile.open(partial, "w:gz") as tar:
            for path in sorted(self.work.iterdir()):
                if path.suffix in (".json", ".log", ".table", ".txt", ".xml", ".jsonl"):
                    data = path.read_bytes()  # as it is now: a stage goes on writing
                    entry = tarfile.TarInfo(path.name)
                    entry.size, entry.mtime = len(data), int(time.time())
                    tar.addfile(entry, io.BytesIO(data))
        partial.replace(self.out / "results.tar.gz")
        tables = [path for stage in table.STAGES for path in files_of(self.work, stage, "table")]
        (self.out / "table.txt").write_text("".join(path.read_text() for path in tables))

    def close(self) -> int:
        self.say("NOT everything passed" if self.failed else "everything passed")
        self.archive(now=True)
        print("\n" + (self.out / "table.txt").read_text(), end="")
        print((self.out / "summary.txt").read_text(), end="", flush=True)
        shutil.rmtree(self.work)
        return int(self.failed)


def child(stage: Stage, folder: Path, options: dict[str, Any]) -> None:
    """A stage's process: its output goes to its log, and it leads a group of its own."""
    os.setsid()
    log = os.open(folder / f"{stage.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(run_stage(stage, folder, options))


def run_stage(stage: Stage, folder: Path, options: dict[str, Any]) -> int:
    """Its function with its session; the status is 1 if something failed that must not."""
    from .device import Gpu
    from .session import Session, explain

    gpu: Gpu = Gpu()
    context: contextlib.AbstractContextManager = contextlib.nullcontext()
    if options["rehearse"]:
        from .rehearsal import FakeGpu, pretended_gpu

        gpu, context = FakeGpu(), pretended_gpu() if stage.gpu else context
    session = Session(stage.name, folder, gpu, options=options)
    late = compiled_here()
    try:
        with context:
            table.function_of(stage)(session)
        if late and stage.gpu:
            session.say(f"    {len(late)} kernels were not compiled ahead: {', '.join(sorted(set(late)))}")
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 130
    except BaseException as error:
        session.fail(explain(error))
        raise
    return int(bool(session.problems))


def compiled_here() -> list[str]:
    """The names of kernels that this process has to compile, as they come: those that were not compiled ahead."""
    import triton

    names: list[str] = []

    def heard(**known: Any) -> None:
        if not known["cache_hit"]:
            names.append(known["src"].name)

    triton.knobs.compilation.listener = heard
    return names


def interrupt(process: BaseProcess) -> None:
    """Interrupt a stage and all that it started; kill what does not end."""
    group = process.pid
    assert group is not None
    for number, grace in ((signal.SIGINT, GRACE), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)
        process.join(grace)
        if not process.is_alive():
            break
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)  # what it started may live on


def tail(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1][:300] if lines else "no output"


def problem_of(folder: Path, stage: Stage) -> str:
    path = folder / f"{stage.name}.table"
    lines = [line for line in path.read_text().splitlines() if line.startswith("FAILED")] if path.exists() else []
    return (
        lines[0].removeprefix("FAILED ")[:300] + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")
        if lines
        else ""
    )


def files_of(folder: Path, stage: Stage, suffix: str) -> list[Path]:
    """What a stage, and the processes that it started under names of their own, have written."""
    name = re.compile(rf"(gpu-|rehearsal-)?([0-9]+-|triton-)?{re.escape(stage.name)}\.{suffix}")
    return sorted(path for path in folder.iterdir() if name.fullmatch(path.name))


def left_by(folder: Path, stage: Stage) -> list[str]:
    """The names of a stage's results so far: figures, or outcomes of tests."""
    found: list[str] = []
    for path in files_of(folder, stage, "json"):
        found += [figure["name"] for figure in json.loads(path.read_text())["benchmarks"]]
    for path in files_of(folder, stage, "jsonl"):
        found += path.read_text().splitlines()
    return found


def plan(stages: list[Stage]) -> int:
    """Print what a run would compile and how long it should take; no GPU is needed."""
    from .ahead import launches_of, planned_seconds

    problems: list[str] = []
    kernels = {name: len(found) for name, found in launches_of(stages, problems.append).items()}
    count, total = sum(kernels.values()), 0
    print(f"{'stage':16}{'kernels':>8}{'planned s':>10}{'limit s':>8}  what")
    for stage in stages:
        planned = max(stage.planned, planned_seconds(count, CORES)) if stage.name == "ahead" else stage.planned
        total += planned
        print(f"{stage.name:16}{kernels.get(stage.name, ''):>8}{planned:>10}{stage.limit:>8}  {stage.what}")
    print(f"{'in all':16}{count:>8}{total:>10}")
    print(*problems, sep="\n", end="\n" * bool(problems))
    return int(bool(problems))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="where", type=Path, default=Path.cwd(), help=argparse.SUPPRESS)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUTDIR")
    parser.add_argument("--run", choices=(*table.RUNS, "both"), default="first")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="STAGE,...")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="of all stages (default: no limit but theirs)")
    parser.add_argument("--ptxas", action="append", default=[], metavar="PATH", help="another assembler to check with")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--plan", action="store_true", help="print kernels and seconds by stage, and do nothing")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: tensors without numbers, a stub clock")
    options = parser.parse_args()
    runs = list(table.RUNS) if options.run == "both" else [options.run]
    try:
        stages = table.chosen(runs, options.only)
    except ValueError as error:
        parser.error(str(error))
    if options.plan:
        return plan(stages)
    if options.out is None:
        parser.error("OUTDIR is missing")
    # What every stage imports; nothing that asks for a GPU, which a process must not have done before it is forked.
    preloaded = ["torch", "triton", "gpu.session"]
    if options.rehearse:
        preloaded += ["gpu.ahead", "gpu.beam", "gpu.check", "gpu.cosine", "gpu.model", "gpu.quantize", "gpu.threads"]
    CONTEXT.set_forkserver_preload(preloaded)
    given = {
        "runs": runs,
        "only": options.only,
        "rehearse": options.rehearse,
        "ptxas": options.ptxas,
        "jobs": options.jobs,
        "budget": options.budget or float("inf"),
    }
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # ends as an interrupt does
    run = Run((options.where / options.out).resolve(), given, StubClock() if options.rehearse else Clock())
    try:
        if any(stage.built for stage in stages):
            run.build()
        if options.rehearse:
            with ThreadPoolExecutor(REHEARSED_AT_ONCE) as pool:
                list(pool.map(run.stage, stages))
                list(pool.map(run.rehearse_cut, stages))
        else:
            for stage in stages:
                run.stage(stage)
    finally:
        status = run.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
