"""Residual quantization by metrics other than the cosine, against the float64 oracle: reference and C++."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import _extension, assign_codes, gumbel_noise, residual_quantize
from dgi_kernels.enums import METRICS, MODES

from .near import assert_all_near, gradients
from .quantize_cases import (
    GRADIENT_MODES,
    Inputs,
    assert_matches_oracle,
    differentiable,
    gradient_names,
    make,
    scores,
)
from .shapes import QUANTIZE, Quantize, name_of

BACKENDS = [
    "reference",
    pytest.param(
        "native", marks=pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))
    ),
]
LENGTHS = [metric for metric in METRICS if metric != "cosine"]  # in which the lengths of the vectors count
SHAPES = (*QUANTIZE, Quantize(n=37, d=24, sizes=(300, 1, 257)), Quantize(n=301, d=16, sizes=(512, 70)))


def near_a_code(n: int, d: int, sizes: tuple[int, ...]) -> Inputs:
    """Rows near a path of codes, so that few codes count: they leave the tile as lists."""
    codebooks = [(0.5**j * torch.randn(size, d)).requires_grad_() for j, size in enumerate(sizes)]
    z = sum((codebook.detach()[torch.randint(len(codebook), (n,))] for codebook in codebooks), 0.02 * torch.randn(n, d))
    return Inputs(z.requires_grad_(), codebooks, torch.tensor(2.0).requires_grad_(), torch.tensor(0.5).requires_grad_())


@pytest.mark.parametrize("seeded", [True, False], ids=["noise", "plain"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("metric", LENGTHS)
@pytest.mark.parametrize("name", BACKENDS)
def test_quantization_and_gradients(
    name: str, metric: str, shape: Quantize, dtype: torch.dtype, mode: str, seeded: bool
) -> None:
    assert_matches_oracle(
        make(shape, dtype), mode, random.randrange(2**63) if seeded else None, metric=metric, backend=name
    )


@pytest.mark.parametrize("with_tau", [True, False], ids=["tau", "constant"])  # without, noise takes one logarithm
@pytest.mark.parametrize("mode", GRADIENT_MODES)
@pytest.mark.parametrize("metric", LENGTHS)
@pytest.mark.parametrize("name", BACKENDS)
def test_rows_of_few_codes(name: str, metric: str, mode: str, with_tau: bool) -> None:
    assert_matches_oracle(
        near_a_code(600, 32, (520, 96)), mode, random.randrange(2**63), with_tau, metric=metric, backend=name
    )


def test_gradients_of_dot_products_by_hand() -> None:
    """One level, straight through: nothing is projected out, and the lengths of codes have a gradient."""
    z, (codebook,), scale, tau = inputs = make(Quantize(n=5, d=4, sizes=(6,)))
    upstream = torch.randn(5, 4, dtype=torch.float64)
    noise = gumbel_noise(8, 0, 5, 6, backend="reference").double()
    p = ((scale * z @ codebook.T + noise) / tau).softmax(-1)
    dp = upstream @ codebook.T
    ds = p * (dp - (p * dp).sum(-1, keepdim=True)) / tau
    for name in ("reference", "native") if _extension.load_error is None else ("reference",):
        result = residual_quantize(*inputs, mode="straight_through", metric="dot", seed=8, backend=name)
        one_hot = torch.nn.functional.one_hot(result.sampled[:, 0], 6).double()
        expected = [
            scale * ds @ codebook,
            scale * ds.T @ z + one_hot.T @ upstream,
            (ds * (z @ codebook.T)).sum(),
            -(ds * (scale * z @ codebook.T + noise)).sum() / tau,
        ]
        assert_all_near(
            gradient_names(inputs), gradients((result.quantized[:, 0] * upstream).sum(), inputs.leaves), expected
        )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("metric", LENGTHS)
def test_gradcheck_and_gradients_of_gradients(metric: str, name: str) -> None:
    z, codebooks, scale, tau = make(Quantize(n=3, d=2, sizes=(3, 2)))

    def run(z: Tensor, e0: Tensor, e1: Tensor, scale: Tensor, tau: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            differentiable(residual_quantize(z, [e0, e1], 0.3 * scale, tau, metric=metric, seed=2, backend=name))
        )

    assert torch.autograd.gradcheck(run, (z, *codebooks, scale, tau))
    assert torch.autograd.gradgradcheck(run, (z, *codebooks, scale, tau))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("metric", LENGTHS)
@pytest.mark.parametrize("name", BACKENDS)
def test_assigned_codes_are_the_best(name: str, metric: str, dtype: torch.dtype) -> None:
    """Over several tiles of codes: each is within rounding of the best of float64, and they are those of hard mode."""
    inputs = make(Quantize(n=700, d=12, sizes=(2500, 1024, 7)), dtype)
    codes = assign_codes(inputs.z, inputs.codebooks, metric=metric, backend=name)
    residual, resolution = inputs.z.detach().double(), 1e-12 if dtype == torch.float64 else 1e-5
    for level, codebook in enumerate(c.detach().double() for c in inputs.codebooks):
        s = scores(metric, residual, codebook, torch.tensor(1.0))
        assert (s.gather(1, codes[:, level : level + 1])[:, 0] >= s.amax(1) - resolution).all()
        residual = residual - codebook[codes[:, level]]
    hard = residual_quantize(inputs.z, inputs.codebooks, 3.0, mode="hard", metric=metric, noise=False, backend=name)
    if dtype == torch.float64:
        assert torch.equal(codes, hard.codes)


@pytest.mark.parametrize("metric", ["cosine", "dot", "euclidean"])
def test_codes_alone_are_those_beside_log_normalizers(metric: str) -> None:
    """The kernel makes codes alone in one pass, which must find what the other finds: NaN, infinite scores and ties."""
    z, codebook = torch.randn(40, 7), torch.randn(1300, 7)
    z[3, 2], z[5], z[6], z[7, 0] = torch.nan, 0, 1e30, torch.inf
    codebook[900:] = codebook[:400].clone()
    for dtype in (torch.float32, torch.float64):
        x, e = z.to(dtype), codebook.to(dtype)
        hard = residual_quantize(x, [e], 1.0, mode="hard", metric=metric, noise=False, backend="native").codes
        codes = assign_codes(x, [e], metric=metric, backend="native")
        assert torch.equal(codes, hard) and (codes < 900).all() and codes[3] == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_long_codes_win_by_dot_products_alone(name: str) -> None:
    z = torch.randn(50, 8).abs()
    codebook = torch.rand(9, 8)
    codebook[4] *= 100
    assert (assign_codes(z, [codebook], metric="dot", backend=name) == 4).all()
    assert not (assign_codes(z, [codebook], backend=name) == 4).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("metric", LENGTHS)
@pytest.mark.parametrize("name", BACKENDS)
def test_awkward_rows(name: str, metric: str, mode: str) -> None:
    z, codebook = torch.randn(6, 5), torch.randn(70, 5)
    z[1], z[3, 2], codebook[7] = 0, torch.nan, 0
    run = residual_quantize(z, [codebook], 3.0, mode=mode, metric=metric, seed=0, backend=name)
    assert run.log_normalizer[:, 0].isnan().tolist() == [False, False, False, True, False, False]
    assert run.quantized[[0, 1, 2, 4, 5]].isfinite().all()
    empty = residual_quantize(z[:0], [codebook], 3.0, mode=mode, metric=metric, seed=0, backend=name)
    assert empty.quantized.shape == (0, 1, 5) and empty.usage[0].tolist() == [0.0] * 70
    with pytest.raises(ValueError, match="^metric must be one of 'cosine', 'dot', 'euclidean'"):
        residual_quantize(z, [codebook], metric="hamming", scale=1.0)
    with pytest.raises(ValueError, match="^metric must be one of 'cosine', 'dot', 'euclidean'"):
        assign_codes(z, [codebook], metric=None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3])
@pytest.mark.parametrize("name", BACKENDS)
def test_nearest_codes_far_from_zero_and_near_each_other(name: str, offset: float, dtype: torch.dtype) -> None:
    """Codes are those of float64 wherever the two nearest differ by more than 1e-5 of the distance.

    Pairs of codes 1e-3 apart, rows near them: squared distances are 1e-6 of the squared spread. Guards against products
    that cancel.
    """
    centre = offset * torch.randn(16)
    codebook = torch.randn(300, 16).repeat_interleave(2, 0)
    codebook = (codebook + 1e-3 * torch.randn(600, 16) + centre).to(dtype)
    z = (codebook[torch.randint(600, (500,))] + 3e-4 * torch.randn(500, 16)).to(dtype)
    distances = (z.double().unsqueeze(1) - codebook.double()).square().sum(-1).sqrt()
    nearest, order = distances.sort(dim=1)
    clear = nearest[:, 1] - nearest[:, 0] > 1e-5 * nearest[:, 0]
    assert clear.float().mean() > 0.9
    ways = [
        assign_codes(z, [codebook], metric="euclidean", backend=name),
        *(
            residual_quantize(z, [codebook], 9.0, mode=mode, metric="euclidean", noise=False, backend=name).codes
            for mode in MODES
        ),
    ]
    for way, codes in enumerate(ways):
        assert torch.equal(codes[clear, 0], order[clear, 0]), way


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=name_of)
@pytest.mark.parametrize("scale", [1.0, -0.7])
@pytest.mark.parametrize("name", BACKENDS)
def test_nearest_codes_of_very_unequal_lengths(name: str, scale: float, dtype: torch.dtype) -> None:
    """A score is rounded by its own code's length: short codes need no recheck because of a long one, and the longest
    is still found where rounding hides it among shorter ones."""
    length = 10 ** torch.empty(1500, 1).uniform_(-4, 1)
    codebook = F.normalize(torch.randn(1500, 16), dim=1) * length
    codebook[700:800] = codebook[700] * (1 + 1e-7 * torch.randn(100, 16))  # beside the origin and beside each other
    codebook[800:900] = 9 * F.normalize(torch.randn(16), dim=0) * (1 + 1e-6 * torch.randn(100, 16))
    codebook = codebook.to(dtype)
    z = torch.cat([codebook + 3e-2 * length.to(dtype) * torch.randn(1500, 16), torch.randn(100, 16)]).to(dtype)
    distances = (z.double().unsqueeze(1) - codebook.double()).square().sum(-1).sqrt()
    best, order = distances.sort(dim=1, descending=scale < 0)
    clear = (best[:, 1] - best[:, 0]).abs() > 1e-5 * best[:, 0]
    assert clear.float().mean() > 0.8
    for mode in MODES:
        run = residual_quantize(z, [codebook], scale, mode=mode, metric="euclidean", noise=False, backend=name)
        assert torch.equal(run.codes[clear, 0], order[clear, 0]), mode
    if scale > 0:
        codes = assign_codes(z, [codebook], metric="euclidean", backend=name)
        assert torch.equal(codes[clear, 0], order[clear, 0])


@pytest.mark.parametrize("name", BACKENDS)
def test_the_farthest_code_by_a_negative_scale_and_the_first_by_none(name: str) -> None:
    z, codebook = torch.randn(40, 5), torch.randn(1100, 5)
    farthest = torch.cdist(z.double(), codebook.double()).argmax(1)
    for mode in MODES:
        far = residual_quantize(z, [codebook], -2.0, mode=mode, metric="euclidean", noise=False, backend=name)
        assert torch.equal(far.codes[:, 0], farthest) and torch.equal(far.sampled, far.codes)
        none = residual_quantize(z, [codebook], 0.0, mode=mode, metric="euclidean", noise=False, backend=name)
        assert not none.codes.any()
