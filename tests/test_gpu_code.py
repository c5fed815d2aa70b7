"""What the compile gate reads from machine code, keeps between runs, and holds against budgets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import cuda_code  # noqa: E402
import machine_code  # noqa: E402
from machine_code import Budgets, Kept, Usage, loop_instructions  # noqa: E402


def sass(*instructions: str) -> str:
    lines = [f"        /*{16 * i:04x}*/          {text} ;   /* 0x0000 */" for i, text in enumerate(instructions)]
    return "\n".join(lines)


def test_instructions_of_the_innermost_loop() -> None:
    code = sass("MOV R1, R2", "LDG R3", "FFMA R4", "FFMA R4", "NOP", "@P0 BRA 0x0010", "FFMA R5", "@P1 BRA 0x0000")
    assert loop_instructions(code, "FFMA", 1) == 2.0  # load, two multiply-adds and the jump
    assert loop_instructions(code, "FFMA", 2) == 4.0
    assert loop_instructions(code, "MUFU", 1) == 0.0


def test_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "BUDGETS", tmp_path / "budgets.json")
    usage = Usage(registers=40, spilled=0, shared=1024, instructions=1000)
    first = Budgets("nvcc", "13.0", recording=True)
    assert first.problem("a kernel", 90, usage) == ""
    first.record([90])
    written = json.loads((tmp_path / "budgets.json").read_text())
    assert written["nvcc"]["kernels"] == {"a kernel sm_90": [40, 1024, 1000]}
    budgets = Budgets("nvcc", "13.0")
    assert budgets.problem("a kernel", 90, Usage(48, 0, 1024, 1100)) == ""
    assert "registers 49, recorded 40" in budgets.problem("a kernel", 90, Usage(49, 0, 1024, 1000))
    assert "shared memory 1028" in budgets.problem("a kernel", 90, Usage(40, 0, 1028, 1000))
    assert "instructions 1101" in budgets.problem("a kernel", 90, Usage(40, 0, 1024, 1101))
    assert "has no budget" in budgets.problem("another", 90, usage)
    assert Budgets("nvcc", "13.1").problem("a kernel", 90, Usage(99, 0, 9999, 9999)) == ""  # another compiler's


def test_results_are_kept(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "build" / "kept.json")
    assert kept.get("key") is None
    kept.put("key", {"kernel": Usage(1, 2, 3, 4, 5.5)})
    assert Kept(kept.path).get("key") == {"kernel": Usage(1, 2, 3, 4, 5.5)}


def test_names_do_not_hold_the_hash_of_a_file() -> None:
    names = {cuda_code.without_file(f"_ZN3dgi4cuda41_GLOBAL__N__{file:08x}_9_gumbel_cu_1daa61b710sum_kernelEPKflPf")
             for file in (1, 2)}
    assert names == {"_ZN3dgi4cuda12_GLOBAL__N_110sum_kernelEPKflPf"}
