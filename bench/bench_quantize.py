"""Residual quantization and its hard assignment, against PyTorch and vector-quantize-pytorch on the CPU.

Quantization is forward and backward. Every system quantizes the same rows by the same three codebooks, softly, with
noise; vector-quantize-pytorch, where it is installed, by a straight-through sample over Euclidean distances, the
nearest that it has to learnable codebooks. The floor is the seven matrix products that forward and backward of each
level cannot do without (``torch.mm``, 14 N D sum(K) operations), measured in the same interleaved run; "MB" is the peak
beyond the inputs of one call, gradients included. Flat: random rows and codes. Peaked, like a trained quantizer:
codebooks in families of 64 codes at cosine 0.8 and rows near a path of codes, so that about 60 of 4096 entries of a row
count at tau = 0.5 and 3 at tau = 0.1.

By metric: the Euclidean one beside the others on the same inputs, and beside what its users write,
``-cdist(z, e) ** 2`` and ``F.gumbel_softmax``; at the sizes above, and at the 3 x 256 codes of RQ-VAE (D = 32).

Assignment gives items their codes, without gradient, noise or softmax; its floor is one product per level.

Run: make bench; python bench/bench_quantize.py prints tables of every shape, pytest bench -k quantize times the target
     case;
     python bench/bench_quantize.py --metrics compares the metrics instead;
     python bench/bench_quantize.py --catalog 10000000 assigns codes to so many items instead, once.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import Results, Step, interleaved, peak_bytes, seconds, title
from torch import Tensor

from dgi.progress import Progress
from dgi_kernels import assign_codes, residual_quantize
from dgi_kernels.types import Metric

ROWS, SIZES, SCALE = 2048, (4096, 1024, 256), 30.0
SHAPES = [(d, tau) for d in (64, 256, 768) for tau in (1.0, 0.5, 0.1)]
SMALL = (256, 256, 256)  # the codebooks of RQ-VAE
BY_METRIC = [(2048, 64, SIZES), (2048, 256, SIZES), *((n, 32, SMALL) for n in (256, 1024, 4096))]
QUICK = [(64, 1.0), (256, 1.0), (256, 0.5)]  # what `make bench` runs
SEED = torch.tensor([42])


def inputs(d: int, peaked: bool, rows: int = 0, sizes: tuple[int, ...] = SIZES) -> tuple[Tensor, list[Tensor], Tensor]:
    """z (N, d), the codebooks and the scale; ``rows``: N, or 0 for ROWS."""
    generator, n = torch.Generator().manual_seed(d), rows or ROWS

    def unit(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, d, generator=generator), dim=-1)

    z, codebooks = unit(n), []
    if peaked:
        z *= 0.02
    for level, size in enumerate(sizes):
        codebook = unit(size)
        if peaked:
            families = unit(-(-size // 64)).repeat_interleave(64, 0)[:size]
            codebook = 0.5**level * F.normalize(0.8**0.5 * families + 0.2**0.5 * codebook, dim=-1)
            z = z + codebook[torch.randint(size, (n,), generator=generator)]
        codebooks.append(codebook.requires_grad_())
    return z.requires_grad_(), codebooks, torch.tensor(SCALE, requires_grad=True)


def eager(z: Tensor, codebooks: list[Tensor], scale: Tensor, tau: float) -> tuple[Tensor, list[Tensor]]:
    quantized, usage = [], []
    for codebook in codebooks:
        p = F.gumbel_softmax(scale * F.normalize(z, dim=-1) @ F.normalize(codebook, dim=-1).T, tau)
        quantized.append(p @ codebook)
        usage.append(p.mean(0))
        z = z - quantized[-1]
    return torch.stack(quantized, 1), usage


def eager_euclidean(z: Tensor, codebooks: list[Tensor], scale: Tensor, tau: float) -> tuple[Tensor, list[Tensor]]:
    quantized, usage = [], []
    for codebook in codebooks:
        p = F.gumbel_softmax(-scale * torch.cdist(z, codebook).pow(2), tau)
        quantized.append(p @ codebook)
        usage.append(p.mean(0))
        z = z - quantized[-1]
    return torch.stack(quantized, 1), usage


def by_metric(metric: Metric) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    def run(z: Tensor, codebooks: list[Tensor], scale: Tensor, tau: float) -> tuple[Tensor, list[Tensor]]:
        result = residual_quantize(z, codebooks, scale, tau, metric=metric, seed=SEED)
        return result.quantized, result.usage

    return run


def ours(z: Tensor, codebooks: list[Tensor], scale: Tensor, tau: float) -> tuple[Tensor, list[Tensor]]:
    result = residual_quantize(z, codebooks, scale, tau, seed=SEED)
    return result.quantized, result.usage


compiled = torch.compile(eager, dynamic=False)
SYSTEMS = {"eager": eager, "compile": compiled, "ours": ours}
METRIC_SYSTEMS = {
    "eager": eager_euclidean,
    "compile": torch.compile(eager_euclidean, dynamic=False),
    "ours": by_metric("euclidean"),
    "ours, cosine": by_metric("cosine"),
    "ours, dot": by_metric("dot"),
}


def step(
    quantize: Callable[..., tuple[Tensor, list[Tensor]]], z: Tensor, codebooks: list[Tensor], scale: Tensor, tau: float
) -> Step:
    weight = torch.randn(len(z), len(codebooks), z.shape[1])

    def run() -> object:
        quantized, usage = quantize(z, codebooks, scale, tau)
        loss = (quantized * weight).sum() + sum((u * u.add(1e-9).log()).sum() for u in usage)
        return torch.autograd.grad(loss, (z, scale, *codebooks))

    return run


def floor(z: Tensor, codebooks: list[Tensor]) -> Step:
    z, books = z.detach(), [codebook.detach() for codebook in codebooks]
    out = [(torch.empty(len(z), len(e)), torch.empty_like(z), torch.empty_like(e)) for e in books]

    def run() -> object:
        for e, (tile, rows, codes) in zip(books, out, strict=True):
            for _ in range(3):  # logits, again in backward, and dP
                torch.mm(z, e.T, out=tile)
            for _ in range(2):  # z~ and dr
                torch.mm(tile, e, out=rows)
            for _ in range(2):  # dE as key and as value
                torch.mm(tile.T, z, out=codes)
        return out

    return run


def vector_quantize_pytorch(z: Tensor, sizes: tuple[int, ...], tau: float) -> Step:
    from vector_quantize_pytorch import ResidualVQ

    model = ResidualVQ(
        dim=z.shape[1],
        num_quantizers=len(sizes),
        codebook_size=sizes,
        learnable_codebook=True,
        ema_update=False,
        stochastic_sample_codes=True,
        sample_codebook_temp=tau,
    )
    weights = [p for p in model.parameters() if p.requires_grad]

    def run() -> object:
        quantized, _, losses = model(z.unsqueeze(0))
        return torch.autograd.grad(quantized.sum() + losses.sum(), (z, *weights), allow_unused=True)

    return run


def steps(d: int, tau: float, peaked: bool, rows: int = 0, sizes: tuple[int, ...] = SIZES) -> dict[str, Step]:
    arguments = inputs(d, peaked, rows, sizes)
    systems = {"floor": floor(*arguments[:2])}
    systems |= {name: step(quantize, *arguments, tau) for name, quantize in SYSTEMS.items()}
    if importlib.util.find_spec("vector_quantize_pytorch") is not None:
        systems["vector-quantize-pytorch"] = vector_quantize_pytorch(arguments[0], sizes, tau)
    return systems


def assign_in_pytorch(z: Tensor, codebooks: list[Tensor]) -> Tensor:
    codes = []
    for codebook in codebooks:
        codes.append((z @ F.normalize(codebook, dim=-1).T).argmax(1))  # the row's own norm changes no argmax
        z = z - codebook[codes[-1]]
    return torch.stack(codes, 1)


def assignments(d: int, rows: int = 0, sizes: tuple[int, ...] = SIZES) -> dict[str, Step]:
    z, codebooks, _ = inputs(d, True, rows, sizes)
    z, books = z.detach().repeat(4, 1), [codebook.detach() for codebook in codebooks]
    out = [torch.empty(len(z), len(e)) for e in books]
    return {
        "floor": lambda: [torch.mm(z, e.T, out=tile) for e, tile in zip(books, out, strict=True)],
        "eager": lambda: assign_in_pytorch(z, books),
        "ours": lambda: assign_codes(z, books),
    }


def assign_catalog(items: int, results: Results, d: int = 64, batch: int = 65536) -> None:
    """Assign codes to a catalog that is made batch by batch; the time of assignment alone, and of its products."""
    books = [codebook.detach() for codebook in inputs(d, peaked=True)[1]]
    random, spent, product = torch.Generator().manual_seed(0), 0.0, 0.0
    tile = torch.empty(batch, max(SIZES))
    counts = torch.zeros(SIZES[0], dtype=torch.int64)
    with Progress(items, "assigning codes") as bar:
        for first in range(0, items, batch):
            z = torch.randn(min(batch, items - first), d, generator=random)
            codes: list[Tensor] = []
            spent += seconds(lambda z=z, codes=codes: codes.append(assign_codes(z, books)))
            product += seconds(
                lambda z=z: [
                    torch.mm(z, e.T, out=tile[: len(z), : len(e)].flatten()[: len(z) * len(e)].view(len(z), len(e)))
                    for e in books
                ]
            )
            counts += codes[0][:, 0].bincount(minlength=SIZES[0])
            bar.update(len(z))
    print(
        f"{items:,} items, D={d}, K={SIZES}: {spent:.1f} s, {items / spent / 1e6:.2f} million a second; the matrix "
        f"products alone {product:.1f} s; {int((counts > 0).sum())} codes of the first level in use; {title()}"
    )
    for name, total in (("floor", product), ("ours", spent)):
        results.add("assign_codes", {"items": items, "D": d}, name, [total])


def table(shapes: list[tuple[int, float]], rounds: int, results: Results) -> None:
    print(
        f"{title()}; N = {ROWS}, K = {SIZES}; ms (ratio to the floor), MB at the peak; medians of {rounds} "
        f"interleaved rounds\n"
    )
    for row, (d, tau, peaked) in enumerate((d, tau, p) for d, tau in shapes for p in (False, True)):
        systems, kind = steps(d, tau, peaked), "peaked" if peaked else "flat"
        if row == 0:
            print_header("D", "tau", "assignments", *systems)
        add_row(
            "residual_quantize",
            {"N": ROWS, "D": d, "tau": tau, "assignments": kind},
            (d, tau, kind),
            systems,
            rounds,
            results,
        )


def metric_table(rounds: int, results: Results) -> None:
    print(f"{title()}; flat, tau = 1; ms (ratio to the floor), MB at the peak; medians of interleaved rounds\n")
    print_header("N, D, K; by the Euclidean metric", "floor", *METRIC_SYSTEMS)
    for n, d, sizes in BY_METRIC:
        arguments = inputs(d, False, n, sizes)
        systems = {"floor": floor(*arguments[:2])}
        systems |= {name: step(quantize, *arguments, 1.0) for name, quantize in METRIC_SYSTEMS.items()}
        codes = "x".join(map(str, sizes))
        shape = {"N": n, "D": d, "K": codes, "metric": "euclidean"}
        add_row(
            "residual_quantize",
            shape,
            (n, d, codes),
            systems,
            rounds if n * sum(sizes) > 2**23 else 9 * rounds,
            results,
        )


def assignment_table(rounds: int, results: Results) -> None:
    print_header("D, assignment", *assignments(64))
    for d in (64, 256):
        add_row("assign_codes", {"N": 4 * ROWS, "D": d}, (d,), assignments(d), rounds, results)


def print_header(*columns: str) -> None:
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")


def add_row(
    op: str,
    shape: dict[str, object],
    labels: tuple[object, ...],
    systems: dict[str, Step],
    rounds: int,
    results: Results,
) -> None:
    times, cells = interleaved(systems, rounds), []
    base = statistics.median(times["floor"])
    for name, run in systems.items():
        memory = peak_bytes(run) if name != "floor" else None
        results.add(op, shape, name, times[name], memory)
        median = statistics.median(times[name])
        cells.append(
            f"{1e3 * median:.4g} ({median / base:.2f})" + (f", {memory / 1e6:.0f} MB" if memory is not None else "")
        )
    print(f"| {' | '.join(map(str, labels))} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the shapes that make bench runs")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per shape (default 7)")
    parser.add_argument("--metrics", action="store_true", help="compare the metrics, and no more")
    parser.add_argument("--catalog", type=int, metavar="ITEMS", help="assign codes to so many items, and no more")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, as pytest-benchmark writes them")
    options = parser.parse_args()
    measured = Results()
    if options.catalog:
        assign_catalog(options.catalog, measured)
    elif options.metrics:
        metric_table(options.rounds, measured)
    else:
        torch._dynamo.config.cache_size_limit = 4 * len(SHAPES)
        table(QUICK if options.quick else SHAPES, options.rounds, measured)
        assignment_table(options.rounds, measured)
    if options.json:
        measured.write(options.json)
        print(f"\nwrote {options.json}")
