"""What every benchmark here shares: systems that take turns, peak memory, and results in pytest-benchmark's JSON.

Run a benchmark as a script for its table; ``--json FILE`` writes the same figures for ``make report``.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path

import torch
from pytest_benchmark.utils import get_commit_info, get_machine_id

Step = Callable[[], object]


def interleaved(
    systems: Mapping[str, Step], rounds: int, warm: float = 0.0, clock: Callable[[Step], float] | None = None
) -> dict[str, list[float]]:
    """Seconds of each call, the systems taking turns, so that what else the machine does falls on all alike; each round
    in another order, so that none always finds the caches as the same other leaves them.

    Each call is timed behind others of the same system, as many as take ``warm`` seconds. Systems with threads of their
    own, as another process has them, need about 0.03: OpenMP's threads spin for 10 ms behind their last loop, and take
    a core from whoever is next; and a core that has rested for as long is slow to begin. ``clock`` is :func:`seconds`
    or :func:`processor_seconds`.
    """
    times: dict[str, list[float]] = {name: [] for name in systems}
    for run in systems.values():  # compiles, and warms up
        run()
    order, shuffled = list(systems), random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for name in order:
            start = time.perf_counter()
            while time.perf_counter() - start < warm:
                systems[name]()
            times[name].append((clock or seconds)(systems[name]))
    return times


def seconds(run: Step) -> float:
    """The seconds of one call, on a GPU until it is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def processor_seconds(run: Step) -> float:
    """The seconds that all threads of this process compute in one call: on one thread the time it would take alone on
    the machine, but for the caches that it shares."""
    start = time.process_time()
    run()
    return time.process_time() - start


def medians(systems: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """The median seconds of each system of :func:`interleaved`."""
    return {name: statistics.median(times) for name, times in interleaved(systems, rounds).items()}


def peak_bytes(run: Step) -> int | None:
    """The peak of one call beyond what was allocated before; None where the system does not tell."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that is free but not given back would hide the peak
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(name)
    )


class Results:
    """Figures of one run, to be written as pytest-benchmark writes them (``commit_info``, ``benchmarks[i].stats``, …).

    The systems that were measured in turns share a ``group``; what the figures depend on (shape, dtype, threads) and
    other measurements (peak memory) are in ``extra_info``.
    """

    def __init__(self, command: str | None = None) -> None:
        self.command = command or shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
        self._benchmarks: dict[str, dict] = {}

    def add(
        self,
        op: str,
        shape: Mapping[str, object],
        system: str,
        times: list[float],
        memory: int | None = None,
        **extra: object,
    ) -> None:
        """Add one system's times in seconds, e.g. ``add("cosine_cross_entropy", {"N": 4096, …}, "eager", times)``, in
        place of what was added for the same."""
        case = " ".join(f"{name}={value}" for name, value in shape.items())
        name = f"{op}[{case} {system}]"
        self._benchmarks[name] = {
            "group": f"{op} {case}",
            "name": name,
            "fullname": name,
            "params": {**shape, "system": system},
            "extra_info": {"op": op, "shape": dict(shape), "system": system, "peak_bytes": memory, **extra},
            "stats": quantiles(times),
        }

    def write(self, path: str | os.PathLike) -> None:
        """Write all that was added to ``path``, whole or not at all."""
        document = {
            "machine_info": machine(),
            "commit_info": _commit(),
            "benchmarks": [*self._benchmarks.values()],
            "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": self.command,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(path.suffix + ".part")
        temporary.write_text(json_text(document))
        temporary.replace(path)


@functools.cache
def _commit() -> dict[str, object]:
    """What is measured; ``COMMIT`` names it where there is no repository, as in a copy of the tree."""
    given = os.environ.get("COMMIT")
    return get_commit_info() if given is None else {"id": given, "dirty": False}


def quantiles(times: list[float]) -> dict[str, float | int | str]:
    """What is kept of the seconds of one system: all that ``pytest-benchmark compare`` shows, without the samples."""
    q1, _, q3 = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    mean, deviation = statistics.mean(times), statistics.stdev(times) if len(times) > 1 else 0.0
    outside = [
        sum(not low <= time <= high for time in times)
        for low, high in ((mean - deviation, mean + deviation), (2.5 * q1 - 1.5 * q3, 2.5 * q3 - 1.5 * q1))
    ]
    return {
        "median": statistics.median(times),
        "mean": mean,
        "min": min(times),
        "max": max(times),
        "q1": q1,
        "q3": q3,
        "iqr": q3 - q1,
        "stddev": deviation,
        "ops": 1 / mean,
        "total": sum(times),
        "rounds": len(times),
        "iterations": 1,
        "outliers": "{};{}".format(*outside),
    }


def json_text(document: Mapping[str, object]) -> str:
    """``document`` as JSON with one benchmark on each line, so that a change of one figure is a change of one line."""
    parts = []
    for key, value in document.items():
        text = (
            "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
            if isinstance(value, list)
            else json.dumps(value, indent=1).replace("\n", "\n ")
        )
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def machine() -> dict[str, object]:
    """The machine in words that identify it to a reader but not to a network: device, cores, versions."""
    info: dict[str, object] = {
        "machine_id": get_machine_id(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        import triton

        info |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "triton": triton.__version__}
    return info


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def title() -> str:
    """One line that says where a table was made."""
    where = machine()
    return (
        f"{where.get('gpu', where['cpu'])}, {where['threads']} threads, torch {where['torch']}, "
        f"load {os.getloadavg()[0]:.1f}"
    )
