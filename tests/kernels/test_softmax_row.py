"""The headers of the C++ cosine loss by themselves: exponentials, conversions, and lists of peaked rows."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from .cosine_cases import compiler, native, trained_head

CSRC = Path(__file__).parents[2] / "csrc"

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
  const dgi::SoftmaxRow<float> row{products, {rnorm}, codes, target};
  const dgi::SoftmaxOptions options{0.0, false};
  double loss;
  const dgi::SoftmaxSums sums = dgi::softmax_row<kFused>(row, options, &loss);
  dgi::SparseRow<float> list{index, value, -1, 0.0};
  if (!dgi::sparse_gradient_row<kFused>(row, options, sums, {1.0}, limit, list)) {
    dgi::dense_gradient_row<kFused>(row, options, sums, {1.0});
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
    subprocess.run(
        [
            "c++",
            "-std=c++20",
            "-O3",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-ffp-contract=off",
            "-fopenmp-simd",
            "-shared",
            "-fPIC",
            "-Wall",
            "-Wextra",
            "-Werror",
            *request.param,
            f"-I{CSRC / 'include'}",
            "harness.cpp",
            "-o",
            "harness.so",
        ],
        cwd=folder,
        check=True,
    )
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
    count = headers.gradient_row(
        pointer(products),
        pointer(rnorm),
        *map(ctypes.c_int64, (logits.size, target, limit)),
        pointer(index),
        pointer(value),
        pointer(t),
    )
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


@compiler
@native
def test_trained_rows_become_lists(headers: ctypes.CDLL) -> None:
    """Many rows of a trained head do, and the list is the row's gradient."""
    h, weight, target, scale = (x.double() if x.is_floating_point() else x for x in trained_head())
    logits = (scale * F.normalize(h, dim=-1) @ F.normalize(weight, dim=-1).T).float().numpy()
    listed = 0
    for row, code in zip(logits, target.tolist(), strict=True):
        count, g = gradient_row(headers, row, code, limit=len(row) // 8)
        listed += count >= 0
        np.testing.assert_allclose(g, softmax_gradient(row, code), rtol=1e-5, atol=2.0**-23)
    assert listed >= len(logits) // 10, listed
