"""Compile every CUDA kernel of ``csrc/cuda`` for GPUs that need not be there."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import source_key
from machine_code import READERS, Kept, Usage, functions_of, loop_instructions

CSRC = Path(__file__).resolve().parents[1] / "csrc"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-I{CSRC}", f"-I{CSRC / 'include'}"]  # as setup.py's
# kernel -> an instruction of its innermost loop, how many of them an element takes, and how many such loops it has: an
# exponential a logit, two multiply-adds an element of a vector, a conversion of an integer a random word.
ELEMENTS = {
    "parents_kernel": ("MUFU.EX2", 1),
    "children_kernel": ("FFMA", 2),
    "factors_kernel": ("FFMA", 1),
    "rank_kernel": ("FFMA", 2),
    "rank_wide_kernel": ("FFMA", 2),
    "gumbel_noise_kernel": ("I2F", 1),
    "softmax_kernel": ("I2F", 1, 2),
    "softmax_backward_kernel": ("I2F", 1, 3),
}


def nvcc() -> str | None:
    """The compiler, from CUDA_HOME or the PATH; None where there is none."""
    at_home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    return str(at_home) if at_home.exists() else shutil.which("nvcc")


def version_of(compiler: str) -> str:
    text = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"V(\d[\d.]*)", text)
    return found[1] if found else "unknown"


def usages(
    compiler: str, architectures: list[int], jobs: int, kept: Kept, files: str = "*.cu"
) -> Iterator[tuple[Path, int, dict[str, Usage]]]:
    """Each file, architecture, and what its kernels take, by their short names; from ``kept`` what has not changed."""
    headers = sorted([*(CSRC / "cuda").glob("*.h"), *(CSRC / "include").rglob("*.h")])
    common = hashlib.sha256("\n".join([version_of(compiler), *FLAGS[:3], repr(ELEMENTS)]).encode())
    for path in headers:
        common.update(source_key.of_cpp(path.read_text()).encode())
    for function in (compile_file, short_names, without_file, *READERS):
        common.update(source_key.of_function(function).encode())

    def usages_of(source: Path, arch: int) -> dict[str, Usage]:
        state = common.copy()
        state.update(f"{source.name} {arch} {source_key.of_cpp(source.read_text())}".encode())
        found = kept.get(state.hexdigest())
        if found is None:
            found = compile_file(compiler, source, arch)
            kept.put(state.hexdigest(), found)
        return found

    cases = [(source, arch) for arch in architectures for source in sorted((CSRC / "cuda").glob(files))]
    with ThreadPoolExecutor(jobs) as pool:
        for (source, arch), found in zip(cases, pool.map(lambda case: usages_of(*case), cases), strict=True):
            yield source, arch, found


def compile_file(compiler: str, source: Path, arch: int) -> dict[str, Usage]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernels.cubin")
        command = [compiler, *FLAGS, f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
        functions = functions_of(target.read_bytes())
    names = short_names(list(functions))
    found = {}
    for mangled, (usage, code) in functions.items():
        name = names[mangled]
        marker = ELEMENTS.get(name.split("<")[0])
        per_element = loop_instructions(code, *marker) if marker else 0.0
        found[name] = Usage(usage.registers, usage.spilled, usage.shared, usage.instructions, round(per_element, 1))
    return dict(sorted(found.items()))


def short_names(mangled: list[str]) -> dict[str, str]:
    """``parents_kernel<LogitRows<float, false>, short, NoSets>``: without namespaces and arguments."""
    plain = [without_file(name) for name in mangled]
    done = subprocess.run(["c++filt"], input="\n".join(plain), check=True, capture_output=True, text=True)
    names = {}
    for name, text in zip(mangled, done.stdout.splitlines(), strict=True):
        text = text.replace("(anonymous namespace)::", "").replace("dgi::cuda::", "").replace("dgi::", "")
        names[name] = text.removeprefix("void ").split("(")[0]
    return names


def without_file(mangled: str) -> str:
    """The name with the file-local namespace, whose hash differs from run to run, as other compilers spell it."""
    found = re.search(r"(\d+)(_GLOBAL__N__)", mangled)
    if found is None:
        return mangled
    return mangled[: found.start()] + "12_GLOBAL__N_1" + mangled[found.start(2) + int(found[1]) :]
