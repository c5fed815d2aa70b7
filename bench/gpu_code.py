"""Compile every Triton and CUDA kernel for GPUs that need not be there; show its registers, memory and instructions.

    python bench/gpu_code.py [--arch 80 90 100] [--jobs 2] [--only triton|cuda] [--record]

Triton's launchers themselves run, on small CPU tensors, with the launch replaced by a note of it, so what is compiled
is what a GPU would be asked to run: every dtype, every tile configuration, with the argument specialisations of Triton.
CUDA's are compiled file by file, where nvcc is (cuda_code.py).

Fails on a kernel that spills more than JUSTIFIED_SPILLS allows it, takes more shared memory than the architecture has,
or goes beyond its budget in gpu_budgets.json, which holds for the compiler that it was recorded with (--record does it
anew). Registers and spills are ptxas's, so they vary with Triton: the tiles are chosen for 3.6 and 3.7. What has not
changed since it was compiled last is not compiled again: build/gpu-code.json keeps the results.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_code
import torch
import triton
from machine_code import Budgets, Kept, Usage, functions_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dgi_kernels import triton_common as common
from dgi_kernels.cosine import triton as cosine
from dgi_kernels.gumbel import triton as gumbel
from dgi_kernels.gumbel import triton_softmax as softmax

PACKAGE = Path(__file__).resolve().parents[1] / "dgi_kernels"
ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may use
# (kernel, architecture) -> bytes a thread, and why.
JUSTIFIED_SPILLS = {
    ("flash_forward_kernel", 80): (24, "ptxas keeps to 128 registers, for two blocks a multiprocessor, in the pass for "
                                       "the loss alone, and puts up to six words into local memory"),
}
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
         torch.int64: "*i64"}


@dataclass(frozen=True)
class Launch:
    """One kernel as one launcher calls it: everything that decides the code Triton makes."""

    label: str
    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


def describe(label: str, kernel: triton.JITFunction, args: tuple, kwargs: dict[str, Any]) -> Launch:
    """What Triton specialises on: dtypes, None, constants, integers equal to 1, and multiples of 16."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = tuple((name, kwargs.pop(name)) for name in ("num_warps", "num_stages") if name in kwargs)
    values |= kwargs
    signature, constants, aligned = [], [], []
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            kind = "constexpr"
            constants.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            kind = TYPES[value.dtype]
            aligned += [i] * (value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment)
        elif isinstance(value, float):
            kind = "fp32"
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned += [i] * (special and value % 16 == 0)
        signature.append((parameter.name, kind))
    return Launch(label, kernel.fn.__module__, kernel.__name__, tuple(signature), tuple(constants), tuple(aligned),
                  options)


def launches_of(label: str, call: Callable[[], None]) -> list[Launch]:
    """Run a launcher; note its launches instead of making them."""
    noted: list[Launch] = []

    def note(kernel: triton.JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        noted.append(describe(label, kernel, args, kwargs))
        for value in args:
            if isinstance(value, torch.Tensor) and value.dtype == torch.int64:
                value.zero_()  # codes and orders that the kernel would have written are indices

    run, triton.JITFunction.run = triton.JITFunction.run, note
    try:
        call()
    finally:
        triton.JITFunction.run = run
    return noted


def cosine_launches(arch: int) -> Iterator[Launch]:
    """Each dtype and form with aligned sizes, and once each with sizes of which nothing is a multiple of 16."""
    cases = [(dtype, dim) for dtype in cosine.HALF for dim in cosine.FLASH[9]]
    cases += [(torch.bfloat16, 200), (torch.bfloat16, 768), (torch.float16, 768), (torch.float32, 256),
              (torch.float32, 17)]
    common.architecture = lambda device: arch // 10  # type: ignore[assignment]
    for dtype, dim in cases:
        def call(dtype: torch.dtype = dtype, dim: int = dim) -> None:
            rows, codes = (32, 48) if dim % 16 == 0 else (33, 47)
            h = torch.randn(rows, dim).to(dtype).requires_grad_()
            weight = torch.randn(codes, dim).to(dtype).requires_grad_()
            target, scale = torch.zeros(rows, dtype=torch.int64), torch.tensor(30.0, requires_grad=True)
            loss = cosine.cosine_cross_entropy(h, weight, target, scale, -100, "mean", 0.1, 1e-12)
            loss.backward()
            with torch.no_grad():
                cosine.cosine_cross_entropy(h, weight, target, scale, -100, "mean", 0.1, 1e-12)
        yield from launches_of(f"{str(dtype).removeprefix('torch.')} D={dim}", call)


def gumbel_launches(arch: int) -> Iterator[Launch]:
    """Each dtype, form and mode, with and without noise and each optional gradient; noise and softmax at each tile."""
    common.architecture = lambda device: arch // 10  # type: ignore[assignment]
    seed, tau = torch.zeros(1, dtype=torch.int64), torch.tensor(0.5, requires_grad=True)
    cases = [(dtype, dim) for dtype in gumbel.HALF for dim in (*gumbel.FLASH[9], 768)] + [(torch.float32, 64)]
    for dtype, dim in cases:
        def quantize(dtype: torch.dtype = dtype, dim: int = dim) -> None:
            for mode, noise in (("soft", seed), ("straight_through", seed), ("hard", None), ("soft", None)):
                z, *codebooks = (torch.randn(rows, dim).to(dtype).requires_grad_() for rows in (32, 48, 48))
                with torch.set_grad_enabled(mode != "hard"):
                    result = gumbel.residual_quantize(z, codebooks, torch.tensor(30.0), tau, mode, noise, 0, 1e-12)
                if mode != "hard":
                    loss = result.quantized.sum()
                    if noise is not None:
                        loss = loss + result.usage[0].sum() + result.log_normalizer.sum()
                    loss.backward()
        yield from launches_of(f"{str(dtype).removeprefix('torch.')} D={dim}", quantize)
    for dtype in (torch.float32, *gumbel.HALF):
        def sample(dtype: torch.dtype = dtype) -> None:
            for codes in (*(b_k for _, b_k in softmax.SOFTMAX_TILES), 32000, 33):
                logits = torch.randn(4, codes).to(dtype).requires_grad_()
                for hard in (False, True):
                    softmax.gumbel_softmax(logits, tau, hard, seed).sum().backward()
        yield from launches_of(str(dtype).removeprefix("torch."), sample)
    yield from launches_of("", lambda: [softmax.gumbel_noise(seed, 0, 0, 0, 4, codes)
                                        for codes in (32, 33, 512)] and None)


def compile_for(launch: Launch, arch: int) -> tuple[Usage, float]:
    """What a kernel takes, and how many seconds its compilation took.

    Instructions by element are the whole kernel's by a thread's elements of a tile: they bound what the loop costs an
    element from above, and two variants' difference says what one ingredient costs.
    """
    start = time.perf_counter()
    modules = (common, cosine.kernels, gumbel.kernels, gumbel.chunks, softmax.kernels)
    kernel = next(getattr(module, launch.kernel) for module in modules if module.__name__ == launch.module)
    constants = {(kernel.arg_names.index(name),): value for name, value in launch.constants}
    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(kernel, dict(launch.signature), constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    (usage, _), = functions_of(compiled.asm["cubin"]).values()
    blocks, warps = dict(launch.constants), dict(launch.options)["num_warps"]
    per_element = usage.instructions * 32 * warps / (blocks.get("b_n", 0) * blocks.get("b_k", 0) or math.inf)
    return (Usage(usage.registers, usage.spilled, compiled.metadata.shared, usage.instructions, round(per_element, 1)),
            time.perf_counter() - start)


Row = tuple[str, str, int, Usage, float]  # kernel, case, architecture, what it takes, seconds


def triton_rows(architectures: list[int], jobs: int, kept: Kept) -> Iterator[Row]:
    """Every launch for every architecture; compiled where ``kept`` does not know it."""
    common = hashlib.sha256(f"{triton.__version__} {torch.__version__}".encode())
    for path in (*sorted(PACKAGE.rglob("*triton*.py")), Path(__file__), Path(__file__).with_name("machine_code.py")):
        common.update(path.read_bytes())
    cases = [(launch, arch) for arch in architectures for arch_launches in (cosine_launches, gumbel_launches)
             for launch in dict.fromkeys(arch_launches(arch))]
    with ProcessPoolExecutor(jobs) as pool:
        waiting = []
        for launch, arch in cases:
            state = common.copy()
            state.update(repr((launch, arch)).encode())
            found = kept.get(state.hexdigest())
            waiting.append((state.hexdigest(), found, found or pool.submit(compile_for, launch, arch)))
        for (launch, arch), (key, found, future) in zip(cases, waiting, strict=True):
            usage, seconds = (found[launch.kernel], 0.0) if found else future.result()
            if not found:
                kept.put(key, {launch.kernel: usage})
            yield launch.kernel, launch.label, arch, usage, seconds


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
        print(f"{name:60}{case:18}{arch:4}{usage.registers:6}{usage.spilled:7}{usage.shared:8}{usage.instructions:6}"
              f"{loop}{seconds:6.1f}{f'  FAILS: {problem}' if problem else ''}", flush=True)
    return count, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--only", choices=("triton", "cuda"))
    parser.add_argument("--record", action="store_true", help="write what the kernels take as their budgets")
    options = parser.parse_args()
    kept = Kept(PACKAGE.parent / "build" / "gpu-code.json")
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
    print(f"{'kernel':60}{'case':18}{'sm':>4}{'regs':>6}{'spill':>7}{'shared':>8}{'code':>6}{'/element':>9}{'s':>6}")
    failures = 0
    for budgets, rows in runs:
        count, failed = judge(rows, budgets)
        failures += failed
        outcome = f"{failed} FAILED" if failed else "all as they should be"
        print(f"{budgets.compiler} {budgets.version}: {count} kernels, {outcome}")
        if options.record and not failed:
            budgets.record(options.arch)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
