"""Residual quantization against a float64 oracle, level by level."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import BackendUnavailable, assign_codes, gumbel_noise, gumbel_softmax, residual_quantize

from .near import ROUNDING, assert_all_near, gradients
from .quantize_cases import (
    GRADIENT_MODES,
    Inputs,
    differentiable,
    gradient_names,
    largest_norm,
    make,
    oracle,
    result_names,
    weighted_sum,
)
from .shapes import QUANTIZE, Quantize, name_of


@pytest.mark.parametrize("op", ["gumbel_softmax", "residual_quantize"])
def test_manual_seed_governs_what_has_no_seed(op: str) -> None:
    x, codebook = torch.randn(4, 3), torch.randn(3, 3)

    def draw() -> Tensor:
        return gumbel_softmax(x) if op == "gumbel_softmax" else residual_quantize(x, [codebook], 1.0).quantized

    torch.manual_seed(5)
    first, second = draw(), draw()
    torch.manual_seed(5)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("shape", QUANTIZE, ids=name_of)
def test_quantization_and_gradients(shape: Quantize, dtype: torch.dtype, mode: str, noise: bool) -> None:
    inputs, seed, row_offset = make(shape, dtype), random.randrange(2**63), random.randrange(2**31)
    result = residual_quantize(
        inputs.z,
        inputs.codebooks,
        inputs.scale,
        inputs.tau,
        mode=mode,
        noise=noise,
        seed=seed,
        row_offset=row_offset,
        backend="reference",
    )
    expected = oracle(inputs, mode, seed if noise else None, result, row_offset)
    compared = differentiable(result), differentiable(expected)
    names = result_names(inputs)
    assert all(actual.dtype == dtype for actual in compared[0])
    assert_all_near(names, *compared, sizes=[1.0] * len(names))
    if mode != "hard" and (dtype == torch.float64 or shape.d > 3):  # in few dimensions residuals may come near to 0
        weights = [torch.randn_like(truth) for truth in compared[1]]
        ours, theirs = (gradients(weighted_sum(c, weights), inputs.leaves) for c in compared)
        assert_all_near(gradient_names(inputs), ours, theirs, dtype=dtype, sizes=[largest_norm(theirs)] * len(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_low_precision_is_the_float32_result_rounded(mode: str, dtype: torch.dtype) -> None:
    inputs = make(Quantize(n=33, d=7, sizes=(9, 33, 5)), dtype)
    result = residual_quantize(*inputs, mode=mode, seed=4)
    wide = residual_quantize(
        inputs.z.float(),
        [c.float() for c in inputs.codebooks],
        inputs.scale.float(),
        inputs.tau.float(),
        mode=mode,
        seed=4,
    )
    assert torch.equal(result.codes, wide.codes) and torch.equal(result.sampled, wide.sampled)
    assert torch.equal(result.quantized, wide.quantized.to(dtype))
    assert torch.equal(result.residuals, wide.residuals.to(dtype))
    assert result.log_normalizer.dtype == result.usage[0].dtype == torch.float32
    assert torch.equal(result.log_normalizer, wide.log_normalizer)


@pytest.mark.parametrize("mode", GRADIENT_MODES)
def test_quantize_gradcheck(mode: str) -> None:
    """Straight-through's gradient is not its forward's derivative, but for usage and log-normalizer of level 0."""
    z, codebooks, scale, tau = make(Quantize(n=3, d=2, sizes=(3, 2)))

    def run(z: Tensor, e0: Tensor, e1: Tensor, scale: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
        result = residual_quantize(z, [e0, e1], scale, tau, mode=mode, seed=2)
        if mode == "soft":
            return tuple(differentiable(result))
        return result.usage[0], result.log_normalizer[:, 0]

    assert torch.autograd.gradcheck(run, (z, *codebooks, scale, tau))


def test_straight_through_backward_is_the_soft_jacobian_by_hand() -> None:
    """One level: dL/ds = J_softmax (E dz~) / tau at the soft p, and dL/dE through the values at the one-hot."""
    inputs = make(Quantize(n=5, d=4, sizes=(6,)))
    z, (codebook,), scale, tau = inputs
    result = residual_quantize(*inputs, mode="straight_through", seed=8, backend="reference")
    upstream = torch.randn_like(result.quantized[:, 0])
    actual = gradients((result.quantized[:, 0] * upstream).sum(), inputs.leaves)

    unit_z, unit_e = F.normalize(z, dim=-1), F.normalize(codebook, dim=-1)
    s = scale * unit_z @ unit_e.T
    p = ((s + gumbel_noise(8, 0, 5, 6, backend="reference").double()) / tau).softmax(-1)
    dp = upstream @ codebook.T
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / tau
    cosine = unit_z @ unit_e.T
    dz = scale * (ds @ unit_e - (ds * cosine).sum(-1, keepdim=True) * unit_z) / z.norm(dim=-1, keepdim=True)
    dkey = scale * (ds.T @ unit_z - (ds * cosine).sum(0).unsqueeze(1) * unit_e) / codebook.norm(dim=-1, keepdim=True)
    dvalue = F.one_hot(result.sampled[:, 0], 6).double().T @ upstream
    dtau = -(ds * (s + gumbel_noise(8, 0, 5, 6, backend="reference").double())).sum() / tau
    assert_all_near(gradient_names(inputs), actual, [dz, dkey + dvalue, (ds * cosine).sum(), dtau])


def test_straight_through_equals_hard_gumbel_softmax_times_codebook() -> None:
    """The composition it stands for, with PyTorch's own F.gumbel_softmax and its noise replaced by ours."""
    inputs = make(Quantize(n=5, d=4, sizes=(6,)))
    z, (codebook,), scale, tau = inputs
    noisy = scale * F.normalize(z, dim=-1) @ F.normalize(codebook, dim=-1).T + gumbel_noise(
        8, 0, 5, 6, backend="reference"
    )
    soft = (noisy / tau).softmax(-1)
    hard = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0) - soft.detach() + soft
    upstream = torch.randn(5, 4, dtype=torch.float64)
    ours = residual_quantize(*inputs, mode="straight_through", seed=8, backend="reference").quantized[:, 0]
    assert_all_near(
        gradient_names(inputs), *(gradients((x * upstream).sum(), inputs.leaves) for x in (ours, hard @ codebook))
    )


@pytest.mark.parametrize("mode", ["straight_through", "hard"])
@pytest.mark.parametrize("dtype", ROUNDING, ids=name_of)
def test_discrete_modes_emit_rows_of_the_codebook_bit_for_bit(mode: str, dtype: torch.dtype) -> None:
    """Guards against y - p + p in place of y: it left rows that were off by an ulp of p."""
    inputs = make(Quantize(n=33, d=7, sizes=(9, 33, 5)), dtype)
    result = residual_quantize(*inputs, mode=mode, seed=1)
    chosen = result.codes if mode == "hard" else result.sampled
    for level, codebook in enumerate(inputs.codebooks):
        assert torch.equal(result.quantized[:, level], codebook[chosen[:, level]])


def test_noise_free_soft_is_deterministic_and_leaves_the_generator_alone() -> None:
    inputs = make(Quantize(n=6, d=4, sizes=(5, 3)))
    state = torch.get_rng_state()
    for mode in ("soft", "straight_through", "hard"):
        result = residual_quantize(*inputs, mode=mode, noise=False)
        assert torch.equal(result.sampled, result.codes)
        assert torch.equal(result.quantized, residual_quantize(*inputs, mode=mode, noise=False, seed=3).quantized)
    assert torch.equal(torch.get_rng_state(), state)


def test_hard_mode_has_noise_only_with_a_seed_and_never_in_what_it_emits() -> None:
    inputs = make(Quantize(n=50, d=4, sizes=(7, 5)))
    plain, seeded = residual_quantize(*inputs, mode="hard"), residual_quantize(*inputs, mode="hard", seed=3)
    assert torch.equal(plain.sampled, plain.codes)
    assert not torch.equal(seeded.sampled, seeded.codes)
    for name in ("quantized", "codes", "residuals"):
        assert torch.equal(getattr(plain, name), getattr(seeded, name)), name
    for a, b in zip(plain.usage, seeded.usage, strict=True):
        assert torch.equal(a, b)
    assert not any(tensor.requires_grad for tensor in differentiable(plain))


def test_hard_usage_counts_codes() -> None:
    inputs = make(Quantize(n=40, d=3, sizes=(6, 4)))
    result = residual_quantize(*inputs, mode="hard")
    for level, usage in enumerate(result.usage):
        counts = torch.bincount(result.codes[:, level], minlength=len(usage))
        assert torch.equal(usage, counts.double() / 40)


@pytest.mark.parametrize("size", [1, 2, 31, 64, 1000, 4099])
def test_ties_go_to_the_lower_code(size: int) -> None:
    """Vectors of +-1 in four dimensions: all cosines are exact, so equal ones are equal bits."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)))
    z, codebook = signs[torch.randint(16, (20,))], signs[torch.randint(16, (size,))]
    best = (z @ codebook.T).tolist()
    expected = [row.index(max(row)) for row in best]
    for mode in ("soft", "hard"):
        result = residual_quantize(z, [codebook], 8.0, mode=mode, noise=False)
        assert result.codes[:, 0].tolist() == result.sampled[:, 0].tolist() == expected


@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_empty_batch(mode: str) -> None:
    inputs = make(Quantize(n=0, d=4, sizes=(5, 1)))
    result = residual_quantize(*inputs, mode=mode, seed=0)
    assert result.quantized.shape == result.residuals.shape == (0, 2, 4)
    assert result.codes.shape == result.sampled.shape == result.log_normalizer.shape == (0, 2)
    assert [usage.tolist() for usage in result.usage] == [[0.0] * 5, [0.0]]
    if mode != "hard":
        for gradient in gradients(weighted_sum(differentiable(result), [torch.tensor(1.0)] * 5), inputs.leaves):
            assert not gradient.any()


def test_row_offset_draws_what_one_process_would() -> None:
    """Two halves with their row numbers: same noise, so same bits wherever the product's bits do not depend on N."""
    inputs = make(Quantize(n=12, d=4, sizes=(5, 3)))
    whole = residual_quantize(*inputs, seed=6, row_offset=100)
    halves = [
        residual_quantize(inputs.z[rows], *inputs[1:], seed=6, row_offset=100 + rows.start)
        for rows in (slice(0, 5), slice(5, 12))
    ]
    for name in ("quantized", "residuals", "log_normalizer"):
        torch.testing.assert_close(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))
    assert torch.equal(torch.cat([half.sampled for half in halves]), whole.sampled)
    alone = residual_quantize(inputs.z[5:], *inputs[1:], seed=6)
    assert not torch.allclose(alone.quantized, whole.quantized[5:])


def test_strides_and_shared_inputs() -> None:
    inputs = make(Quantize(n=6, d=4, sizes=(6, 6)), torch.float32)
    z, (e0, e1), scale, tau = inputs
    plain = residual_quantize(z, [e0, e1], scale, tau, seed=1)
    views = F.pad(e0, (1, 2))[:, 1:-2], e1.T.contiguous().T
    strided = residual_quantize(z.T.contiguous().T, views, scale, tau, seed=1)
    torch.testing.assert_close(strided.quantized, plain.quantized)
    expanded = residual_quantize(z[:1].expand(6, 4), [e0], scale, tau, noise=False)
    torch.testing.assert_close(expanded.quantized, expanded.quantized[:1].expand(6, 1, 4))

    codebook = inputs.codebooks[0].detach().double().requires_grad_()  # z and every codebook one and the same tensor
    tied = Inputs(codebook, [codebook, codebook], scale.detach().double().requires_grad_(), tau.detach().double())
    ours = residual_quantize(*tied, seed=1, backend="reference")
    truth = oracle(tied, "soft", 1, ours)
    weights = [torch.randn_like(t) for t in differentiable(truth)]
    leaves = [codebook, tied.scale]
    assert_all_near(
        ("gradient of the codebook", "gradient of scale"),
        gradients(weighted_sum(differentiable(ours), weights), leaves),
        gradients(weighted_sum(differentiable(truth), weights), leaves),
    )


def test_zero_vectors_are_quantized_by_the_uniform_distribution() -> None:
    codebook = torch.randn(5, 3)
    result = residual_quantize(torch.zeros(2, 3), [codebook], 30.0, noise=False)
    torch.testing.assert_close(result.quantized[:, 0], codebook.mean(0).expand(2, 3))
    torch.testing.assert_close(result.log_normalizer, torch.full((2, 1), math.log(5)))


def test_nan_stays_in_its_row() -> None:
    inputs = make(Quantize(n=5, d=4, sizes=(6, 3)))
    z = inputs.z.detach().clone()
    z[2, 1] = torch.nan
    for mode in GRADIENT_MODES:
        result = residual_quantize(z, *inputs[1:], mode=mode, seed=0)
        assert result.quantized[:, 0].isnan().any(-1).tolist() == [False, False, True, False, False]
        assert result.log_normalizer[:, 0].isnan().tolist() == [False, False, True, False, False]
    result = residual_quantize(z, *inputs[1:], mode="hard")
    assert result.codes[2, 0] == 0
    assert result.log_normalizer[:, 0].isnan().tolist() == [False, False, True, False, False]


def test_bits_repeat() -> None:
    inputs = make(QUANTIZE[-1], torch.float32)
    for mode in GRADIENT_MODES:
        runs = []
        for _ in range(2):
            result = residual_quantize(*inputs, mode=mode, seed=11)
            loss = weighted_sum(differentiable(result), [torch.tensor(1.0)] * len(differentiable(result)))
            runs.append(
                [*differentiable(result), result.codes, result.sampled, *torch.autograd.grad(loss, inputs.leaves)]
            )
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_keeps_full_precision() -> None:
    inputs = make(Quantize(n=9, d=4, sizes=(6, 3)), torch.float32)
    z, codebooks, scale, tau = inputs
    expected = residual_quantize(*inputs, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        result = residual_quantize(*inputs, seed=2)
        mixed = residual_quantize(z.bfloat16(), codebooks, scale, tau, seed=2)
        logits = torch.randn(3, 4, dtype=torch.bfloat16)
        assert gumbel_softmax(logits, seed=1).dtype == torch.bfloat16
    assert torch.equal(result.quantized, expected.quantized)
    assert mixed.quantized.dtype == torch.float32
    rounded = residual_quantize(z.bfloat16().float(), codebooks, scale, tau, seed=2)
    assert torch.equal(mixed.quantized, rounded.quantized)


def test_no_grad() -> None:
    inputs = make(Quantize(n=3, d=4, sizes=(6,)))
    with torch.no_grad():
        result = residual_quantize(*inputs, seed=2)
    assert not any(tensor.requires_grad for tensor in differentiable(result))
    assert torch.equal(result.quantized, residual_quantize(*inputs, seed=2).quantized)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("z", [[1.0]], TypeError),
        ("z", torch.tensor(3.0), ValueError),
        ("values", torch.randn(5, 2), TypeError),
        ("values", [], ValueError),
        (r"values\[0\]", [torch.randn(4, 2)], ValueError),
        (r"values\[0\]", [torch.randn(5, 2).double()], TypeError),
        (r"values\[0\]", [torch.randn(5)], ValueError),
        ("noise_scale", float("nan"), ValueError),
        ("noise_scale", torch.ones(2), ValueError),
        ("noise_rows", torch.ones(2), TypeError),
        ("noise_rows", torch.ones(3, dtype=torch.bool), ValueError),
        ("mask", [True, False], TypeError),
        ("mask", torch.ones(2, 1, dtype=torch.bool), ValueError),
        ("z", torch.ones(2, 3, dtype=torch.int32), TypeError),
        ("codebooks", torch.randn(5, 3), TypeError),
        ("codebooks", 3, TypeError),
        ("codebooks", [], ValueError),
        (r"codebooks\[1\]", [torch.randn(5, 3), torch.randn(5, 2)], ValueError),
        (r"codebooks\[1\]", [torch.randn(5, 3), torch.randn(0, 3)], ValueError),
        (r"codebooks\[0\]", [torch.randn(3)], ValueError),
        (r"codebooks\[0\]", [torch.randn(5, 3).double()], TypeError),
        (r"codebooks\[0\]", [torch.randn(5, 3, device="meta")], TypeError),
        (r"codebooks\[0\]", [None], TypeError),
        ("scale", float("inf"), ValueError),
        ("scale", torch.ones(2), ValueError),
        ("tau", 0, ValueError),
        ("tau", torch.tensor(float("nan")), ValueError),
        ("mode", "gumbel", ValueError),
        ("mode", None, ValueError),
        ("noise", 1, TypeError),
        ("seed", "7", TypeError),
        ("row_offset", -1, ValueError),
        ("row_offset", 2**32 - 1, ValueError),
        ("row_offset", 1.0, TypeError),
        ("eps", -1e-12, ValueError),
        ("backend", None, ValueError),
    ],
)
def test_bad_quantize_arguments_are_named(name: str, value: object, error: type[Exception]) -> None:
    arguments = {
        "z": torch.randn(2, 3),
        "codebooks": [torch.randn(5, 3)],
        name.removesuffix(r"\[0\]").removesuffix(r"\[1\]"): value,
    }
    with pytest.raises(error, match=rf"^{name} must"):
        residual_quantize(**arguments)


def test_a_backend_asked_for_by_name_says_why_it_cannot_run() -> None:
    z, codebooks = torch.randn(2, 3), [torch.randn(4, 3)]
    with pytest.raises(BackendUnavailable, match="cannot run residual_quantize here: "):
        residual_quantize(z, codebooks, 1.0, backend="triton")
    with pytest.raises(BackendUnavailable, match="cannot run assign_codes here: "):  # the op that was called
        assign_codes(z, codebooks, backend="triton")
