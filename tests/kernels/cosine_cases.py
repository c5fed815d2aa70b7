"""What the tests of the cosine loss share: the formula in torch, and inputs random, peaked or trained."""

from __future__ import annotations

import functools
import math
import random
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import _extension, cosine_cross_entropy

native = pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))
compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

GRADIENTS = ("gradient of h", "gradient of weight", "gradient of scale")
RESULTS = ("loss", *GRADIENTS)


def eager(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, eps: float = 1e-12, **options: object) -> Tensor:
    """What users write, in the dtype of the inputs."""
    logits = scale * (F.normalize(h, dim=-1, eps=eps) @ F.normalize(weight, dim=-1, eps=eps).T)
    loss = F.cross_entropy(logits.reshape(-1, len(weight)), target.flatten().long(), **options)
    return loss.reshape(target.shape) if options.get("reduction") == "none" else loss


def true_loss(h: Tensor, weight: Tensor, target: Tensor, scale: float | Tensor, **options: object) -> Tensor:
    """The formula in float64; ``scale`` as it is, so that its gradient is that of its dtype."""
    return eager(h.double(), weight.double(), target, scale, **options)


def native_loss(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, **options: object) -> Tensor:
    return cosine_cross_entropy(h, weight, target, scale, backend="native", **options)


def loss_and_gradients(
    function: Callable[..., Tensor],
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: Tensor,
    upstream: Tensor | None = None,
    **options: object,
) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (h, weight, scale)]
    loss = function(leaves[0], leaves[1], target, leaves[2], **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def exact(
    h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, upstream: Tensor | None = None, **options: object
) -> list[Tensor]:
    return loss_and_gradients(eager, h.double(), weight.double(), target, scale.double(), upstream, **options)


def random_inputs(n: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    h, weight = (torch.randn(rows, d) * torch.empty(rows, 1).uniform_(0.1, 5) for rows in (n, k))
    return h.to(dtype), weight.to(dtype), torch.randint(k, (n,))


def peaked_inputs(n: int, d: int, k: int, cosine: float = 0.7) -> tuple[Tensor, Tensor, Tensor]:
    """Rows at ``cosine`` to their target, every tenth one flat."""
    weight, target = torch.randn(k, d), torch.randint(k, (n,))
    h = cosine * F.normalize(weight[target], dim=-1) + math.sqrt(1 - cosine**2) * F.normalize(torch.randn(n, d), dim=-1)
    h[::10] = torch.randn(len(h[::10]), d)
    return 3 * h, weight, target


def random_size(high: int) -> int:
    return round(math.exp(random.uniform(0, math.log(high))))


@functools.cache
def trained_head() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(600, 128), (2000, 128), (600,), scale: what a small model ends with after some hundred steps.

    Each of 300 contexts has its item; popularities of contexts fall off as in Zipf's law, so the rows of frequent ones
    are peaked in the end (about 100 of 2,000 entries count) and those of rare ones less so (about 600).
    """
    contexts, items, dim, steps = 300, 2000, 128, 300
    popularity, item = 1 / torch.arange(1.0, contexts + 1), torch.randint(items, (contexts,))

    def draw(count: int) -> tuple[Tensor, Tensor]:
        context = popularity.multinomial(count, replacement=True)
        return context, item[context]

    encoder = torch.nn.Sequential(
        torch.nn.Embedding(contexts, dim), torch.nn.Linear(dim, dim), torch.nn.GELU(), torch.nn.Linear(dim, dim)
    )
    weight, scale = torch.randn(items, dim).requires_grad_(), torch.tensor(30.0, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": [*encoder.parameters(), weight]}, {"params": [scale], "lr": 0.02}], lr=1e-2, weight_decay=0.0
    )
    for _ in range(steps):
        context, target = draw(256)
        loss = native_loss(encoder(context), weight, target, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    context, target = draw(600)
    return encoder(context).detach(), weight.detach(), target, scale.detach()
