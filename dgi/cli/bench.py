"""``dgi bench``."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

HELP = "run the benchmarks of the source tree with pytest-benchmark"
EPILOG = """\
examples:
  dgi bench
  dgi bench -k trie --benchmark-json trie.json

All further arguments go to pytest.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pytest_arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments for pytest")


def run(args: argparse.Namespace) -> None:
    folder = Path(__file__).resolve().parents[2] / "bench"
    files = sorted(map(str, folder.glob("bench_*.py")))
    if not files:
        raise FileNotFoundError(f"{folder} holds no benchmarks; they come with the source tree, not with the installed "
                                f"package: clone the repository, run pip install -e '.[bench]' in it, then dgi bench")
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ImportError("the benchmarks need pytest-benchmark; run: pip install 'dgi-kernels[bench]'")
    command = [sys.executable, "-m", "pytest", "--rootdir", str(folder.parent), *files, *args.pytest_arguments]
    status = subprocess.run(command, check=False).returncode
    if status:
        raise ValueError(f"pytest ended with status {status}")
