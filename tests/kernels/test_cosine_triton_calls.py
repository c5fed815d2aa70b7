"""Calls of the Triton cosine cross-entropy: autograd, operators, memory, and what only a GPU can show."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library

from .cosine_cases import eager, true_loss_by_columns
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
    choose_form,
    interpreted,
    launcher,
    run_in_the_interpreter,
    runs,
)
from .near import ROUNDING, error
from .shapes import name_of

if TRITON and (GPU or INTERPRETED):
    from dgi_kernels import cosine_cross_entropy
    from dgi_kernels.cosine import triton
    from dgi_kernels.cosine import triton_launch as launch
    from dgi_kernels.cosine import triton_reduced as reduced


@launcher
def test_all_of_this_file_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@runs
@every_form
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("scale", [30.0, 48.0, -49.0, 120.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 17, 65), (70, 24, 64)], ids=name_of)
def test_gradients_made_with_the_loss(
    form: str, shape: tuple[int, int, int], scale: float, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both sides of the largest plain scale, beyond which a row's offset is its log-sum-exp."""
    made = []
    of_chunks = reduced._chunks
    monkeypatch.setattr(reduced, "_chunks", lambda *arguments: made.append(of_chunks(*arguments)))
    h, weight, target = inputs(*shape)
    target[torch.rand(shape[0], device=DEVICE) < 0.3] = -100
    target[0] = 0
    smoothing, eps = random.choice([0.0, 0.1, 1.0]), random.choice([1e-12, 0.5])
    assert_exact(h, weight, target, scale, reduction=reduction, label_smoothing=smoothing, eps=eps)
    assert len(made) == (form == "reduced")


in_one_pass = pytest.mark.parametrize("form", ["reduced"], indirect=True)
either_scale = pytest.mark.parametrize("scale", [30.0, 120.0])  # plain, and beyond the largest plain scale


@runs
@in_one_pass
@either_scale
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("is_aligned", [True, False])
def test_gradients_made_with_the_loss_of_strided_inputs(
    form: str, is_aligned: bool, reduction: str, scale: float
) -> None:
    """Vectors that kernels read where they are, 16 bytes at a time, and others, which are copied first."""
    h, weight, target = inputs(66, 48, 65)
    first = 16 if is_aligned else 1
    h, weight, target = h[::2, first:], (weight if is_aligned else weight.T.contiguous().T)[:, first:], target[::2]
    assert (launch.tiled(h) is h) == (launch.tiled(weight) is weight) == is_aligned
    assert_exact(h, weight, target, scale, reduction=reduction, label_smoothing=0.1)
    strided = loss_and_gradients(ours, h, weight, target, scale, reduction=reduction, label_smoothing=0.1)
    copies = (h.contiguous(), weight.contiguous(), target.contiguous())
    dense = loss_and_gradients(ours, *copies, scale, reduction=reduction, label_smoothing=0.1)
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


@runs
@in_one_pass
@either_scale
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_gradients_made_with_the_loss_of_numbers_that_are_none(form: str, value: float, scale: float) -> None:
    """One in a row of h leaves dh of the others as it was; one in a column is in the weights of all rows."""
    h, weight, target = inputs(40, 24, 33)
    _, clean, *_ = loss_and_gradients(ours, h, weight, target, scale, reduction="sum")
    dirty = h.clone()
    dirty[3, 1] = value
    loss, dh, dweight, dscale = loss_and_gradients(ours, dirty, weight, target, scale, reduction="sum")
    assert loss.isnan() and dweight.isnan().all() and dscale.isnan()
    assert dh[3].isnan().any()
    others = [n for n in range(40) if n != 3]
    assert torch.equal(dh[others], clean[others])
    weight[5, 2] = value
    loss, dh, dweight, dscale = loss_and_gradients(ours, h, weight, target, scale, reduction="sum")
    assert loss.isnan() and dh.isnan().any(1).all() and dweight.isnan().any(1).all() and dscale.isnan()


@runs
@every_form
def test_a_loss_near_0_keeps_its_digits(form: str) -> None:
    """Guards against the difference of a logarithm and a logit, each of 43 in base 2, where the loss is 1e-9."""
    weight = torch.eye(4, device=DEVICE)
    h = torch.tensor([[1.0, 0.3, 0.2, 0.1]], device=DEVICE)
    target = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    loss, dh, *_ = loss_and_gradients(ours, h, weight, target, 30.0)
    truth, exact, *_ = loss_and_gradients(eager, h, weight, target, 30.0, torch.float64)
    assert truth < 1e-8 and error(loss, truth) < 2e-5
    assert form == "flash" or error(dh, exact) < 2e-5  # which leaves out weights below 2^-24


@runs
@every_form
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
@every_form
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
@every_form
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
    of_reduced = (h, weight.requires_grad_(), target, gamma, -100, 0.1, 1e-12, True, True, True)
    library.opcheck(torch.ops.dgi_kernels.cosine_loss_triton_reduced.default, of_reduced)
    bias, groups = torch.randn(11, device=DEVICE, requires_grad=True), triton._groups(torch.arange(11, device=DEVICE))
    library.opcheck(
        torch.ops.dgi_kernels.cosine_loss_triton.default, (h, weight, target, gamma, bias, groups, *arguments[6:])
    )


@runs
@every_form
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
@pytest.mark.parametrize(("d", "part"), [(64, 0.01), (256, 0.02), (768, 0.02)])
def test_memory_on_a_gpu(d: int, part: float) -> None:
    """Beyond the gradients, one or two hundredths of the logits that are never formed (test_gpu_rehearsal.py counts
    the same without a GPU)."""
    h, weight, target = inputs(65536, d, 4096, torch.bfloat16)
    h, weight = h.requires_grad_(), weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours(h, weight, target, torch.tensor(30.0, device=DEVICE)).backward()
    gradients = 2 * (h.numel() + weight.numel())
    assert torch.cuda.max_memory_allocated() - before <= gradients + part * 65536 * 4096 * 4
