"""The Triton cosine cross-entropy against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .cosine_cases import (
    all_columns,
    eager,
    exact_by_columns,
    random_columns,
    results_by_columns,
)
from .cosine_triton_cases import (
    assert_exact,
    chosen_form,  # noqa: F401
    every_form,
    inputs,
    loss_and_gradients,
    ours,
)
from .interpreter import (
    DEVICE,
    DTYPES,
    GPU,
    INTERPRETED,
    TRITON,
    launcher,
    run_in_the_interpreter,
    runs,
)
from .near import assert_near, error
from .shapes import name_of

if TRITON and (GPU or INTERPRETED):
    from dgi_kernels import cosine_cross_entropy
    from dgi_kernels.cosine import triton
    from dgi_kernels.cosine.options import Columns, LossOptions


@launcher
def test_all_of_this_file_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@runs
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 2), (33, 17, 65), (40, 40, 50)], ids=name_of)
def test_every_option(form: str, shape: tuple[int, int, int], dtype: torch.dtype, reduction: str) -> None:
    h, weight, target = inputs(*shape, dtype)
    ignore_index = random.choice([-100, 1, 10**12])
    target[torch.rand(shape[0], device=DEVICE) < 0.3] = ignore_index
    target[0] = 0
    assert_exact(
        h,
        weight,
        target,
        random.choice([1.0, 30.0, 120.0]),
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=random.choice([0.0, 0.1, 1.0]),
    )


def ours_by_columns(
    h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, *, label_smoothing: float = 0.0, **columns: Tensor
) -> tuple[Tensor, Tensor]:
    options = LossOptions(reduction="none", label_smoothing=label_smoothing, return_log_normalizer=True)
    return triton.cosine_cross_entropy(h, weight, target, scale, Columns(**columns), options)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("columns", ["none", "some", "all"])
@pytest.mark.parametrize("weights", [(1, 0), (0, 1), (1, 2)], ids=["loss", "log_normalizer", "both"])
def test_options_of_columns_and_log_normalizers(
    form: str, dtype: torch.dtype, columns: str, weights: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        h, weight, target = inputs(*random.choice([(33, 17, 65), (7, 3, 5)]), dtype)
        target[2] = -100
        rows = len(h)
        draw = {"none": lambda *_: {}, "some": random_columns, "all": all_columns}[columns]
        given = {name: x.to(DEVICE) for name, x in draw(len(weight), torch.float32).items()}
        leaves = (h, weight, torch.tensor(random.choice([-20.0, 5.0, 30.0]), device=DEVICE))
        smoothing = random.choice([0.0, 0.1])
        ramp = torch.linspace(-1, 2, rows, device=DEVICE)
        upstream = tuple(ramp * share if share else None for share in weights)
        arguments = (leaves, target, given, upstream)
        actual = results_by_columns(ours_by_columns, *arguments, label_smoothing=smoothing)
        expected = exact_by_columns(*arguments, reduction="none", label_smoothing=smoothing)
        # Where a result cancels, what it is summed from is still rounded, and so is every logit.
        gamma, largest = abs(leaves[2].item()), 0.1 * max(expected[name].norm().item() for name in ("dh", "dweight"))
        sizes = dict.fromkeys(("loss", "log_normalizer"), rows**0.5 * (1 + gamma / 20))
        sizes |= dict.fromkeys(("dh", "dweight"), largest)
        for name, want in expected.items():
            of_input = dtype if name.startswith("d") else torch.float32
            assert_near(name, actual[name], want, dtype=of_input, size=sizes.get(name, rows**0.5))


@runs
def test_a_bias_may_take_columns_out(form: str) -> None:
    """-inf: the column has probability 0 and no gradient; as a target its row has an infinite loss, and the others
    none of it."""
    h, weight, target = inputs(12, 8, 33)
    bias = torch.randn(33, device=DEVICE)
    bias[[3, 20]] = -torch.inf
    target[target == 20] = 21
    target[4] = 20
    loss, lse = ours_by_columns(h, weight, target, torch.tensor(20.0, device=DEVICE), bias=bias)
    assert loss[4] == torch.inf and loss.isfinite().sum() >= 11 - (target == 3).sum()
    kept = [k for k in range(33) if k not in (3, 20)]
    logits = 20 * F.normalize(h.double(), dim=-1) @ F.normalize(weight.double(), dim=-1).T + bias
    assert error(lse, logits[:, kept].logsumexp(-1)) < 1e-6
    others = [n for n in range(12) if target[n] not in (3, 20)]
    leaves = [x.detach().requires_grad_() for x in (h[others], weight, bias)]
    gamma = torch.tensor(20.0, device=DEVICE)
    total = ours_by_columns(leaves[0], leaves[1], target[others], gamma, bias=leaves[2])[0].sum()
    dh, dweight, dbias = torch.autograd.grad(total, leaves)
    assert not dweight[[3, 20]].any() and not dbias[[3, 20]].any()
    assert dh.isfinite().all() and dweight.isfinite().all() and abs(dbias.sum().item()) < 1e-4


FAR_BELOW = {
    "out-beside-200": lambda bias: torch.full_like(bias, -200.0).index_fill(0, torch.tensor([20]), -torch.inf),
    "least": lambda bias: bias.index_fill(0, torch.tensor([20]), -1e30),
    "300-below": lambda bias: bias.index_fill(0, torch.tensor([20]), -300.0),
    "first-tiles-out": lambda bias: bias.index_fill(0, torch.arange(40), -torch.inf) - 200,
    "nothing-else": lambda bias: torch.full_like(bias, -torch.inf).index_fill(0, torch.tensor([20]), -400.0),
}


@runs
@pytest.mark.parametrize("bias", FAR_BELOW)
def test_a_target_far_below_the_other_columns(form: str, bias: str, dtype: torch.dtype = torch.float16) -> None:
    """Guards against a running maximum that starts where the others underflow, or where float32 cannot tell scores
    apart: the loss was NaN and not inf, and log-normalizers of rows whose target is the column of -1e30 were wrong."""
    h, weight, target = inputs(33, 17, 70, dtype)
    target[::2] = 20
    given = {"bias": FAR_BELOW[bias](torch.randn(70)).to(DEVICE)}
    leaves = (h, weight, torch.tensor(20.0, device=DEVICE))
    known = given["bias"][target] > -torch.inf
    upstream = (torch.where(known, 1.0, 0.0), torch.linspace(-1, 2, 33, device=DEVICE))
    actual = results_by_columns(ours_by_columns, leaves, target, given, upstream)
    expected = exact_by_columns(leaves, target, given, upstream, reduction="none")
    assert torch.equal(actual["loss"].isinf(), ~known) and torch.equal(expected["loss"].isinf(), ~known)
    for name, want in expected.items():
        got = actual[name]
        if name == "loss":
            got, want = got[known], want[known]
        assert_near(name, got, want, dtype=dtype if name.startswith("d") else torch.float32, size=10.0)


@runs
def test_columns_of_the_target_alone(form: str) -> None:
    """Nothing is left to lose against: the loss is 0 and so are its gradients."""
    h, weight, target = inputs(9, 8, 20)
    same_as = torch.full((20,), 7, device=DEVICE)
    bias = torch.randn(20, device=DEVICE)
    scale = torch.tensor(20.0, device=DEVICE)
    arguments = ((h, weight, scale), target, {"bias": bias, "same_as": same_as}, (torch.ones(9, device=DEVICE), None))
    actual = results_by_columns(ours_by_columns, *arguments, label_smoothing=0.1)
    lse, expected = actual.pop("log_normalizer"), exact_by_columns(*arguments, reduction="none", label_smoothing=0.1)
    assert all(value.abs().max() < 1e-5 for value in actual.values())
    assert error(lse, expected["log_normalizer"]) < 1e-6


@runs
@every_form
@pytest.mark.parametrize("scale", [0.0, -30.0, 64.0, 300.0])
def test_any_scale(form: str, scale: float) -> None:
    """At 300 the running maximum rises by more than 2^8 within a row, at 0 dscale is still a gradient."""
    assert_exact(*inputs(40, 24, 70), scale)


@runs
@pytest.mark.parametrize("scale", [5e9, 1e30, -1e36, torch.finfo(torch.float32).max])
def test_scales_up_to_the_largest(form: str, scale: float) -> None:
    """Guards against logits that leave float32's range, and what is then infinity less infinity."""
    h, weight, target = inputs(20, 24, 40)
    h, weight = 100 * F.normalize(h, dim=-1), 100 * F.normalize(weight, dim=-1)
    expected = eager(h.double(), weight.double(), target, torch.tensor(scale, dtype=torch.float64), reduction="none")
    for value in (scale, torch.tensor(scale, device=DEVICE)):
        loss = cosine_cross_entropy(h, weight, target, value, reduction="none", backend="triton")
        assert_near("loss", loss / abs(scale), expected / abs(scale), size=1.0)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("cosine", [0.3, 0.25, 0.22])
def test_others_that_all_but_underflow(form: str, dtype: torch.dtype, cosine: float) -> None:
    """The sum of the others, 2^-121, 2^-130 or 2^-135 of the target's: its reciprocal once made NaN of dh."""
    weight = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], device=DEVICE, dtype=dtype)
    h = torch.tensor([[2.0, 0.0], [0.5, 0.01]], device=DEVICE, dtype=dtype)
    assert_exact(
        h, weight, torch.zeros(2, dtype=torch.int64, device=DEVICE), 120.0, reduction="none", label_smoothing=0.1
    )


@runs
def test_norms_of_any_size_stay_in_the_range_of_float16(form: str) -> None:
    """Weights of products hold 1 / norm and the upstream gradient: float16 would overflow or lose both."""
    h, weight, target = inputs(40, 16, 50)
    h, weight = F.normalize(h, dim=-1) * 2e-3, F.normalize(weight, dim=-1) * 500
    assert_exact((h + 0.0).half(), weight.half(), target, 30.0, reduction="mean")


@runs
@every_form
def test_wild_targets_and_nan_stay_in_their_row(form: str) -> None:
    h, weight, target = inputs(40, 8, 33)
    clean = ours(h, weight, target, torch.tensor(30.0, device=DEVICE), reduction="none")
    target[1], target[3], target[5] = 33, -1, 2**40
    _, dh, dweight, dscale = loss_and_gradients(ours, h, weight, target, 30.0, reduction="none")
    assert not dh[[1, 3, 5]].any() and dweight.isfinite().all() and dscale.isfinite()
    h[7, 2], h[35, 0] = torch.nan, torch.inf
    dirty = ours(h, weight, target, torch.tensor(30.0, device=DEVICE), reduction="none")
    bad = [1, 3, 5, 7, 35]
    assert dirty[bad].isnan().all()
    good = [i for i in range(40) if i not in bad]
    torch.testing.assert_close(dirty[good], clean[good])
    assert ours(h, weight, target, torch.tensor(30.0, device=DEVICE)).isnan()


@runs
@every_form
def test_nan_reaches_the_gradient_through_tiles_that_are_skipped(form: str) -> None:
    h, weight, target = inputs(40, 8, 33)
    h[3, 1] = torch.nan
    _, dh, dweight, _ = loss_and_gradients(ours, h, weight, target, 30.0)
    assert dh.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert dweight.isnan().all()


@runs
@every_form
def test_nothing_to_learn_from(form: str) -> None:
    h, weight, target = inputs(5, 4, 6)
    loss, *gradients = loss_and_gradients(ours, h, weight, torch.full_like(target, -100), 30.0, reduction="none")
    assert not loss.any() and not any(gradient.any() for gradient in gradients)
    assert ours(h, weight, torch.full_like(target, -100), torch.tensor(1.0, device=DEVICE)).isnan()
    for rows, codes in ((0, 6), (0, 0), (5, 0)):
        ignored = torch.full_like(target[:rows], -100)
        loss, dh, dweight, dscale = loss_and_gradients(ours, h[:rows], weight[:codes], ignored, 30.0, reduction="sum")
        assert loss == 0 and dh.shape == (rows, 4) and dweight.shape == (codes, 4) and dscale == 0
        assert not dh.any() and not dweight.any()


@runs
@every_form
@pytest.mark.parametrize("eps", [1e-12, 0.5])
def test_zero_vectors_and_norms_below_eps(form: str, eps: float) -> None:
    h, weight, target = inputs(9, 5, 11)
    h[1] *= 0.1
    weight[2] *= 0.1
    assert_exact(h, weight, target, 20.0, eps=eps)
    h[4], weight[7] = 0, 0
    actual = loss_and_gradients(ours, h, weight, target, 20.0, eps=eps)
    expected = loss_and_gradients(eager, h, weight, target, 20.0, torch.float64, eps=eps)
    for gradient, truth in zip(actual, expected, strict=True):
        assert error(gradient, truth) < 1e-5
    for row in range(9):
        assert error(actual[1][row], expected[1][row], floor=1e-3) < 1e-4


@runs
@every_form
def test_strides_and_one_tensor_as_both_inputs(form: str) -> None:
    x = torch.randn(2, 40, 48, device=DEVICE)[:, :, 5:29].transpose(1, 2)[1].T  # 40 rows of 24 numbers, unaligned
    target = torch.randperm(40, device=DEVICE)
    leaf = x.detach().requires_grad_()
    gamma = torch.tensor(20.0, device=DEVICE)
    (gradient,) = torch.autograd.grad(ours(leaf, leaf, target, gamma), leaf)
    double = x.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(eager(double, double, target, gamma.double()), double)
    assert error(gradient, truth) < 2e-5


def peaked(n: int, d: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Nine rows in ten at cosine 0.7 to their target, the tenth anywhere: a trained head."""
    weight = F.normalize(torch.randn(k, d), dim=-1)
    target = torch.randint(k, (n,))
    h = F.normalize(torch.randn(n, d), dim=-1)
    near = torch.rand(n, 1) < 0.9
    h = torch.where(near, 0.7 * weight[target] + 0.714 * h, h)
    return h.to(DEVICE, dtype), weight.to(DEVICE, dtype), target.to(DEVICE)


@runs
@pytest.mark.parametrize("scale", [30.0, 60.0], ids=["plain", "large"])
def test_peaked_rows_lose_nothing(form: str, scale: float) -> None:
    """Nearly all weights are far below the largest; with a plain scale there is not even a maximum to be near."""
    h, weight, target = peaked(*((4096, 64, 1024) if GPU else (96, 16, 80)), torch.float32)
    target[::7] = -100
    truth = loss_and_gradients(eager, h, weight, target, scale, torch.float64)
    usual = loss_and_gradients(eager, h, weight, target, scale, torch.float32)
    found = loss_and_gradients(ours, h, weight, target, scale)
    rounding = scale * 2.0**-24  # of a logit, and so of its weight: how much of it eager suffers depends on the machine
    for ours_is, eager_is, expected in zip(found, usual, truth, strict=True):
        assert error(ours_is, expected) <= max(2 * error(eager_is, expected), rounding)
