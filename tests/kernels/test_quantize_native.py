"""Residual quantization in C++ against the float64 oracle and the reference with the same noise."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library

from dgi_kernels import _extension, assign_codes, residual_quantize

from .near import assert_all_near
from .quantize_cases import (
    GRADIENT_MODES,
    Inputs,
    assert_matches_oracle,
    differentiable,
    gradient_names,
    largest_norm,
    make,
    peaked,
    weighted_sum,
)
from .shapes import QUANTIZE, Quantize, name_of

pytestmark = pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))

SHAPES = (*QUANTIZE, Quantize(n=37, d=24, sizes=(300, 1, 257)), Quantize(n=301, d=16, sizes=(512, 70)))


def scaled(inputs: Inputs, scale: float, tau: float) -> Inputs:
    like = inputs.scale
    return inputs._replace(
        scale=torch.full_like(like, scale).requires_grad_(), tau=torch.full_like(like, tau).requires_grad_()
    )


@pytest.mark.parametrize("seeded", [True, False], ids=["noise", "no noise"])
@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_quantization_and_gradients(shape: Quantize, dtype: torch.dtype, mode: str, seeded: bool) -> None:
    assert_matches_oracle(make(shape, dtype), mode, random.randrange(2**63) if seeded else None)


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("mode", GRADIENT_MODES)
@pytest.mark.parametrize("family", ["flat", "peaked"])
def test_flat_and_peaked_assignments(family: str, mode: str, tau: float) -> None:
    n, d, sizes = 290, 32, (520, 96)
    inputs = peaked(n, d, sizes) if family == "peaked" else make(Quantize(n, d, sizes), torch.float32)
    assert_matches_oracle(scaled(inputs, 30.0, tau), mode, random.randrange(2**63))


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("scale", [9.0, 64.0])
def test_temperatures_that_need_one_logarithm_if_not_their_gradient(scale: float, tau: float) -> None:
    """The shortcut exp((s + g) / tau) = (exp(s) / E)^(1 / tau): not for a tensor tau that wants its gradient."""
    for shape in SHAPES[3:]:
        inputs = scaled(make(shape, torch.float32), scale, tau)
        for mode in GRADIENT_MODES:
            assert_matches_oracle(inputs, mode, random.randrange(2**63), with_tau=False)


def test_gradients_of_gradients_are_the_references() -> None:
    inputs = make(Quantize(n=3, d=2, sizes=(3, 2)))
    z, codebooks, scale, tau = inputs

    def second(backend: str) -> list[Tensor]:
        result = residual_quantize(*inputs, seed=4, backend=backend)
        first = torch.autograd.grad(
            weighted_sum(differentiable(result), [torch.tensor(1.0)] * 5), inputs.leaves, create_graph=True
        )
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs.leaves))

    torch.testing.assert_close(second("native"), second("reference"), rtol=1e-4, atol=1e-4)


def test_a_codebook_row_of_nan_reaches_every_row_as_in_the_reference() -> None:
    z, codebook = torch.randn(4, 3), torch.randn(70, 3)
    codebook[66] = torch.nan
    for mode in ("soft", "straight_through", "hard"):
        ours, theirs = (
            residual_quantize(z, [codebook], 9.0, mode=mode, seed=1, backend=b) for b in ("native", "reference")
        )
        assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.sampled, theirs.sampled)
        for a, b in zip(differentiable(ours)[:2], differentiable(theirs)[:2], strict=True):
            assert torch.equal(a.isnan(), b.isnan())


def test_zero_rows_and_short_vectors_keep_finite_gradients() -> None:
    z = torch.zeros(3, 4)
    z[1] = 1e-20
    codebook = torch.randn(5, 4)
    codebook[2] = 0
    leaves = [z.requires_grad_(), codebook.requires_grad_()]
    ours, theirs = (
        torch.autograd.grad(
            residual_quantize(z, [codebook], 9.0, seed=1, eps=1e-3, backend=b).quantized.square().sum(), leaves
        )
        for b in ("native", "reference")
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * theirs[0].abs().max().item())


@pytest.mark.parametrize("mode", GRADIENT_MODES)
def test_bits_do_not_depend_on_the_number_of_threads(mode: str) -> None:
    """Of everything but torch's matrix products, whose own bits may: sizes so small that they run on one thread."""
    inputs = scaled(make(Quantize(n=150, d=4, sizes=(64, 9)), torch.float32), 20.0, 0.5)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            result = residual_quantize(*inputs, mode=mode, seed=11, backend="native")
            loss = weighted_sum(differentiable(result), [torch.tensor(1.0)] * 5)
            runs.append([*differentiable(result), *torch.autograd.grad(loss, inputs.leaves)])
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for a, b in zip(run, runs[0], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * max(1, b.abs().max().item()))


def test_backward_without_some_upstream_gradients() -> None:
    inputs = make(Quantize(n=9, d=5, sizes=(7, 6)), torch.float32)
    wide = Inputs(
        *(
            x.detach().double().requires_grad_()
            if isinstance(x, Tensor)
            else [c.detach().double().requires_grad_() for c in x]
            for x in inputs
        )
    )
    picks: list[Callable[..., Tensor]] = [
        lambda r: r.quantized[:, 0].sum(),
        lambda r: (r.usage[1] ** 2).sum(),
        lambda r: r.log_normalizer.sum(),
        lambda r: r.residuals[:, 1].square().sum(),
    ]
    for pick in picks:
        ours, theirs = (
            torch.autograd.grad(pick(residual_quantize(*x, seed=5, backend=b)), x.leaves, allow_unused=True)
            for x, b in ((inputs, "native"), (wide, "reference"))
        )
        wanted = [
            torch.zeros_like(a, dtype=torch.float64) if b is None else b for a, b in zip(ours, theirs, strict=True)
        ]
        assert_all_near(gradient_names(inputs), ours, wanted, sizes=[largest_norm(wanted)] * len(wanted))


MEMORY = """
import sys, torch
import torch.nn.functional as F
from dgi_kernels import residual_quantize
torch.set_num_threads(2)
tau, peaked = float(sys.argv[1]), sys.argv[2] == "peaked"
def peak():  # in KB; not ru_maxrss, which begins with that of the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
def run(n):
    books = [F.normalize(torch.randn(k, 64), dim=-1) for k in (4096, 1024, 256)]
    z = torch.randn(n, 64)
    if peaked:  # rows near a path of codes
        books = [0.5**j * b for j, b in enumerate(books)]
        z = sum(b[torch.randint(len(b), (n,))] for b in books) + 0.02 * z
    leaves = [x.requires_grad_() for x in (z, *books)]
    before = peak()
    result = residual_quantize(*leaves[:1], leaves[1:], 30.0, tau, seed=1, backend="native")
    result.quantized.sum().backward()
    return peak() - before
run(256)
print(run(16384))
"""


@pytest.mark.parametrize(("assignments", "tau"), [("flat", 1.0), ("flat", 0.1), ("peaked", 0.5)])
def test_memory_stays_far_below_one_assignment_matrix(assignments: str, tau: float) -> None:
    """N = 16384, D = 64, K up to 4096: under 100 MiB, results and gradients included; one N x K alone is 256 MiB."""
    added = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tau), assignments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "DGI_POISON": "0"},
    ).stdout
    assert 4 < int(added) / 1024 < 100  # the residuals alone take 12


@pytest.mark.parametrize("seeded", [True, False])
def test_ops_are_well_registered(seeded: bool) -> None:
    ops = torch.ops.dgi_kernels
    z, books, scale, tau = torch.randn(5, 3), torch.randn(9, 3), torch.tensor(9.0), torch.tensor(0.8)
    seed, sigma, values, padding = None, None, None, None
    if seeded:
        seed, sigma, values, padding = torch.tensor([3]), torch.rand(5), torch.randn(9, 2), torch.rand(5) < 0.5
    options = ([4, 5], scale, tau, seed, sigma, values, padding, 7, 0, 0, 1e-12, 0 if seeded else 2)
    library.opcheck(ops.residual_quantize.default, (z, books, *options[:-1], 0))  # room is left as it was
    result = ops.residual_quantize(z, books, *options)
    upstream = (torch.randn(5, 2, 3), None, None, torch.randn(5, 2), torch.randn(5, 2, 2) if seeded else None)
    wanted = (True, seeded, True, not seeded, seeded, seeded)
    library.opcheck(
        ops.residual_quantize_backward.default,
        (*upstream, result[4], result[2], result[5], *result[7:], books, *options[:-1], *wanted),
    )


def test_direct_callers_are_stopped_too() -> None:
    ops = torch.ops.dgi_kernels
    z, books, one, none = torch.randn(5, 3), torch.randn(9, 3), torch.tensor(1.0), (None,) * 4
    with pytest.raises(RuntimeError, match="sizes must add up"):
        ops.residual_quantize(z, books, [4, 4], one, one, *none, 0, 0, 0, 1e-12, 0)
    with pytest.raises(RuntimeError, match="mode must be"):
        ops.residual_quantize(z, books, [9], one, one, *none, 0, 3, 0, 1e-12, 0)
    with pytest.raises(RuntimeError, match="metric must be"):
        ops.residual_quantize(z, books, [9], one, one, *none, 0, 0, 9, 1e-12, 0)
    for name, i, wrong in (("noise_scale", 1, torch.ones(4)), ("values", 2, torch.ones(8, 2)), ("padding", 3, one)):
        given = [*none]
        given[i] = wrong
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            ops.residual_quantize(z, books, [9], one, one, *given, 0, 0, 0, 1e-12, 0)
    with pytest.raises(RuntimeError, match="metric must be"):
        ops.assign_codes(z, books, [9], -1, 1e-12)

    def backward(sampled: Tensor, *lists: Tensor, wants_sigma: bool = False) -> None:
        ops.residual_quantize_backward(
            *[None] * 5,
            torch.randn(2, 1, 3),
            sampled,
            torch.randn(2, 1),
            *lists,
            books,
            [9],
            one,
            one,
            *none,
            0,
            1,
            0,
            1e-12,
            *[True] * 4,
            wants_sigma,
            False,
        )

    def lists(ranges: list[int], codes: list[int]) -> tuple[Tensor, ...]:
        p = torch.full((len(codes),), 0.5)
        return torch.tensor(ranges).view(2, 1, 2), torch.tensor(codes, dtype=torch.int32), p

    fine = torch.zeros(2, 1, dtype=torch.int64)
    backward(fine, *lists([0, 2, 2, 4], [1, 8, 0, 3]))
    with pytest.raises(RuntimeError, match="needs a forward without lists"):
        backward(fine, *lists([0, 2, 2, 4], [1, 8, 0, 3]), wants_sigma=True)
    with pytest.raises(RuntimeError, match="sampled must hold codes"):
        backward(torch.full((2, 1), 9), *lists([0, 2, 2, 4], [1, 8, 0, 3]))
    for ranges, codes in (
        ([0, 2, 2, 4], [1, 9, 0, 3]),
        ([0, 2, 2, 4], [1, 8, -1, 3]),
        ([0, 2, 2, 4], [8, 1, 0, 3]),
        ([0, 2, 2, 5], [1, 8, 0, 3]),
        ([-1, 2, 2, 4], [1, 8, 0, 3]),
        ([2, 0, 2, 4], [1, 8, 0, 3]),
    ):
        with pytest.raises(RuntimeError, match="must hold ranges of ascending codes"):
            backward(fine, *lists(ranges, codes))
    with pytest.raises(RuntimeError, match="must be as forward returned them"):
        backward(fine, *lists([0, 2, 2, 4], [1, 8, 0, 3])[:2], torch.full((3,), 0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("shape", [*SHAPES, Quantize(n=1100, d=12, sizes=(2500, 1024, 7))], ids=name_of)
def test_assigned_codes_are_those_of_hard_mode(shape: Quantize, dtype: torch.dtype) -> None:
    """Compared by their cosines in float64: of codes within rounding of each other either will do."""
    inputs = make(shape, dtype)
    codes = assign_codes(inputs.z, inputs.codebooks, backend="native")
    assert codes.dtype == torch.int64 and codes.shape == (shape.n, len(shape.sizes))
    resolution = 1e-12 if dtype == torch.float64 else 1e-5
    residual = inputs.z.detach().double()
    for level, codebook in enumerate(inputs.codebooks):
        e = codebook.detach().double()
        cosines = F.normalize(residual, dim=-1, eps=1e-12) @ F.normalize(e, dim=-1, eps=1e-12).T
        chosen = cosines.gather(1, codes[:, level : level + 1])[:, 0]
        assert (chosen >= cosines.amax(1) - resolution).all()
        residual = residual - e[codes[:, level]]
    by_reference = residual_quantize(
        inputs.z, inputs.codebooks, 9.0, mode="hard", noise=False, backend="reference"
    ).codes
    if dtype == torch.float64 and shape.d > 3:
        assert torch.equal(codes, by_reference)


def test_assigned_codes_of_awkward_rows() -> None:
    z, codebook = torch.randn(7, 5), torch.randn(1500, 5)
    codebook[1400] = codebook[3]  # a tie in another tile: the lower code
    z[0], z[1], z[2], z[3, 2] = codebook[3], 0, 1e15 * codebook[8], torch.nan
    codes = assign_codes(z, [codebook], backend="native")[:, 0]
    assert codes[:4].tolist() == [3, 0, 8, 0]
    codebook[1300] = torch.nan  # torch's argmax takes the first NaN
    assert assign_codes(z, [codebook], backend="native")[:, 0].tolist() == [1300, 1300, 1300, 0, 1300, 1300, 1300]
    assert assign_codes(z[:0], [codebook], backend="native").shape == (0, 1)
    with pytest.raises(ValueError, match=r"codebooks\[0\]"):
        assign_codes(z, [codebook[:, :4]])


@pytest.mark.parametrize("scale", [0.0, 3.0, -30.0, 300.0])
@pytest.mark.parametrize("seed", [None, 5])
def test_hard_mode_over_several_tiles_of_codes(scale: float, seed: int | None) -> None:
    """Its running maxima and log-sum-exp, with noise and without, against the reference over all codes at once."""
    inputs = peaked(600, 16, (2600, 70), torch.float64)
    ours, theirs = (
        residual_quantize(inputs.z, inputs.codebooks, scale, 0.3, mode="hard", seed=seed, backend=b)
        for b in ("native", "reference")
    )
    assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.sampled, theirs.sampled)
    for a, b in zip(differentiable(ours), differentiable(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    narrow = residual_quantize(
        inputs.z.float(), [c.float() for c in inputs.codebooks], scale, 0.3, mode="hard", seed=seed, backend="native"
    ).log_normalizer[:, 0]
    torch.testing.assert_close(narrow.double(), theirs.log_normalizer[:, 0], rtol=1e-4, atol=1e-4)
