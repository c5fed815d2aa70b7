"""Residual quantization in Triton against float64: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .interpreter import (
    DEVICE,
    DTYPES,
    GPU,
    INTERPRETED,
    TRITON,
    choose_form,
    launcher,
    run_in_the_interpreter,
    runs,
    seed_tensor,
)
from .near import assert_all_near, gradients
from .quantize_cases import Inputs, oracle
from .shapes import Quantize, name_of

if TRITON and (GPU or INTERPRETED):
    from dgi_kernels import ResidualQuantization, assign_codes, gumbel_noise, residual_quantize
    from dgi_kernels import tiles as measured
    from dgi_kernels.quantize import triton_forms as forms
    from dgi_kernels.quantize import triton_gradients as gradients_of_levels

    flash_config = forms.flash_config


@launcher
def test_all_of_this_file_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@pytest.fixture(params=["flash", "chunked"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A form of the launchers; what they allocate holds NaN until it is written."""
    choose_form(monkeypatch, forms, request.param, step=32)
    monkeypatch.setattr(gradients_of_levels, "PROBABILITY_CODES", 16)
    if request.param == "flash" and random.random() < 0.5:  # as where means do not fit the registers
        b_d_and_config = forms.flash_config
        monkeypatch.setattr(
            forms, "flash_config", lambda *of: (b_d_and_config(*of)[0], b_d_and_config(*of)[1]._replace(forward=None))
        )
    monkeypatch.setattr(forms, "ROW_LARGEST", random.choice([16, 40]))  # rows of 33 codes in two passes, or in one
    if INTERPRETED:  # tiles as Hopper's, or as other GPUs'
        threads = random.choice([1, 4])
        monkeypatch.setattr(forms, "threads_of_row", lambda device: threads)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield request.param
    torch.use_deterministic_algorithms(before)


# The least there is; a level of one code; several tiles of rows and, of 32 codes, of codes.
SHAPES = [Quantize(n=1, d=1, sizes=(1,)), Quantize(n=6, d=3, sizes=(4, 1, 3)), Quantize(n=35, d=7, sizes=(9, 33))]


def inputs(shape: Quantize, dtype: torch.dtype) -> list[Tensor]:
    # Lengths stay away from 0, where the cosine's gradient, 1 / length, has no digits left to compare.
    n, d, sizes = shape
    tensors = [
        F.normalize(torch.randn(rows, d, device=DEVICE), dim=1)
        * d**0.5
        * torch.empty(rows, 1, device=DEVICE).uniform_(0.5, 2)
        for rows in (n, *sizes)
    ]
    return [x.to(dtype).requires_grad_() for x in tensors]


def scalars(scale: float, tau: float) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(scale, device=DEVICE, requires_grad=True),
        torch.tensor(tau, device=DEVICE, requires_grad=True),
    )


def assert_exact(
    leaves: Sequence[Tensor],
    scale: Tensor,
    tau: Tensor,
    mode: str,
    weights: Sequence[float] = (1, 1, 1, 9),
    noise: bool = True,
    eps: float = 1e-12,
    metric: str = "cosine",
    sigma: Tensor | None = None,
    rows: Tensor | None = None,
    mixed: Sequence[Tensor] = (),
) -> ResidualQuantization:
    """Every result and every gradient, for gradients of every result (``weights``: 0 for none), against float64;
    ``mixed`` are the values."""
    dtype = leaves[0].dtype
    seed, row_offset = seed_tensor(), random.choice([0, 5, 2**32 - len(leaves[0])])

    def quantize(values: Sequence[Tensor], backend: str) -> ResidualQuantization:
        z, *codebooks = values[: len(leaves)]
        scale, tau, *others = values[len(leaves) :]
        return residual_quantize(
            z,
            codebooks,
            scale,
            tau,
            mode=mode,
            metric=metric,
            noise=noise,
            seed=seed,
            row_offset=row_offset,
            eps=eps,
            values=others[: len(mixed)] if mixed else None,
            noise_scale=None if sigma is None else others[-1],
            noise_rows=rows,
            backend=backend,
        )

    values = [*leaves, scale, tau, *mixed, *([] if sigma is None else [sigma])]
    exact = [x.detach().double().requires_grad_() for x in values]
    actual, usual = quantize(values, "triton"), quantize(values, "reference")
    z, *codebooks = exact[: len(leaves)]
    of_rows = torch.ones_like(z[:, 0]) if rows is None else rows.double()
    truth = oracle(
        Inputs(z, codebooks, *exact[len(leaves) : len(leaves) + 2]),
        mode,
        seed if noise else None,
        actual,
        row_offset,
        eps,
        metric,
        sigma=of_rows if sigma is None else of_rows * exact[-1],
        values=exact[len(leaves) + 2 :][: len(mixed)] if mixed else None,
    )
    same_path = torch.equal(actual.codes, usual.codes) and torch.equal(actual.sampled, usual.sampled)
    assert actual.quantized.dtype == actual.residuals.dtype == dtype

    def results(result: ResidualQuantization) -> list[Tensor]:
        found = [result.quantized, result.residuals, result.log_normalizer, torch.cat(list(result.usage))]
        return found if result.mixtures is None else [*found, result.mixtures]

    # At a near-tie the reference goes another way, and says nothing of this one; a soft path does not follow the codes.
    compared = results(usual) if same_path or mode == "soft" else None
    assert_all_near(
        ("quantized", "residuals", "log_normalizer", "usage", "mixtures")[: 5 if mixed else 4],
        results(actual),
        results(truth),
        compared,
        dtype=dtype,
        sizes=(1e-2, 1e-2, 1e-2, 0, 1e-2)[: 5 if mixed else 4],
    )
    if mode == "hard":
        assert not actual.quantized.requires_grad
        return actual

    def loss(result: ResidualQuantization) -> Tensor:
        return sum(
            (
                weight
                * (
                    x.double() * torch.linspace(-1, 2, x.numel(), device=DEVICE, dtype=torch.float64).view(x.shape)
                ).sum()
                for weight, x in zip((*weights, 1)[: 5 if mixed else 4], results(result), strict=True)
                if weight
            ),
            torch.tensor(0.0),
        )

    wanted, found = gradients(loss(truth), exact), gradients(loss(actual), values)
    names = ["z", *(f"codebooks[{j}]" for j in range(len(leaves) - 1)), "scale", "tau"]
    names += [*(f"values[{j}]" for j in range(len(mixed))), "noise_scale"][: len(values) - len(names)]
    # Where a gradient cancels to nothing, what it is summed from is still rounded.
    largest = max(x.norm().item() for x in wanted)
    assert_all_near(
        [f"gradient of {name}" for name in names],
        found,
        wanted,
        gradients(loss(usual), values) if compared is not None else None,
        dtype=dtype,
        sizes=[0.1 * largest] * len(names),
    )
    return actual


@runs
@pytest.mark.parametrize(
    ("mode", "noise"), [("soft", True), ("straight_through", True), ("hard", True), ("soft", False)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_quantization(form: str, shape: Quantize, dtype: torch.dtype, mode: str, noise: bool) -> None:
    leaves, (scale, tau) = inputs(shape, dtype), scalars(random.uniform(2, 6), random.uniform(0.6, 1.5))
    result = assert_exact(leaves, scale, tau, mode, noise=noise)
    chosen = {"straight_through": result.sampled, "hard": result.codes}.get(mode)
    if chosen is not None:  # exactly one row of the codebook
        for level, codebook in enumerate(leaves[1:]):
            assert torch.equal(result.quantized[:, level], codebook[chosen[:, level]])


@runs
@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_dot_products(form: str, mode: str) -> None:
    """Lengths count, in scores and in gradients: nothing is projected out. In float32, whose codes are float64's."""
    leaves = inputs(random.choice(SHAPES), torch.float32)
    with torch.no_grad():
        leaves[1][0] = 0
    assert_exact(
        leaves,
        *scalars(random.uniform(0.2, 1), random.uniform(0.6, 1.5)),
        mode,
        noise=random.random() < 0.5,
        metric="dot",
    )


@runs
@pytest.mark.parametrize("mode", ["soft", "straight_through", "hard"])
def test_distances(form: str, mode: str) -> None:
    leaves, scale = inputs(random.choice(SHAPES), random.choice(DTYPES)), random.choice([-0.3, 0.3, 0.9])
    result = assert_exact(
        leaves, *scalars(scale, random.uniform(0.6, 1.5)), mode, noise=random.random() < 0.5, metric="euclidean"
    )
    chosen = {"straight_through": result.sampled, "hard": result.codes}.get(mode)
    if chosen is not None:  # exactly one row of the codebook
        for level, codebook in enumerate(leaves[1:]):
            assert torch.equal(result.quantized[:, level], codebook[chosen[:, level]])


@runs
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_scale_of_the_noise_and_its_rows(form: str, metric: str) -> None:
    mode = random.choice(["soft", "straight_through", "hard"])
    leaves = inputs(random.choice(SHAPES), random.choice(DTYPES))
    sigma = torch.tensor(random.choice([0.4, 1.6]), device=DEVICE, requires_grad=True)
    rows = random.choice([None, torch.rand(len(leaves[0]), device=DEVICE) < 0.6])
    assert_exact(leaves, *scalars(0.8, random.uniform(0.6, 1.5)), mode, metric=metric, sigma=sigma, rows=rows)


@runs
@pytest.mark.parametrize("mode", ["soft", "straight_through"])
def test_rows_without_noise_sample_their_code(form: str, mode: str) -> None:
    """Also of codes that are so near each other that the rounding of another formula would choose another."""
    z = torch.randn(64, 16, device=DEVICE)
    codebook = torch.randn(16, device=DEVICE) + 1e-7 * torch.randn(16, 16, device=DEVICE)
    given = random.choice([{"noise_scale": 0.0}, {"noise_rows": torch.zeros(64, dtype=torch.bool, device=DEVICE)}])
    result = residual_quantize(z, [codebook, codebook], 7.3, mode=mode, seed=3, backend="triton", **given)
    assert torch.equal(result.sampled, result.codes)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("mode", ["soft", "straight_through"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_values(form: str, metric: str, mode: str, dtype: torch.dtype) -> None:
    """Mixed by the weights of the codebooks: their gradients, and what they add to those of the weights."""
    leaves = inputs(SHAPES[1], dtype)
    width = random.choice([1, 5, 16])
    mixed = [torch.randn(len(x), width, device=DEVICE).to(dtype).requires_grad_() for x in leaves[1:]]
    sigma = random.choice([None, torch.tensor(0.6, device=DEVICE, requires_grad=True)])
    result = assert_exact(leaves, *scalars(0.9, 0.8), mode, metric=metric, sigma=sigma, mixed=mixed)
    assert result.mixtures is not None and result.mixtures.dtype == dtype
    if mode == "straight_through":
        for level, value in enumerate(mixed):
            assert torch.equal(result.mixtures[:, level], value[result.sampled[:, level]])


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("offset", [0.0, 1e3] if GPU else [300.0])
def test_nearest_codes_far_from_zero_and_near_each_other(form: str, offset: float, dtype: torch.dtype) -> None:
    """Codes are those of float64 wherever the two nearest differ by more than 1e-5 of the distance.

    Pairs of codes near each other, rows near them. Guards against products that cancel and operands that are rounded.
    """
    centre = offset * torch.randn(16, device=DEVICE)
    codebook = torch.randn(35, 16, device=DEVICE).repeat_interleave(2, 0)
    codebook = (codebook + 1e-3 * torch.randn(70, 16, device=DEVICE) + centre).to(dtype)
    z = (codebook[torch.arange(40, device=DEVICE)] + 3e-4 * torch.randn(40, 16, device=DEVICE)).to(dtype)
    nearest, order = (z.double().unsqueeze(1) - codebook.double()).square().sum(-1).sqrt().sort(dim=1, stable=True)
    clear = nearest[:, 1] - nearest[:, 0] > 1e-5 * nearest[:, 0]
    assert dtype == torch.float16 or clear.float().mean() > 0.9
    for mode in random.choice([("soft", "hard"), ("straight_through", "hard")]):
        result = residual_quantize(z, [codebook], 9.0, mode=mode, metric="euclidean", noise=False, backend="triton")
        assert torch.equal(result.codes[clear, 0], order[clear, 0]) and torch.equal(result.sampled, result.codes)
    assert torch.equal(assign_codes(z, [codebook], metric="euclidean", backend="triton"), result.codes)
    none = residual_quantize(z, [codebook], 0.0, metric="euclidean", noise=False, backend="triton")
    assert not none.codes.any()


@runs
@pytest.mark.parametrize("only", range(4), ids=["quantized", "residuals", "log_normalizer", "usage"])
def test_gradient_of_one_result_alone(form: str, only: int) -> None:
    weights, mode = [float(only == i) for i in range(4)], random.choice(["soft", "straight_through"])
    assert_exact(inputs(Quantize(6, 16, (18, 7)), torch.float32), *scalars(4.0, 0.8), mode, weights)


def errors_of_rows(
    leaves: Sequence[Tensor], scale: float, tau: float, upstream: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    """The relative error of each row's gradient, of one level, in a dtype."""

    def gradient(dtype: torch.dtype, backend: str) -> Tensor:
        z, codebook = (x.detach().to(dtype).requires_grad_() for x in leaves)
        result = residual_quantize(z, [codebook], scale, tau, seed=5, backend=backend)
        return torch.autograd.grad((result.quantized[:, 0] * upstream.to(dtype)).sum(), z)[0].double()

    truth = gradient(torch.float64, "reference")
    return (gradient(dtype, backend) - truth).norm(dim=1) / truth.norm(dim=1)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_peaked_rows_lose_nothing(form: str, dtype: torch.dtype) -> None:
    """Rows near a code at a low temperature: all but one of a row's p are small, and so is its gradient, a difference
    of numbers that 16 bits round. It is as exact as any other's."""
    codebook = torch.randn(70, 16, device=DEVICE)
    near = codebook[torch.arange(17, device=DEVICE) * 4] + 0.05 * torch.randn(17, 16, device=DEVICE)
    leaves = [x.to(dtype).requires_grad_() for x in (near, codebook)]
    assert_exact(leaves, *scalars(30.0, 0.3), "soft")
    errors = errors_of_rows(leaves, 10.0, 0.3, torch.randn(17, 16, device=DEVICE), dtype, "triton")
    assert errors.median() < (1e-3 if dtype == torch.float32 else 0.02)


@runs
def test_codes_with_a_common_part_keep_their_gradients(form: str) -> None:
    """Products of z with codes that point one way are large and nearly equal, as is their mean, which is rounded."""
    sizes = (17, random.choice([96, 40]))
    leaves = [(3.0 + torch.randn(n, 16, device=DEVICE)).to(torch.float16).requires_grad_() for n in sizes]
    assert_exact(leaves, *scalars(10.0, 2.0), "soft", (1, 0, 0, 9))
    upstream = 0.5 + torch.randn(17, 16, device=DEVICE)
    ours, usual = (
        errors_of_rows(leaves, 10.0, 2.0, upstream, torch.float16, backend) for backend in ("triton", "reference")
    )
    assert ours.median() < max(2e-3, 0.5 * usual.median())


@runs
def test_zero_and_tiny_vectors(form: str) -> None:
    """A zero vector has cosine 0 with everything, a gradient of 1 / eps; an ``eps`` above a norm takes its place."""
    z, *codebooks = inputs(Quantize(6, 16, (5, 4)), torch.float32)
    with torch.no_grad():
        z[1], z[2], codebooks[0][3] = 0, z[2] * 1e-3, 0
    assert_exact([z, *codebooks], *scalars(4.0, 0.8), "soft", eps=0.05)


@runs
def test_rows_with_nan_and_ties(form: str) -> None:
    z, codebook = torch.randn(5, 16, device=DEVICE), torch.randn(7, 16, device=DEVICE)
    codebook[5] = codebook[2]
    z[0], z[1] = torch.nan, codebook[2]
    for mode in ("soft", "straight_through", "hard"):
        result = residual_quantize(z, [codebook], 3.0, mode=mode, seed=1, backend="triton")
        assert result.log_normalizer[0].isnan().all() and result.log_normalizer[1:].isfinite().all()
        assert mode == "hard" or result.quantized[0].isnan().all()
        assert result.codes[0] == 0 and result.codes[1] == 2, "ties go to the lower code"
        assert result.quantized[1:].isfinite().all()


@runs
@pytest.mark.parametrize("codes", [3, 40, 100, 300, 700, 1500])
def test_the_first_of_equal_codes(form: str, codes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they lie: each thread finds the best of its own codes first, of which it has one or up to 32."""
    monkeypatch.setattr(forms, "flash_config", flash_config)
    monkeypatch.setattr(forms, "ROW_LARGEST", 8192)
    monkeypatch.setattr(forms, "CHUNK_BYTES", 1 << 20)
    dtype = torch.bfloat16 if GPU and form == "flash" else torch.float32
    few, z = (torch.randint(-1, 2, (rows, 16), device=DEVICE).to(dtype) for rows in (random.randint(1, 6), 20))
    codebook = few[torch.randint(len(few), (codes,))]
    scores = (z.float() @ codebook.float().T).cpu().numpy()  # exact, and argmax takes the first
    first, seed = scores.argmax(1).tolist(), seed_tensor()
    noisy = scores + gumbel_noise(seed, 0, *scores.shape, backend="reference").cpu().numpy()
    for threads in (1, 4) if form == "flash" and INTERPRETED else (None,):
        if threads is not None:
            monkeypatch.setattr(forms, "threads_of_row", lambda device, threads=threads: threads)
        result = residual_quantize(z, [codebook], 1.0, metric="dot", noise=False, backend="triton")
        assert result.codes[:, 0].tolist() == result.sampled[:, 0].tolist() == first, "not the first of equal codes"
        result = residual_quantize(z, [codebook], 1.0, metric="dot", seed=seed, backend="triton")
        assert result.codes[:, 0].tolist() == first, "not the first of equal codes"
        assert noisy[np.arange(20), result.sampled[:, 0].cpu()] == pytest.approx(noisy.max(1), abs=1e-4)


@runs
def test_anomalies_are_not_seen_where_nothing_is_wrong(form: str) -> None:
    """Autograd's search for NaN looks at gradients that nobody wants, too."""
    z, *codebooks = inputs(Quantize(n=6, d=3, sizes=(4, 3)), torch.float32)
    with torch.autograd.detect_anomaly(check_nan=True):
        result = residual_quantize(z, codebooks, 3.0, 0.7, seed=1, backend="triton")
        (result.quantized.sum() + result.usage[0].square().sum()).backward()
    assert z.grad is not None and z.grad.isfinite().all()


@runs
def test_views_empty_batches_and_repeats(form: str) -> None:
    z, codebook = torch.randn(12, 40, device=DEVICE), torch.randn(7, 20, device=DEVICE)
    for view in (z[:, ::2], z[::3, 5:25], z[:1, :20].expand(4, 20), z[:0, :20]):
        first = residual_quantize(view, [codebook, codebook], 3.0, seed=1, backend="triton")
        again = residual_quantize(view.contiguous(), [codebook, codebook], 3.0, seed=1, backend="triton")
        for a, b in zip(
            (first.quantized, first.log_normalizer, *first.usage),
            (again.quantized, again.log_normalizer, *again.usage),
            strict=True,
        ):
            assert torch.equal(a, b)
    empty = z[:0, :20].clone().requires_grad_()
    result = residual_quantize(empty, [codebook], 3.0, seed=1, backend="triton")
    assert result.usage[0].tolist() == [0] * 7
    assert torch.autograd.grad(result.quantized.sum(), empty)[0].shape == (0, 20)


@runs
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_padding_and_leading_dimensions(form: str, metric: str) -> None:
    """Results and gradients are the reference's, and rows that are padding may hold anything."""
    mode = random.choice(["soft", "straight_through", "hard"])
    leaves, mask = inputs(Quantize(12, 5, (9, 4)), torch.float32), torch.rand(2, 6, device=DEVICE) < 0.4
    with torch.no_grad():
        leaves[0][mask.flatten()] = torch.nan
    found = []
    for backend in ("triton", "reference"):
        z, *codebooks = leaves
        result = residual_quantize(
            z.reshape(2, 6, 5), codebooks, 0.5, metric=metric, mode=mode, mask=mask, seed=4, backend=backend
        )  # fmt: skip
        assert not torch.cat([x[mask].flatten() for x in (result.quantized, result.log_normalizer)]).any()
        assert (result.codes[mask] == -1).all() and (result.sampled[mask] == -1).all()
        tensors = [result.quantized, result.residuals, result.log_normalizer, *result.usage]
        if mode != "hard":
            weighted = [x * torch.linspace(-1, 2, x.numel(), device=DEVICE).view(x.shape) for x in tensors]
            loss = sum((x.sum() for x in weighted), z.new_zeros(()))
            tensors += torch.autograd.grad(loss, leaves)
        found.append((tensors, result.codes, result.sampled))
    (ours, *our_codes), (theirs, *their_codes) = found
    assert all(torch.equal(a, b) for a, b in zip(our_codes, their_codes, strict=True))
    assert_all_near([str(i) for i in range(len(ours))], ours, [x.double() for x in theirs], sizes=[1.0] * len(ours))


@runs
def test_ranks_draw_what_one_process_would(form: str) -> None:
    z, codebook = torch.randn(9, 16, device=DEVICE), torch.randn(7, 16, device=DEVICE)
    whole = residual_quantize(z, [codebook], 3.0, seed=4, backend="triton")
    part = residual_quantize(z[5:], [codebook], 3.0, seed=4, row_offset=5, backend="triton")
    assert torch.equal(whole.sampled[5:], part.sampled)
    torch.testing.assert_close(whole.quantized[5:], part.quantized, rtol=0, atol=1e-5)


on_a_gpu = pytest.mark.skipif(not GPU, reason="the tiles of the launchers are too large for the interpreter")


@runs
@on_a_gpu
@pytest.mark.parametrize("tiles", ["none", measured.FALLBACK] if TRITON and GPU else ["none"])
@pytest.mark.parametrize("dim", [64, 128, 256, 768])
def test_at_size_on_a_gpu(dim: int, tiles: str) -> None:
    """At the launchers' own tiles, and at those of one warpgroup: several chunks, sums split, every gradient."""
    leaves = inputs(Quantize(5000, dim, (1030, 256)), torch.bfloat16)
    with measured.override(tiles):
        assert_exact(leaves, *scalars(30.0, 1.0), "soft", (1, 0, 0, 9))


@runs
@on_a_gpu
@pytest.mark.parametrize("mode", ["soft", "straight_through"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_bits_repeat_on_a_gpu(dim: int, mode: str) -> None:
    """The size of a training step, many times: a race of two warpgroups would show as other bits."""
    leaves, (scale, tau) = inputs(Quantize(65536, dim, (4096, 256)), torch.bfloat16), scalars(30.0, 0.5)

    def step() -> list[Tensor]:
        z, *codebooks = leaves
        result = residual_quantize(z, codebooks, scale, tau, mode=mode, seed=3, backend="triton")
        loss = result.quantized.float().square().sum() + torch.cat(list(result.usage)).square().sum()
        return [
            result.quantized,
            result.sampled,
            result.log_normalizer,
            *torch.autograd.grad(loss, (*leaves, scale, tau)),
        ]

    first = step()
    for _ in range(20):
        for again, before in zip(step(), first, strict=True):
            assert torch.equal(again, before)
