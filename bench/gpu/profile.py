"""Three kernels under Nsight Compute, by bench/profile.sh."""

from __future__ import annotations

import subprocess
import time

from .session import Session
from .tests import ROOT

KERNELS = ("flash_forward_kernel", "level_kernel", "select_kernel")


def run(session: Session) -> None:
    for kernel in KERNELS[:1] if session.options.get("rehearse") else KERNELS:
        command = [str(ROOT / "bench" / "profile.sh"), kernel, str(session.folder / f"profile-{kernel}.txt")]
        if session.options.get("rehearse"):
            command.append("--rehearse")
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, check=False)
        seconds = time.perf_counter() - start
        session.add("profile", {"kernel": kernel}, "ours", [seconds], status=done.returncode)
        if done.returncode:
            session.fail(f"profile of {kernel}: status {done.returncode}")
        else:
            session.say(f"{kernel}: see profile-{kernel}.txt")
