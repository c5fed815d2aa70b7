"""The run on a GPU, rehearsed without one from a bare copy of the tree; and that the rehearsal finds planted faults."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dgi_kernels import _extension

from .processes import outside_of_pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("bench", "csrc", "dgi", "dgi_kernels", "tests", "setup.py", "pyproject.toml", "README.md")
BROKEN_PEERS = {  # a package that breaks when it is imported, and one that breaks when it is called
    "liger_kernel/__init__.py": "raise ImportError('this Liger needs another transformers')",
    "cut_cross_entropy.py": "def linear_cross_entropy(*args):\n    raise RuntimeError('no kernel image')",
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
    pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error)),
]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is carried to a machine with a GPU: the tree without a repository, and the extension that was built."""
    target = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "results")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, target / name)
    for name, text in BROKEN_PEERS.items():
        (target / "peers" / name).parent.mkdir(parents=True, exist_ok=True)
        (target / "peers" / name).write_text(text)
    return target


def rehearse(tree: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = outside_of_pytest() | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(tree / "peers"),
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": str(out / "cache"),
    }
    return subprocess.run(
        [tree / "bench" / "gpu.sh", "--rehearse", *options, str(out / "results")],
        env=environment,
        capture_output=True,
        text=True,
        cwd=out,
        check=False,
    )


def test_every_stage_passes_and_leaves_results_when_cut(bare: Path, tmp_path: Path) -> None:
    done = rehearse(bare, tmp_path, "--run", "both")
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert files == ["results.tar.gz", "summary.txt", "table.txt"]
    summary, table = ((tmp_path / "results" / f"{name}.txt").read_text() for name in ("summary", "table"))
    stages = set(re.findall(r"^ok       (\S+) \(", summary, re.MULTILINE))
    cut = set(re.findall(r"^ok       (\S+), cut: [1-9]", summary, re.MULTILINE))
    assert {"ahead", "check", "native", "cosine", "beam", "quantize", "sweep", "tests", "threads"} <= stages
    assert cut == stages - {"ahead"}, "a stage that was cut left nothing, or was not cut"
    # A peer that is broken says so, and costs nobody else's figure.
    assert "Liger left out: ImportError: this Liger needs another transformers" in table
    assert "cut-cross-entropy left out: RuntimeError: no kernel image" in table
    with tarfile.open(tmp_path / "results" / "results.tar.gz") as tar:
        peers = json.load(tar.extractfile("rehearsal-peers-cosine.json"))  # type: ignore[arg-type]
        log = tar.extractfile("quantize.log")
        assert log is not None and b"residual_quantize" in log.read()
    assert {figure["params"]["system"] for figure in peers["benchmarks"]} >= {"ours", "compile"}


PLANTED = {
    "a seed on the wrong device": (
        "bench/gpu/quantize.py",
        "tau, seed=SEED)",
        "tau, seed=torch.tensor([SEED]))",
        "quantize",
        "seed must be on cuda:0",
    ),
    "a step that is cut and leaves nothing": (
        "bench/gpu/session.py",
        "        self._results.write(self.path)\n        self._added",
        "        self._added",
        "ceilings",
        "ceilings, cut: nothing is left",
    ),
    "a missing marker": (
        "tests/kernels/interpreter.py",
        "pytest.mark.gpu(test)",
        "test",
        "tests",
        "test_quantize_triton.py has no test marked gpu",
    ),
    "a peer that is imported unguarded": (
        "bench/gpu/cosine.py",
        "name: lazily(theirs)",
        "name: theirs()",
        "peers-cosine",
        "this Liger needs another transformers",
    ),
    "a name that Triton keeps": (
        "dgi_kernels/gumbel/triton_softmax.py",
        "noise_stream=stream,",
        "stream=stream,",
        "check",
        "a name which Triton keeps",
    ),
    "a grid that CUDA refuses": (
        "dgi_kernels/gumbel/triton_softmax.py",
        "(triton.cdiv(rows, b_n) * triton.cdiv(codes",
        "(triton.cdiv(rows, b_n), triton.cdiv(codes",
        "check",
        "invalid argument",
    ),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_the_rehearsal_finds(fault: str, bare: Path, tmp_path: Path) -> None:
    name, old, new, stage, message = PLANTED[fault]
    tree = tmp_path / "tree"
    shutil.copytree(bare, tree, copy_function=functools.partial(os.link, follow_symlinks=True))
    text = (tree / name).read_text()
    assert text.count(old) == 1, f"{fault}: {name} has changed"
    (tree / name).unlink()
    (tree / name).write_text(text.replace(old, new))
    done = rehearse(tree, tmp_path, "--only", stage)
    assert done.returncode == 1, done.stdout + done.stderr
    summary = (tmp_path / "results" / "summary.txt").read_text()
    assert message in summary, summary


# Each of these runs in a process of its own: what Triton is asked to do is decided as it is imported.
CHECKED = """
import sys
from pathlib import Path
from gpu import check, session, device
from dgi_kernels.cosine import triton as cosine
if len(sys.argv) > 2:
    genuine = cosine._gradients
    def wrong(*given):
        dh, dweight, *others = genuine(*given)
        return dh, dweight * 1.01, *others
    cosine._gradients = wrong
made = session.Session("tiny", Path(sys.argv[1]), device.Cpu())
check.tiny(made)
print(*made.problems, sep="\\n")
"""
COMPILED = """
import torch, triton, triton_code
from dgi_kernels.gumbel import triton_softmax
from gpu import ahead
def call():
    triton_softmax.gumbel_noise(torch.zeros(1, dtype=torch.int64), 0, 0, 0, 4, 33)
def main():
    launch, = triton_code.launches_of("", call)
    (_, seconds, problem), = ahead.compile_all([launch], 90, 1)
    assert not problem, problem
    triton.runtime.driver.set_active(ahead.NoDriver(90))
    hit = []
    triton.knobs.compilation.listener = lambda **known: hit.append(known["cache_hit"])
    run = triton.JITFunction.run
    triton.JITFunction.run = lambda *given, warmup, **more: run(*given, warmup=True, **more)
    call()
    assert hit == [True], hit
if __name__ == "__main__":
    main()
"""


def script(text: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(text)
    path = f"{ROOT}{os.pathsep}{ROOT / 'bench'}"
    return subprocess.run(
        [sys.executable, folder / "script.py", *arguments],
        env=outside_of_pytest() | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(folder / "cache"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("planted", [False, True])
def test_the_checks_tell_right_from_wrong(planted: bool, tmp_path: Path) -> None:
    """The checks that a GPU run begins with, on interpreted kernels: as they are, and with a gradient 1 % too large."""
    done = script(CHECKED, tmp_path, str(tmp_path), *["planted"] * planted, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    problems = [
        line for line in done.stdout.splitlines() if line.startswith("cosine") and "dweight is wrong by" in line
    ]
    assert len(problems) == 4 * planted, done.stdout
    assert ("FAILED" in done.stdout) == planted, done.stdout


def test_what_is_compiled_ahead_is_what_a_launch_finds(tmp_path: Path) -> None:
    done = script(COMPILED, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_with_tests_for_a_gpu_is_named() -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", "-p", "no:cacheprovider", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    found = set(re.findall(r"^(tests/\S+\.py)::", listed.stdout, re.MULTILINE))
    script = "from gpu import tests; print(*tests.NATIVE, *tests.TRITON)"
    named = subprocess.run(
        [sys.executable, "-c", script],
        env=outside_of_pytest() | {"PYTHONPATH": f"{ROOT}:{ROOT}/bench"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert found == set(named)


def test_the_plan_keeps_to_six_minutes() -> None:
    done = subprocess.run(
        [ROOT / "bench" / "gpu.sh", "--plan"],
        env=outside_of_pytest() | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=True,
    )
    kernels, seconds = re.search(r"^in all +(\d+) +(\d+)", done.stdout, re.MULTILINE).groups()  # type: ignore[union-attr]
    assert int(kernels) > 50 and int(seconds) <= 360, done.stdout
