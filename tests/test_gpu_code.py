"""What the compile gate reads from machine code, keeps between runs, and holds against budgets."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import cuda_code  # noqa: E402
import machine_code  # noqa: E402
from machine_code import (  # noqa: E402
    Budgets,
    Kept,
    Usage,
    instructions_of_every_program,
    loop_instructions,
    repeated_instructions,
)


def sass(*instructions: str) -> str:
    lines = [f"        /*{16 * i:04x}*/          {text} ;   /* 0x0000 */" for i, text in enumerate(instructions)]
    return "\n".join(lines)


def test_instructions_of_the_innermost_loop() -> None:
    code = sass("MOV R1, R2", "LDG R3", "FFMA R4", "FFMA R4", "NOP", "@P0 BRA 0x0010", "FFMA R5", "@P1 BRA 0x0000")
    assert loop_instructions(code, "FFMA", 1) == 2.0  # load, two multiply-adds and the jump
    assert loop_instructions(code, "FFMA", 2) == 4.0
    assert loop_instructions(code, "MUFU", 1) == 0.0


def test_instructions_of_several_passes() -> None:
    code = sass("MOV R1", "I2F R2", "@P0 BRA 0x0010", "I2F R3", "FADD R3", "@P1 BRA 0x0030", "EXIT")
    assert loop_instructions(code, "I2F", 1, passes=2) == 5.0
    assert loop_instructions(code, "I2F", 1, passes=3) == 0.0
    assert repeated_instructions(code) == 5
    assert repeated_instructions(sass("MOV R1", "EXIT", "BRA 0x0020")) == 3  # what follows the end jumps to itself


def test_instructions_of_every_program() -> None:
    """Up to where all but the last one leave; an exit before the count, of programs without work, is none."""
    counting = (
        "@P1 EXIT",
        "FFMA R1",
        "MEMBAR.ALL.GPU",
        "ATOMG.E.ADD.STRONG.GPU PT, R2",
        "BAR.SYNC",
        "@P0 EXIT",
        "FADD R3",
    )
    assert instructions_of_every_program(sass(*counting, "EXIT")) == 6
    assert instructions_of_every_program(sass("FFMA R1", "@P0 EXIT", "FADD R3", "EXIT")) == 0


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
    own, recorded = tmp_path / "build" / "kept.json", tmp_path / "recorded.json"
    kept = Kept(own, recorded)
    assert kept.get("key") is None
    kept.put("key", {"kernel": Usage(1, 2, 3, 4, 5.5)})
    kept.put("other", {"kernel": Usage(6, 7, 8, 9)})
    assert not recorded.exists()
    again = Kept(own, recorded)
    assert again.get("key") == {"kernel": Usage(1, 2, 3, 4, 5.5)}
    again.record(whole=True)
    assert set(json.loads(recorded.read_text())) == {"key"}
    anew = Kept(own, recorded, anew=True)
    assert anew.get("key") is None
    anew.put("new", {})
    assert anew.get("key") is None and anew.get("new") == {}
    own.unlink()
    later = Kept(own, recorded)
    assert later.get("key") == {"kernel": Usage(1, 2, 3, 4, 5.5)} and later.get("other") is None
    later.put("third", {})
    later.record(whole=False)
    assert set(json.loads(recorded.read_text())) == {"key", "third"}


def test_names_do_not_hold_the_hash_of_a_file() -> None:
    names = {
        cuda_code.without_file(f"_ZN3dgi4cuda41_GLOBAL__N__{file:08x}_9_gumbel_cu_1daa61b710sum_kernelEPKflPf")
        for file in (1, 2)
    }
    assert names == {"_ZN3dgi4cuda12_GLOBAL__N_110sum_kernelEPKflPf"}


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton's compiler",
)
def test_a_kernel_that_has_grown_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise, compiled for sm_90: in its budget as it is, beyond it with a tile of twice the rows."""
    import triton_code

    seed = torch.zeros(1, dtype=torch.int64)
    (launch,) = triton_code.launches_of("", lambda: triton_code.softmax.gumbel_noise(seed, 0, 0, 0, 4, 512))
    usage, code = triton_code.machine_code(launch, 90)
    assert usage.spilled == 0
    # Both logarithms of each of a thread's elements, and nowhere a slow path of them.
    assert code.count("MUFU.LG2") == 2 * triton_code.elements(launch)
    assert triton_code.compile_for(launch, 90)[0].per_element < 42

    monkeypatch.setattr(machine_code, "BUDGETS", tmp_path / "budgets.json")
    recording = Budgets("triton", "3", recording=True)
    recording.problem("noise", 90, usage)
    recording.record([90])
    assert Budgets("triton", "3").problem("noise", 90, usage) == ""
    taller = replace(
        launch, constants=tuple((name, 2 * value if name == "b_n" else value) for name, value in launch.constants)
    )
    assert "instructions" in Budgets("triton", "3").problem("noise", 90, triton_code.machine_code(taller, 90)[0])


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton's compiler",
)


@needs_triton
def test_loops_with_products() -> None:
    import gpu_time

    code = sass(
        "MOV R1",
        "LDGSTS.E.BYPASS.128 [R135], desc[UR22][R10.64]",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT",
        "HGMMA.64x64x16.F32.BF16 R56, R24, gdesc[UR8].tnspB, R56",
        "@P0 BRA 0x0010",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT",
    )
    assert gpu_time.loops_of(code) == gpu_time.Loops(copies=1, from_shared=1, from_registers=1)


@needs_triton
def test_estimated_seconds() -> None:
    """More blocks than fit come in waves; blocks of one multiprocessor do one's products beside another's rest."""
    import gpu_time

    assert gpu_time.resident(Usage(registers=128, spilled=0, shared=40 << 10, instructions=1), warps=8) == 2
    assert gpu_time.resident(Usage(registers=32, spilled=0, shared=100 << 10, instructions=1), warps=4) == 2
    assert gpu_time.filled(132 * 2, 2) == (2, 1.0)
    assert gpu_time.filled(8, 2) == (1, 8 / 132)
    assert gpu_time.filled(133, 1) == (1, 133 / 264)
    work = {"products": 2.0, "instructions": 1.0, "memory": 0.5}
    assert gpu_time.combined(work, 1) == 3.0 and gpu_time.combined(work, 2) == 2.5
    assert gpu_time.combined(work | {"memory": 4.0}, 1) == 4.0


@needs_triton
@pytest.mark.parametrize(("case", "most"), [("loss D=768", 300), ("quantizer D=256", 330), ("logits D=256", 4)])
def test_launches_of_a_call(case: str, most: int) -> None:
    """Guards against chunks so small that the host, which launches them, takes longer than the GPU."""
    import gpu_time

    (chosen,) = [known for known in gpu_time.CASES if known.name == case]
    calls = gpu_time.calls_of(chosen)
    launched = [call for call in calls if call.grid or gpu_time.torch_part(call) is not None]
    assert 0 < len(launched) <= most


@needs_triton
@pytest.mark.parametrize(("d", "part"), [(64, 0.01), (256, 0.02), (768, 0.02)])
def test_memory_of_the_loss(d: int, part: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond its gradients, a step takes one or two hundredths of the logits' bytes, which are never formed."""
    from gpu import cosine, rehearsal

    from dgi_kernels import cosine_cross_entropy
    from dgi_kernels.cosine import triton, triton_reduced

    for module in (triton, triton_reduced):  # tensors of the rehearsal are no plain ones
        monkeypatch.setattr(module, "may_replace", lambda kept, h: kept.shape == h.shape)

    rows, codes = 65536, 4096
    with rehearsal.pretended_gpu() as launches:
        launches.memory = memory = rehearsal.Memory()
        step = cosine.step(cosine_cross_entropy, cosine.inputs(rehearsal.FakeGpu(), rows, codes, d, "flat"))
        before = memory.start()
        assert before >= 2 * (rows + codes) * d  # the operands
        step()
    gradients = 2 * (rows + codes) * d
    assert gradients < memory.peak - before <= gradients + part * rows * codes * 4
