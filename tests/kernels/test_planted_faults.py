"""The Triton tests can fail: each fault is planted in a copy of the kernels, and a test of theirs must find it."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Fault(NamedTuple):
    """``right`` becomes ``wrong``, at every place of ``file``; ``test`` in ``tests`` fails and says ``message``."""

    file: str
    right: str
    wrong: str
    tests: str
    test: str
    message: str


QUANTIZE = "quantize_triton.py", "test_quantization and flash-n35-d7-k9.33-float32"
COSINE = "cosine_triton.py", "test_every_option and flash-33x17x65-float32-none"
EQUAL = "quantize_triton.py", "test_the_first_of_equal_codes and chunked-300"
THREADS = "quantize_triton.py", "test_the_first_of_equal_codes and flash-100"
REDUCED = "cosine_triton_calls.py", "test_gradients_made_with_the_loss and 33x17x65-30.0-mean-reduced"
FAULTS = {
    "codes of later tiles are never the best": Fault(
        "quantize/triton_kernels.py",
        "best_item = tl.where(is_better, first // threads + item, best_item)",
        "best_item = tl.where(first == 0, item, best_item)",
        *QUANTIZE,
        "codes of level 1 are worse than the best",
    ),
    "the sample forgets the noise": Fault(
        "quantize/triton_kernels.py",
        "sampled = first_code(best_noisy, best_noisy_item)",
        "sampled = code",
        *QUANTIZE,
        "sampled of level 0 are worse than the best",
    ),
    "the last tile of codes is left out": Fault(
        "cosine/triton_kernels.py",
        "for start in range(0, K, b_k):",
        "for start in range(0, K - b_k, b_k):",
        *COSINE,
        "is off by",
    ),
    "the last of equal codes is taken": Fault(
        "quantize/triton_columns.py",
        "is_first = largest_of(first) == value",
        "is_first = largest_of(last) != value",
        *EQUAL,
        "not the first of equal codes",
    ),
    "every thread's best code counts": Fault(
        "quantize/triton_columns.py",
        "is_best = largest == tl.max(largest, axis=1)[:, None]",
        "is_best = largest == largest",
        *THREADS,
        "not the first of equal codes",
    ),
    "the radial part stays": Fault(
        "triton_common.py",
        "return tl.where(is_constant(rnorm, eps), 0.0, product * rnorm * rnorm)",
        "return product * 0.0",
        *QUANTIZE,
        "is off by",
    ),
    "a target has no weight of its own": Fault(
        "cosine/triton_products.py",
        "(smoothing * total - others) * factor_of(",
        "(smoothing * total) * factor_of(",
        *REDUCED,
        "is off by",
    ),
    "ignored targets count": Fault(
        "cosine/triton_kernels.py", "(target < K) & (target != ignore_index)", "(target < K)", *COSINE, "is off by"
    ),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton"
    ),
]


def run_tests(folder: Path, *tests: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    """Tests, each a file and what chooses one of its tests, in the interpreter, against the package in ``folder``."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(folder),
        "DGI_TEST_SEED": "0",
    }  # draws an ignore_index that is a code
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-x",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        "--rootdir",
        str(folder),
        "-k",
        " or ".join(f"({chosen})" for _, chosen in tests),
        *(str(folder / "tests" / "kernels" / f"test_{file}") for file, _ in tests),
    ]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def copy_of_the_project(folder: Path) -> None:
    for name in ("dgi_kernels", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    copy_of_the_project(tmp_path)
    path = tmp_path / "dgi_kernels" / fault.file
    text = path.read_text(encoding="utf-8")
    assert fault.right in text, f"{fault.file} has changed: plant the fault in what it says now"
    path.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
    run = run_tests(tmp_path, (fault.tests, fault.test))
    assert run.returncode == 1 and fault.message in run.stdout, run.stdout[-3000:] + run.stderr[-1000:]


def test_the_same_tests_pass_without_a_fault(tmp_path: Path) -> None:
    copy_of_the_project(tmp_path)
    tests = (QUANTIZE, COSINE, REDUCED, EQUAL, THREADS)
    run = run_tests(tmp_path, *tests)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    for file, _ in tests:
        assert re.search(rf"test_{file}::.* PASSED", run.stdout), f"no test of {file} was run"
