"""Estimated times of the target shapes on one H200, from what was compiled and counted; no GPU is needed.

    python bench/gpu_time.py [--case NAME ...] [--detail] [--recorded]

The ops themselves run at their real sizes on tensors without numbers (gpu/rehearsal.py), and every launch is noted.
A launch takes the time of its products, of its instructions and of its bytes:

    products      2 M N K operations / TENSOR, and / OWN_PRODUCTS where they are Triton's, not cuBLAS's
    instructions  elements x (instructions of the compiled loops by element) / ISSUE / ISSUE_SHARE[warps resident / 8]
    bytes         each tensor once from device memory if it is larger than RESIDENT, else from the L2; for products also
                  each tile's reads of both operands, from the L2

each over the part of the multiprocessors' time that the grid fills (registers, shared memory, waves). With one block on
a multiprocessor products and instructions add up, since a block waits for its products; with r blocks the larger
counts, and of the others a part of 1 / r. Launches follow each other by GAP; the host takes HOST for each. What a
kernel does in dependent steps, not by throughput, is counted apart: sorts, and the beam step's kernels. Not counted is
what the steps of small kernels take beside their bytes, and those of a program that finishes what others began: a
microsecond or two each.

The constants are those measured on such machines (copy, products: performance targets) or published ones, and each
estimate names the part that binds it. An estimate is no measurement: bench/gpu.sh makes those.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gpu_beam_time
import torch
import triton
import triton_code
from gpu import cosine, quantize
from gpu.rehearsal import MULTIPROCESSORS, Call, FakeGpu, pretended_gpu
from gpu_work import Work, work_of
from machine_code import Kept, Usage, lines_and_loops
from torch import Tensor
from torch.utils._pytree import tree_leaves

BENCH = Path(__file__).resolve().parent
ARCH = 90
TENSOR = 790e12  # operations a second of bfloat16 products by cuBLAS, measured
OWN_PRODUCTS = 0.8  # of that, what Triton's products reach on Hopper (published: 600 to 700 of 790)
SINGLE = 50e12  # of float32 products
CUBLAS_TILES = (((128, 256), 1.0), ((256, 128), 1.0), ((128, 192), 0.95), ((192, 128), 0.95), ((128, 128), 0.88))
ISSUE = 3.1e13  # instructions of a lane a second, all multiprocessors
ISSUE_SHARE = (0.65, 0.75, 0.8)  # with at most 8, 16, more warps on a multiprocessor
DEVICE_MEMORY, L2 = 4.3e12, 7.5e12  # bytes a second: a copy, measured; what published products read
RESIDENT = 40 << 20  # bytes of a tensor that the L2 keeps for the next kernel
GAP = 1.5e-6  # from a kernel's end to the work of the next, in one stream
HOST_TRITON, HOST_TORCH = 8e-6, 4.5e-6  # of the host: one launch, one operator
SORT_PASS = 9e-6  # of a radix sort of some ten thousand keys: one of its passes, by a byte of the key
THREADS, REGISTERS, SHARED, BLOCKS = 2048, 65536, 227 << 10, 32  # of a multiprocessor


@dataclass(frozen=True)
class Part:
    """One launch: its seconds, of which each kind would take alone, and blocks on a multiprocessor."""

    name: str
    seconds: float
    alone: dict[str, float]
    blocks: int
    host: float
    usage: Usage | None = None


def resident(usage: Usage, warps: int) -> int:
    """Blocks that a multiprocessor holds."""
    registers = math.ceil(max(usage.registers, 16) / 8) * 8 * 32 * warps
    shared = usage.shared + 1024
    return max(1, min(THREADS // (32 * warps), REGISTERS // registers, SHARED // shared, BLOCKS))


def filled(blocks: int, at_once: int) -> tuple[int, float]:
    """Blocks on a multiprocessor, and the part of the multiprocessors' time that they fill."""
    at_once = min(at_once, math.ceil(blocks / MULTIPROCESSORS))
    slots = MULTIPROCESSORS * at_once
    return at_once, blocks / (math.ceil(blocks / slots) * slots)


def combined(alone: dict[str, float], blocks: int) -> float:
    """Seconds of a kernel of which each kind of work would take those given, without any other."""
    largest = max(alone.values())
    compute = alone.get("products", 0.0) + alone.get("instructions", 0.0)
    overlapped = max(alone.get("products", 0.0), alone.get("instructions", 0.0))
    return max(largest, overlapped + (compute - overlapped) / blocks)


def seconds_of_bytes(tensors: list[Tensor]) -> tuple[float, float]:
    """Those of device memory and of the L2, each tensor once."""
    device = near = 0.0
    for x in tensors:
        size = x.numel() * x.element_size()
        if size > RESIDENT:
            device += size / DEVICE_MEMORY
        else:
            near += size / L2
    return device, near


def triton_part(call: Call, usage: Usage) -> Part:
    launch: triton_code.Launch = call.what
    warps = dict(launch.options)["num_warps"]
    grid = math.prod(call.grid)
    work: Work = work_of(launch.kernel, call.values, call.grid)
    blocks, fill = filled(grid, resident(usage, warps))
    share = ISSUE_SHARE[min(2, (blocks * warps - 1) // 8)]
    if work.moved is None:
        tensors = list({id(x): x for x in call.values.values() if isinstance(x, Tensor)}.values())
        device, near = seconds_of_bytes(tensors)
    else:
        device, near = work.moved / DEVICE_MEMORY, 0.0
    each = usage.instructions / (triton_code.elements(launch) or 1) if work.whole else usage.per_element
    alone = {
        "products": work.operations / TENSOR / OWN_PRODUCTS / fill,
        "instructions": work.elements * each / ISSUE / share / fill,
        "memory": device,
        "L2": near + work.reread / L2,
    }
    return Part(launch.name(), combined(alone, blocks), alone, blocks, HOST_TRITON, usage)


def fill_of_product(rows: int, columns: int, inner: int) -> float:
    """Of cuBLAS's best tile, relative to large products: a smaller tile is slower, but may leave fewer idle. Few tiles
    split the inner dimension."""

    def fill(tile: tuple[int, int], rate: float) -> float:
        tiles = math.ceil(rows / tile[0]) * math.ceil(columns / tile[1])
        splits = max(1, min(MULTIPROCESSORS // tiles, inner // 1024))
        used = rows * columns / (tiles * tile[0] * tile[1])
        return rate * used * filled(tiles * splits, 1)[1]

    return max(fill(tile, rate) for tile, rate in CUBLAS_TILES)


VIEWS = ("empty", "new_empty", "empty_like", "detach", "new_empty_strided", "empty_strided", "lift_fresh")


def torch_part(call: Call) -> Part | None:
    """An operator of torch; None where it launches nothing."""
    function, values = call.what, call.values
    name = str(function).removeprefix("aten.").split(".")[0]
    results = [x for x in tree_leaves(values["result"]) if isinstance(x, Tensor)]
    info = function._schema.returns[0].alias_info if function._schema.returns else None
    given = [x for x in tree_leaves((values["args"], values["kwargs"])) if isinstance(x, Tensor)]
    is_view = (info is not None and not info.is_write) or name in VIEWS or not any(x.numel() for x in results)
    is_cast = name == "to" and given[0].dtype != results[0].dtype
    if is_view and not is_cast:
        return None
    device, near = seconds_of_bytes(list({id(x): x for x in (*given, *results)}.values()))
    alone = {"memory": device, "L2": near}
    if name in ("mm", "addmm", "addmm_"):
        left, right = [x for x in given if x.dim() == 2][-3:][-3:-1] if "out" in values["kwargs"] else given[-2:]
        rows, inner, columns = left.shape[0], left.shape[1], right.shape[1]
        rate = TENSOR if left.element_size() == 2 else SINGLE
        alone["products"] = 2 * rows * inner * columns / rate / fill_of_product(rows, columns, inner)
    if name in ("sort", "argsort"):
        alone["passes"] = SORT_PASS * given[0].element_size()
    return Part(name, max(alone.values()), alone, 1, HOST_TORCH)


def usage_of(launch: triton_code.Launch, kept: Kept, recorded: bool) -> Usage:
    """What a kernel takes: as recorded, or compiled now."""
    key = triton_code.key_of(launch, ARCH)
    found = kept.get(key)
    if found is None:
        if recorded:
            raise LookupError(f"{launch.name()} {dict(launch.constants)} has not been compiled for sm_{ARCH}")
        usage, _ = triton_code.compile_for(launch, ARCH)
        kept.put(key, {launch.kernel: usage})
        return usage
    return found[launch.kernel]


@dataclass(frozen=True)
class Case:
    """A call to estimate, its target in milliseconds, and what no method does without, in operations or bytes."""

    name: str
    prepare: Callable[[FakeGpu], Callable[[], object]]
    target: float
    operations: float
    graph: bool = False  # the target is that of a captured graph


def loss(n: int, k: int, d: int) -> Callable[[FakeGpu], Callable[[], object]]:
    from dgi_kernels import cosine_cross_entropy

    return lambda gpu: cosine.step(cosine_cross_entropy, cosine.inputs(gpu, n, k, d, "flat"))


def quantizer(n: int, d: int) -> Callable[[FakeGpu], Callable[[], object]]:
    """With gradients of the quantized vectors and of the usage, but without a loss that would make them."""

    def prepare(gpu: FakeGpu) -> Callable[[], object]:
        leaves = [x.detach().requires_grad_() for x in _flat(quantize.inputs(gpu, n, d, "flat"))]
        scale = torch.full((), quantize.SCALE, device=gpu.device).requires_grad_()
        given = [torch.empty_like(leaves[0])[:, None].expand(-1, len(leaves) - 1, -1).contiguous()]
        given += [torch.empty(len(e), device=gpu.device) for e in leaves[1:]]

        def run() -> object:
            quantized, usage = quantize.ours(leaves[0], leaves[1:], scale, quantize.TAU)
            return torch.autograd.grad([quantized, *usage], [*leaves, scale], given)

        return run

    return prepare


def _flat(inputs: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
    return [inputs[0], *inputs[1]]


def logits(n: int, k: int, d: int) -> Callable[[FakeGpu], Callable[[], object]]:
    from dgi_kernels import cosine_logits

    def prepare(gpu: FakeGpu) -> Callable[[], object]:
        h = torch.randn(n, d, device=gpu.device, dtype=torch.bfloat16)
        weight = torch.randn(k, d, device=gpu.device, dtype=torch.bfloat16)
        return lambda: cosine_logits(h, weight, 30.0)

    return prepare


N, K, CODES = 65536, 4096, 4096 + 1024 + 256
CASES = (
    *(Case(f"loss D={d}", loss(N, K, d), t, 8 * N * K * d) for d, t in ((64, 0.45), (256, 0.95), (768, 2.6))),
    Case("loss N=4096 K=151936 D=256", loss(4096, 151_936, 256), 3.0, 8 * 4096 * 151_936 * 256),
    Case("loss N=1024 K=32768 D=256", loss(1024, 32768, 256), 0.25, 8 * 1024 * 32768 * 256),
    Case("loss N=1024 D=256, graph", loss(1024, K, 256), 0.06, 8 * 1024 * K * 256, graph=True),
    *(Case(f"quantizer D={d}", quantizer(N, d), t, 14 * N * CODES * d) for d, t in ((64, 2.0), (256, 3.2), (768, 7.0))),
    Case("quantizer N=1024 D=64, graph", quantizer(1024, 64), 0.5, 14 * 1024 * CODES * 64, graph=True),
    Case("logits D=256", logits(N, K, 256), 0.3, 2 * N * K * 256),
)


def calls_of(case: Case) -> list[Call]:
    """Every operator and launch of a call."""
    with contextlib.redirect_stdout(io.StringIO()), pretended_gpu() as launches:
        run = case.prepare(FakeGpu())
        launches.calls = found = []
        run()
        launches.calls = None
        return found


def parts_of(calls: list[Call], kept: Kept, recorded: bool) -> list[Part]:
    """Those that launch something, and their seconds."""
    parts = []
    for call in calls:
        if isinstance(call.what, triton_code.Launch):
            parts.append(triton_part(call, usage_of(call.what, kept, recorded)))
        elif (part := torch_part(call)) is not None:
            parts.append(part)
    return parts


@dataclass(frozen=True)
class Loops:
    """Of the loops of a kernel with products: copies to shared memory that do not wait, and products on the tensor
    cores whose left operand is in shared memory, or in registers."""

    copies: int
    from_shared: int
    from_registers: int


PRODUCT = re.compile(r"HGMMA\S*\s+R\d+, (gdesc)?")


def loops_of(code: str) -> Loops:
    lines, loops = lines_and_loops(code)
    inside = [text for address, text in lines if any(first <= address <= last for first, last in loops)]
    products = [found[1] for text in inside if (found := PRODUCT.search(text))]
    shared = sum(left is not None for left in products)
    return Loops(sum("LDGSTS" in text for text in inside), shared, len(products) - shared)


def unpipelined(launches: list[triton_code.Launch], kept: Kept) -> list[str]:
    """What is wrong with the loops of the kernels that have products: each copies ahead, and has its first product's
    operands both in shared memory."""
    problems = []
    for launch in launches:
        if not {"b_n", "b_k", "b_d"} <= set(dict(launch.constants)):
            continue
        key = triton_code.key_of(launch, ARCH)
        known = kept.get(key)
        if known is None:
            known = {launch.kernel: loops_of(triton_code.machine_code(launch, ARCH)[1])}
            kept.put(key, known)
        found = known[launch.kernel]
        if not (found.copies and found.from_shared):
            problems.append(f"{launch.name()} is not pipelined: {found}")
    return problems


@dataclass(frozen=True)
class Estimate:
    """In milliseconds, with what binds: the kind of work that takes most."""

    name: str
    launches: int
    host: float
    gpu: float
    graph: bool
    floor: float
    target: float
    binds: str

    @property
    def alone(self) -> float:
        """One call after another: the host and the GPU work side by side."""
        return self.gpu if self.graph else max(self.gpu, self.host)

    def line(self) -> str:
        verdict = "meets" if self.alone <= self.target else "MISSES"
        return (
            f"{self.name:32}{self.launches:9}{self.host:8.2f}{self.gpu:8.3f}{self.alone:10.3f}{self.floor:8.3f}"
            f"{self.target:8.3f}  {verdict:8}{self.binds}"
        )


HEADER = f"{'H200, ms, estimated':32}{'launches':>9}{'host':>8}{'GPU':>8}{'estimate':>10}{'floor':>8}{'target':>8}"


def estimate(case: Case, parts: list[Part]) -> Estimate:
    gpu = sum(part.seconds + GAP for part in parts)
    kinds: dict[str, float] = defaultdict(float)
    for part in parts:
        kinds[max(part.alone, key=part.alone.__getitem__)] += part.seconds
    kinds["gaps"] = GAP * len(parts)
    binds = ", ".join(f"{name} {100 * s / gpu:.0f} %" for name, s in sorted(kinds.items(), key=lambda x: -x[1])[:3])
    host = sum(part.host for part in parts)
    return Estimate(
        case.name,
        len(parts),
        1e3 * host,
        1e3 * gpu,
        case.graph,
        1e3 * case.operations / TENSOR,
        case.target,
        binds + (", host" if host > gpu and not case.graph else ""),
    )


def breakdown(parts: list[Part]) -> Iterator[str]:
    """By kernel: launches, milliseconds in all, and what each kind of work would take alone."""
    found: dict[str, list[Part]] = defaultdict(list)
    for part in parts:
        found[part.name].append(part)
    for name, own in sorted(found.items(), key=lambda item: -sum(part.seconds for part in item[1])):
        kinds: dict[str, float] = defaultdict(float)
        for part in own:
            for kind, seconds in part.alone.items():
                kinds[kind] += seconds
        usage = own[0].usage
        taken = f"{usage.registers} registers, {usage.per_element} instr/element, " if usage else ""
        yield (
            f"    {name:36}{len(own):6} x  {1e3 * sum(part.seconds for part in own):8.3f} ms   {taken}"
            f"{own[0].blocks} blocks/SM; " + ", ".join(f"{kind} {1e3 * s:.3f}" for kind, s in kinds.items() if s > 0)
        )


def loops_kept(*, anew: bool = False) -> Kept:
    return Kept(BENCH.parent / "build" / "gpu-loops.json", BENCH / "gpu_loops.json", anew=anew, kind=Loops)


def table(names: list[str], kept: Kept, loops: Kept, *, detail: bool, recorded: bool) -> list[str]:
    """Print the estimates; return what is wrong with the kernels' loops."""
    print(HEADER)
    launched: dict[triton_code.Launch, None] = {}
    for case in CASES:
        if names and not any(name in case.name for name in names):
            continue
        calls = calls_of(case)
        launched |= dict.fromkeys(call.what for call in calls if isinstance(call.what, triton_code.Launch))
        parts = parts_of(calls, kept, recorded)
        found = estimate(case, parts)
        print(found.line(), flush=True)
        if detail:
            print("\n".join(breakdown(parts)))
    if not names or any(name in "beam" for name in names):
        for step in gpu_beam_time.steps(kept, DEVICE_MEMORY, ISSUE * ISSUE_SHARE[-1]):
            ms = sum(step.launches.values()) + 1e3 * GAP * len(step.launches)
            binds = ", ".join(f"{name} {1e3 * part:.0f} us" for name, part in step.launches.items())
            case = step.case
            found = Estimate(case.name, len(step.launches), 0.0, ms, True, step.floor, case.target, binds)
            print(found.line(), flush=True)
    return [] if recorded else unpipelined(list(launched), loops)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs="+", default=[], help="parts of the names of cases")
    parser.add_argument("--detail", action="store_true", help="each kernel's share, and what its work would take")
    parser.add_argument("--recorded", action="store_true", help="compile nothing; fail for what is not recorded")
    options = parser.parse_args()
    print(f"Triton {triton.__version__}")
    kept = Kept(BENCH.parent / "build" / "gpu-code.json")
    problems = table(options.case, kept, loops_kept(), detail=options.detail, recorded=options.recorded)
    print("\n".join(problems) or "every loop with products copies ahead, from shared memory")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
