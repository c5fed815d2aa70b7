"""Vocabulary-parallel cosine cross-entropy against one process; what every one of torchrun's processes does."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import dgi_kernels
from dgi_kernels import collectives

from .cosine_cases import random_columns

DIM, ROWS = 7, 6  # rows of every rank
SHARDS = ([5, 3, 9], [4, 0, 2], [0, 1, 1])  # rows of the weight on each rank

group: Any = None  # of the ranks that take part


def rank() -> int:
    return collectives.rank(group)


def world_size() -> int:
    return collectives.world_size(group)


def parallel_loss(*arguments: Any, **options: Any) -> Tensor:
    return dgi_kernels.vocabulary_parallel_cosine_cross_entropy(*arguments, group=group, **options)


class Case(NamedTuple):
    """What all ranks hold together; each takes its part."""

    h: Tensor
    weight: Tensor
    target: Tensor
    scale: Tensor
    upstream: Tensor
    sizes: list[int]

    @property
    def own_rows(self) -> slice:
        return slice(rank() * ROWS, (rank() + 1) * ROWS)

    @property
    def own_codes(self) -> slice:
        first = sum(self.sizes[: rank()])
        return slice(first, first + self.sizes[rank()])


def make_case(sizes: list[int], ignore_index: int = -100, dtype: torch.dtype = torch.float64) -> Case:
    """The same on every rank, all generators being at the same place."""
    sizes = sizes[: world_size()]
    rows, codes = ROWS * world_size(), sum(sizes)
    target = torch.randint(codes, (rows,))
    target[1::ROWS] = ignore_index
    return Case(
        torch.randn(rows, DIM, dtype=dtype),
        torch.randn(codes, DIM, dtype=dtype),
        target,
        torch.tensor(random.choice([3.0, 30.0, 120.0]), dtype=dtype),
        torch.randn(rows, dtype=dtype),
        sizes,
    )


def leaves(*values: Tensor) -> list[Tensor]:
    return [value.clone().requires_grad_() for value in values]


def reduce(loss: Tensor, case: Case, rows: slice, reduction: str, ignore_index: int) -> Tensor:
    """Losses of the chosen rows as one number, weighted by ``upstream`` where they are not reduced."""
    if reduction == "none":
        return (loss * case.upstream[rows]).sum()
    return loss.sum() / ((case.target[rows] != ignore_index).sum() if reduction == "mean" else 1)


def true_loss(
    case: Case, rows: str, reduction: str, ignore_index: int, smoothing: float
) -> tuple[Tensor, list[Tensor]]:
    """This rank's loss, and gradients of what its gradients are those of, in one process."""
    h, weight, scale = leaves(case.h, case.weight, case.scale)
    logits = scale * F.normalize(h, dim=-1) @ F.normalize(weight, dim=-1).T
    loss = F.cross_entropy(logits, case.target, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)
    if rows == "replicated":
        own = total = reduce(loss, case, slice(None), reduction, ignore_index)
    else:
        parts = [slice(r * ROWS, (r + 1) * ROWS) for r in range(world_size())]
        reduced = [reduce(loss[part], case, part, reduction, ignore_index) for part in parts]
        own, total = reduced[rank()], torch.stack(reduced).sum()
    dh, dweight, dscale = torch.autograd.grad(total, (h, weight, scale))
    return own.detach(), [dh if rows == "replicated" else dh[case.own_rows], dweight[case.own_codes], dscale]


def our_loss(case: Case, rows: str, reduction: str, **options: Any) -> tuple[Tensor, list[Tensor]]:
    part = slice(None) if rows == "replicated" else case.own_rows
    h, weight, scale = leaves(case.h[part], case.weight[case.own_codes], case.scale)
    loss = parallel_loss(h, weight, case.target[part], scale, rows=rows, reduction=reduction, **options)
    value = (loss * case.upstream[part]).sum() if reduction == "none" else loss
    gradients = list(torch.autograd.grad(value, (h, weight, scale)))
    if rows == "sharded":
        dist.all_reduce(gradients[2], group=group)
    return value.detach(), gradients


def test_loss_and_gradients_are_those_of_one_process() -> None:
    for sizes, rows, reduction, smoothing, backend in itertools.product(
        SHARDS, ("replicated", "sharded"), ("mean", "sum", "none"), (0.0, 0.2), ("auto", "reference")
    ):
        ignore_index = random.choice([-100, 0, -1, 10**12])
        case = make_case(sizes, ignore_index)
        expected = true_loss(case, rows, reduction, ignore_index, smoothing)
        actual = our_loss(case, rows, reduction, ignore_index=ignore_index, label_smoothing=smoothing, backend=backend)
        torch.testing.assert_close(
            actual,
            expected,
            rtol=1e-9,
            atol=1e-9,
            equal_nan=True,
            msg=lambda text, c=(sizes, rows, reduction, smoothing, backend): f"{c}: {text}",
        )


def column_loss(
    function: Callable[..., Any],
    inputs: list[Tensor],
    case: Case,
    part: slice,
    of_lse: Tensor,
    reduction: str,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Log normalizers, and loss and log normalizers as one number; ``inputs`` h of ``part``, weight and scale."""
    h, weight, scale = inputs
    loss, lse = function(
        h, weight, case.target[part], scale, reduction=reduction, return_log_normalizer=True, **options
    )
    value = (loss * case.upstream[part]).sum() if reduction == "none" else loss
    return lse.detach(), value + (lse * of_lse[part]).sum()


def test_options_of_columns_are_those_of_one_process() -> None:
    """A bias, items that have columns on several ranks, and the log normalizers, with all gradients."""
    for sizes, rows, reduction, smoothing, few in itertools.product(
        SHARDS, ("replicated", "sharded"), ("mean", "none"), (0.0, 0.2), (False, True, True)
    ):
        case = make_case(sizes)
        codes = len(case.weight)
        columns, of_lse = random_columns(codes, few=few), torch.randn(len(case.h), dtype=torch.float64)
        names = [name for name, x in columns.items() if x.is_floating_point()]
        rest = {name: x for name, x in columns.items() if name not in names}
        case.h[2] = case.weight[case.target[2]]  # a row that its target has nearly all of
        part = slice(None) if rows == "replicated" else case.own_rows
        parts = [part] if rows == "replicated" else [slice(r * ROWS, (r + 1) * ROWS) for r in range(world_size())]

        h, *others = leaves(case.h, case.weight, case.scale, *(columns[name] for name in names))
        whole = [
            column_loss(
                dgi_kernels.cosine_cross_entropy,
                [h[p], *others[:2]],
                case,
                p,
                of_lse,
                reduction,
                label_smoothing=smoothing,
                **rest,
                **dict(zip(names, others[2:], strict=True)),
            )
            for p in parts
        ]
        expected = torch.autograd.grad(torch.stack([value for _, value in whole]).sum(), (h, *others))
        mine = {name: x[case.own_codes] for name, x in columns.items()}
        own = leaves(case.h[part], case.weight[case.own_codes], case.scale, *(mine[name] for name in names))
        lse, value = column_loss(
            parallel_loss,
            own[:3],
            case,
            part,
            of_lse,
            reduction,
            rows=rows,
            label_smoothing=smoothing,
            **{**mine, **dict(zip(names, own[3:], strict=True))},
        )
        actual = list(torch.autograd.grad(value, own))
        if rows == "sharded":
            dist.all_reduce(actual[2], group=group)

        about = (sizes, rows, reduction, smoothing, list(columns))
        right = (
            torch.cat([x for x, _ in whole])[part if rows == "sharded" else slice(None)],
            expected[0][part],
            expected[1][case.own_codes],
            expected[2],
            *(gradient[case.own_codes] for gradient in expected[3:]),
        )
        gradients = ("dh", "dweight", "dscale", *(f"d{name}" for name in names))
        for name, a, e in zip(("log normalizer", *gradients), (lse, *actual), right, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-8, msg=lambda text, c=(name, *about): f"{c}: {text}")


def test_a_bias_of_minus_infinity_takes_a_class_out_on_its_rank() -> None:
    case = make_case([4, 4, 4])
    case = case._replace(target=torch.where(case.target < 0, case.target, case.target % 2))
    bias = torch.zeros(len(case.weight), dtype=torch.float64)
    bias[3:] = -torch.inf
    loss, lse = parallel_loss(
        case.h,
        case.weight[case.own_codes],
        case.target,
        case.scale,
        bias=bias[case.own_codes],
        return_log_normalizer=True,
    )
    expected = dgi_kernels.cosine_cross_entropy(
        case.h, case.weight[:3], case.target, case.scale, return_log_normalizer=True
    )
    torch.testing.assert_close((loss, lse), expected)
    inputs = leaves(case.h, case.weight[case.own_codes])  # nothing is left on the last rank: no NaN comes of it
    loss, lse = parallel_loss(*inputs, case.target, case.scale, bias=bias[case.own_codes], return_log_normalizer=True)
    gradients = torch.autograd.grad(loss + lse.sum(), inputs)
    whole = case.h.clone().requires_grad_()
    loss, lse = dgi_kernels.cosine_cross_entropy(
        whole, case.weight[:3], case.target, case.scale, return_log_normalizer=True
    )
    right = torch.autograd.grad(loss + lse.sum(), whole)
    torch.testing.assert_close(gradients[0], right[0])
    assert gradients[1].isfinite().all()


def test_contrastive_modules_put_the_candidates_of_all_ranks_together() -> None:
    case = make_case([4, 4, 4])
    queries, items = case.h, torch.randn_like(case.h)
    ids, log_q = torch.randint(5, (len(items),)), torch.randn(len(items), dtype=torch.float64)
    own = case.own_rows
    options = {"across_ranks": True, "group": group, "reduction": "none"}
    parts = leaves(queries[own], items[own])
    loss = dgi_kernels.InfoNCELoss(9.0, **options)(*parts, log_q=log_q[own], same_as=ids[own])
    inputs = leaves(queries, items)
    expected = dgi_kernels.InfoNCELoss(9.0, reduction="none")(*inputs, log_q=log_q, same_as=ids)
    torch.testing.assert_close(loss, expected[own])
    for a, e in zip(torch.autograd.grad(loss.sum(), parts), torch.autograd.grad(expected.sum(), inputs), strict=True):
        torch.testing.assert_close(a, e[own])

    drawn, drawn_ids = torch.randn(5 * world_size(), DIM, dtype=torch.float64), torch.arange(5 * world_size())
    mine = slice(5 * rank(), 5 * rank() + 5)
    own_items = items[own]
    loss = dgi_kernels.SampledSoftmaxLoss(9.0, **options)(
        queries[own],
        own_items,
        drawn[mine],
        log_q=drawn_ids[mine].double(),
        item_ids=ids[own],
        sampled_ids=drawn_ids[mine],
    )
    expected = dgi_kernels.SampledSoftmaxLoss(9.0, reduction="none")(
        queries, items, drawn, log_q=drawn_ids.double(), item_ids=ids, sampled_ids=drawn_ids
    )
    torch.testing.assert_close(loss, expected[own])

    shared, alike = (dgi_kernels.FrequencyEstimator(64, group=group) for _ in range(2))
    shared.update(ids[own])
    alike.update(ids)  # all ranks have the same items, and each counts once
    assert torch.equal(shared.interval, alike.interval)


class Classifier(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, 6), dgi_kernels.CosineLinear(6, 8, max_scale=50.0)

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        return self.head.loss(self.body(h), target)


def test_a_head_can_be_sharded_by_fsdp() -> None:
    """Guards against a 0-d log_scale, which FSDP refuses."""
    if group is not None:  # a mesh is made of all processes
        return
    from torch.distributed.fsdp import fully_shard

    model, h, target = Classifier(), torch.randn(9, 4), torch.randint(8, (9,))
    expected = model(h, target)
    expected.backward()
    gradient = model.head.log_scale.grad.clone()
    model.zero_grad()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (world_size(),)))
    loss = model(h, target)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    torch.testing.assert_close(model.head.log_scale.grad.full_tensor(), gradient)


def test_peaked_rows_lose_nothing_in_float32() -> None:
    """Guards against log-sum-exp minus target logit, which rounds a loss of 1e-5 to multiples of 1e-5 at scale 120."""
    case = make_case(SHARDS[0])
    h = F.normalize(case.weight, dim=-1)[case.target.clamp(min=0)] + 0.15 * F.normalize(case.h, dim=-1)
    case = case._replace(h=h.float(), weight=case.weight.float(), scale=torch.tensor(20.0), upstream=torch.ones(len(h)))
    exact = case._replace(h=case.h.double(), weight=case.weight.double(), scale=case.scale.double())
    loss, gradients = our_loss(case, "replicated", "sum")
    expected, truth = true_loss(exact, "replicated", "sum", -100, 0.0)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=2e-6)
    for actual, true in zip(gradients, truth, strict=True):
        torch.testing.assert_close(actual.double(), true, rtol=1e-4, atol=2e-5)


def test_low_precision_and_autocast() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        case = make_case(SHARDS[0])
        case = case._replace(
            h=case.h.to(dtype), weight=case.weight.to(dtype), scale=torch.tensor(10.0), upstream=case.upstream.float()
        )
        exact = case._replace(h=case.h.double(), weight=case.weight.double(), scale=case.scale.double())
        plain = our_loss(case, "sharded", "mean")
        expected = true_loss(exact, "sharded", "mean", -100, 0.0)
        assert plain[0].dtype == torch.float32 and [g.dtype for g in plain[1][:2]] == [dtype] * 2
        torch.testing.assert_close(plain[0].double(), expected[0], rtol=1e-5, atol=1e-5)
        for actual, true in zip(plain[1], expected[1], strict=True):
            torch.testing.assert_close(actual.double(), true, rtol=3e-2, atol=3e-2)
        with torch.autocast("cpu", dtype):
            mixed = our_loss(case._replace(h=case.h.float()), "sharded", "mean")
        assert torch.equal(mixed[0], plain[0])


def test_bits_repeat() -> None:
    case = make_case(SHARDS[0], dtype=torch.float32)
    for rows in ("replicated", "sharded"):
        first, second = (our_loss(case, rows, "mean") for _ in range(2))
        assert torch.equal(first[0], second[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_replicated_ranks_get_the_same_bits() -> None:
    loss, (dh, _, dscale) = our_loss(make_case(SHARDS[0], dtype=torch.float32), "replicated", "mean")
    for value in (loss, dh, dscale):
        other = value.clone()
        dist.broadcast(other, 0, group=group)
        assert torch.equal(value, other)


def test_padding_may_be_nan_and_all_rows_of_a_rank_ignored() -> None:
    case = make_case(SHARDS[0])
    case.target[:ROWS], case.h[:ROWS] = -100, torch.nan
    loss, gradients = our_loss(case, "sharded", "none", label_smoothing=0.1)
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    mean, _ = our_loss(case, "sharded", "mean")
    assert mean.isnan() == (rank() == 0)  # the mean of nothing, as F.cross_entropy has it


def test_leading_dimensions_and_a_shared_weight() -> None:
    """One weight in two losses and as h, as an item tower that is its own negatives has it."""
    case = make_case([4, 4, 4])
    (weight,) = leaves(case.weight[case.own_codes])
    target = torch.arange(4).view(2, 2) + rank() * 4
    one = parallel_loss(weight.view(2, 2, DIM), weight, target, 5.0, rows="sharded", reduction="none")
    assert one.shape == (2, 2)
    two = parallel_loss(case.h, weight, case.target, 5.0)
    (actual,) = torch.autograd.grad(one.sum() + two, weight)

    (every,) = leaves(case.weight)
    unit = F.normalize(every, dim=-1)
    loss = F.cross_entropy(5.0 * unit @ unit.T, torch.arange(len(every)), reduction="sum") + F.cross_entropy(
        5.0 * F.normalize(case.h, dim=-1) @ unit.T, case.target
    )
    torch.testing.assert_close(actual, torch.autograd.grad(loss, every)[0][case.own_codes], rtol=1e-9, atol=1e-9)


def test_a_wrong_argument_of_one_rank_is_an_error_of_all() -> None:
    """Guards against one rank that raises while the others wait for it."""
    case = make_case(SHARDS[0])
    h, weight, target = case.h[case.own_rows], case.weight[case.own_codes], case.target[case.own_rows].clone()
    if rank() == 1:
        target[0] = sum(case.sizes)
    assert_raises("^target must be in", h, weight, target)
    rows = ROWS - (rank() == 1)
    assert_raises("^number of rows of h must be the same", h[:rows], weight, target[:rows])
    dim = DIM - (rank() == 1)
    assert_raises("^D of weight must be the same", h[:, :dim], weight[:, :dim], target)
    assert_raises("^rows must be the same", h, weight, target, "sharded" if rank() else "replicated")


def test_bytes_are_those_of_the_docstring() -> None:
    """What every collective sends where it is a ring, with the 32 bytes of sizes and shapes."""
    case, sent, rows = make_case(SHARDS[0], dtype=torch.float32), [0], ROWS * world_size()
    counted = {
        "all_gather": lambda out, value, **_: (len(out) - 1) * value.nbytes,
        "reduce_scatter": lambda out, parts, **_: (len(parts) - 1) * out.nbytes,
        "all_reduce": lambda value, *_, **__: 2 * (world_size() - 1) * value.nbytes // world_size(),
    }
    with counting(counted, sent):
        loss = parallel_loss(
            case.h[case.own_rows].requires_grad_(),
            case.weight[case.own_codes].requires_grad_(),
            case.target[case.own_rows],
            5.0,
            rows="sharded",
        )
        loss.backward()
    share = (world_size() - 1) / world_size()
    assert sent[0] == round(share * (36 * rows + 2 * 4 * rows * DIM) + (world_size() - 1) * 32)


@contextlib.contextmanager
def counting(counted: dict[str, Callable[..., int]], sent: list[int]) -> Iterator[None]:
    """Add up in ``sent`` what the ``counted`` collectives send."""
    genuine = {name: getattr(dist, name) for name in counted}

    def wrapped(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            sent[0] += counted[name](*arguments, **options)
            return genuine[name](*arguments, **options)

        return call

    for name in counted:
        setattr(dist, name, wrapped(name))
    try:
        yield
    finally:
        for name, function in genuine.items():
            setattr(dist, name, function)


def assert_raises(pattern: str, h: Tensor, weight: Tensor, target: Tensor, rows: str = "sharded") -> None:
    try:
        parallel_loss(h, weight, target, 5.0, rows=rows)
    except ValueError as error:
        assert re.search(pattern, str(error)), error
    else:
        raise AssertionError(f"nothing raised; expected {pattern}")


def run(seed: int) -> None:
    for name, function in list(globals().items()):
        if name.startswith("test_"):
            random.seed(seed)
            torch.manual_seed(seed)
            function()


def main(seed: int) -> None:
    """All three processes, then the first and the last as a group of two, whose ranks are not those of all."""
    global group
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    run(seed)
    group = dist.new_group([0, 2])
    if dist.get_rank() != 1:
        run(seed)
    dist.barrier()
    os._exit(0)  # torch keeps groups in caches, and their threads now and then abort a process that ends as usual


if __name__ == "__main__":
    main(int(sys.argv[1]))
