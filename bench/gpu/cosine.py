"""The cosine loss, forward and backward, at the size of a training step: ours, its floor, and what users write.

The floor of the loss is its matrix products, 8 N K D operations: logits, logits again, dh and dE. As ``torch.mm`` they
also move N x K numbers, which ours does not, so the share of the measured ceiling is printed too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import bench_cosine
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import cosine_cross_entropy

from . import peers
from .device import Gpu, Step
from .session import Session, lazily

N, K = 65536, 4096
FIRST = [(N, K, 256, "flat"), (N, K, 64, "flat"), (N, K, 256, "peaked"), (N, K, 64, "peaked")]
MORE = [
    (N, K, 128, "flat"),
    (N, K, 768, "flat"),
    (N, K, 768, "peaked"),
    (4096, 151_936, 256, "peaked"),
    (1024, 32_768, 256, "flat"),
]  # the last two: a language model's vocabulary, and few rows of many codes
WITH_PEERS = [(N, K, 256, "flat"), (N, K, 64, "peaked")]

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(gpu: Gpu, n: int, k: int, d: int, logits: str, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """h, weight, target, scale; peaked: nine rows in ten at cosine 0.7 to their target."""
    torch.manual_seed(n + k + d)
    weight = torch.randn(k, d, device=gpu.device)
    target = torch.randint(k, (n,), device=gpu.device)
    h = F.normalize(torch.randn(n, d, device=gpu.device), dim=-1)
    if logits == "peaked":
        near = 0.7 * F.normalize(weight[target], dim=-1) + 0.51**0.5 * h
        h = torch.where((torch.arange(n, device=gpu.device) % 10 == 0)[:, None], h, near)
    scale = torch.full((), 30.0, device=gpu.device)
    return 4 * h.to(dtype), weight.to(dtype), target, scale


def step(loss: Callable[..., Tensor], arguments: Inputs) -> Step:
    h, weight, target, scale = arguments
    leaves = [x.detach().requires_grad_() for x in (h, weight, scale)]
    return lambda: torch.autograd.grad(loss(leaves[0], leaves[1], target, leaves[2]), leaves)


def floor(h: Tensor, weight: Tensor) -> Step:
    tile = torch.empty(len(h), len(weight), dtype=h.dtype, device=h.device)

    def run() -> object:
        torch.mm(h, weight.T, out=tile)
        torch.mm(h, weight.T, out=tile)
        return tile @ weight, tile.T @ h

    return run


def shape(n: int, k: int, d: int, logits: str) -> dict[str, object]:
    return {"N": n, "K": k, "D": d, "logits": logits, "dtype": "bfloat16"}


def figures(session: Session, cases: list[tuple[int, int, int, str]]) -> None:
    for n, k, d, logits in cases:
        with session.guarded(f"cosine N={n} K={k} D={d}"):
            arguments = inputs(session.gpu, n, k, d, logits)
            ours = step(cosine_cross_entropy, arguments)
            median = session.measure(
                "cosine_cross_entropy",
                shape(n, k, d, logits),
                {
                    "ours": ours,
                    "floor": floor(*arguments[:2]),
                    "eager": step(bench_cosine.eager_loss, arguments),
                    "ours, graph": lazily(functools.partial(session.gpu.graphed, ours)),
                },
                calls=10,
            )
            session.share_of_ceiling(8 * n * k * d, median)


def run(session: Session) -> None:
    figures(session, FIRST)


def more(session: Session) -> None:
    figures(session, MORE)


def with_peers(session: Session) -> None:
    """Others, each beside ours and alone in its failure."""
    for n, k, d, logits in WITH_PEERS:
        arguments = inputs(session.gpu, n, k, d, logits)
        ours = step(cosine_cross_entropy, arguments)
        for name, make in peers.losses(session.gpu).items():

            def theirs(make: Callable[[], peers.Loss] = make, arguments: Inputs = arguments) -> Step:
                return step(make(), arguments)

            session.measure(
                "cosine_cross_entropy",
                shape(n, k, d, logits),
                {"ours": ours, name: lazily(theirs)},
                calls=10,
                budget=2.0,
            )
