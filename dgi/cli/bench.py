"""``dgi bench``."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

HELP = "run the benchmarks of the source tree with pytest-benchmark"
FOLDER = Path(__file__).resolve().parents[2] / "bench"
EPILOG = """\
examples:
  dgi bench
  dgi bench -k trie --benchmark-json trie.json

All further arguments go to pytest.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "dgi bench [-h] [--debug] [PYTEST ARGUMENT ...]"


def run(args: argparse.Namespace) -> None:
    files = sorted(map(str, FOLDER.glob("bench_*.py")))
    if not files:
        raise FileNotFoundError(
            f"{FOLDER} holds no benchmarks; they come with the source tree, not with the installed "
            f"package: clone the repository, run pip install -e '.[bench]' in it, then dgi bench"
        )
    if importlib.util.find_spec("pytest_benchmark") is None:
        raise ImportError("the benchmarks need pytest-benchmark; run: pip install 'dgi-kernels[bench]'")
    status = subprocess.call([sys.executable, "-m", "pytest", *files, *args.pytest_arguments])
    if status:
        raise ValueError(f"pytest ended with status {status}")
