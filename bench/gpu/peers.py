"""Other libraries: each is looked for, imported and called on its own, so that a broken one costs only itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import bench_cosine
import torch
import torch.nn.functional as F
from torch import Tensor

from .device import Gpu

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def normalised(h: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Copies for those that know no norms; the cost is theirs."""
    return (scale * F.normalize(h, dim=-1)).to(h.dtype), F.normalize(weight, dim=-1)


def liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()

    def run(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        rows, codes = normalised(h, weight, scale)
        return loss(codes, rows, target)

    return run


def cut_cross_entropy() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda h, weight, target, scale: linear_cross_entropy(*normalised(h, weight, scale), target)


def quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda h, weight, target, scale: chunked_linear_cross_entropy(*normalised(h, weight, scale), target)


def losses(gpu: Gpu) -> dict[str, Callable[[], Loss]]:
    """Fused linear cross-entropies that are installed, and torch's own; each is made when it is called."""
    found: dict[str, Callable[[], Loss]] = {}
    for name, package, make in (
        ("Liger", "liger_kernel", liger),
        ("cut-cross-entropy", "cut_cross_entropy", cut_cross_entropy),
        ("quack", "quack", quack),
    ):
        if importlib.util.find_spec(package) is not None:
            found[name] = make
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["linear_cross_entropy"] = lambda: bench_cosine.chunked_loss
    found["compile"] = lambda: gpu.compile(bench_cosine.eager_loss)
    return found
