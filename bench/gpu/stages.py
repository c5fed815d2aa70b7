"""The stages of a run on a GPU: what each is for, in which order, how long it should and how long it may take.

The first run leaves what must be known first, with ours, the floor and eager code before any other system; what is left
for the second can wait until the first has been read. Seconds are those of a machine with 16 cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .session import Session

RUNS = ("first", "second")


@dataclass(frozen=True)
class Stage:
    """``planned`` and ``limit`` are seconds; ``function`` is "module:function" of this package, called with a Session.

    run: the run that it belongs to.
    gpu: whether it launches kernels of ours, which are then compiled ahead.
    built: whether it waits for the extension.
    leaves: whether it has results, of which some must be left when it is cut.
    """

    name: str
    what: str
    function: str
    planned: int
    limit: int
    run: str = "first"
    gpu: bool = True
    built: bool = True
    leaves: bool = True


# fmt: off
STAGES = (
    Stage("ahead", "compile the Triton kernels of all stages, while the extension is built", "ahead:run", 50, 120,
          gpu=False, built=False, leaves=False),
    Stage("check", "every Triton kernel at its real tiles against float64; bits of 20 runs", "check:run", 35, 90,
          built=False),
    Stage("ptxas", "the same by the other ptxas that there are", "check:other_ptxas", 20, 60, gpu=False, built=False),
    Stage("native", "tests of the CUDA C++ kernels", "tests:native", 30, 90, gpu=False),
    Stage("ceilings", "a copy, and products of matrices", "ceilings:run", 8, 20, built=False),
    Stage("cosine", "the loss: ours, floor, eager", "cosine:run", 35, 70, built=False),
    Stage("beam", "searches: ours, floor", "beam:run", 30, 60),
    Stage("quantize", "the quantizer: ours, floor, eager", "quantize:run", 40, 80, built=False),
    Stage("sweep", "other tiles of the kernels with products", "sweep:run", 30, 80, built=False),
    Stage("sanitizer", "memcheck of Triton's kernels; racecheck, synccheck of CUDA's", "sanitizer:run", 50, 120,
          gpu=False),
    Stage("tests", "all tests marked gpu", "tests:everything", 120, 150, run="second", gpu=False),
    Stage("model", "training steps of a whole model, ours and the references", "model:run", 20, 40, run="second",
          gpu=False),
    Stage("more-cosine", "the loss at other sizes", "cosine:more", 30, 60, run="second", built=False),
    Stage("more-quantize", "the quantizer at other sizes", "quantize:more", 35, 70, run="second", built=False),
    Stage("gumbel", "noise and Gumbel-softmax", "quantize:samples", 15, 30, run="second"),
    Stage("more-beam", "searches at other sizes", "beam:more", 25, 50, run="second"),
    Stage("threads", "the CPU kernels with 1, 2, 4, 8 and 16 threads", "threads:run", 60, 75, run="second", gpu=False),
    Stage("profile", "three kernels under ncu", "profile:run", 40, 60, run="second", gpu=False),
    Stage("peers-cosine", "torch.compile and other libraries' losses", "cosine:with_peers", 40, 80, run="second",
          built=False),
    Stage("peers-beam", "other libraries' searches", "beam:with_peers", 30, 60, run="second"),
    Stage("peers-quantize", "torch.compile's quantizer", "quantize:with_peers", 45, 80, run="second", built=False),
)
# fmt: on


def function_of(stage: Stage) -> Callable[[Session], None]:
    import importlib

    module, name = stage.function.split(":")
    return getattr(importlib.import_module(f".{module}", __package__), name)


def chosen(runs: list[str], only: list[str]) -> list[Stage]:
    """The stages named, or those of the runs; ahead comes with whatever launches kernels."""
    unknown = set(only) - {stage.name for stage in STAGES}
    if unknown:
        raise ValueError(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in STAGES)}")
    stages = [stage for stage in STAGES if (stage.name in only if only else stage.run in runs)]
    if any(stage.gpu for stage in stages) and STAGES[0] not in stages:
        stages.insert(0, STAGES[0])
    return stages
