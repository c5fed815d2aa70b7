"""What the machine code of a GPU kernel takes; kept between runs, and held against recorded budgets."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

BUDGETS = Path(__file__).with_name("gpu_budgets.json")
COMPILED = Path(__file__).with_name("gpu_compiled.json")
SLACK_REGISTERS = 8  # registers are handed out in eights
SLACK_INSTRUCTIONS = 1.1
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?!\s|NOP)(.*?);", re.MULTILINE)


@dataclass(frozen=True)
class Usage:
    """Registers a thread; bytes of shared memory a block; bytes of local memory, that is of spills, a thread;
    instructions of the whole kernel, and of its innermost loop for each element (0: not known)."""

    registers: int
    spilled: int
    shared: int
    instructions: int
    per_element: float = 0.0


def cuobjdump() -> str:
    """The tool, from the PATH or from Triton, which carries it."""
    found = shutil.which("cuobjdump")
    if found is None:
        import triton

        found = triton.knobs.nvidia.cuobjdump.path
    return found


def functions_of(cubin: bytes) -> dict[str, tuple[Usage, str]]:
    """Each kernel of a cubin: what it takes, and its machine code as text."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([cuobjdump(), option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("-res-usage", "-sass")
        )
    codes = {name: text for name, text in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", code, re.DOTALL)}
    found = {}
    for name, line in re.findall(r"Function (\S+):\s*\n(.*)", usage):
        numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", line)}
        if name in codes:
            found[name] = (
                Usage(
                    numbers["REG"],
                    numbers["STACK"] + numbers["LOCAL"],
                    numbers["SHARED"],
                    len(INSTRUCTION.findall(codes[name])),
                ),
                codes[name],
            )
    return found


def lines_and_loops(code: str) -> tuple[list[tuple[int, str]], list[tuple[int, int]]]:
    """The instructions with their addresses, and the first and last address of every loop: of every jump back."""
    lines = [(int(address, 16), text) for address, text in INSTRUCTION.findall(code)]
    jumps = [(address, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for address, text in lines]
    return lines, [(int(jump[1], 16), address) for address, jump in jumps if jump and int(jump[1], 16) < address]


def loop_instructions(code: str, marker: str, per_element: int, passes: int = 1) -> float:
    """Instructions for each element in the innermost loops with most ``marker`` instructions, a loop for each pass over
    the elements; an element takes ``per_element`` of these. 0 where fewer loops have any."""
    lines, all_loops = lines_and_loops(code)
    loops = []
    for first, last in all_loops:
        body = [text for address, text in lines if first <= address <= last]
        marks = sum(marker in text for text in body)
        if marks:
            loops.append((first, last, len(body), marks))
    innermost = [
        (marks, length)
        for first, last, length, marks in loops
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b, _, _ in loops)
    ]
    if len(innermost) < passes:
        return 0.0
    chosen = sorted(innermost, key=lambda loop: (-loop[0], loop[1]))[:passes]
    return sum(length * per_element / marks for marks, length in chosen)


def repeated_instructions(code: str) -> int:
    """Instructions inside loops; all, where there are none."""
    lines, loops = lines_and_loops(code)
    inside = sum(any(first <= address <= last for first, last in loops) for address, _ in lines)
    return inside or len(lines)


def instructions_of_every_program(code: str) -> int:
    """Instructions up to where programs leave all that is left to the last one, which an atomic count has told them; 0
    where none does."""
    lines, _ = lines_and_loops(code)
    counts = [i for i, (_, text) in enumerate(lines) if "ATOMG" in text]
    exits = [i for i, (_, text) in enumerate(lines) if re.match(r"@!?P\d EXIT", text)]
    return next((i + 1 for i in exits if counts and i > counts[0]), 0)


# What a usage follows from, too.
READERS = (
    functions_of,
    lines_and_loops,
    loop_instructions,
    repeated_instructions,
    instructions_of_every_program,
)


class Kept:
    """Usages of earlier runs by the hash of all that they follow from: those recorded with the source, and this
    machine's own. ``anew``: none of them, only what this run has put. ``kind``: another dataclass of numbers."""

    def __init__(
        self, path: Path, recorded: Path = COMPILED, *, anew: bool = False, kind: Callable[..., Any] = Usage
    ) -> None:
        self.path, self.recorded, self.anew, self.kind = path, recorded, anew, kind
        self.all = self.read()
        self.used: dict[str, dict[str, list]] = {}

    def read(self) -> dict[str, dict[str, list]]:
        files = [path for path in (self.recorded, self.path) if path.exists()]
        return {key: usages for path in files for key, usages in json.loads(path.read_text()).items()}

    def get(self, key: str) -> dict[str, Any] | None:
        found = (self.used if self.anew else self.all).get(key)
        if found is None:
            return None
        self.used[key] = found
        return {name: self.kind(*usage) for name, usage in found.items()}

    def put(self, key: str, usages: dict[str, Any]) -> None:
        self.used[key] = {name: list(astuple(usage)) for name, usage in usages.items()}
        self.all = self.read() | self.used  # others may run too
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(self.path, self.all)

    def record(self, *, whole: bool) -> None:
        """Write what this run used, a line a kernel or file of kernels: in place of all that was recorded if the run
        was ``whole``, else beside it."""
        before = {} if whole or not self.recorded.exists() else json.loads(self.recorded.read_text())
        write_lines(self.recorded, dict(sorted((before | self.used).items())))


def write_lines(path: Path, usages: dict[str, dict[str, list]]) -> None:
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in usages.items())
    partial = path.with_suffix(".part")
    partial.write_text(f"{{\n{lines}\n}}\n")
    partial.replace(path)


class Budgets:
    """What each kernel took when that was last recorded, by compiler, case and architecture."""

    def __init__(self, compiler: str, version: str, *, recording: bool = False) -> None:
        self.compiler, self.version = compiler, version
        own = read_budgets().get(compiler, {})
        self.recorded: dict[str, list[int]] = own["kernels"] if own.get("version") == version else {}
        self.why_not = (
            ""
            if self.recorded and not recording
            else (
                f"{compiler} {version} is held to no budget (recorded: {own.get('version', 'none')}), to spills and "
                "shared memory alone"
            )
        )
        self.seen: dict[str, list[int]] = {}

    def problem(self, case: str, arch: int, usage: Usage) -> str:
        """Why a kernel is beyond its budget; empty where it is not, or has none."""
        key = f"{case} sm_{arch}"
        now = [usage.registers, usage.shared, usage.instructions]
        self.seen[key] = [max(pair) for pair in zip(now, self.seen.get(key, now), strict=True)]
        if self.why_not:
            return ""
        if key not in self.recorded:
            return "has no budget: record it"
        registers, shared, instructions = self.recorded[key]
        over = [
            f"{name} {is_now}, recorded {budget}"
            for name, is_now, budget, most in (
                ("registers", usage.registers, registers, registers + SLACK_REGISTERS),
                ("shared memory", usage.shared, shared, shared),
                ("instructions", usage.instructions, instructions, SLACK_INSTRUCTIONS * instructions),
            )
            if is_now > most
        ]
        return "; ".join(over)

    def record(self, architectures: Iterable[int]) -> None:
        """Write what was seen in place of what was recorded for these architectures."""
        everything = read_budgets()
        ends = tuple(f" sm_{arch}" for arch in architectures)
        kept = {key: value for key, value in self.recorded.items() if not key.endswith(ends)}
        everything[self.compiler] = {"version": self.version, "kernels": dict(sorted((kept | self.seen).items()))}
        lines = json.dumps(dict(sorted(everything.items())), indent=1)
        BUDGETS.write_text(re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", lines) + "\n")


def read_budgets() -> dict[str, dict]:
    return json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
