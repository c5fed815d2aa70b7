"""Cosine logits and cross-entropy in C++ as operators: gradients asked for, bits, memory, integration, callers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, library

from dgi_kernels import cosine_cross_entropy, cosine_logits

from .cosine_cases import (
    all_columns,
    exact,
    loss_and_gradients,
    native,
    native_loss,
    op_arguments,
    peaked_inputs,
    random_inputs,
)
from .near import error


@native
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_subset_of_gradients(wanted: tuple[bool, bool, bool], reduction: str) -> None:
    h, weight, target = peaked_inputs(200, 128, 300)
    scale, upstream = torch.tensor(40.0), torch.rand(200 if reduction == "none" else ())
    everything = loss_and_gradients(native_loss, h, weight, target, scale, upstream, reduction=reduction)[1:]
    inputs = [x.clone().requires_grad_(want) for x, want in zip((h, weight, scale), wanted, strict=True)]
    loss = native_loss(inputs[0], inputs[1], target, inputs[2], reduction=reduction)
    loss.backward(upstream)
    for x, want, expected in zip(inputs, wanted, everything, strict=True):
        assert torch.equal(x.grad, expected) if want else x.grad is None


@native
@pytest.mark.parametrize("rows", [400, 2500], ids=["shared products", "half of the rows each"])
@pytest.mark.parametrize("inputs", [random_inputs, peaked_inputs])
def test_bits_repeat_from_run_to_run(inputs: Callable[..., tuple[Tensor, Tensor, Tensor]], rows: int) -> None:
    """With the same number of threads: BLAS may cut a product another way for another number."""
    h, weight, target = inputs(rows, 128, 500)
    threads, first = torch.get_num_threads(), {}
    try:
        for run in range(100 if rows < 1000 else 20):
            count = 1 + run % 3
            torch.set_num_threads(count)
            results = loss_and_gradients(native_loss, h, weight, target, torch.tensor(30.0))
            for a, b in zip(results, first.setdefault(count, results), strict=True):
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
@pytest.mark.parametrize(("dtype", "dim"), [("float32", 64), ("float32", 256), ("bfloat16", 64), ("bfloat16", 256)])
def test_memory_beyond_the_gradients_is_one_percent_of_the_logits(dtype: str, dim: int) -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, dtype, str(dim)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "DGI_POISON": "0"},
    )  # poison would touch pages that are never used
    assert int(run.stdout) * 1024 <= 0.01 * 65536 * 4096 * 4


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
            lambda h, w, s, r=reduction: native_loss(h, w, target, s, reduction=r), leaves
        )


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
    library.opcheck(ops.cosine_logits.default, (h, weight, scale, 1e-12))
    library.opcheck(ops.cosine_logits_backward.default, (torch.randn(5, 7), h, weight, scale, 1e-12, True, False, True))
    every = all_columns(7, torch.float32)
    by_row = {"upstream": torch.rand(5), "upstream_log_normalizer": torch.rand(5)}
    for change in (
        {"reduction": 1, "wants_log_normalizer": False, "wants_bias": False},
        {**every, **by_row, "label_smoothing": 0.1, "wants_weight": False},
        {"bias": every["bias"], "wants_h": False, "wants_weight": False, "wants_scale": False, "wants_bias": False},
    ):
        library.opcheck(ops.cosine_cross_entropy.default, (), {**op_arguments(), **change})


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
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.randn(5, 2)}, "h must be"),
        ({"weight": torch.randn(3, 7).T}, "contiguous"),
        ({"weight": torch.randn(7, 3).double()}, "one dtype"),
        ({"scale": torch.tensor(2)}, "scale must"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, "target must"),
        ({"target": torch.zeros(5)}, "target must"),
        ({"upstream": torch.zeros(4)}, "upstream must"),
        ({"reduction": 3}, "reduction must"),
        ({"upstream_log_normalizer": torch.zeros(5, 1)}, "upstream_log_normalizer must"),
        ({"bias": torch.zeros(6)}, "bias must"),
        ({"bias": torch.zeros(7).double()}, "bias must"),
        ({"same_as": torch.zeros(7)}, "same_as must"),
        ({"same_as": torch.zeros(14).long()[::2]}, "same_as must"),
        ({"h": torch.randn(5, 3).int()}, "inputs must be float32"),
    ],
)
def test_direct_callers_are_stopped_too(change: dict[str, object], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dgi_kernels.cosine_cross_entropy(**{**op_arguments(), **change})


@native
def test_direct_callers_get_nan_for_a_wild_target() -> None:
    h, weight, _ = random_inputs(4, 3, 5)
    target = torch.tensor([0, 5, -1, -100])
    arguments = {**op_arguments(), "h": h, "weight": weight, "target": target}
    loss, lse, *_ = torch.ops.dgi_kernels.cosine_cross_entropy(**arguments)
    assert loss.isnan().tolist() == lse.isnan().tolist() == [False, True, True, False]
