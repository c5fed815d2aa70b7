"""The package as users get it: built into a wheel from a copy of the sources, installed elsewhere, used from there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
WARNING = "WARNING: dgi-kernels is installed without its compiled kernels"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output, both streams in one."""
    return subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what a clone holds, without anything built."""
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "dgi_kernels", "dgi", "tests"):
        shutil.copytree(ROOT / name, tmp_path / "sources" / name, ignore=ignore)
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "CHANGELOG.md",
        "constraints.txt",
        "LICENSE",
    ):
        shutil.copy(ROOT / name, tmp_path / "sources" / name)
    return tmp_path / "sources"


# Compiling everything once more would take minutes, and the same setup.py has just compiled this checkout's extension.
# This compiler compiles only files that differ from the checkout's, and hands out the checkout's library for a link.
COMPILER = """#!/usr/bin/env bash
checkout={checkout} output= source= compiles=
arguments=("$@")
while (($#)); do
    case $1 in
        -o) output=$2 ;;
        -c) compiles=1 ;;
        *.cpp) source=$1 ;;
    esac
    shift
done
case $compiles$output in
    1*) if cmp -s "$source" "$checkout/csrc/${{source##*/csrc/}}"; then exec touch "$output"; fi ;;
    *_C.abi3.so) exec cp "$checkout/dgi_kernels/_C.abi3.so" "$output" ;;
esac
exec {compiler} "${{arguments[@]}}"
"""


@pytest.fixture
def compiler(tmp_path: Path) -> str:
    """A C++ compiler for a copy of this checkout's sources."""
    real = os.environ.get("CXX", "c++")
    if shutil.which(real) is None:
        pytest.skip("needs a C++ compiler")
    if not (ROOT / "dgi_kernels" / "_C.abi3.so").exists():
        return real
    path = tmp_path / "c++"
    path.write_text(COMPILER.format(checkout=ROOT, compiler=real))
    path.chmod(0o755)
    return str(path)


PIP_WHEEL = ("-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "-w", "dist", ".")
BUILD_STEP = ("-c", "from setuptools import build_meta; build_meta.build_wheel('dist')")  # pip's last step: saves time


def build_wheel(
    sources: Path, *command: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """Run one of the above in ``sources`` and return how it ended and the wheels it left."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # for the environment's own ninja
    result = run(sys.executable, *command, cwd=sources, PATH=path, **environment)
    return result, sorted((sources / "dist").glob("*.whl"))


def run_installed(wheel: Path, code: str, folder: Path) -> str:
    """What ``code`` prints where only this wheel provides the packages."""
    target = folder / "installed"
    result = run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=folder)
    assert result.returncode == 0, result.stdout
    check = f"import dgi_kernels; assert dgi_kernels.__file__.startswith({str(target)!r}), dgi_kernels.__file__\n"
    result = run(sys.executable, "-c", check + code, cwd=folder, PYTHONPATH=str(target))
    assert result.returncode == 0, result.stdout
    return result.stdout


def files_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_with_the_extension(sources: Path, compiler: str, tmp_path: Path) -> None:
    result, wheels = build_wheel(sources, *BUILD_STEP, DGI_BUILD_CUDA="0", CXX=compiler)
    assert result.returncode == 0, result.stdout
    assert len(wheels) == 1 and "-cp310-abi3-" in wheels[0].name
    assert WARNING not in result.stdout
    files = files_in(wheels[0])
    assert {"dgi_kernels/_C.abi3.so", "dgi_kernels/py.typed", "dgi/__init__.py"} <= files
    assert not [name for name in files if name.startswith(("tests/", "csrc/", "bench/"))]
    output = run_installed(
        wheels[0],
        """
import torch
native = dgi_kernels.backends()["native"]
assert native.available and "gumbel_noise" in native.ops, native
noise = torch.ops.dgi_kernels.gumbel_noise(torch.tensor([9]), 1, 0, 2, 3, 4)
assert torch.equal(dgi_kernels.gumbel_noise(9, 1, 3, 4, row_offset=2), noise)
print("fine")
""",
        tmp_path,
    )
    assert output == "fine\n"


def test_without_a_compiler_it_is_pure_python_with_one_warning(sources: Path, tmp_path: Path) -> None:
    result, wheels = build_wheel(sources, *PIP_WHEEL, CC="/nowhere/cc", CXX="/nowhere/c++")
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("WARNING: dgi-kernels") == 1
    assert "no C++ compiler was found ('/nowhere/c++')" in result.stdout
    assert len(wheels) == 1 and wheels[0].name.endswith("-py3-none-any.whl")
    assert not [name for name in files_in(wheels[0]) if name.endswith(".so")]
    output = run_installed(
        wheels[0],
        """
native = dgi_kernels.backends()["native"]
assert not native.available and "the extension is not built" in native.reason, native
print(tuple(dgi_kernels.gumbel_noise(9, 1, 3, 4).shape))
""",
        tmp_path,
    )
    assert output == "(3, 4)\n"


def test_where_compiling_fails_it_is_pure_python_with_one_warning(sources: Path, compiler: str) -> None:
    (sources / "csrc" / "register" / "trie.cpp").write_text("#error a compiler that is too old\n")
    result, wheels = build_wheel(sources, *BUILD_STEP, DGI_BUILD_CUDA="0", CXX=compiler)
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("WARNING: dgi-kernels") == 1
    assert "a compiler that is too old" in result.stdout
    assert len(wheels) == 1 and not [name for name in files_in(wheels[0]) if name.endswith(".so")]


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a torch without CUDA")
def test_cuda_by_name_needs_a_cuda_torch(sources: Path) -> None:
    result, wheels = build_wheel(sources, *BUILD_STEP, DGI_BUILD_CUDA="1")
    assert result.returncode != 0 and not wheels
    assert "DGI_BUILD_CUDA=1, but CUDA kernels cannot be built here: torch" in result.stdout
    assert "is built without CUDA" in result.stdout


def test_a_misspelt_cuda_switch_is_refused(sources: Path) -> None:
    result, wheels = build_wheel(sources, *BUILD_STEP, DGI_BUILD_CUDA="yes")
    assert result.returncode != 0 and not wheels
    assert "DGI_BUILD_CUDA must be auto, 0 or 1; got 'yes'" in result.stdout
