"""One function of this package in a process of its own, for tools that look at one:

python -m gpu.alone check:run DIR
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
from pathlib import Path

from .device import Cpu, Gpu
from .session import Session


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("function", help="module:function, called with a Session")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="alone")
    parser.add_argument("--stall", type=Path)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--rehearse", action="store_true", help="on a GPU that is pretended")
    parser.add_argument("--cpu", action="store_true", help="on the CPU: kernels are interpreted (TRITON_INTERPRET=1)")
    options = parser.parse_args()
    module, name = options.function.split(":")
    gpu: Gpu = Cpu() if options.cpu else Gpu()
    context: contextlib.AbstractContextManager = contextlib.nullcontext()
    if options.rehearse:
        from .rehearsal import FakeGpu, pretended_gpu

        gpu, context = FakeGpu(), pretended_gpu()
    given = {"repeats": options.repeats, "rehearse": options.rehearse, "stall": options.stall}
    session = Session(options.name, options.folder, gpu, options=given)
    with context:
        getattr(importlib.import_module(f".{module}", __package__), name)(session)
    return int(bool(session.problems))


if __name__ == "__main__":
    sys.exit(main())
