"""The tests marked gpu, of files that are named: one whose tests lose their marker is a failure, not a silence."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from .session import Session

ROOT = Path(__file__).resolve().parents[2]
# Every file with tests that need a GPU, CUDA C++ first. A test of the rehearsal holds this list against the tree.
NATIVE = (
    "tests/kernels/test_beam_graph.py",
    "tests/kernels/test_beam.py",
    "tests/kernels/test_ranking.py",
    "tests/kernels/test_every_backend.py",
)
TRITON = (
    "tests/kernels/test_quantize_triton.py",
    "tests/kernels/test_gumbel_triton.py",
    "tests/kernels/test_cosine_triton.py",
    "tests/kernels/test_cosine_triton_calls.py",
    "tests/kernels/test_cosine_logits_triton.py",
    "tests/kernels/test_log_normalizer_triton.py",
    "tests/kernels/test_clustering_triton.py",
    "tests/dgi/training/test_update.py",
)
EACH = "gpu.each_test"  # the plugin that writes each outcome when it is there


def pytest(session: Session, *arguments: str, workers: int | None = None) -> int:
    """Run pytest; each outcome is a line of the stage's .jsonl, whatever happens to the run."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-p",
        EACH,
        f"--junitxml={session.folder / session.name}.xml",
        *arguments,
    ]
    if workers and workers > 1:
        command += ["-n", str(workers), "--dist", "load"]
    environment = os.environ | {"EACH_TEST": str(session.folder / f"{session.name}.jsonl")}
    if session.options.get("stall"):
        environment["EACH_TEST_STALL"] = str(session.options["stall"])
    process = subprocess.Popen(command, cwd=ROOT, env=environment)
    try:
        return process.wait()
    except KeyboardInterrupt:  # pytest has it too: it writes its summary
        process.send_signal(signal.SIGINT)
        process.wait(10)
        raise


def marked(session: Session, files: tuple[str, ...], *more: str) -> None:
    """Run the files' tests marked gpu, and fail where a file has none."""
    outcomes = session.folder / f"{session.name}.jsonl"
    rehearsed = bool(session.options.get("rehearse"))
    # Without a GPU the marked tests skip themselves one by one, which shows that they are there.
    status = pytest(session, "-m", "gpu", *more, *files, workers=1 if rehearsed else min(12, os.cpu_count() or 1))
    seen = outcomes.read_text() if outcomes.exists() else ""
    for file in files:
        if f'"{file}::' not in seen:
            session.fail(f"{file} has no test marked gpu")
    counts = {word: seen.count(f'"outcome": "{word}"') for word in ("passed", "failed", "skipped")}
    session.say(f"{session.name}: " + ", ".join(f"{count} {word}" for word, count in counts.items()))
    if status not in (0, 5) or counts["failed"]:
        session.fail(f"pytest ended with status {status}, {counts['failed']} failed")
    if not rehearsed and not counts["passed"]:
        session.fail("no test ran")


def native(session: Session) -> None:
    """CUDA C++: these need no compilation, and what they find is found in seconds."""
    marked(session, NATIVE, "-k", "native or graph or beam or ranking")


def everything(session: Session) -> None:
    """All of them; what inductor compiles comes last."""
    marked(session, (*NATIVE, *TRITON))
