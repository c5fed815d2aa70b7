"""The C++ cosine cross-entropy against float64 and against eager: random, peaked and trained inputs, every dtype."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import cosine_logits

from .cosine_cases import (
    RESULTS,
    eager,
    exact,
    loss_and_gradients,
    native,
    native_loss,
    peaked_inputs,
    random_inputs,
    random_size,
    trained_head,
)
from .near import ROUNDING, assert_all_near, error
from .shapes import name_of


def random_case(dtype: torch.dtype, work: float) -> tuple[tuple[Tensor, ...], dict[str, object]]:
    """Inputs of any shape up to 5,000 that takes no more than ``work`` multiplications, and any options."""
    n, d, k = random_size(5000), random_size(5000), random_size(5000)
    while n * d * k > work:
        n, d, k = random_size(5000), random_size(5000), random_size(5000)
    h, weight, target = random.choice([random_inputs, peaked_inputs])(n, d, k)
    scale = torch.tensor(random.uniform(1, 120) * random.choice([1, 1, 1, -1]))
    options = {
        "reduction": random.choice(["none", "mean", "sum"]),
        "label_smoothing": random.choice([0, 0.1, 1.0]),
        "ignore_index": random.choice([-100, 0]),
    }
    target[torch.rand(n) < random.choice([0, 0.3])] = options["ignore_index"]
    if not (target != options["ignore_index"]).any():
        options["reduction"] = "sum"
    upstream = torch.randn(n if options["reduction"] == "none" else ())
    return (h.to(dtype), weight.to(dtype), target, scale.to(dtype), upstream), options


@native
@pytest.mark.parametrize("round_", range(12))
def test_accuracy_over_random_shapes_and_options(round_: int) -> None:
    inputs, options = random_case(torch.float32, 3e8)
    expected = exact(*inputs, **options)
    ours, usual = (loss_and_gradients(function, *inputs, **options) for function in (native_loss, eager))
    upstream, rows = inputs[-1].abs(), (inputs[2] != options["ignore_index"]).sum()
    of_row = {"none": upstream.norm(), "sum": upstream * rows**0.5, "mean": upstream / rows**0.5}[options["reduction"]]
    # What cancels (the scale's gradient is a sum over rows of either sign) is as wrong in any float32.
    assert_all_near(RESULTS, ours, expected, usual, factor=2, sizes=[0.05 * of_row.item()] * 4)


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("round_", range(5))
def test_low_precision_is_no_worse_than_eager(round_: int, dtype: torch.dtype) -> None:
    """At most 1.5 times the error of the same formula in the same dtype."""
    inputs, options = random_case(dtype, 5e7)
    expected = exact(*inputs, **options)
    ours, usual = (loss_and_gradients(function, *inputs, **options) for function in (native_loss, eager))
    assert ours[0].dtype == torch.float32 and [x.dtype for x in ours[1:]] == [dtype] * 3
    for name, a, e, u in zip(("loss", "dh", "dweight", "dscale"), ours, expected, usual, strict=True):
        # Eager may be exact by luck, as of one row, and a result that is rounded once still be half a unit off: of its
        # dtype for gradients (or of what that can hold at all), of float32's own bound for the loss.
        limits = torch.finfo(dtype)
        rounding = limits.eps / 2 * e.norm().item() + limits.smallest_normal * limits.eps * e.numel() ** 0.5
        least = ROUNDING[torch.float32] * e.norm().item() if name == "loss" else rounding
        own = (u.double() - e).norm().item()  # NaN where a float16 sum overflows, as ours in float32 does not
        allowed = max(1.5 * own, least) if math.isfinite(own) else max(limits.eps * e.norm().item(), least)
        assert (a.double() - e).norm().item() <= allowed, (name, [x.shape for x in inputs[:2]], inputs[3], options)


@native
@pytest.mark.parametrize("scale", [0.0, 1.0, 64.0, 64.5, 120.0, 3000.0])
def test_every_scale(scale: float) -> None:
    """64 is where the maximum comes in; at 3000 all but a few terms underflow."""
    h, weight, target = random_inputs(90, 24, 150)
    gamma = torch.tensor(scale)
    expected, ours = exact(h, weight, target, gamma), loss_and_gradients(native_loss, h, weight, target, gamma)
    usual = loss_and_gradients(eager, h, weight, target, gamma)
    # The scale's gradient is a mean of terms of either sign, and rounded as they are.
    cosines = F.normalize(h.double(), dim=-1) @ F.normalize(weight.double(), dim=-1).T
    g = (scale * cosines).softmax(-1) - F.one_hot(target, len(weight))
    rounding = (0, 0, 0, torch.finfo(torch.float32).eps * (g * cosines).sum(-1).abs().mean().item())
    for a, e, u, least in zip(ours, expected, usual, rounding, strict=True):
        allowed = max(2 * (u.double() - e).norm().item(), ROUNDING[torch.float32] * e.norm().item(), least)
        assert (a.double() - e).norm().item() <= allowed


def common_offset(weight: Tensor) -> Tensor:
    return weight + 2 * torch.randn(weight.shape[1])


def two_clusters(weight: Tensor) -> Tensor:
    side = torch.randn(weight.shape[1])
    return weight + torch.where(torch.arange(len(weight)) % 4 < 1, 1.0, -1.0).unsqueeze(1) * side


@native
@pytest.mark.parametrize("shift", [lambda w: w, common_offset, two_clusters], ids=["apart", "offset", "clusters"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("scale", [30.0, 90.0])
def test_peaked_rows_are_as_accurate_as_eager(
    shift: Callable[[Tensor], Tensor], smoothing: float, scale: float
) -> None:
    """Guards against skipped entries that matter in sum: all codes may lean in one direction.

    With flat rows among them the error is at most twice eager's; three times where there is nothing but peaked rows. Of
    several draws together, for eager may be exact by luck in one.
    """
    n, d, k, draws = 400, 128, 1500, 4
    for cosine, flat in ((0.7, 10), (0.8, 10), (0.7, n + 1), (0.95, n + 1)):
        ours, usual, size = torch.zeros(3, 4, dtype=torch.float64)  # squares of norms
        for _ in range(draws):
            weight, target = shift(torch.randn(k, d)), torch.randint(k, (n,))
            h = cosine * F.normalize(weight[target], dim=-1) + math.sqrt(1 - cosine**2) * F.normalize(
                torch.randn(n, d), dim=-1
            )
            h[flat - 1 :: flat] = F.normalize(torch.randn(len(h[flat - 1 :: flat]), d), dim=-1)
            arguments = (h, weight, target, torch.tensor(scale))
            expected = exact(*arguments, label_smoothing=smoothing)
            size += torch.stack([e.square().sum() for e in expected])
            for total, function in ((ours, native_loss), (usual, eager)):
                results = loss_and_gradients(function, *arguments, label_smoothing=smoothing)
                total += torch.stack([(a.double() - e).square().sum() for a, e in zip(results, expected, strict=True)])
        # Scalars that sum what cancels are held to the project's own bound.
        own = ROUNDING[torch.float32]
        rounding = torch.tensor([own, own / 20, own / 20, own], dtype=torch.float64) * size.sqrt()
        allowed = torch.maximum((2 if flat <= n else 3) * usual.sqrt(), rounding).clamp(min=1e-15)
        assert (ours.sqrt() <= allowed).all(), (cosine, flat, ours.sqrt() / allowed)


@native
def test_small_losses_keep_their_digits() -> None:
    """log1p and -R / Z in place of log Z - s and p - 1, which float32 rounds away where p is close to 1."""
    weight = F.normalize(torch.randn(300, 64), dim=-1)
    target = torch.arange(300)
    arguments = (weight + 1e-3 * torch.randn(300, 64), weight, target, torch.tensor(25.0))
    loss, _, _, dscale = exact(*arguments)
    assert loss < 1e-5
    ours = loss_and_gradients(native_loss, *arguments)
    assert error(ours[0], loss) < ROUNDING[torch.float32] and error(ours[3], dscale) < ROUNDING[torch.float32]


@native
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trained_rows_are_as_accurate_as_eager(smoothing: float) -> None:
    """On what training leads to, and not on what was made up to resemble it: some of these rows become lists."""
    arguments = trained_head()
    expected = exact(*arguments, label_smoothing=smoothing)
    ours = loss_and_gradients(native_loss, *arguments, label_smoothing=smoothing)
    usual = loss_and_gradients(eager, *arguments, label_smoothing=smoothing)
    least = arguments[3].item() * 2.0**-24  # how a logit is rounded, and so its weight; eager's rounding may cancel
    for name, a, e, u in zip(("loss", "dh", "dweight", "dscale"), ours, expected, usual, strict=True):
        assert error(a, e) <= max(2 * error(u, e), least), (name, error(a, e), error(u, e))


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("inputs", [random_inputs, peaked_inputs])
def test_gradients_have_no_radial_part(inputs: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    h, weight, target = inputs(300, 128, 500)
    h, weight = h.to(dtype), weight.to(dtype)
    _, dh, dweight, _ = loss_and_gradients(native_loss, h, weight, target, torch.tensor(30.0), reduction="sum")
    limits = torch.finfo(dtype)
    rounding = limits.eps / 2 if dtype in (torch.bfloat16, torch.float16) else 8 * limits.eps  # of each number alone
    for x, dx in ((h.double(), dh.double()), (weight.double(), dweight.double())):
        allowed = (rounding + 1e-6 * (dtype != torch.float64)) * x.norm(dim=-1) * dx.norm(dim=-1)
        allowed += limits.smallest_normal * limits.eps * x.abs().sum(-1)  # what the dtype cannot hold
        assert ((x * dx).sum(-1).abs() <= allowed).all()


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=name_of)
def test_logits_over_several_blocks(dtype: torch.dtype) -> None:
    h, weight, _ = random_inputs(530, 20, 70, dtype)
    leaves = [x.requires_grad_() for x in (h, weight, torch.tensor(25.0, dtype=dtype))]
    logits = cosine_logits(*leaves, backend="native")
    upstream = torch.randn(530, 70).to(dtype)
    double = [x.detach().double().requires_grad_() for x in leaves]
    expected = double[2] * (F.normalize(double[0], dim=-1) @ F.normalize(double[1], dim=-1).T)
    tolerance = torch.finfo(dtype).eps
    assert error(logits, expected) <= 2 * tolerance
    gradients = torch.autograd.grad(expected, double, upstream.double(), retain_graph=True)
    # The scale's gradient is one sum over all logits, whose terms cancel: its error is relative to their magnitudes.
    cancelled = float((upstream.double() * expected / 25.0).abs().sum() / gradients[2].abs())
    for a, e, condition in zip(
        torch.autograd.grad(logits, leaves, upstream), gradients, (1.0, 1.0, cancelled), strict=True
    ):
        assert error(a, e) <= 10 * condition * tolerance


@native
def test_zero_and_tiny_vectors() -> None:
    """Guards against 1 / eps of both sides multiplied, which float32 cannot hold."""
    h, weight, target = random_inputs(8, 5, 9)
    h[2], weight[4], h[3], weight[1] = 0, 0, 1e-18, 1e-18
    for eps in (1e-12, 1e-30):
        ours = [x.detach().requires_grad_() for x in (h, weight)]
        usual = [x.detach().double().requires_grad_() for x in (h, weight)]
        native_loss(*ours, target, 20.0, eps=eps).backward()
        F.cross_entropy(
            20.0 * F.normalize(usual[0], dim=-1, eps=eps) @ F.normalize(usual[1], dim=-1, eps=eps).T, target
        ).backward()
        for a, e in zip(ours, usual, strict=True):  # row by row; what cancels within one is as large as scale / norm
            bound = 1e-3 * e.grad.norm(dim=1) + 1e-5 * 20.0 / e.norm(dim=1).clamp(min=eps)
            assert ((a.grad.double() - e.grad).norm(dim=1) <= bound).all()


@native
def test_nan_and_inf_do_no_harm_to_other_rows() -> None:
    h, weight, target = peaked_inputs(300, 128, 400)
    clean = loss_and_gradients(native_loss, h, weight, target, torch.tensor(30.0), reduction="none")
    bad = torch.zeros(300, dtype=torch.bool)
    bad[[3, 17, 250]] = True
    dirty = h.clone()
    dirty[3, 2], dirty[17, 0], dirty[250] = torch.nan, torch.inf, torch.nan
    loss, dh, dweight, dscale = loss_and_gradients(
        native_loss, dirty, weight, target, torch.tensor(30.0), reduction="none"
    )
    assert torch.equal(loss.isnan(), bad) and torch.equal(dh.isnan().any(1), bad)
    torch.testing.assert_close(loss[~bad], clean[0][~bad])
    torch.testing.assert_close(dh[~bad], clean[1][~bad])
    assert dweight.isnan().all() and dscale.isnan()
    poisoned = weight.clone()
    poisoned[7, 1] = torch.nan
    assert native_loss(h, poisoned, target, torch.tensor(30.0), reduction="none").isnan().all()
