"""What the Triton tests share: on a GPU they run there, else once in Triton's interpreter, with small tiles.

The interpreter must be chosen before Triton is imported, so without a GPU one test of each file runs the file in a
process of its own. There bfloat16 is left out (the interpreter's tl.dot multiplies its raw bits), and float32 goes
through both forms.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if GPU else "cpu"
TRITON = importlib.util.find_spec("triton") is not None
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * GPU

interpreted = pytest.mark.skipif(not (TRITON and INTERPRETED), reason="needs Triton's interpreter")
needs_launching = pytest.mark.skipif(
    not TRITON or GPU or INTERPRETED, reason="needs Triton; a GPU runs the tests itself"
)


def launcher(test: Callable[[], None]) -> Callable[[], None]:
    """Mark the test of a file that runs the others in the interpreter."""
    return pytest.mark.slow(needs_launching(test))


def runs(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test of kernels: skipped where they cannot run."""
    test = pytest.mark.skipif(
        not (TRITON and (GPU or INTERPRETED)), reason="needs Triton and a GPU or its interpreter"
    )(test)
    return test if INTERPRETED else pytest.mark.gpu(test)


def run_in_the_interpreter(file: str) -> None:
    """Run a file's tests in a process that interprets; what is skipped there must be on the list of tests/skips.py."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    passed, skipped = (
        int(found[1]) if (found := re.search(rf"(\d+) {what}", run.stdout)) else 0 for what in ("passed", "skipped")
    )
    print(f"{Path(file).name} in the interpreter: {passed} passed, {skipped} skipped")
    assert passed > skipped, run.stdout


def choose_form(monkeypatch: pytest.MonkeyPatch, forms: ModuleType, form: str, step: int) -> None:
    """Make an op's launchers take the "flash" or the "chunked" form whatever the size; interpreted with small tiles.

    The "reduced" form of an op that has one is that of its reduced results, which are "chunked" elsewhere.
    """
    flash = form == "flash"
    monkeypatch.setattr(forms, "uses_flash", lambda dim, dtype: flash and (INTERPRETED or dtype != torch.float32))
    monkeypatch.setattr(forms, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(forms, "CHUNK_STEP", 32)
    if hasattr(forms, "FLASH_ROWS"):
        monkeypatch.setattr(forms, "FLASH_ROWS", 0)
    launch = sys.modules.get(f"{forms.__name__}_launch")
    if launch is not None:
        monkeypatch.setattr(launch, "IN_RANGE", (torch.float32, torch.bfloat16))
    reduced = getattr(forms, "reduced", None)
    if reduced is not None:
        monkeypatch.setattr(reduced, "SUM_ROWS", 16)
        monkeypatch.setattr(reduced, "SUMS_BLOCK", 2)
        monkeypatch.setattr(reduced, "IN_RANGE", (torch.float32, torch.bfloat16) if form == "reduced" else ())
        monkeypatch.setattr(reduced, "KEPT_BYTES", 0)
    fused = getattr(forms, "fused", None)
    if fused is not None:
        monkeypatch.setattr(fused, "CHUNK_BYTES", 4096)
        monkeypatch.setattr(fused, "LEAST_ROWS", 32)
        monkeypatch.setattr(fused, "PARTS", 2)
        if INTERPRETED:
            monkeypatch.setattr(fused, "STEP", 16)
            small = forms.Tiles(owned=32, step=step, warps=4, stages=2)
            monkeypatch.setattr(fused, "fused_tiles", lambda dim, device: small)
    if INTERPRETED:
        shuffle_programs(monkeypatch)
        tiles = forms.Tiles(owned=32, step=step, warps=4, stages=2)
        # Passes that share a buffer have steps of their own, as on a GPU.
        others = [tiles._replace(step=max(16, step >> i % 2)) for i in range(len(forms.FlashConfig._fields))]
        config = forms.FlashConfig(*others)
        monkeypatch.setattr(forms, "flash_config", lambda dim, device: (max(16, 1 << (dim - 1).bit_length()), config))


def shuffle_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the interpreter run the programs of a launch in any order, as a GPU may."""
    from triton.runtime.interpreter import interpreter_builder

    set_grid, set_program = interpreter_builder.set_grid_dim, interpreter_builder.set_grid_idx
    left: list[tuple[int, ...]] = []

    def shuffled(*grid: int) -> None:
        set_grid(*grid)
        left[:] = itertools.product(*map(range, grid))
        random.shuffle(left)

    monkeypatch.setattr(interpreter_builder, "set_grid_dim", shuffled)
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *_: set_program(*left.pop()))


def seed_tensor() -> Tensor:
    return torch.tensor([random.randrange(-(2**63), 2**63)], device=DEVICE)
