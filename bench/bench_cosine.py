"""Cosine cross-entropy, forward and backward, against eager, torch.compile and F.linear_cross_entropy on the CPU.

Every system gets the same inputs that need normalising.  The floor is the three matrix products that no dense method
can do without (``torch.mm``, 6 N K D operations), measured in the same interleaved run; MB are the peak of one call
beyond its inputs, gradients included.  Peaked logits are those of a trained model: nine rows in ten at cosine 0.7 to
their target, the tenth flat, all with scale 30.  "with bias" is ours with a learned bias for each column, a popularity,
and its gradient.

Run: make bench; python bench/bench_cosine.py prints a table of every shape, pytest bench -k cosine times the target
     case.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import Results, Step, interleaved, peak_bytes, title
from torch import Tensor

from dgi_kernels import cosine_cross_entropy

SMALL = (64, 256, 256)  # (N, D, K)
SHAPES = [SMALL, *((n, d, k) for k, n in ((256, 4096), (4096, 4096), (32768, 1024)) for d in (64, 256, 768))]
QUICK = [(4096, 64, 4096), (4096, 256, 4096), SMALL]  # what `make bench` runs
LARGE, LARGE_ROUNDS = 10**10, 3  # N K D from which a round takes seconds, and how many rounds are enough of it
SCALE = 30.0

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(n: int, d: int, k: int, peaked: bool) -> Inputs:
    generator = torch.Generator().manual_seed(n + d + k)
    weight, target = torch.randn(k, d, generator=generator), torch.randint(k, (n,), generator=generator)
    h = F.normalize(torch.randn(n, d, generator=generator), dim=-1)
    if peaked:
        flat = torch.arange(n).unsqueeze(1) % 10 == 0
        h = torch.where(flat, h, 0.7 * F.normalize(weight[target], dim=-1) + 0.51**0.5 * h)
    return h.mul_(4).requires_grad_(), weight.requires_grad_(), target, torch.tensor(SCALE, requires_grad=True)


def eager_loss(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * F.normalize(h, dim=-1) @ F.normalize(weight, dim=-1).T, target)


def chunked_loss(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    """torch's own chunked head knows neither norms nor the scale: it is given normalised copies."""
    return F.linear_cross_entropy(
        scale * F.normalize(h, dim=-1),
        F.normalize(weight, dim=-1),
        target,
        options=torch.nn.LinearCrossEntropyOptions(),
    )


@functools.cache
def popularity(k: int) -> Tensor:
    return torch.randn(k, generator=torch.Generator().manual_seed(k)).requires_grad_()


def biased_loss(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor) -> Tensor:
    return cosine_cross_entropy(h, weight, target, scale, bias=popularity(len(weight)))


compiled_loss = torch.compile(eager_loss, dynamic=False)
LOSSES = {
    "eager": eager_loss,
    "compile": compiled_loss,
    "linear_cross_entropy": chunked_loss,
    "ours": cosine_cross_entropy,
    "with bias": biased_loss,
}


def step(loss: Callable[..., Tensor], arguments: Inputs) -> Step:
    h, weight, target, scale = arguments
    leaves = (h, weight, scale, *([popularity(len(weight))] if loss is biased_loss else []))

    def run() -> object:
        return torch.autograd.grad(loss(h, weight, target, scale), leaves)

    return run


def floor(arguments: Inputs) -> Step:
    h, weight = arguments[0].detach(), arguments[1].detach()
    logits, dh, dweight = torch.empty(len(h), len(weight)), torch.empty_like(h), torch.empty_like(weight)

    def run() -> object:
        torch.mm(h, weight.T, out=logits)
        torch.mm(logits, weight, out=dh)
        return torch.mm(logits.T, h, out=dweight)

    return run


def steps(n: int, d: int, k: int, peaked: bool) -> dict[str, Step]:
    arguments = inputs(n, d, k, peaked)
    return {"floor": floor(arguments), **{name: step(loss, arguments) for name, loss in LOSSES.items()}}


def table(shapes: list[tuple[int, int, int]], rounds: int) -> Results:
    names, results = ["floor", *LOSSES], Results()
    print(
        f"{title()}; ms (ratio to the floor), MB at the peak; medians of {rounds} interleaved rounds"
        f" ({min(rounds, LARGE_ROUNDS)} where N K D > {LARGE:.0e})\n"
    )
    print("| N | D | K | logits | " + " | ".join(names) + " |\n" + "|---" * (4 + len(names)) + "|")
    for n, d, k in shapes:
        for logits in ("flat", "peaked"):
            systems = steps(n, d, k, logits == "peaked")
            times = interleaved(systems, min(rounds, LARGE_ROUNDS) if n * d * k > LARGE else rounds)
            base, cells = statistics.median(times["floor"]), []
            for name in names:
                memory = peak_bytes(systems[name]) if name != "floor" else None
                shape = {"N": n, "D": d, "K": k, "logits": logits}
                results.add("cosine_cross_entropy", shape, name, times[name], memory)
                median = statistics.median(times[name])
                cells.append(
                    f"{1e3 * median:.4g} ({median / base:.2f})"
                    + (f", {memory / 1e6:.0f} MB" if memory is not None else "")
                )
            print(f"| {n} | {d} | {k} | {logits} | " + " | ".join(cells) + " |", flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the shapes that make bench runs")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per shape (default 7)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, as pytest-benchmark writes them")
    options = parser.parse_args()
    torch._dynamo.config.cache_size_limit = len(SHAPES) + 1
    measured = table(QUICK if options.quick else SHAPES, options.rounds)
    if options.json:
        measured.write(options.json)
        print(f"\nwrote {options.json}")
