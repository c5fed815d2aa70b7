"""Cosine logits and cross-entropy in C++: accuracy against float64, lists of peaked rows, bits, memory, integration."""

from __future__ import annotations

import ctypes
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import _extension, cosine_cross_entropy, cosine_logits

native = pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))
compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

CSRC = Path(__file__).parents[2] / "csrc"
TOLERANCE = 2e-5  # of float32 losses and gradients against float64, relative to their norm


def eager(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, **options: object) -> Tensor:
    """What users write, in the dtype of the inputs."""
    logits = scale * (F.normalize(h, dim=-1) @ F.normalize(weight, dim=-1).T)
    return F.cross_entropy(logits, target, **options)


def native_loss(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, **options: object) -> Tensor:
    return cosine_cross_entropy(h, weight, target, scale, backend="native", **options)


def loss_and_gradients(function: Callable[..., Tensor], h: Tensor, weight: Tensor, target: Tensor, scale: Tensor,
                       upstream: Tensor | None = None, **options: object) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (h, weight, scale)]
    loss = function(leaves[0], leaves[1], target, leaves[2], **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


def exact(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor, upstream: Tensor | None = None,
          **options: object) -> list[Tensor]:
    return loss_and_gradients(eager, h.double(), weight.double(), target, scale.double(), upstream, **options)


def error(actual: Tensor, expected: Tensor) -> float:
    """Relative to the norm of what is expected."""
    return ((actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


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


@native
@pytest.mark.parametrize("round_", range(12))
def test_accuracy_over_random_shapes_and_options(round_: int) -> None:
    n, d, k = random_size(5000), random_size(5000), random_size(5000)
    while n * d * k > 3e8:
        n, d, k = random_size(5000), random_size(5000), random_size(5000)
    h, weight, target = random_inputs(n, d, k)
    scale = torch.tensor(random.uniform(1, 120) * random.choice([1, 1, 1, -1]))
    options = {"reduction": random.choice(["none", "mean", "sum"]), "label_smoothing": random.choice([0, 0.1, 1.0]),
               "ignore_index": random.choice([-100, 0])}
    target[torch.rand(n) < random.choice([0, 0.3])] = options["ignore_index"]
    if not (target != options["ignore_index"]).any():
        options["reduction"] = "sum"
    upstream = torch.randn(n if options["reduction"] == "none" else ())
    expected = exact(h, weight, target, scale, upstream, **options)
    ours = loss_and_gradients(native_loss, h, weight, target, scale, upstream, **options)
    usual = loss_and_gradients(eager, h, weight, target, scale, upstream, **options)
    for name, a, e, u in zip(("loss", "dh", "dweight", "dscale"), ours, expected, usual, strict=True):
        # What cancels (dscale is a sum over rows of either sign) is as wrong in any float32: then twice eager's error.
        allowed = max(TOLERANCE * e.norm().item(), 2 * (u.double() - e).norm().item(), 1e-6 * n**0.5)
        assert (a.double() - e).norm().item() <= allowed, (name, (n, d, k), scale, options)


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_low_precision_is_no_worse_than_eager(dtype: torch.dtype, reduction: str) -> None:
    for n, d, k in ((300, 64, 700), (70, 33, 5), (1, 256, 999)):
        h, weight, target = random_inputs(n, d, k, dtype)
        scale, upstream = torch.tensor(30.0, dtype=dtype), torch.rand(n) if reduction == "none" else None
        expected = exact(h, weight, target, scale, upstream, reduction=reduction)
        ours = loss_and_gradients(native_loss, h, weight, target, scale, upstream, reduction=reduction)
        usual = loss_and_gradients(eager, h, weight, target, scale, upstream, reduction=reduction)
        assert ours[0].dtype == torch.float32 and [x.dtype for x in ours[1:]] == [dtype] * 3
        for a, e, u in zip(ours, expected, usual, strict=True):
            rounding = torch.finfo(dtype).eps / 2  # of a result that is rounded once
            assert error(a, e) <= max(1.5 * error(u, e), rounding)


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
        allowed = max(2 * (u.double() - e).norm().item(), TOLERANCE * e.norm().item(), least)
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
def test_peaked_rows_are_as_accurate_as_eager(shift: Callable[[Tensor], Tensor], smoothing: float,
                                              scale: float) -> None:
    """Guards against skipped entries that matter in sum: all codes may lean in one direction.

    With flat rows among them the error is at most twice eager's; three times where there is nothing but peaked rows. Of
    several draws together, for eager may be exact by luck in one.
    """
    n, d, k, draws = 400, 96, 1500, 4
    for cosine, flat in ((0.7, 10), (0.8, 10), (0.7, n + 1), (0.95, n + 1)):
        ours, usual, size = torch.zeros(3, 4, dtype=torch.float64)  # squares of norms
        for _ in range(draws):
            weight, target = shift(torch.randn(k, d)), torch.randint(k, (n,))
            h = cosine * F.normalize(weight[target], dim=-1) \
                + math.sqrt(1 - cosine**2) * F.normalize(torch.randn(n, d), dim=-1)
            h[flat - 1::flat] = F.normalize(torch.randn(len(h[flat - 1::flat]), d), dim=-1)
            arguments = (h, weight, target, torch.tensor(scale))
            expected = exact(*arguments, label_smoothing=smoothing)
            size += torch.stack([e.square().sum() for e in expected])
            for total, function in ((ours, native_loss), (usual, eager)):
                results = loss_and_gradients(function, *arguments, label_smoothing=smoothing)
                total += torch.stack([(a.double() - e).square().sum() for a, e in zip(results, expected, strict=True)])
        # Scalars that sum what cancels are held to the project's own bound.
        rounding = torch.tensor([TOLERANCE, 1e-6, 1e-6, TOLERANCE], dtype=torch.float64) * size.sqrt()
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
    assert error(ours[0], loss) < TOLERANCE and error(ours[3], dscale) < TOLERANCE


@native
@pytest.mark.parametrize("inputs", [random_inputs, peaked_inputs])
def test_gradients_have_no_radial_part(inputs: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    h, weight, target = inputs(300, 48, 500)
    _, dh, dweight, _ = loss_and_gradients(native_loss, h, weight, target, torch.tensor(30.0))
    for x, dx in ((h, dh), (weight, dweight)):
        radial = (x.double() * dx.double()).sum(-1)
        largest = (x.norm(dim=-1) * dx.norm(dim=-1)).double().clamp(min=1e-30)
        assert (radial / largest).abs().max() < 1e-6


@native
@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True),
                                    (True, True, False)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_subset_of_gradients(wanted: tuple[bool, bool, bool], reduction: str) -> None:
    h, weight, target = peaked_inputs(200, 16, 300)
    scale, upstream = torch.tensor(40.0), torch.rand(200 if reduction == "none" else ())
    everything = loss_and_gradients(native_loss, h, weight, target, scale, upstream, reduction=reduction)[1:]
    inputs = [x.clone().requires_grad_(want) for x, want in zip((h, weight, scale), wanted, strict=True)]
    loss = native_loss(inputs[0], inputs[1], target, inputs[2], reduction=reduction)
    loss.backward(upstream)
    for x, want, expected in zip(inputs, wanted, everything, strict=True):
        assert torch.equal(x.grad, expected) if want else x.grad is None


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
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
    for a, e, condition in zip(torch.autograd.grad(logits, leaves, upstream), gradients, (1.0, 1.0, cancelled),
                               strict=True):
        assert error(a, e) <= 10 * condition * tolerance


@native
@pytest.mark.parametrize("inputs", [random_inputs, peaked_inputs])
def test_bits_repeat_over_runs_and_threads(inputs: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    h, weight, target = inputs(400, 32, 500)
    threads = torch.get_num_threads()
    first = loss_and_gradients(native_loss, h, weight, target, torch.tensor(30.0))
    try:
        for run in range(100):
            torch.set_num_threads(1 + run % 3)
            for a, b in zip(loss_and_gradients(native_loss, h, weight, target, torch.tensor(30.0)), first, strict=True):
                assert torch.equal(a, b), f"run {run}"
    finally:
        torch.set_num_threads(threads)


@native
@pytest.mark.parametrize("inputs", [random_inputs, peaked_inputs])
def test_bits_repeat_where_threads_take_half_of_the_rows_each(
        inputs: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    h, weight, target = inputs(2500, 32, 500)
    threads = torch.get_num_threads()
    try:
        runs = []
        for run in range(20):
            torch.set_num_threads(1 + run % 2)
            runs.append(loss_and_gradients(native_loss, h, weight, target, torch.tensor(30.0)))
        for run, results in enumerate(runs):
            for a, b in zip(results, runs[0], strict=True):
                assert torch.equal(a, b), f"run {run}"
    finally:
        torch.set_num_threads(threads)


MEMORY = """
import ctypes, sys, torch
from dgi_kernels import cosine_cross_entropy
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
n, k, d, dtype = 65536, 4096, int(sys.argv[2]), getattr(torch, sys.argv[1])
def work(n):
    h = torch.randn(n, d).to(dtype).requires_grad_()
    weight, scale = torch.randn(k, d).to(dtype).requires_grad_(), torch.tensor(30.0, requires_grad=True)
    target = torch.randint(k, (n,))
    gradients = [torch.ones_like(h), torch.ones_like(weight)]  # their pages are touched, so the peak counts them
    del gradients
    ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back would hide the peak
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = kilobytes("VmRSS")
    cosine_cross_entropy(h, weight, target, scale).backward()
    gradients = (h.grad.nbytes + weight.grad.nbytes) // 1024
    return kilobytes("VmHWM") - before - gradients
work(600)
print(work(n))
"""


@native
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' record of the peak")
@pytest.mark.parametrize(("dtype", "dim"), [("float32", 64), ("float32", 256), ("bfloat16", 64)])
def test_memory_beyond_the_gradients_is_one_percent_of_the_logits(dtype: str, dim: int) -> None:
    run = subprocess.run([sys.executable, "-c", MEMORY, dtype, str(dim)], check=True, capture_output=True, text=True)
    assert int(run.stdout) * 1024 <= 0.01 * 65536 * 4096 * 4


@native
def test_nan_and_inf_do_no_harm_to_other_rows() -> None:
    h, weight, target = peaked_inputs(300, 16, 400)
    clean = loss_and_gradients(native_loss, h, weight, target, torch.tensor(30.0), reduction="none")
    bad = torch.zeros(300, dtype=torch.bool)
    bad[[3, 17, 250]] = True
    dirty = h.clone()
    dirty[3, 2], dirty[17, 0], dirty[250] = torch.nan, torch.inf, torch.nan
    loss, dh, dweight, dscale = loss_and_gradients(native_loss, dirty, weight, target, torch.tensor(30.0),
                                                   reduction="none")
    assert torch.equal(loss.isnan(), bad) and torch.equal(dh.isnan().any(1), bad)
    torch.testing.assert_close(loss[~bad], clean[0][~bad])
    torch.testing.assert_close(dh[~bad], clean[1][~bad])
    assert dweight.isnan().all() and dscale.isnan()
    poisoned = weight.clone()
    poisoned[7, 1] = torch.nan
    assert native_loss(h, poisoned, target, torch.tensor(30.0), reduction="none").isnan().all()


@native
def test_zero_and_tiny_vectors() -> None:
    """Guards against 1 / eps of both sides multiplied, which float32 cannot hold."""
    h, weight, target = random_inputs(8, 5, 9)
    h[2], weight[4], h[3], weight[1] = 0, 0, 1e-18, 1e-18
    for eps in (1e-12, 1e-30):
        ours = [x.detach().requires_grad_() for x in (h, weight)]
        usual = [x.detach().double().requires_grad_() for x in (h, weight)]
        native_loss(*ours, target, 20.0, eps=eps).backward()
        F.cross_entropy(20.0 * F.normalize(usual[0], dim=-1, eps=eps) @ F.normalize(usual[1], dim=-1, eps=eps).T,
                        target).backward()
        for a, e in zip(ours, usual, strict=True):
            torch.testing.assert_close(a.grad.double(), e.grad, rtol=1e-3, atol=1e-5)


@native
def test_backward_twice_and_scaled_upstream() -> None:
    """Guards against gradients handed out and then scaled or added to in place."""
    h, weight, target = (x.requires_grad_() if x.is_floating_point() else x for x in random_inputs(30, 8, 40))
    loss = native_loss(h, weight, target, 20.0)
    once = torch.autograd.grad(loss, (h, weight), retain_graph=True)
    kept = [g.clone() for g in once]
    (3 * loss).backward(retain_graph=True)
    for g, before, x in zip(once, kept, (h, weight), strict=True):
        assert torch.equal(g, before)
        torch.testing.assert_close(x.grad, 3 * before)
    loss.backward()
    torch.testing.assert_close(h.grad, 4 * kept[0])


@native
def test_gradients_of_gradients() -> None:
    h, weight, target = random_inputs(5, 3, 6, torch.float64)
    leaves = [x.requires_grad_() for x in (h, weight, torch.tensor(7.0, dtype=torch.float64))]
    assert torch.autograd.gradgradcheck(lambda *x: cosine_logits(*x, backend="native"), leaves)
    for reduction in ("mean", "none"):
        assert torch.autograd.gradgradcheck(
            lambda h, w, s, r=reduction: native_loss(h, w, target, s, reduction=r), leaves)


@native
def test_leading_dimensions_and_strides() -> None:
    h, weight, target = torch.randn(6, 7, 10)[..., ::2], torch.randn(5, 9).T, torch.randint(9, (7, 6)).T
    plain = [x.contiguous() for x in (h, weight, target)]
    for reduction in ("mean", "none"):
        ours = loss_and_gradients(native_loss, h, weight, target, torch.tensor(9.0), reduction=reduction)
        expected = loss_and_gradients(native_loss, *plain, torch.tensor(9.0), reduction=reduction)
        assert ours[1].shape == h.shape and ours[2].shape == weight.shape
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a, b)


@native
def test_ops_are_well_registered() -> None:
    h, weight, target = random_inputs(5, 3, 7)
    scale, ops = torch.tensor(9.0), torch.ops.dgi_kernels
    torch.library.opcheck(ops.cosine_logits.default, (h, weight, scale, 1e-12))
    torch.library.opcheck(ops.cosine_logits_backward.default,
                          (torch.randn(5, 7), h, weight, scale, 1e-12, True, False, True))
    for upstream, reduction, wanted in ((None, 1, (True,) * 3), (torch.rand(5), 0, (True, False, True)),
                                        (None, 0, (False,) * 3)):
        torch.library.opcheck(ops.cosine_cross_entropy.default,
                              (h, weight, target, scale, upstream, -100, reduction, 0.1, 1e-12, *wanted))


@native
def test_compiled_forward_and_backward() -> None:
    torch._dynamo.reset()

    def step(h: Tensor, weight: Tensor, target: Tensor, scale: Tensor) -> Tensor:
        rows = cosine_cross_entropy(h, weight, target, scale, reduction="none", backend="native")
        mean = cosine_cross_entropy(h.relu(), weight, target, scale, label_smoothing=0.1, backend="native")
        return rows.square().mean() + 2 * mean + cosine_logits(h, weight, scale, backend="native").square().mean()

    compiled = torch.compile(step, fullgraph=True)
    for n in (6, 11):
        arguments = (*random_inputs(n, 4, 9), torch.tensor(20.0))
        expected, actual = loss_and_gradients(step, *arguments), loss_and_gradients(compiled, *arguments)
        torch.testing.assert_close(actual, expected)
    torch._dynamo.reset()


@native
def test_autocast_multiplies_what_linear_would() -> None:
    h, weight, target = random_inputs(20, 8, 30)
    scale = torch.tensor(12.0)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_gradients(native_loss, h, weight, target, scale)
    expected = exact(h.bfloat16(), weight.bfloat16(), target, scale)
    assert [x.dtype for x in ours] == [torch.float32] * 4
    for a, e in zip(ours, expected, strict=True):
        assert error(a, e) < 2**-8


@native
@pytest.mark.parametrize(("change", "message"), [
    ({"h": torch.randn(5, 2)}, "h must be"), ({"weight": torch.randn(3, 7).T}, "contiguous"),
    ({"weight": torch.randn(7, 3).double()}, "one dtype"), ({"scale": torch.tensor(2)}, "scale must"),
    ({"target": torch.zeros(4, dtype=torch.int64)}, "target must"), ({"target": torch.zeros(5)}, "target must"),
    ({"upstream": torch.zeros(4)}, "upstream must"), ({"reduction": 3}, "reduction must"),
    ({"h": torch.randn(5, 3).int()}, "inputs must be float32"),
])
def test_direct_callers_are_stopped_too(change: dict[str, object], message: str) -> None:
    arguments = {"h": torch.randn(5, 3), "weight": torch.randn(7, 3), "target": torch.zeros(5, dtype=torch.int64),
                 "scale": torch.tensor(2.0), "upstream": None, "ignore_index": -100, "reduction": 0,
                 "label_smoothing": 0.0, "eps": 1e-12, "wants_h": True, "wants_weight": True, "wants_scale": True}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dgi_kernels.cosine_cross_entropy(**{**arguments, **change})


@native
def test_direct_callers_get_nan_for_a_wild_target() -> None:
    h, weight, _ = random_inputs(4, 3, 5)
    target = torch.tensor([0, 5, -1, -100])
    loss, *_ = torch.ops.dgi_kernels.cosine_cross_entropy(h, weight, target, torch.tensor(2.0), None, -100, 0, 0.0,
                                                          1e-12, True, True, True)
    assert loss.isnan().tolist() == [False, True, True, False]


HARNESS = """
#include "dgi/convert.h"
#include "dgi/softmax_row.h"
#include "dgi/vector.h"
#ifdef __FMA__
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif
extern "C" void exponentials(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = dgi::exponential<kFused>(x[i]);
}
extern "C" void to_bfloat16(const float* x, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dgi::store(x[i], reinterpret_cast<dgi::BFloat16*>(out)[i]);
}
extern "C" void to_float16(const float* x, uint16_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dgi::store(x[i], reinterpret_cast<dgi::Float16*>(out)[i]);
}
extern "C" void from_bfloat16(const uint16_t* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = dgi::load(reinterpret_cast<const dgi::BFloat16*>(x)[i]);
}
extern "C" void from_float16(const uint16_t* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = dgi::load(reinterpret_cast<const dgi::Float16*>(x)[i]);
}
// How many entries the row's list has, -1 where it gets none; then the row's T in full, from the list or dense.
extern "C" int64_t gradient_row(float* products, const float* rnorm, int64_t codes, int64_t target, int64_t limit,
                                int32_t* index, float* value, float* t) {
  const dgi::SoftmaxRow<float> row{products, rnorm, codes, target};
  const dgi::SoftmaxOptions options{0.0, false};
  double loss;
  const dgi::SoftmaxSums sums = dgi::softmax_row<kFused>(row, options, &loss);
  dgi::SparseRow<float> list{index, value, -1, 0.0};
  if (!dgi::sparse_gradient_row<kFused>(row, options, sums, 1.0, limit, list)) {
    dgi::dense_gradient_row<kFused>(row, options, sums, 1.0);
    for (int64_t k = 0; k < codes; ++k) t[k] = products[k];
    return -1;
  }
  for (int64_t k = 0; k < codes; ++k) t[k] = static_cast<float>(list.even) * rnorm[k];
  for (int64_t i = 0; i < list.count; ++i) t[index[i]] += value[i];
  return list.count;
}
"""


@pytest.fixture(scope="module", params=[(), ("-mavx2", "-mfma"), ("-march=native",)], ids=["plain", "avx2", "native"])
def headers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Compiles the headers by themselves, which proves that they know no torch."""
    supported = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "-mavx2" in request.param and not (" avx2" in supported and " fma" in supported):
        pytest.skip("the processor has no AVX2")
    folder = tmp_path_factory.mktemp("headers")
    (folder / "harness.cpp").write_text(HARNESS)
    subprocess.run(["c++", "-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off",
                    "-fopenmp-simd", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", *request.param,
                    f"-I{CSRC / 'include'}", "harness.cpp", "-o", "harness.so"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "harness.so"))


def pointer(x: np.ndarray) -> ctypes.c_void_p:
    return x.ctypes.data_as(ctypes.c_void_p)


def apply(function: Callable[..., None], x: np.ndarray, dtype: type) -> np.ndarray:
    x, out = np.ascontiguousarray(x), np.empty(x.shape, dtype)
    function(pointer(x), pointer(out), ctypes.c_int64(x.size))
    return out


@compiler
def test_exponential_meets_its_bound(headers: ctypes.CDLL) -> None:
    x = np.concatenate([np.linspace(-87, 88, 2_000_001), np.random.normal(0, 1e-3, 100_000), [0.0]]).astype(np.float32)
    truth = np.exp(x.astype(np.float64))
    assert np.abs(apply(headers.exponentials, x, np.float32) / truth - 1).max() < 1.5e-7
    nans = np.random.randint(0x7F800001, 0x80000000, 10_000).astype(np.uint32)  # with any payload, of either sign
    nans[::2] |= np.uint32(1 << 31)
    assert np.isnan(apply(headers.exponentials, nans.view(np.float32), np.float32)).all()
    assert 0 <= apply(headers.exponentials, np.array([-np.inf, -1e30, -88], np.float32), np.float32).max() < 1.3e-38


@compiler
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_conversions_are_torchs(name: str, headers: ctypes.CDLL) -> None:
    dtype = getattr(torch, name)
    every = np.arange(1 << 16, dtype=np.uint16)
    truth = torch.from_numpy(every.view(np.int16)).view(dtype)
    wide = torch.from_numpy(apply(getattr(headers, f"from_{name}"), every, np.float32))
    torch.testing.assert_close(wide, truth.float(), rtol=0, atol=0, equal_nan=True)
    random_bits = np.random.randint(0, 1 << 32, 1 << 20, dtype=np.uint32)
    around = np.array([-1, 0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFF, 0x1000, 0x1001])  # halfway to the next, and beside it
    halfway = (truth.float().numpy().view(np.uint32)[:, None] + around).astype(np.uint32)
    values = np.concatenate([random_bits, halfway.ravel()]).view(np.float32)
    narrow = torch.from_numpy(apply(getattr(headers, f"to_{name}"), values, np.uint16).view(np.int16)).view(dtype)
    torch.testing.assert_close(narrow, torch.from_numpy(values.copy()).to(dtype), rtol=0, atol=0, equal_nan=True)


def gradient_row(headers: ctypes.CDLL, logits: np.ndarray, target: int, limit: int) -> tuple[int, np.ndarray]:
    rnorm = np.random.uniform(0.5, 2, logits.size).astype(np.float32)
    products = (logits / rnorm).astype(np.float32)
    index, value, t = np.empty(limit + 64, np.int32), np.empty(limit + 64, np.float32), np.empty_like(rnorm)
    headers.gradient_row.restype = ctypes.c_int64
    count = headers.gradient_row(pointer(products), pointer(rnorm), *map(ctypes.c_int64, (logits.size, target, limit)),
                                 pointer(index), pointer(value), pointer(t))
    return count, t / rnorm


def softmax_gradient(logits: np.ndarray, target: int) -> np.ndarray:
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    p[target] -= 1
    return p


@compiler
@pytest.mark.parametrize("target", [0, 31, 32, 500, 1000])
def test_peaked_rows_become_lists(target: int, headers: ctypes.CDLL) -> None:
    logits = np.random.normal(0, 1.5, 1001).astype(np.float32)
    logits[target] = 22
    count, g = gradient_row(headers, logits, target, limit=128)
    counting = (softmax_gradient(logits, target) >= 2.0**-24).sum() + 1
    assert counting - 1 <= count < 80  # more where the list stays short
    assert abs(g.sum()) < 1e-8  # what is skipped is spread, not lost
    np.testing.assert_allclose(g, softmax_gradient(logits, target), rtol=2e-6, atol=2.0**-24)


@compiler
@pytest.mark.parametrize("kind", ["flat", "heavy tail", "nan", "list too long"])
def test_rows_that_get_no_list(kind: str, headers: ctypes.CDLL) -> None:
    logits, target, limit = np.zeros(4000, np.float32), 5, 256
    if kind == "heavy tail":  # every entry is below the cut, but not all of them together
        logits[target] = 16.8
    elif kind == "nan":
        logits[7] = np.nan
    elif kind == "list too long":
        logits[:] = -20
        logits[100:400] = np.random.normal(0, 1, 300)
    count, g = gradient_row(headers, logits, target, limit)
    assert count == -1
    if kind != "nan":
        np.testing.assert_allclose(g, softmax_gradient(logits, target), rtol=1e-5, atol=1e-9)
    else:
        assert np.isnan(g).all()
