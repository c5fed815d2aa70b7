"""The noise and Gumbel-Softmax in Triton against float64: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from .interpreter import (
    DEVICE,
    DTYPES,
    GPU,
    INTERPRETED,
    TRITON,
    launcher,
    run_in_the_interpreter,
    runs,
    seed_tensor,
)
from .near import assert_all_near, assert_near
from .shapes import name_of

if TRITON and (GPU or INTERPRETED):
    from dgi_kernels import gumbel_noise, gumbel_softmax
    from dgi_kernels.gumbel import triton_softmax

SMALL = 0x03800000  # words below which the kernels take their parabola, A x^2 + B x + C
A, B, C = 3.946412786535432e-20, 3.359009737025076e-10, 1.679504868512538e-10


@launcher
def test_all_of_this_file_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@runs
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (70, 33), (3, 600)], ids=name_of)
def test_noise_is_as_defined(shape: tuple[int, int]) -> None:
    seed, level, stream = seed_tensor(), random.randrange(2**32), random.randrange(2**32)
    row_offset = random.choice([0, random.randrange(2**31), 2**32 - shape[0]])
    actual = triton_softmax.gumbel_noise(seed, level, stream, row_offset, *shape)
    expected = gumbel_noise(seed, level, *shape, stream=stream, row_offset=row_offset, backend="reference")
    assert (actual - expected).abs().max() < 2e-5


def worst_noise_error(words: np.ndarray) -> float:
    """Of the kernel's formula, with each logarithm wrong by the most that PTX allows ``lg2.approx``, either way."""
    single = np.float32

    def log2(x: np.ndarray, sign: int) -> np.ndarray:
        exact = np.log2(x.astype(np.float64))
        allowed = np.where((x > 0.5) & (x < 2), 1.0, np.abs(exact)) * 2.0**-22
        return (exact + sign * allowed).astype(single)

    def fma(x: np.ndarray, y: np.ndarray | float, z: float) -> np.ndarray:
        return (x.astype(np.float64) * y + z).astype(single)

    small = words < SMALL
    f = np.where(small, words, ~words).astype(single)
    a, b, c = (float(single(value)) for value in (A, B, C))
    parabola = fma(fma(f, a, b), f.astype(np.float64), c)
    v = fma(f, 2.0**-32, 2.0**-33)
    exact = -np.log(-np.log1p(-(words.astype(np.float64) + 0.5) * 2.0**-32))
    worst = 0.0
    for first in (-1, 1):
        for second in (-1, 1):
            g = (single(0.5287663729448977) - log2(np.where(small, parabola, -log2(v, first)), second)).astype(
                np.float64
            )
            worst = max(worst, float(np.abs(g * math.log(2) - exact).max()))
    return worst


def test_noise_formula_holds_with_the_worst_logarithms() -> None:
    """Both ends, both sides of the seam, and a sample between. triton_noise.gumbel_less_base, in numpy."""
    seams = np.concatenate(
        [
            np.arange(2**16),
            2**32 - 1 - np.arange(2**16),
            SMALL + np.arange(-(2**15), 2**15),
            np.random.randint(0, 2**32, 2**19),
            2 ** (np.random.rand(2**18) * 32),
        ]
    )
    assert worst_noise_error(seams.astype(np.uint32)) < 2e-5


def test_constants_are_the_same_everywhere() -> None:
    """In Triton's assembly, in what is interpreted instead, and in C++; the test above has those of this file."""
    root = Path(__file__).parents[2]
    triton, header = (
        (root / path).read_text() for path in ("dgi_kernels/gumbel/triton_noise.py", "csrc/include/dgi/gumbel_log2.h")
    )
    words = [int(word, 16) for word in re.findall(r"\b0f([0-9A-F]{8})\b", triton)]
    assembly = np.array(words, np.uint32).view(np.float32).tolist()
    assert assembly == np.array([A, B, C, 2.0**-32, 2.0**-33], np.float32).tolist()
    assert f"setp.ge.u32 large, $1, 0x{SMALL:08X};" in triton and f"SMALL = tl.constexpr(0x{SMALL:08X})" in triton
    assert f"f * (f * {A} + {B}) + {C}\n" in triton
    assert f"f * (f * {A}f + {B}f) + {C}f;" in header and f"word < 0x{SMALL:08X}u" in header


@runs
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("shape", [(5,), (1, 1), (7, 3), (2, 3, 9), (33, 65), (0, 4)], ids=name_of)
def test_softmax(shape: tuple[int, ...], dtype: torch.dtype, hard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        monkeypatch.setattr(triton_softmax, "SOFTMAX_TILES", ((4, 4), (2, 32)))
    seed, x = seed_tensor(), (torch.randn(shape, device=DEVICE) * 3).to(dtype).requires_grad_()
    tau = torch.tensor(random.uniform(0.3, 2), device=DEVICE, requires_grad=True)
    actual = gumbel_softmax(x, tau, hard, seed=seed, backend="triton")
    exact, exact_tau = (value.detach().double().requires_grad_() for value in (x, tau))
    expected = gumbel_softmax(exact, exact_tau, hard, seed=seed, backend="reference")
    assert actual.dtype == dtype
    assert_near("softmax", actual, expected)

    upstream = torch.randn_like(actual)
    gradients = torch.autograd.grad((actual * upstream).sum(), (x, tau))
    truths = torch.autograd.grad((expected * upstream.double()).sum(), (exact, exact_tau))
    assert_all_near(("gradient of logits", "gradient of tau"), gradients, truths, dtype=dtype, sizes=(0.1, 0.1))


@runs
def test_softmax_edge_values() -> None:
    inf = torch.inf
    x = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, -inf], [0.0, torch.nan, 1.0], [2.0, -inf, -inf]], device=DEVICE)
    for hard in (False, True):
        p = gumbel_softmax(x, hard=hard, seed=3, backend="triton")
        assert p[0, 1] == 0 and p[0].sum().item() == pytest.approx(1)
        assert p[3].tolist() == [1, 0, 0]
        assert p[1].isnan().all() and p[2].isnan().all()


@runs
def test_more_tiles_than_a_grid_has_in_y(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of codes were once in the grid's second dimension, which CUDA ends at 65,535."""
    if not GPU:
        monkeypatch.setattr(triton_softmax, "NOISE_TILES", ((2, 8),))
    seed, (rows, codes) = seed_tensor(), (1, 40_000_000) if GPU else (5, 70)
    actual = triton_softmax.gumbel_noise(seed, 1, 0, 5, rows, codes)
    expected = gumbel_noise(seed, 1, rows, codes, row_offset=5, backend="reference")
    assert (actual - expected).abs().max() < 2e-5
