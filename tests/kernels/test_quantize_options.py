"""Options of residual quantization: leading dimensions, padding, the noise's scale and rows, values, rotation.

Against the float64 oracle, on the reference and in C++.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import ResidualQuantization, _extension, assign_codes, residual_quantize
from dgi_kernels.enums import METRICS, MODES

from .near import assert_all_near, gradients
from .quantize_cases import GRADIENT_MODES, Inputs, differentiable, largest_norm, make, oracle, peaked, weighted_sum
from .shapes import Quantize, name_of

BACKENDS = [
    "reference",
    pytest.param(
        "native", marks=pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))
    ),
]
DTYPES = (torch.float64, torch.float32)
SHAPES = [
    Quantize(n=1, d=1, sizes=(1,)),
    Quantize(n=0, d=4, sizes=(5,)),
    Quantize(n=33, d=7, sizes=(9, 33, 5)),
    Quantize(n=301, d=16, sizes=(512, 70)),
]


def named(tensors: Sequence[Tensor], what: str) -> list[str]:
    return [f"{what} {i} of {len(tensors)}" for i in range(len(tensors))]


def assert_matches(
    inputs: Inputs, mode: str, name: str, metric: str, *, sigma: Tensor | None = None, rows: Tensor | None = None,
    values: list[Tensor] | None = None,
) -> ResidualQuantization:  # fmt: skip
    """Results and all gradients of a call with noise of a scale, of some rows, and with values."""
    seed = random.randrange(2**63)
    options: dict[str, Any] = {"noise_scale": sigma, "noise_rows": rows, "values": values}
    leaves = [*inputs.leaves, *([] if sigma is None else [sigma]), *(values or [])]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    z, *codebooks, scale, tau = exact[: len(inputs.leaves)]
    rest = exact[len(inputs.leaves) :]
    spread = torch.ones(len(z), dtype=torch.float64) if rows is None else rows.double()
    if sigma is not None:
        spread = spread * rest.pop(0)
    result = residual_quantize(*inputs, mode=mode, metric=metric, seed=seed, backend=name, **options)
    exact_inputs, exact_values = Inputs(z, codebooks, scale, tau), rest if values else None
    truth = oracle(exact_inputs, mode, seed, result, metric=metric, sigma=spread, values=exact_values)
    results, truths = differentiable(result), differentiable(truth)
    assert_all_near(named(results, "result"), results, truths, sizes=[1.0] * len(results))
    if mode == "hard":
        assert not any(x.requires_grad for x in results)
    elif inputs.z.dtype == torch.float64 or inputs.z.shape[1] > 3:  # in few dimensions residuals may come near to 0
        weights = [torch.randn_like(x) for x in truths]
        ours, theirs = (
            gradients(weighted_sum(results, weights), leaves),
            gradients(weighted_sum(truths, weights), exact),
        )
        sizes = [max(1.0, largest_norm(theirs))] * len(theirs)
        assert_all_near(named(leaves, "gradient"), ours, theirs, dtype=inputs.z.dtype, sizes=sizes)
    return result


def values_of(inputs: Inputs, width: int) -> list[Tensor]:
    return [torch.randn(len(c), width, dtype=c.dtype).requires_grad_() for c in inputs.codebooks]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("name", BACKENDS)
def test_scale_of_the_noise_its_rows_and_values(name: str, shape: Quantize, dtype: torch.dtype, mode: str) -> None:
    for metric in METRICS:
        inputs = make(shape, dtype)
        sigma = torch.tensor(random.choice([0.3, 1.7]), dtype=dtype).requires_grad_()
        rows = torch.rand(shape.n) < 0.6
        assert_matches(inputs, mode, name, metric, sigma=sigma)
        assert_matches(inputs, mode, name, metric, rows=rows)
        assert_matches(inputs, mode, name, metric, values=values_of(inputs, random.choice([1, 5, 24])))
        assert_matches(inputs, mode, name, metric, sigma=sigma, rows=rows, values=values_of(inputs, 3))


@pytest.mark.parametrize("tau", [1.0, 0.5])  # at which noise may take one logarithm, if its scale is 1
@pytest.mark.parametrize("mode", GRADIENT_MODES)
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_of_few_codes(name: str, mode: str, tau: float) -> None:
    """Rows that leave the tile as lists, beside rows that do not, with noise, without, and with half of it."""
    inputs = peaked(300, 32, (520, 96))._replace(
        scale=torch.tensor(30.0).requires_grad_(), tau=torch.tensor(tau).requires_grad_()
    )
    rows, sigma = torch.rand(300) < 0.5, torch.tensor(0.5)
    assert_matches(inputs, mode, name, "cosine", rows=rows, values=values_of(inputs, 8))
    assert_matches(inputs, mode, name, "cosine", sigma=sigma.requires_grad_(), values=values_of(inputs, 8))
    constant = inputs._replace(tau=torch.tensor(tau))
    result = residual_quantize(*constant, mode=mode, seed=3, noise_rows=rows, backend=name)
    for noise, kept in ((True, rows), (False, ~rows)):
        alike = residual_quantize(*constant, mode=mode, seed=3, noise=noise, backend=name)
        torch.testing.assert_close(result.log_normalizer[kept, 0], alike.log_normalizer[kept, 0])
        assert torch.equal(result.sampled[kept, 0], alike.sampled[kept, 0])


@pytest.mark.parametrize("name", BACKENDS)
def test_gradcheck(name: str) -> None:
    z, codebooks, scale, tau = make(Quantize(n=3, d=2, sizes=(3, 2)))
    sigma = torch.tensor(0.7, dtype=torch.float64).requires_grad_()
    values = values_of(Inputs(z, codebooks, scale, tau), 2)
    rows, mask = torch.tensor([True, True, False]), torch.tensor([False, True, False])

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        z, e0, e1, sigma, v0, v1 = leaves
        result = residual_quantize(
            z, [e0, e1], scale.detach(), tau.detach(), values=[v0, v1], noise_scale=sigma, noise_rows=rows, mask=mask,
            seed=2, backend=name,
        )  # fmt: skip
        return tuple(differentiable(result))

    leaves = (z, *codebooks, sigma, *values)
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", BACKENDS)
def test_padding(name: str, dtype: torch.dtype, mode: str) -> None:
    """The other rows are what they are without it, and two halves add up to the usage and gradients of the whole."""
    inputs = make(Quantize(n=50, d=8, sizes=(40, 9)), dtype)
    values, halves = values_of(inputs, 3), torch.rand(50) < 0.4
    halves[0], halves[1] = True, False
    parameters = [*inputs.codebooks, *values]
    weights: list[Tensor] = []

    def run(mask: Tensor | None) -> tuple[ResidualQuantization, Tensor, list[Tensor]]:
        """Result, gradient of z, and what adds up: usage times rows, gradients of parameters."""
        z = inputs.z.detach().clone().requires_grad_()
        kept = torch.ones(50, dtype=torch.bool) if mask is None else ~mask
        if mask is not None:
            with torch.no_grad():
                z[mask] = torch.nan
        r = residual_quantize(
            z, inputs.codebooks, 5.0, values=values, mode=mode, seed=3, mask=mask, backend=name
        )  # fmt: skip
        sums = [kept.sum() * u for u in r.usage]
        if mode == "hard":
            return r, z, sums
        rows = [r.quantized, r.residuals, r.log_normalizer, r.mixtures]
        if not weights:
            weights.extend(torch.randn_like(x) for x in [*rows, *sums])
        dz, *rest = torch.autograd.grad(weighted_sum([*rows, *sums], weights), [z, *parameters])
        return r, dz, [*sums, *rest]

    whole, dz, sums = run(None)
    (one, dz_one, one_sums), (two, dz_two, two_sums) = run(halves), run(~halves)
    for result, gradient, mask in ((one, dz_one, halves), (two, dz_two, ~halves)):
        for field in ("quantized", "residuals", "log_normalizer", "mixtures", "codes", "sampled"):
            own, theirs = getattr(result, field), getattr(whole, field)
            assert torch.equal(own[~mask], theirs[~mask]), field
            assert (own[mask] == (-1 if field in ("codes", "sampled") else 0)).all(), field
        if mode != "hard":
            assert_all_near(["gradient of z"], [gradient[~mask]], [dz[~mask].double()], dtype=dtype)
            assert not gradient[mask].any()
    added = [a.double() + b.double() for a, b in zip(one_sums, two_sums, strict=True)]
    assert_all_near(named(sums, "sum"), added, [x.double() for x in sums], dtype=dtype)
    nothing = residual_quantize(inputs.z, inputs.codebooks, mask=torch.ones(50, dtype=torch.bool), backend=name)
    assert not any(u.any() for u in nothing.usage)


@pytest.mark.parametrize("mode", [*MODES, "rotation"])
@pytest.mark.parametrize("name", BACKENDS)
def test_leading_dimensions(name: str, mode: str) -> None:
    """As of the flattened rows, noise included."""
    flat = make(Quantize(n=24, d=5, sizes=(7, 6)), torch.float32)
    values, mask, rows = values_of(flat, 4), torch.rand(24) < 0.3, torch.rand(24) < 0.5

    def run(leading: tuple[int, ...]) -> tuple[list[Tensor | None], Tensor, list[Tensor]]:
        z = flat.z.detach().requires_grad_()
        r = residual_quantize(
            z.reshape(*leading, 5), flat.codebooks, values=values, mask=mask.reshape(leading),
            noise_rows=rows.reshape(leading), mode=mode, seed=4, backend=name,
        )  # fmt: skip
        shaped = [r.quantized, r.codes, r.sampled, r.residuals, r.log_normalizer, r.mixtures]
        assert all(x.shape[: len(leading) + 1] == (*leading, 2) for x in shaped)
        return [x.flatten(0, len(leading) - 1) for x in shaped], z, r.usage

    expected, z, usage = run((24,))
    for leading in ((4, 6), (2, 3, 4), (1, 24)):
        actual, own, own_usage = run(leading)
        for a, b in zip([*actual, *own_usage], [*expected, *usage], strict=True):
            assert torch.equal(a, b)
        if mode != "hard":
            dz = [
                torch.autograd.grad((q[0] + q[3]).sum(), leaf, retain_graph=True)[0]
                for q, leaf in ((actual, own), (expected, z))
            ]
            assert torch.equal(*dz)
    one = residual_quantize(flat.z[0], flat.codebooks, mode=mode, seed=4, backend=name)
    assert one.codes.shape == (2,) and one.quantized.shape == (2, 5)
    codes = assign_codes(flat.z.reshape(2, 3, 4, 5), flat.codebooks, backend=name)
    assert torch.equal(codes.flatten(0, 2), assign_codes(flat.z, flat.codebooks, backend=name))
    assert assign_codes(flat.z[0], flat.codebooks, backend=name).shape == (2,)
    assert residual_quantize(torch.zeros(3, 0, 5), flat.codebooks, mode=mode, backend=name).codes.shape == (3, 0, 2)


def rotated(r: Tensor, e: Tensor) -> Tensor:
    """Section 4.2 of arXiv 2410.06424, as vector-quantize-pytorch 1.32 has it (``rotate_to``)."""
    u, q = r / r.norm(dim=-1, keepdim=True), e / e.norm(dim=-1, keepdim=True)
    w = F.normalize(u + q, dim=-1).detach()
    x = r.unsqueeze(1)
    x = x - 2 * (x @ w.unsqueeze(2) @ w.unsqueeze(1)) + 2 * (x @ u.detach().unsqueeze(2) @ q.detach().unsqueeze(1))
    return x.squeeze(1) * (e.norm(dim=-1, keepdim=True) / r.norm(dim=-1, keepdim=True)).detach()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("name", BACKENDS)
def test_rotation(name: str, dtype: torch.dtype, metric: str) -> None:
    inputs = make(Quantize(n=40, d=6, sizes=(9, 8, 5)), dtype)
    values = values_of(inputs, 2)
    arguments = (inputs.z, inputs.codebooks, 3.0)
    result = residual_quantize(*arguments, values=values, metric=metric, mode="rotation", backend=name)
    hard = residual_quantize(*arguments, values=values, metric=metric, mode="hard", backend=name)
    for field, own, theirs in zip(ResidualQuantization._fields, result, hard, strict=True):
        pairs = zip(own, theirs, strict=True) if field == "usage" else [(own, theirs)]
        assert all(torch.equal(a, b) for a, b in pairs), field
    z = inputs.z.detach().double().requires_grad_()
    r, emitted, seen = z, [], []
    for level, codebook in enumerate(inputs.codebooks):
        seen.append(r)
        emitted.append(rotated(r, codebook.detach().double()[result.codes[:, level]]))
        r = r - emitted[-1]
    truths = [torch.stack(emitted, 1), torch.stack(seen, 1)]
    weights = [torch.randn_like(x) for x in truths]
    assert_all_near(("quantized", "residuals"), [result.quantized, result.residuals], truths, dtype=dtype)
    ours = gradients(weighted_sum([result.quantized, result.residuals], weights), [inputs.z, *inputs.codebooks])
    (wanted,) = gradients(weighted_sum(truths, weights), [z])
    assert_all_near(["gradient of z"], ours[:1], [wanted], dtype=dtype)
    assert not any(gradient.any() for gradient in ours[1:]), "codebooks have none"
    assert not result.log_normalizer.requires_grad and not result.usage[0].requires_grad
    weight = torch.randn_like(result.mixtures)
    for level, gradient in enumerate(gradients((result.mixtures * weight).sum(), values)):
        one_hot = F.one_hot(result.codes[:, level], len(values[level])).double()
        torch.testing.assert_close(gradient, one_hot.T @ weight[:, level].double(), rtol=1e-5, atol=1e-6)


def test_rotation_of_vectors_without_a_direction_and_its_derivatives() -> None:
    z, codebook = torch.randn(5, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    z[0], z[1], z[2, 1], codebook[2] = 0, -codebook[0], torch.nan, 0
    z.requires_grad_()
    result = residual_quantize(z, [codebook, codebook], metric="euclidean", mode="rotation")
    (gradient,) = torch.autograd.grad(result.quantized.sum(), z)
    assert gradient[[0, 1, 3, 4]].isfinite().all() and result.quantized[2, 0].equal(codebook[0])
    assert gradient[0].abs().max() < 1e3, "a residual of 0 has no gradient of 1 / eps"
    (gradient,) = torch.autograd.grad(
        residual_quantize(z[:0], [codebook], mode="rotation").quantized.sum(), z, materialize_grads=True
    )
    assert not gradient.any()
    with torch.no_grad():
        assert not residual_quantize(z, [codebook], mode="rotation").quantized.requires_grad

    def run(change: Tensor) -> Tensor:
        return residual_quantize(start + change, [codebook], mode="rotation").quantized

    start = torch.randn(3, 4, dtype=torch.float64)
    zero, tangent, weight = torch.zeros(3, 4, dtype=torch.float64), torch.randn(3, 4).double(), torch.randn(3, 1, 4)
    forward = torch.func.jvp(run, (zero,), (tangent,))[1]
    backward = torch.func.vjp(run, zero)[1](weight.double())[0]
    torch.testing.assert_close((forward * weight).sum(), (backward * tangent).sum())


def test_nothing_else_changes_the_default() -> None:
    """A scale of 1, all rows, no padding: the bits of a call without them; a scale of 0 those of one without noise."""
    for dtype in (torch.float32, torch.bfloat16):
        z, codebooks, *_ = make(Quantize(n=300, d=16, sizes=(520, 9)), dtype)
        everything, nothing = torch.ones(300, dtype=torch.bool), torch.zeros(300, dtype=torch.bool)
        for mode in MODES:
            plain = residual_quantize(z, codebooks, 9.0, mode=mode, seed=1)
            same = residual_quantize(
                z, codebooks, 9.0, mode=mode, seed=1, noise_scale=1.0, noise_rows=everything, mask=nothing
            )
            quiet = residual_quantize(z, codebooks, 9.0, mode=mode, noise=False)
            for silent in ({"noise_scale": 0.0}, {"noise_rows": nothing}):
                other = residual_quantize(z, codebooks, 9.0, mode=mode, seed=1, **silent)
                assert all(torch.equal(a, b) for a, b in zip(differentiable(other), differentiable(quiet), strict=True))
                assert torch.equal(other.sampled, quiet.sampled)
            assert all(torch.equal(a, b) for a, b in zip(differentiable(same), differentiable(plain), strict=True))
            assert torch.equal(same.sampled, plain.sampled) and plain.mixtures is None
