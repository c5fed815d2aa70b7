"""log_normalizer against math.fsum in float64, on every backend but Triton's."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgi_kernels import Trie, backends, beam_step, log_normalizer

from .near import ROUNDING
from .sanitizers import assert_clean
from .shapes import name_of

BACKENDS = ("reference", *(["native"] if backends()["native"].available else []))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (1, 2, 31, 2048, 2049, 32_768, 33_000, 151_936)


def truth(row: Tensor) -> float:
    """log sum exp of one row, in float64; NaN as -inf, +inf as the largest number of the compute dtype."""
    largest = torch.finfo(torch.float64 if row.dtype == torch.float64 else torch.float32).max
    values = row.double().nan_to_num(nan=-math.inf, posinf=largest, neginf=-math.inf)
    top = float(values.max()) if len(values) else -math.inf
    if top == -math.inf:
        return top
    return top + math.log(float((values - top).exp().sum()))


def assert_right(got: Tensor, logits: Tensor) -> None:
    assert got.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    assert got.shape == logits.shape[:-1]
    expected = torch.tensor([truth(row) for row in logits.reshape(got.numel(), logits.shape[-1])], dtype=torch.float64)
    bound = ROUNDING[torch.float64] if logits.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(got.double().flatten(), expected, rtol=bound, atol=bound)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_length(backend: str, dtype: torch.dtype, size: int) -> None:
    logits = torch.randn(3, size) * random.choice([0.1, 3.0, 40.0]) + random.choice([0.0, 30.0, -80.0])
    assert_right(log_normalizer(logits.to(dtype), backend=backend), logits.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_shapes(backend: str, dtype: torch.dtype) -> None:
    """Slices, transposes, repeated rows, no leading dimension, several, and none of the rows or logits."""
    whole = (4 * torch.randn(4, 5, 3, 70)).to(dtype)
    for logits in (
        whole,
        whole[::2, 1:, :, 7:],
        whole.transpose(0, 2),
        whole.transpose(1, 3),
        whole[..., ::3],
        whole[0, 0, 0],
        whole[:1].expand(6, -1, -1, -1),
        whole[:0],
        whole[..., :0],
    ):
        before = logits.clone()
        assert_right(log_normalizer(logits, backend=backend), logits)
        assert torch.equal(before, logits)


@pytest.mark.parametrize("size", [5, 40_000])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_none(backend: str, dtype: torch.dtype, size: int) -> None:
    logits = torch.randn(8, size).to(dtype)
    logits[torch.rand(logits.shape) < 0.3] = math.nan
    logits[torch.rand(logits.shape) < 0.3] = -math.inf
    logits[0], logits[1], logits[2, -1] = math.nan, -math.inf, math.inf
    logits[3, 0] = torch.finfo(dtype).max
    assert_right(log_normalizer(logits, backend=backend), logits)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_level_of_a_vocabulary_is_a_slice(backend: str) -> None:
    """A step with it is that on the log-probabilities of the whole vocabulary."""
    trie = Trie.from_codes(torch.randint(0, 50, (300, 1)), codebook_sizes=[50])
    vocabulary = 3 * torch.randn(2, 1, 5000)
    level = vocabulary[..., 1200:1250]
    got = beam_step(trie, level, trie.root(2), num_beams=7, log_normalizer=log_normalizer(vocabulary, backend=backend))
    logp = vocabulary.double().log_softmax(-1)[..., 1200:1250]
    expected = beam_step(trie, logp, trie.root(2), num_beams=7, normalize="none", backend="reference")
    torch.testing.assert_close(got.scores, expected.scores, rtol=1e-6, atol=1e-6)
    assert torch.equal(got.tokens, expected.tokens)


def test_bits_repeat_whatever_the_threads() -> None:
    logits, threads = torch.randn(3, 200_000), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(log_normalizer(logits))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_gradients_are_the_softmax() -> None:
    logits = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_normalizer, logits)
    (gradient,) = torch.autograd.grad(log_normalizer(logits).sum(), logits)
    torch.testing.assert_close(gradient, logits.softmax(-1))


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="logits must have at least 1 dimensions"):
        log_normalizer(torch.tensor(1.0))
    with pytest.raises(TypeError, match="logits must have dtype"):
        log_normalizer(torch.tensor([1]))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_whose_largest_number_comes_late(backend: str, dtype: torch.dtype) -> None:
    """Guards the sum that goes by the first block's maximum: each block of these rows lies above the one before, far
    above it, beyond what its quick terms can hold, or is the first with a number at all."""
    steps = torch.arange(20_000) // 500
    logits = torch.stack([0.01 * steps, 3.0 * steps, 30.0 * steps, 1e3 * steps, -30.0 * steps, torch.randn(20_000)])
    logits = logits + torch.randn(20_000)
    logits[5, :15_000] = -math.inf
    logits[3, 17_000] = torch.finfo(dtype).max if dtype == torch.float16 else 1e30
    assert_right(log_normalizer(logits.to(dtype), backend=backend), logits.to(dtype))


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_kernel_is_clean_under_sanitizers(tmp_path: Path, seed: int) -> None:
    assert_clean("log_normalizer_driver.cpp", ("cpu/normalizer/log_normalizer.cpp",), tmp_path, seed, 60)
