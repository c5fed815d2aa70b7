"""The skips that are expected, each with when it is: any other skip is a test that says nothing, and fails."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import sys

import torch

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


# A pattern that the whole reason matches, and whether it may be given on this machine.
EXPECTED = (
    (r"needs a CUDA device", not CUDA),
    (r"needs Triton and a GPU or its interpreter", not (CUDA or INTERPRETED)),
    (r"needs Triton's interpreter", not INTERPRETED),
    (r"needs Triton; a GPU runs the tests itself", CUDA or INTERPRETED or not _has("triton")),
    (r"needs Triton", not _has("triton") or INTERPRETED),
    (r"the tiles of the launchers are too large for the interpreter", not CUDA),
    (r"float32 is chunked on a GPU", CUDA),
    # test_every_backend tries every backend on every device, and gives the reason that a user would get.
    (r"\w+ has no (native|triton) kernel .*", True),
    (r"the triton backend is not available: .*", not (CUDA or INTERPRETED)),
    (r"the extension was built without CUDA kernels.*", True),
    (r"(needs a|no) C\+\+ compiler", shutil.which("c++") is None),
    (r"the compiler has no sanitizers: .*", not sys.platform.startswith("linux")),
    (r"the processor has no AVX2", platform.machine() != "x86_64"),
    (r"needs Linux' record of the peak|reads /proc", not sys.platform.startswith("linux")),
    (r"the extension holds the CUDA kernels themselves, .*", CUDA),
    (r"needs a torch without CUDA", torch.version.cuda is not None),
    # Not everyone has these: a package registry, and data whose licence keeps it out of the project.
    (r"the wheel with MovieLens-100K is not to be had here: .*", True),
    (r".* is not here", True),
)


def is_expected(reason: str) -> bool:
    """Whether a test may be skipped for this reason here."""
    missing = re.match(
        r"could not import '(\w+)|needs the extra '(\w+)'|.*needs (transformers|matplotlib|peft)", reason
    )
    if missing:
        package = {"docs": "mkdocs"}.get(str(missing[2]), missing[1] or missing[2] or missing[3])
        return not _has(package)
    return any(may and re.fullmatch(pattern, reason, re.DOTALL) for pattern, may in EXPECTED)
