"""Kernels under NVIDIA's compute-sanitizer: Triton's under memcheck, CUDA's under racecheck and synccheck too.

Without torch's cache of freed memory, which hides what is out of bounds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

from .session import Session
from .tests import EACH, NATIVE, ROOT

TOOLS = (("memcheck", "triton"), ("racecheck", "native"), ("memcheck", "native"), ("synccheck", "native"))
SELECTED = "native and (search or ranking) and cuda"


def tool_path() -> str | None:
    at_home = os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "compute-sanitizer")
    return shutil.which("compute-sanitizer") or (at_home if os.path.exists(at_home) else None)


def run(session: Session) -> None:
    rehearsed = bool(session.options.get("rehearse"))
    tool = tool_path()
    if tool is None and not rehearsed:
        session.fail("there is no compute-sanitizer in the CUDA toolkit")
        return
    for name, kernels in TOOLS[:2] if rehearsed else TOOLS:
        command = [] if rehearsed else [str(tool), "--tool", name, "--error-exitcode", "9", "--target-processes", "all"]
        if kernels == "triton":
            command += [
                sys.executable,
                "-m",
                "gpu.alone",
                "check:sanitized",
                str(session.folder),
                "--name",
                f"{kernels}-{session.name}",
                "--repeats",
                "0",
            ] + ["--rehearse"] * rehearsed
        else:
            command += [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                "-p",
                EACH,
                "-m",
                "gpu",
                "-k",
                SELECTED,
                NATIVE[-1],
            ]
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, check=False, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        seconds = time.perf_counter() - start
        if done.returncode not in (0, 5 if rehearsed else 0):
            session.fail(f"{name} of the {kernels} kernels: status {done.returncode} (see {session.name}.log)")
        else:
            session.say(f"{name} of the {kernels} kernels: nothing found ({seconds:.0f} s)")
        session.add("sanitizer", {"tool": name, "kernels": kernels}, "ours", [seconds], status=done.returncode)
