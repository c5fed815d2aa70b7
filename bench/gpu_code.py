"""Compile every Triton and CUDA kernel for GPUs that need not be there; show its registers, memory and instructions.

    python bench/gpu_code.py [--arch 80 90 100] [--jobs 2] [--only triton|cuda] [--record] [--anew]

Triton's are compiled as the launchers call them (triton_code.py), CUDA's file by file, where nvcc is (cuda_code.py).

Ends with the estimated times of the target shapes on an H200 (gpu_time.py), which rest on what was compiled.

Fails on a loop with products that is not pipelined, and on a kernel that spills more than JUSTIFIED_SPILLS allows it,
takes more shared memory than the architecture has, or goes beyond its budget in gpu_budgets.json, which holds for the
compiler that it was recorded with (--record does it anew). Registers and spills are
ptxas's, so they vary with Triton: the tiles are chosen for 3.6 and 3.7.

What has not changed since it was compiled last, by a hash of its source, of what it calls and of the compiler's
version, is not compiled again unless --anew says so: gpu_compiled.json has the results for the source as it is
(--record), build/gpu-code.json those of this machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import cuda_code
import gpu_time
import triton
import triton_code
from machine_code import Budgets, Kept, Usage

from dgi.progress import Progress

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may use
# (kernel, architecture) -> bytes a thread, and why.
JUSTIFIED_SPILLS = {
    ("cosine.flash_forward_kernel", 80): (
        24,
        "ptxas keeps to 128 registers, for two blocks a multiprocessor, in the pass for the loss alone, and puts "
        "up to six words into local memory",
    ),
    ("quantize.row_level_kernel", 100): (
        24,
        "six words where codes have a bias and rows a scale of noise: 128 registers, for two blocks of eight warps",
    ),
    ("quantize.row_level_kernel", 80): (24, "up to six words: 168 registers, for three blocks of four warps"),
    ("quantize.row_level_kernel", 90): (24, "the same with Triton 3.6"),
    ("quantize.level_kernel", 80): (16, "four words: two blocks a multiprocessor have 255 registers each"),
    ("quantize.level_kernel", 100): (8, "two words: ptxas keeps to 128 registers, for four blocks at once"),
    ("quantize.weight_kernel", 80): (8, "two words: ptxas keeps to 168 registers, for three blocks at once"),
    ("quantize.finish_kernel", 90): (24, "six words: ptxas keeps to 80 registers, for six blocks at once"),
    ("cosine.flash_forward_kernel", 100): (8, "two words: ptxas keeps to 128 registers, for four blocks at once"),
    ("gumbel.softmax_backward_kernel", 80): (40, "ten words: ptxas keeps to 168 registers, for three blocks at once"),
    ("quantize.chunk_level_kernel", 100): (8, "two words: ptxas keeps to 48 registers, for ten blocks at once"),
    ("quantize.chunk_gradient_kernel", 80): (8, "two words: ptxas keeps to 40 registers, for twelve blocks at once"),
}


Row = tuple[str, str, int, Usage, float]  # kernel, case, architecture, what it takes, seconds


def triton_rows(architectures: list[int], jobs: int, kept: Kept) -> Iterator[Row]:
    """Every launch for every architecture, under a progress bar where someone looks."""
    cases = triton_code.cases(architectures, kept)
    unknown = sum(case.usage is None for case in cases)
    print(f"Triton {triton.__version__}: {len(cases)} kernels, {unknown} of them to compile", flush=True)
    with Progress(unknown, "compiling", unit="kernels") as bar:
        for case, usage, seconds in triton_code.compiled(cases, jobs, kept):
            bar.update(case.usage is None)
            yield case.launch.name(), case.launch.case(), case.arch, usage, seconds


def cuda_rows(compiler: str, architectures: list[int], jobs: int, kept: Kept) -> Iterator[Row]:
    """Every kernel of every file for every architecture."""
    for source, arch, usages in cuda_code.usages(compiler, architectures, jobs, kept):
        for name, usage in usages.items():
            yield name, source.name, arch, usage, 0.0


def judge(rows: Iterator[Row], budgets: Budgets) -> tuple[int, int]:
    """Print a table; return how many kernels there were, and how many are not as they should be."""
    if budgets.why_not:
        print(budgets.why_not)
    count = failed = 0
    for name, case, arch, usage, seconds in rows:
        problem = budgets.problem(f"{name} {case}", arch, usage)
        allowed = JUSTIFIED_SPILLS.get((name, arch), (0, ""))[0]
        if usage.spilled > allowed:
            problem = f"spills {usage.spilled} bytes"
        elif usage.shared > SHARED_LIMIT[arch]:
            problem = f"takes more than the {SHARED_LIMIT[arch]} bytes of shared memory that there are"
        count, failed = count + 1, failed + bool(problem)
        loop = f"{usage.per_element:9.1f}" if usage.per_element else " " * 9
        print(
            f"{name:60}{case:34}{arch:4}{usage.registers:6}{usage.spilled:7}{usage.shared:8}{usage.instructions:6}"
            f"{loop}{seconds:6.1f}{f'  FAILS: {problem}' if problem else ''}",
            flush=True,
        )
    return count, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", choices=("triton", "cuda"))
    parser.add_argument(
        "--record",
        action="store_true",
        help="write what the kernels take: as their budgets, and for runs in which they are unchanged",
    )
    parser.add_argument("--anew", action="store_true", help="compile what is unchanged, too: a quarter of an hour")
    options = parser.parse_args()
    kept = Kept(Path(__file__).resolve().parents[1] / "build" / "gpu-code.json", anew=options.anew)
    runs = []
    if options.only != "cuda":
        budgets = Budgets("triton", triton.__version__, recording=options.record)
        runs.append((budgets, triton_rows(options.arch, options.jobs, kept)))
    compiler = cuda_code.nvcc()
    if options.only != "triton" and compiler is None:
        print("CUDA kernels are left out: nvcc was not found (set CUDA_HOME, or put it on the PATH)")
    elif options.only != "triton":
        budgets = Budgets("nvcc", cuda_code.version_of(compiler), recording=options.record)
        runs.append((budgets, cuda_rows(compiler, options.arch, options.jobs, kept)))
    print(f"{'kernel':60}{'case':34}{'sm':>4}{'regs':>6}{'spill':>7}{'shared':>8}{'code':>6}{'/element':>9}{'s':>6}")
    failures = 0
    for budgets, rows in runs:
        count, failed = judge(rows, budgets)
        failures += failed
        outcome = f"{failed} FAILED" if failed else "all as they should be"
        print(f"{budgets.compiler} {budgets.version}: {count} kernels, {outcome}")
        if options.record and not failed:
            budgets.record(options.arch)
    if 90 in options.arch and options.only != "cuda":
        loops = gpu_time.loops_kept(anew=options.anew)
        problems = gpu_time.table([], kept, loops, detail=False, recorded=False)
        print("\n".join(problems) or "every loop with products copies ahead into shared memory")
        failures += len(problems)
        if options.record and not problems:
            loops.record(whole=True)
    if options.record and not failures:
        kept.record(whole=options.only is None and set(options.arch) == set(ARCHITECTURES) and compiler is not None)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
