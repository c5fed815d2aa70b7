"""C++ drivers that run kernels under AddressSanitizer and UBSan."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"


def assert_clean(
    driver: str, sources: Sequence[str], folder: Path, seed: int, rounds: int, defines: Sequence[str] = ()
) -> None:
    """Compile ``driver`` of this folder with ``sources`` of csrc, and let it check ``rounds`` random cases."""
    binary = folder / Path(driver).stem
    compiled = subprocess.run(
        [
            "c++",
            "-std=c++20",
            "-O0",
            "-g1",
            "-march=native",
            "-fsanitize=address,undefined",
            "-fno-sanitize-recover=all",
            *(f"-D{define}" for define in defines),
            f"-I{Path(__file__).with_name('one_isa')}",
            f"-I{CSRC / 'include'}",
            f"-I{CSRC}",
            str(Path(__file__).with_name(driver)),
            *(str(CSRC / source) for source in sources),
            "-o",
            str(binary),
        ],
        capture_output=True,
        text=True,
    )
    if compiled.returncode and "sanitize" in compiled.stderr + compiled.stdout or "asan" in compiled.stderr:
        pytest.skip(f"the compiler has no sanitizers: {compiled.stderr[-300:]}")
    assert compiled.returncode == 0, compiled.stderr
    done = subprocess.run([str(binary), str(seed), str(rounds)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
