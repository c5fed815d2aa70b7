"""The Triton cosine cross-entropy against float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from .cosine_cases import (
    GRADIENTS,
    all_columns,
    eager,
    exact_by_columns,
    random_columns,
    results_by_columns,
    true_loss_by_columns,
)
from .interpreter import (
    DEVICE,
    DTYPES,
    GPU,
    INTERPRETED,
    TRITON,
    choose_form,
    interpreted,
    launcher,
    run_in_the_interpreter,
    runs,
)
from .near import ROUNDING, assert_all_near, assert_near, error
from .shapes import name_of

if TRITON and (GPU or INTERPRETED):
    from dgi_kernels import cosine_cross_entropy
    from dgi_kernels.cosine import triton
    from dgi_kernels.cosine.options import Columns, LossOptions


@launcher
def test_all_of_this_file_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@pytest.fixture(params=["flash", "chunked"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    choose_form(monkeypatch, triton, request.param, step=16)
    return request.param


def inputs(n: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    h, weight = (torch.randn(rows, d) * torch.empty(rows, 1).uniform_(0.1, 5) for rows in (n, k))
    return h.to(DEVICE, dtype), weight.to(DEVICE, dtype), torch.randint(k, (n,), device=DEVICE)


def ours(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    eps: float = 1e-12,
) -> Tensor:
    """Below the public op, which would check the values of CPU tensors."""
    options = LossOptions(ignore_index, reduction, label_smoothing, eps)
    return triton.cosine_cross_entropy(h, weight, target, scale, Columns(), options)[0]


def loss_and_gradients(
    function,
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
    **options: object,
) -> list[Tensor]:
    """With an upstream gradient of its own for every loss, the same for every call."""
    h, weight = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (h, weight))
    gamma = torch.tensor(scale, device=DEVICE, dtype=dtype or torch.float32, requires_grad=True)
    loss = function(h, weight, target, gamma, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), device=DEVICE).reshape(loss.shape).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), (h, weight, gamma))]


def assert_exact(h: Tensor, weight: Tensor, target: Tensor, scale: float, **options: object) -> None:
    actual = loss_and_gradients(ours, h, weight, target, scale, **options)
    expected = loss_and_gradients(eager, h, weight, target, scale, torch.float64, **options)
    assert_near("loss", actual[0], expected[0], size=0.01 + abs(scale) / 20)  # near 0 it is a difference of logits
    sums = magnitudes(h, weight, target, scale, **options)
    assert_all_near(GRADIENTS, actual[1:], expected[1:], dtype=h.dtype, sizes=[0.2 * size for size in sums])


def magnitudes(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    eps: float = 1e-12,
) -> tuple[float, float, float]:
    """Norms of what the gradients of h, weight and scale add up, without its signs: a sum that cancels to nothing is
    still rounded as what it was summed from, softmax and target distribution apart."""
    h, weight = h.double(), weight.double()
    softmax = (scale * F.normalize(h, dim=-1, eps=eps) @ F.normalize(weight, dim=-1, eps=eps).T).softmax(-1)
    kept = (target != ignore_index).double()
    wanted = torch.full_like(softmax, label_smoothing / len(weight))
    wanted.scatter_add_(1, (target * kept.long())[:, None], torch.full_like(softmax[:, :1], 1 - label_smoothing))
    upstream = {
        "mean": torch.full_like(kept, 1 / max(1.0, kept.sum().item())),
        "sum": torch.ones_like(kept),
        "none": torch.linspace(-1, 2, len(h), device=DEVICE, dtype=torch.float64).abs(),
    }[reduction]
    shares = (softmax + wanted) * (kept * upstream)[:, None]
    of_h, of_weight = (
        abs(scale) * shares.sum(1 - dim) / x.norm(dim=-1).clamp(min=eps) for dim, x in enumerate((h, weight))
    )
    return of_h.norm().item(), of_weight.norm().item(), shares.sum().item()


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
    monkeypatch.setattr(triton, "ORDER_FROM", random.choice([(1, 1), (10**9, 1)]))
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
def test_nan_reaches_the_gradient_through_tiles_that_are_skipped(form: str) -> None:
    h, weight, target = inputs(40, 8, 33)
    h[3, 1] = torch.nan
    _, dh, dweight, _ = loss_and_gradients(ours, h, weight, target, 30.0)
    assert dh.isnan().any(1).nonzero().flatten().tolist() == [3]
    assert dweight.isnan().all()


@runs
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
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_what_is_skipped_is_below_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of negligible tiles are left out (the bits show it), and the error stays what the dense kernel's is."""
    n, d, k, scale = (4096, 256, 1024, 30.0) if GPU else (128, 64, 96, 60.0)
    if not GPU:
        tiles = triton.Tiles(owned=16, step=16, warps=4, stages=2)
        monkeypatch.setattr(triton, "flash_config", lambda dim, device: (64, triton.FlashConfig(tiles, tiles)))
    monkeypatch.setattr(triton, "uses_flash", lambda dim, dtype: True)
    monkeypatch.setattr(triton, "FLASH_ROWS", 0)
    monkeypatch.setattr(triton, "ORDER_FROM", (1, 1))
    if GPU and dtype == torch.float32:
        pytest.skip("float32 is chunked on a GPU")
    h, weight, target = peaked(n, d, k, dtype)
    truth = loss_and_gradients(eager, h, weight, target, scale, torch.float64)
    usual = loss_and_gradients(eager, h, weight, target, scale, torch.float32)
    sparse = loss_and_gradients(ours, h, weight, target, scale)
    monkeypatch.setattr(triton, "LOG2_SKIP", dict.fromkeys(triton.LOG2_SKIP, -1e30))
    dense = loss_and_gradients(ours, h, weight, target, scale)
    assert torch.equal(sparse[0], dense[0])  # the loss sums every weight
    # In float16 dh may round to the same bits.
    assert not torch.equal(sparse[2], dense[2]) and (dtype != torch.float32 or not torch.equal(sparse[1], dense[1]))
    rounding = scale * 2.0**-24  # of a logit, and so of its weight: how much of it eager suffers depends on the machine
    for gradients in zip(sparse[1:], dense[1:], usual[1:], truth[1:], strict=True):
        sparse_error, dense_error, eager_error = (error(x, gradients[3]) for x in gradients[:3])
        if dtype == torch.float32:
            assert sparse_error <= max(2 * eager_error, rounding)
        assert sparse_error <= 1.1 * dense_error + 1e-7


@runs
def test_the_order_of_rows_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    h, weight, target = peaked(50, 16, 40, torch.float16)
    target[::7] = -100
    plain = loss_and_gradients(ours, h, weight, target, 30.0, reduction="none", label_smoothing=0.1)
    monkeypatch.setattr(triton, "ORDER_FROM", (1, 1))
    ordered = loss_and_gradients(ours, h, weight, target, 30.0, reduction="none", label_smoothing=0.1)
    for a, b in zip(ordered, plain, strict=True):
        assert error(a, b.double(), floor=1e-3) < 2e-3


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bits_repeat_and_gradients_have_no_radial_part(form: str, dtype: torch.dtype) -> None:
    h, weight, target = inputs(40, 24, 50, dtype)
    runs = [loss_and_gradients(ours, h, weight, target, 30.0) for _ in range(2)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    _, dh, dweight, _ = runs[0]
    limits = torch.finfo(dtype)
    rounding = 1e-5 if dtype == torch.float32 else limits.eps / 2 + 1e-5  # of each number of the result
    for x, dx in ((h.double(), dh.double()), (weight.double(), dweight.double())):
        least = limits.smallest_normal * limits.eps * x.abs().sum(-1) + 1e-9  # what the dtype cannot hold
        assert ((x * dx).sum(-1).abs() <= rounding * x.norm(dim=-1) * dx.norm(dim=-1) + least).all()


@runs
def test_a_second_backward_repeats_the_first(form: str) -> None:
    """The first one makes dh of what forward kept for it, the second of the same made anew."""
    h, weight, target = (x.requires_grad_() if x.is_floating_point() else x for x in inputs(40, 24, 50))
    leaves = (h, weight, torch.tensor(30.0, device=DEVICE, requires_grad=True))
    loss = ours(h, weight, target, leaves[2], label_smoothing=0.1)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    assert torch.equal(torch.autograd.grad(loss, leaves[2], retain_graph=True)[0], kept[2])
    for gradient, before, again in zip(first, kept, torch.autograd.grad(loss, leaves, retain_graph=True), strict=True):
        assert torch.equal(gradient, before) and torch.equal(again, before)
    twice = torch.autograd.grad(loss, leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(twice, kept, strict=True))
    with pytest.raises(RuntimeError, match="no autograd formula|not implemented|backward"):
        torch.autograd.grad(twice[0].sum(), weight)


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that torch's CPU allocator had given away at one time during a step, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = step()
    del kept
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@interpreted
def test_flash_keeps_no_second_gradient_of_h(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the mean and dh beside each other, and against a mean where h needs no gradient."""
    choose_form(monkeypatch, triton, "flash", step=16)
    h, weight, target = inputs(512, 64, 16, torch.float16)
    vectors = 512 * 80 + 4 * 16 * 64 * 2 + 4096  # a dozen numbers a row, and the four partial sums of dweight
    for need_h in (True, False):

        def step(need_h: bool = need_h) -> tuple[Tensor, ...]:
            leaves = [h.detach().requires_grad_(need_h), weight.detach().requires_grad_()]
            ours(*leaves, target, 30.0).backward()
            return tuple(leaf.grad for leaf in leaves if leaf.requires_grad)

        step()
        assert peak_bytes(step) <= h.nbytes * need_h + weight.nbytes + vectors, need_h


@runs
def test_gradients_only_where_asked(form: str) -> None:
    h, weight, target = inputs(20, 8, 12)
    gamma = torch.tensor(30.0, device=DEVICE)
    for wanted in range(3):
        leaves = [x.detach().requires_grad_(i == wanted) for i, x in enumerate((h, weight, gamma))]
        (gradient,) = torch.autograd.grad(
            ours(leaves[0], leaves[1], target, leaves[2], reduction="sum"), leaves[wanted]
        )
        double = [x.detach().double().requires_grad_(i == wanted) for i, x in enumerate((h, weight, gamma))]
        loss = eager(double[0], double[1], target, double[2], reduction="sum")
        assert error(gradient, torch.autograd.grad(loss, double[wanted])[0]) < 2e-5
    with torch.no_grad():
        assert not ours(h, weight, target, gamma).requires_grad


@runs
def test_public_op_autocast_and_leading_dimensions(form: str) -> None:
    h, weight, target = inputs(24, 8, 12)
    loss = cosine_cross_entropy(
        h.view(2, 3, 4, 8), weight, target.view(2, 3, 4), 20.0, reduction="none", backend="triton"
    )
    truth = eager(h.double(), weight.double(), target, 20.0, reduction="none")
    assert loss.shape == (2, 3, 4) and error(loss.flatten(), truth) < 2e-5
    bias = torch.randn(12, device=DEVICE)
    loss, lse = cosine_cross_entropy(
        h.view(2, 3, 4, 8),
        weight,
        target.view(2, 3, 4),
        20.0,
        bias=bias,
        return_log_normalizer=True,
        reduction="sum",
        backend="triton",
    )
    gamma = torch.tensor(20.0, dtype=torch.float64, device=DEVICE)
    by_row = true_loss_by_columns(h.double(), weight.double(), target, gamma, bias=bias.double(), reduction="none")
    assert error(loss, by_row[0].sum()) < 2e-5 and lse.shape == (2, 3, 4) and error(lse.flatten(), by_row[1]) < 2e-5
    with torch.autocast(DEVICE, torch.float16):
        cast = cosine_cross_entropy(h.requires_grad_(), weight, target, 20.0, backend="triton")
        assert torch.equal(cast, cosine_cross_entropy(h.half(), weight.half(), target, 20.0, backend="triton"))
    assert cast.dtype == torch.float32 and torch.autograd.grad(cast, h)[0].dtype == torch.float32


@runs
def test_operator_registration(form: str) -> None:
    h, weight, target = inputs(9, 5, 11)
    gamma = torch.tensor(20.0, device=DEVICE, requires_grad=True)
    arguments = (h.requires_grad_(), weight.requires_grad_(), target, gamma, None, None, -100, 0.1, 1e-12, True, False)
    library.opcheck(torch.ops.dgi_kernels.cosine_loss_triton.default, arguments)
    bias, groups = torch.randn(11, device=DEVICE, requires_grad=True), triton._groups(torch.arange(11, device=DEVICE))
    library.opcheck(
        torch.ops.dgi_kernels.cosine_loss_triton.default, (h, weight, target, gamma, bias, groups, *arguments[6:])
    )


@runs
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_as_one_graph(form: str, reduction: str) -> None:
    h, weight, target = inputs(20, 8, 12)
    step = torch.compile(ours, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    expected = loss_and_gradients(ours, h, weight, target, 20.0, reduction=reduction)
    for a, b in zip(loss_and_gradients(step, h, weight, target, 20.0, reduction=reduction), expected, strict=True):
        torch.testing.assert_close(a, b)


def large(dtype: torch.dtype, d: int) -> tuple[Tensor, Tensor, Tensor]:
    return inputs(random.randint(1000, 5000), d, random.randint(500, 5000), dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("d", [17, 64, 100, 128, 256, 300, 768])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_large_on_a_gpu(dtype: torch.dtype, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "ORDER_FROM", random.choice([(1, 1), (10**9, 1)]))
    h, weight, target = large(dtype, d)
    scale, smoothing = random.uniform(1, 120), random.choice([0.0, 0.1])
    options = {"reduction": random.choice(["mean", "sum"]), "label_smoothing": smoothing}
    assert_exact(h, weight, target, scale, **options)
    truth = loss_and_gradients(eager, h, weight, target, scale, torch.float64, **options)
    usual = loss_and_gradients(eager, h, weight, target, scale, dtype, **options)
    for actual, plain, expected in zip(
        loss_and_gradients(ours, h, weight, target, scale, **options), usual, truth, strict=True
    ):
        # A scalar's error may be small by luck, eager's too: it is allowed that of its terms.
        luck = ROUNDING[dtype] if expected.dim() == 0 else 2e-5
        assert error(actual, expected) <= 1.5 * error(plain, expected) + luck


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("d", [64, 128, 256, 768])
def test_bits_repeat_on_a_gpu(d: int) -> None:
    """A race of two warpgroups would show as other bits."""
    h, weight, target = large(torch.bfloat16, d)
    first = loss_and_gradients(ours, h, weight, target, 30.0)
    for _ in range(100):
        for a, b in zip(loss_and_gradients(ours, h, weight, target, 30.0), first, strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("d", [128, 768])
def test_a_cuda_graph_holds_a_step(d: int) -> None:
    """No host sync and no launch that depends on values: captured once, replayed with new numbers and a new scale."""
    h, weight, target = inputs(5000, d, 1000, torch.bfloat16)
    h, weight = h.requires_grad_(), weight.requires_grad_()
    gamma = torch.tensor(30.0, device=DEVICE, requires_grad=True)

    def step() -> tuple[Tensor, ...]:
        loss = ours(h, weight, target, gamma)
        return loss.detach(), *torch.autograd.grad(loss, (h, weight, gamma))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        h.normal_()
        gamma.fill_(100.0)
        target.random_(1000)
    graph.replay()
    for a, b in zip(captured, step(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(("d", "part"), [(64, 0.01), (256, 0.045), (768, 0.06)])
def test_memory_on_a_gpu(d: int, part: float) -> None:
    """Beyond the gradients, a hundredth of the logits that are never formed.

    The chunked form, from D = 128 on, has a chunk's weights of 32 MB, 3 %, and both gradients in float32: dweight and
    a chunk's rows of dh.
    """
    h, weight, target = inputs(65536, d, 4096, torch.bfloat16)
    h, weight = h.requires_grad_(), weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours(h, weight, target, torch.tensor(30.0, device=DEVICE)).backward()
    gradients = 2 * (h.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before <= gradients + part * 65536 * 4096 * 4
