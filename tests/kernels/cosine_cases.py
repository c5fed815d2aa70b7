"""What the tests of the cosine loss share: the formula in torch, and inputs random, peaked or trained.

What columns have beside their vectors is a dict by the names of the op's options: the oracle, what is drawn of them,
and which have a gradient are here alone, for every backend, for ranks and for modules.
"""

from __future__ import annotations

import functools
import math
import random
import shutil
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import _extension, cosine_cross_entropy

native = pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))
compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

# Relative to the norm of a result; the gradients of the scale and of columns are sums whose terms cancel.
COLUMN_BOUND = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
Columns = dict[str, Tensor]

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


def random_columns(k: int, dtype: torch.dtype = torch.float64, *, few: bool = False) -> Columns:
    """Each option of K columns or not; ``few``: of few items, so that most rows lose columns."""
    groups = [torch.randint(max(1, k // 3), (k,)), torch.zeros(k).long()]
    drawn = {
        "bias": random.choice([None, torch.randn(k), 6 * torch.randn(k), 90 * torch.rand(k)]),
        "same_as": random.choice(groups if few else [None, torch.arange(k), *groups]),
    }
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in drawn.items() if x is not None}


def all_columns(k: int, dtype: torch.dtype = torch.float64) -> Columns:
    """Every option of K columns, as the op takes it."""
    return {"bias": torch.randn(k).to(dtype), "same_as": torch.arange(k) % 3}


def true_loss_by_columns(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: Tensor,
    *,
    bias: Tensor | None = None,
    same_as: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Loss and log normalizers row by row, over the columns that are left."""
    unit = F.normalize(weight, dim=-1)
    losses, normalizers = [], []
    for row, label in zip(h, target.tolist(), strict=True):
        if label == ignore_index:
            losses.append(0 * row.sum())
            normalizers.append(0 * row.sum())
            continue
        logits = scale * (F.normalize(row, dim=-1) * unit).sum(-1)
        logits = logits if bias is None else logits + bias
        keep = torch.ones(len(weight), dtype=torch.bool, device=h.device)
        if same_as is not None:
            keep = same_as != same_as[label]
            keep[label] = True
        place = keep[:label].sum()
        losses.append(F.cross_entropy(logits[keep], place, label_smoothing=label_smoothing))
        normalizers.append(logits[keep].logsumexp(0))
    loss = torch.stack(losses)
    if reduction == "mean":
        loss = loss.sum() / (target != ignore_index).sum()
    return loss.sum() if reduction == "sum" else loss, torch.stack(normalizers)


def results_by_columns(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, Tensor, Tensor],
    target: Tensor,
    columns: Columns,
    upstream: tuple[Tensor | None, Tensor | None],
    **options: object,
) -> dict[str, Tensor]:
    """Loss, log normalizers and all gradients by name; an output whose ``upstream`` is None goes unused."""
    leaves = dict(zip(("h", "weight", "scale"), inputs, strict=True))
    leaves |= {name: x for name, x in columns.items() if x.is_floating_point()}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    h, weight, scale, *_ = leaves.values()
    given = {name: leaves.get(name, x) for name, x in columns.items()}
    outputs = function(h, weight, target, scale, **given, **options)
    terms = [(x * g.to(x.dtype)).sum() for x, g in zip(outputs, upstream, strict=True) if g is not None]
    gradients = torch.autograd.grad(
        torch.stack(terms).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    loss, log_normalizer = (x.detach() for x in outputs)
    found = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"loss": loss, "log_normalizer": log_normalizer, **found}


def exact_by_columns(
    inputs: tuple[Tensor, Tensor, Tensor], target: Tensor, columns: Columns, *arguments: object, **options: object
) -> dict[str, Tensor]:
    """:func:`results_by_columns` of the formula in float64."""
    wide = {name: x.double() if x.is_floating_point() else x for name, x in columns.items()}
    h, weight, scale = (x.double() for x in inputs)
    return results_by_columns(true_loss_by_columns, (h, weight, scale), target, wide, *arguments, **options)


def assert_columns_near(
    actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float, least: float, about: object
) -> None:
    for name, value in expected.items():
        off = (actual[name].double() - value).norm().item()
        allowed = bound * max(value.norm().item(), least)
        assert off <= allowed, f"{name} is off by {off:.3g}, allowed {allowed:.3g}: {about}"


class ColumnCase(NamedTuple):
    inputs: tuple[Tensor, Tensor, Tensor]  # h, weight, scale
    target: Tensor
    columns: Columns
    upstream: tuple[Tensor, Tensor]
    options: dict[str, object]


def random_case(dtype: torch.dtype) -> ColumnCase:
    n, d, k = random.choice([(5, 3, 4), (70, 17, 40), (300, 128, 500), (64, 130, 900), (9, 8, 1)])
    h, weight, target = random.choice([random_inputs, peaked_inputs])(n, d, k)
    scale = torch.tensor(random.choice([0.0, 5.0, 25.0, 70.0, -20.0]))
    options = {
        "reduction": random.choice(["none", "mean", "sum"]),
        "label_smoothing": random.choice([0.0, 0.1, 1.0]),
        "ignore_index": random.choice([-100, 0]),
    }
    target[1::3] = options["ignore_index"]
    target[0] = k - 1 if k > 1 else target[0]
    if not (target != options["ignore_index"]).any():
        options["reduction"] = "sum"
    upstream = (torch.randn(n if options["reduction"] == "none" else ()), torch.randn(n))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = (h.to(dtype), weight.to(dtype), scale.to(compute))
    return ColumnCase(inputs, target, random_columns(k, compute), upstream, options)


def op_arguments(n: int = 5, d: int = 3, k: int = 7) -> dict[str, object]:
    """What ``torch.ops.dgi_kernels.cosine_cross_entropy`` takes, by its names, without any option."""
    return {
        "h": torch.randn(n, d),
        "weight": torch.randn(k, d),
        "target": torch.zeros(n, dtype=torch.int64),
        "scale": torch.tensor(2.0),
        "bias": None,
        "same_as": None,
        "upstream": None,
        "upstream_log_normalizer": None,
        "ignore_index": -100,
        "reduction": 0,
        "label_smoothing": 0.0,
        "eps": 1e-12,
        "wants_log_normalizer": True,
        "wants_h": True,
        "wants_weight": True,
        "wants_scale": True,
        "wants_bias": True,
    }


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
