"""That memory really is poisoned before kernels write to it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
PROGRAM = """
#include <cstdio>
#include "cpu/shared/host.h"
int main() {
  const auto reals = dgi::cpu::make_buffer<float>(100);
  const auto codes = dgi::cpu::make_buffer<int>(100);
  int poisoned = 0;
  for (int i = 0; i < 100; ++i) poisoned += reals[i] != reals[i] && codes[i] == -1;
  std::printf("%d", poisoned);
}
"""


def test_torch_gives_nan() -> None:
    assert torch.empty(5).isnan().all() and torch.ops.aten.empty.memory_format([3]).isnan().all()
    assert (torch.empty(5, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_cpp_buffers_are_nan(tmp_path: Path) -> None:
    assert os.environ["DGI_POISON"] == "1", "set before the extension is loaded"
    (tmp_path / "main.cpp").write_text(PROGRAM)
    subprocess.run(
        ["c++", "-std=c++20", "-I", str(CSRC), "-o", str(tmp_path / "main"), str(tmp_path / "main.cpp")], check=True
    )
    run = subprocess.run([str(tmp_path / "main")], capture_output=True, text=True, check=True)
    assert run.stdout == "100"
