"""What a stage measures with: systems in turns, those that fail left out, and every figure written when it is there."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from measure import Results

from .device import Gpu, Step

STALL_AFTER = 1  # figures
OWN = ("ours", "floor", "eager", "reference")  # what must run; anything else may be missing or broken


def stall(mark: Path) -> None:
    """Where the rehearsal wants a stage to be too slow: say so, and wait to be interrupted."""
    mark.touch()
    time.sleep(600)


def lazily(make: Callable[[], Step]) -> Step:
    """A system whose making may fail: it is made at its first call, where a failure is one system's."""
    made: list[Step] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()

    return run


def is_own(system: str) -> bool:
    return system.split(",")[0] in OWN


class Session:
    """One stage's figures.

    Attributes:
        gpu: the device, or what stands in its place.
        problems: what must run and did not; the stage fails if there are any.
        rehearsed: kinds of what has been rehearsed once, and need not be again in full.
    """

    def __init__(self, name: str, folder: Path, gpu: Gpu, *, options: Mapping[str, Any] | None = None) -> None:
        self.name, self.folder, self.gpu = name, folder, gpu
        self.options = dict(options or {})
        self.path = folder / f"{'gpu' if gpu.here else 'rehearsal'}-{name}.json"
        self.problems: list[str] = []
        self.rehearsed: set[str] = set()
        self._added = 0
        self._results = Results(f"bench/gpu.sh --only {name}")

    def say(self, line: str) -> None:
        """A line of the table that is printed last."""
        print(line, flush=True)
        with open(self.folder / f"{self.name}.table", "a") as table:
            table.write(line + "\n")

    def fail(self, problem: str) -> None:
        self.problems.append(problem)
        self.say(f"FAILED {problem}")

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """A failure inside is noted, and what follows still runs."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  the rest of the stage must not be lost
            self.fail(f"{what}: {explain(error)}")

    def add(
        self,
        op: str,
        shape: Mapping[str, object],
        system: str,
        times: list[float],
        memory: int | None = None,
        **extra: object,
    ) -> None:
        """Note one system's times in seconds, and write all that there is."""
        self._results.add(op, {**shape, "device": self.gpu.device.type}, system, times, memory, **extra)
        self._results.write(self.path)
        self._added += 1
        if self._added == STALL_AFTER and self.options.get("stall"):
            stall(self.options["stall"])

    def measure(
        self,
        op: str,
        shape: Mapping[str, object],
        systems: Mapping[str, Step],
        *,
        rounds: int = 7,
        calls: int = 1,
        budget: float = 4.0,
        memory: bool = True,
    ) -> dict[str, float]:
        """Time systems in turns and write each; return the medians of those that ran.

        A system that raises is left out with its reason: a peer's affair, a failure of the stage if it is one of ours.
        One whose call is slow is called once a round, and rounds end when the ``budget`` in seconds is spent.
        """
        label = f"{op} {' '.join(f'{name}={value}' for name, value in shape.items())}"
        rounds = rounds if self.gpu.here else 1
        running: dict[str, tuple[Step, int]] = {}
        for name, run in systems.items():
            start = time.perf_counter()
            try:
                self.gpu.seconds(run)  # compiles, and warms up
                first = self.gpu.seconds(run)
            except Exception as error:  # noqa: BLE001  one that cannot run must not cost the others their figures
                if is_own(name):
                    self.fail(f"{label}: {name}: {explain(error)}")
                else:
                    self.say(f"{label}: {name} left out: {explain(error)}")
                continue
            print(
                f"{label}: {name} ready after {time.perf_counter() - start:.1f} s, first {1e3 * first:.4g} ms",
                flush=True,
            )
            running[name] = run, max(1, min(calls, int(0.05 / max(first, 1e-9))))
            self.add(op, shape, name, [first])  # till there is better
        times: dict[str, list[float]] = {name: [] for name in running}
        end = time.perf_counter() + budget
        for done in range(rounds):
            for name, (run, repeats) in running.items():
                times[name].append(self.gpu.seconds(run, repeats))
            if time.perf_counter() > end and done:
                break
        medians = {}
        for name, (run, _) in running.items():
            peak = self.gpu.peak_bytes(run) if memory and name != "floor" else None
            medians[name] = statistics.median(times[name])
            self.add(op, shape, name, times[name], peak)
        self.say(f"{label}: " + ", ".join(self._cells(medians)))
        self.gpu.release()
        return medians

    def share_of_ceiling(self, operations: float, medians: Mapping[str, float]) -> None:
        """Say what part of the measured rate of matrix products the op's own are: a floor that moves nothing."""
        ours, path = medians.get("ours"), self.path.with_name(self.path.name.replace(self.name, "ceilings"))
        if not ours or not path.exists():
            return
        for figure in json.loads(path.read_text())["benchmarks"]:
            if figure["params"]["what"] == "bfloat16 product":
                floor = operations / figure["extra_info"]["rate"]
                self.say(
                    f"    {operations / 1e12:.2f} T operations, {1e3 * floor:.3g} ms at the measured rate of "
                    f"products: ours takes {ours / floor:.2f} times as long"
                )

    @staticmethod
    def _cells(medians: Mapping[str, float]) -> Iterator[str]:
        ours = medians.get("ours")
        for name, median in medians.items():
            ratio = f" ({median / ours:.2f})" if ours and name != "ours" else ""
            yield f"{name} {1e3 * median:.4g} ms{ratio}"


def explain(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"
