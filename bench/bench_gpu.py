"""Every op on a GPU against its peers, with the ceilings of the machine; peers that are not installed are left out.

    python bench/bench_gpu.py ceilings cosine gumbel quantize beam --output DIR     one gpu-NAME.json each
    python bench/bench_gpu.py beam --rehearse                              tiny, on the CPU: that it runs, not how fast

Sizes are those of a training step at scale: 65,536 rows against 4,096 codes for the loss, 16,384 rows for residual
quantization, all in bfloat16, and up to 64 requests for search.  The floor of an op with matrix products is those
products through ``torch.mm``: 8 N K D operations for the loss (logits, logits again, dh, dE), seven products a level
for the quantizer.  The floor of a beam step is a copy of its logits.  Peers that know no norms are given normalised
copies, whose cost is theirs; peers of the search are those of bench_beam.py.  A step too short to time alone is
timed as the average of many without a pause between them; "graph" is a CUDA graph's replay, without the host's share.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import bench_beam
import bench_cosine
import bench_quantize
import torch
import torch.nn.functional as F
from measure import Results, Step, peak_bytes, seconds
from torch import Tensor

from dgi_kernels import (
    backends,
    beam_search,
    beam_step,
    cosine_beam_step,
    cosine_cross_entropy,
    cosine_logits,
    gumbel_noise,
    gumbel_softmax,
    rank_candidates,
)
from dgi_kernels.backend import why_not

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REHEARSAL = False
SEED = 42
DIMS = (64, 256, 768)
SEARCH_PEERS = ("STATIC", "STATIC compiled", "FlashRec")


def size(real: int, rehearsed: int) -> int:
    return rehearsed if REHEARSAL else real


def measure(results: Results, op: str, shape: Mapping[str, object], systems: Mapping[str, Step], *, rounds: int = 9,
            calls: int = 1) -> None:
    """Time the systems in turns and add them; one that fails here (too little memory, no kernel) is left out."""
    rounds, calls = size(rounds, 1), size(calls, 1)
    running, times = dict(systems), {name: [] for name in systems}
    for name, run in systems.items():
        try:
            run()
            run()  # compiled, tuned and warm
        except Exception as error:  # noqa: BLE001  a peer that cannot run must not cost the others their figures
            print(f"{op} {dict(shape)}: {name} left out: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
            del running[name]

    def repeated(run: Step) -> object:
        for _ in range(calls):
            run()
        return None

    for _ in range(rounds):
        for name, run in running.items():
            times[name].append(seconds(lambda run=run: repeated(run)) / calls)
    for name, run in running.items():
        memory = peak_bytes(run) if name != "floor" and DEVICE.type == "cuda" else None
        results.add(op, {**shape, "device": DEVICE.type}, name, times[name], memory)
    ours, line = statistics.median(times.get("ours", [0.0]) or [0.0]), []
    for name in running:
        median = statistics.median(times[name])
        line.append(f"{name} {1e3 * median:.4g} ms" + (f" ({median / ours:.2f})" if ours and name != "ours" else ""))
    print(f"{op} {' '.join(f'{k}={v}' for k, v in shape.items())}: {', '.join(line)}", flush=True)
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def graphed(run: Step) -> Step:
    """The replay of a CUDA graph of ``run``; ``run`` itself on a CPU."""
    if DEVICE.type != "cuda":
        return run
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def lazily(make: Callable[[], Step]) -> Step:
    """A system whose making may fail: it is made at its first call, where a failure is one system's."""
    made: list[Step] = []

    def run() -> object:
        if not made:
            made.append(make())
        return made[0]()
    return run


def ceilings(results: Results) -> None:
    """What this GPU can do: a copy, and products of matrices. ``rate`` in bytes and operations a second."""
    source = torch.empty(size(1 << 30, 1 << 20), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    n = size(8192, 64)
    left, right = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    single = [matrix.float() for matrix in (left, right)]
    for name, work, unit, run in (("copy", 2 * source.numel(), "TB/s", lambda: target.copy_(source)),
                                  ("bfloat16 product", 2 * n**3, "TFLOP/s", lambda: left @ right),
                                  ("float32 product", 2 * n**3, "TFLOP/s", lambda: single[0] @ single[1])):
        run()
        times = [seconds(run) for _ in range(size(20, 2))]
        rate = work / statistics.median(times)
        results.add("ceiling", {"what": name}, "ours", times, rate=rate)
        print(f"{name}: {rate / 1e12:.3g} {unit}", flush=True)


def installed_losses() -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """Fused linear cross-entropies of other libraries, on normalised copies; their scale is a constant."""
    found: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {}

    def normalised(h: Tensor, weight: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return (gamma * F.normalize(h, dim=-1)).to(h.dtype), F.normalize(weight, dim=-1)

    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["linear_cross_entropy"] = bench_cosine.chunked_loss
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()

        def with_liger(h: Tensor, weight: Tensor, target: Tensor, gamma: Tensor) -> Tensor:
            rows, codes = normalised(h, weight, gamma)
            return liger(codes, rows, target)
        found["Liger"] = with_liger
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        found["cut-cross-entropy"] = lambda h, weight, target, gamma: linear_cross_entropy(
            *normalised(h, weight, gamma), target)
    if importlib.util.find_spec("quack") is not None:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy

        found["quack"] = lambda h, weight, target, gamma: chunked_linear_cross_entropy(
            *normalised(h, weight, gamma), target)
    return found


def loss_floor(h: Tensor, weight: Tensor) -> Step:
    tile = torch.empty(len(h), len(weight), dtype=h.dtype, device=h.device)

    def run() -> object:
        torch.mm(h, weight.T, out=tile)
        torch.mm(h, weight.T, out=tile)
        return tile @ weight, tile.T @ h
    return run


def cosine(results: Results) -> None:
    torch._dynamo.config.cache_size_limit = 64
    losses = {"ours": cosine_cross_entropy, "eager": bench_cosine.eager_loss, **installed_losses()}
    if not REHEARSAL:
        losses["compile"] = torch.compile(bench_cosine.eager_loss, dynamic=False)
    n, k = size(65536, 64), size(4096, 48)
    for dim in DIMS[:size(len(DIMS), 1)]:
        for logits in ("flat", "peaked"):
            h, weight, target, gamma = bench_cosine.inputs(n, dim, k, logits == "peaked")
            h, weight = (x.detach().to(DEVICE, torch.bfloat16).requires_grad_() for x in (h, weight))
            target, gamma = target.to(DEVICE), gamma.detach().to(DEVICE).requires_grad_()
            systems = {"floor": loss_floor(h.detach(), weight.detach())}
            systems |= {name: bench_cosine.step(loss, (h, weight, target, gamma)) for name, loss in losses.items()}
            measure(results, "cosine_cross_entropy", {"N": n, "K": k, "D": dim, "logits": logits, "dtype": "bfloat16"},
                    systems)


def quantize(results: Results) -> None:
    torch._dynamo.config.cache_size_limit = 64
    n, dtype = size(16384, 32), torch.bfloat16
    bench_quantize.ROWS = n
    for dim in DIMS[:size(len(DIMS), 1)]:
        for assignments in ("flat", "peaked"):
            z, codebooks, scale = bench_quantize.inputs(dim, assignments == "peaked")
            z = z.detach().to(DEVICE, dtype).requires_grad_()
            codebooks = [book.detach().to(DEVICE, dtype).requires_grad_() for book in codebooks]
            arguments = (z, codebooks, scale.detach().to(DEVICE).requires_grad_(), 0.5)
            systems = {"floor": products(z.detach(), [book.detach() for book in codebooks])}
            for name, system in bench_quantize.SYSTEMS.items():
                if not (REHEARSAL and name == "compile"):
                    systems[name] = quantize_step(system, arguments)
            measure(results, "residual_quantize", {"N": n, "K": "4096, 1024, 256", "D": dim,
                                                   "assignments": assignments, "tau": 0.5, "dtype": "bfloat16"},
                    systems, rounds=7)


def gumbel(results: Results) -> None:
    dtype = torch.bfloat16
    for codes in (256, 4096, 32768):
        rows = size((1 << 26) // codes, 8)
        logits = torch.randn(rows, codes, device=DEVICE, dtype=dtype).requires_grad_()

        def sample(draw: Callable[..., Tensor], logits: Tensor = logits) -> Step:
            return lambda: torch.autograd.grad(draw(logits).float().sum(), logits)
        systems = {"eager": sample(lambda x: F.gumbel_softmax(x, 0.5)),
                   "ours": sample(lambda x: gumbel_softmax(x, 0.5, seed=SEED))}
        systems |= {f"ours, {name}": sample(lambda x, name=name: gumbel_softmax(x, 0.5, seed=SEED, backend=name))
                    for name in ("triton", "native") if why_not("gumbel_softmax", name, DEVICE, dtype) is None}
        measure(results, "gumbel_softmax", {"N": rows, "K": codes, "dtype": "bfloat16"}, systems)
        noise = {"exponential_": lambda rows=rows, codes=codes: torch.empty(rows, codes, device=DEVICE).exponential_(),
                 "ours": lambda rows=rows, codes=codes: gumbel_noise(SEED, 0, rows, codes, device=DEVICE)}
        measure(results, "gumbel_noise", {"N": rows, "K": codes}, noise)


def products(z: Tensor, codebooks: list[Tensor]) -> Step:
    def run() -> object:
        for e in codebooks:
            for _ in range(3):  # logits, again in backward, and dP
                tile = z @ e.T
            for _ in range(2):  # z~ and dr; dE as key and as value
                rows, codes = tile @ e, tile.T @ z
        return rows, codes
    return run


def quantize_step(quantize: Callable[..., tuple[Tensor, list[Tensor]]], arguments: tuple) -> Step:
    z, codebooks, scale, tau = arguments
    weight = torch.randn(*z.shape[:1], len(codebooks), z.shape[1], device=DEVICE, dtype=z.dtype)

    def run() -> object:
        quantized, usage = quantize(z, codebooks, scale, tau)
        loss = (quantized * weight).float().sum() + sum((u.float() * u.float().add(1e-9).log()).sum() for u in usage)
        return torch.autograd.grad(loss, (z, scale, *codebooks))
    return run


def beam(results: Results) -> None:
    cases = ((2048, 1, 10), (2048, 8, 50), (2048, 64, 50), (2048, 64, 500), (256, 64, 50))
    for codes, batch, beams in cases[:size(len(cases), 1)]:
        beam_case(results, bench_beam.Case(items=size(1_000_000, 200), codes=size(codes, 8), batch=size(batch, 2),
                                           beams=size(beams, 4)))


def beam_case(results: Results, case: bench_beam.Case) -> None:
    sids, model = case.sids(), bench_beam.Model(case)
    trie = bench_beam.trie_of(sids, case)
    items, codes, levels, batch, beams, dim = case.items, case.codes, case.levels, case.batch, case.beams, case.dim
    logits = model.logits = [level.to(torch.bfloat16) for level in model.logits]
    copies = [level.clone() for level in logits]
    h = torch.randn(batch, beams, dim, device=DEVICE, dtype=torch.bfloat16)
    codebook = torch.randn(codes, dim, device=DEVICE, dtype=torch.bfloat16)
    state = trie.root(batch)
    for level in logits[:-1]:
        state = beam_step(trie, level, state, num_beams=beams)

    def search(backend: str = "auto") -> object:
        return beam_search(trie, lambda depth, tokens, parents: logits[depth], batch_size=batch, num_beams=beams,
                           backend=backend)

    def step(backend: str = "auto") -> object:
        return beam_step(trie, logits[-1], state, num_beams=beams, backend=backend)

    def head(backend: str = "auto") -> object:
        return cosine_beam_step(trie, h, codebook, 30.0, state, num_beams=beams, backend=backend)

    def head_then_step() -> object:
        return beam_step(trie, cosine_logits(h, codebook, 30.0), state, num_beams=beams)

    shape = {"items": items, "V": codes, "B": batch, "M": beams, "dtype": "bfloat16"}
    for op, more, call, floor, others, calls in (
            ("beam_search", {"L": levels}, search,
             lambda: [a.copy_(b) for a, b in zip(copies, logits, strict=True)], {}, 20),
            ("beam_step", {}, step, lambda: copies[-1].copy_(logits[-1]), {}, 50),
            ("cosine_beam_step", {"D": dim}, head, lambda: h @ codebook.T, {"head, then step": head_then_step}, 50)):
        if op == "beam_search":
            others = {name: lazily(partial(make, sids, model, case))
                      for name, make in bench_beam.systems(case).items() if name in SEARCH_PEERS}
        systems = {"floor": floor, "ours": call, "ours, graph": lazily(partial(graphed, call)),
                   "reference": partial(call, "reference"), **others}
        measure(results, op, {**shape, **more}, systems, calls=calls)
    if DEVICE.type == "cuda":
        print(f"beam_step: {launches(step)} launches", flush=True)
    found = search()
    query = torch.randn(batch, dim, device=DEVICE, dtype=torch.bfloat16)
    vectors = torch.randn(items, dim, device=DEVICE, dtype=torch.bfloat16)
    measure(results, "rank_candidates", {"items": items, "B": batch, "M": beams, "D": dim, "k": 20}, {
        "ours": lambda: rank_candidates(query, vectors, trie, found, 20),
        "reference": lambda: rank_candidates(query, vectors, trie, found, 20, backend="reference")}, calls=10)


def launches(run: Step) -> int:
    """Kernels that one call starts on the GPU."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


SECTIONS = {"ceilings": ceilings, "cosine": cosine, "gumbel": gumbel, "quantize": quantize, "beam": beam}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--output", type=Path, default=Path("bench/results"), help="where gpu-NAME.json are written")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, on the CPU too; the figures mean nothing")
    options = parser.parse_args()
    global REHEARSAL
    REHEARSAL = options.rehearse
    if DEVICE.type != "cuda" and not REHEARSAL:
        print("bench_gpu.py needs a CUDA device (--rehearse runs it without)", file=sys.stderr)
        return 2
    print({name: status.available for name, status in backends().items()})
    for name in options.sections:
        results = Results()
        try:
            SECTIONS[name](results)
        finally:  # what was measured before a failure counts
            results.write(options.output / f"{'rehearsal' if REHEARSAL else 'gpu'}-{name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
