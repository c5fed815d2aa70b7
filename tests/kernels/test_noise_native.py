"""The noise in C++ against an oracle of its own in Python integers and float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import library

from dgi_kernels import _extension

native = pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))
compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")

TOLERANCE = 2e-5  # of float32 noise against the float64 definition, everywhere
CSRC = Path(__file__).parents[2] / "csrc"


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, written from the paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def gumbel(words: np.ndarray) -> np.ndarray:
    """The definition of docs/method.md in float64, in which ``x + 0.5`` and ``u`` are exact."""
    uniform = (words.astype(np.float64) + 0.5) * 2.0**-32
    return -np.log(-np.log1p(-uniform))


def oracle(seed: int, level: int, stream: int, row_offset: int, rows: int, codes: int) -> np.ndarray:
    key = (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    words = [
        [philox((k // 4, n, level, stream), key)[k % 4] for k in range(codes)]
        for n in range(row_offset, row_offset + rows)
    ]
    return gumbel(np.array(words, dtype=np.uint64).reshape(rows, codes))


def noise(seed: int, level: int, stream: int, row_offset: int, rows: int, codes: int) -> torch.Tensor:
    return torch.ops.dgi_kernels.gumbel_noise(torch.tensor([seed]), level, stream, row_offset, rows, codes)


KNOWN_ANSWERS = {  # of Random123
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_oracle_gives_the_known_answers(name: str) -> None:
    counter, key, expected = KNOWN_ANSWERS[name]
    assert philox(counter, key) == expected


HARNESS = """
#include "dgi/gumbel.h"
#include "dgi/philox.h"
extern "C" void philox(uint32_t* words, uint32_t low, uint32_t high) {
  const dgi::PhiloxBlock out = dgi::philox4x32_10({{words[0], words[1], words[2], words[3]}}, {low, high});
  for (int w = 0; w < 4; ++w) words[w] = out.word[w];
}
extern "C" void gumbel(const uint32_t* words, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = dgi::gumbel_from_word(words[i]);
}
"""


@pytest.fixture(scope="module")
def build_headers(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., ctypes.CDLL]:
    """Compiles the headers by themselves, which proves that they know no torch."""

    def build(*flags: str) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("headers")
        (folder / "harness.cpp").write_text(HARNESS)
        subprocess.run(
            [
                "c++",
                "-std=c++20",
                "-O3",
                "-fno-trapping-math",
                "-ffp-contract=off",
                "-shared",
                "-fPIC",
                "-Wall",
                "-Wextra",
                "-Werror",
                *flags,
                f"-I{CSRC / 'include'}",
                "harness.cpp",
                "-o",
                "harness.so",
            ],
            cwd=folder,
            check=True,
        )
        return ctypes.CDLL(str(folder / "harness.so"))

    return build


def gumbel_of(library: ctypes.CDLL, words: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(words, dtype=np.uint32)
    out = np.empty(words.shape, np.float32)
    library.gumbel(
        words.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(words.size)
    )
    return out


def words_of_interest() -> np.ndarray:
    """Both ends in full, the words around every power of two from both ends, and a fresh dense sample between."""
    ends = np.arange(1 << 16, dtype=np.int64)
    powers = (1 << np.arange(33, dtype=np.int64))[:, None] + np.arange(-64, 64)
    words = np.concatenate([ends, powers.ravel(), np.random.randint(0, 1 << 32, 1 << 20)])
    words = words[(words >= 0) & (words < 1 << 32)]
    return np.concatenate([words, 0xFFFFFFFF - words]).astype(np.uint32)


@compiler
@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_header_gives_the_known_answers(name: str, build_headers: Callable[..., ctypes.CDLL]) -> None:
    counter, key, expected = KNOWN_ANSWERS[name]
    words = (ctypes.c_uint32 * 4)(*counter)
    build_headers().philox(words, ctypes.c_uint32(key[0]), ctypes.c_uint32(key[1]))
    assert tuple(words) == expected


@compiler
def test_header_meets_the_definition_over_the_whole_range(build_headers: Callable[..., ctypes.CDLL]) -> None:
    words = words_of_interest()
    error = np.abs(gumbel_of(build_headers(), words) - gumbel(words))
    assert error.max() < TOLERANCE / 5, f"word {words[error.argmax()]}"


@compiler
def test_header_gives_the_same_bits_with_every_instruction_set(build_headers: Callable[..., ctypes.CDLL]) -> None:
    words = words_of_interest()
    plain, widest = gumbel_of(build_headers(), words), gumbel_of(build_headers("-march=native"), words)
    np.testing.assert_array_equal(plain.view(np.int32), widest.view(np.int32))


@native
@pytest.mark.parametrize(("rows", "codes"), [(1, 1), (3, 4), (2, 7), (5, 64), (3, 257), (130, 3), (2, 1030)])
def test_noise_is_as_defined(rows: int, codes: int) -> None:
    seed, level = int(np.random.randint(-(2**62), 2**62)), int(np.random.randint(0, 8))
    got = noise(seed, level, 0, 0, rows, codes)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), oracle(seed, level, 0, 0, rows, codes), rtol=0, atol=TOLERANCE)


@native
@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
def test_all_64_bits_of_the_seed_count(seed: int) -> None:
    np.testing.assert_allclose(noise(seed, 1, 0, 0, 2, 6).numpy(), oracle(seed, 1, 0, 0, 2, 6), rtol=0, atol=TOLERANCE)


@native
@pytest.mark.parametrize(
    ("level", "stream", "row_offset"), [(0, 1, 0), (2, 0, 1000), (2**32 - 1, 2**32 - 1, 2**32 - 3), (1, 1, 2**31 - 1)]
)
def test_level_stream_and_row_offset_reach_their_counter_words(level: int, stream: int, row_offset: int) -> None:
    got = noise(7, level, stream, row_offset, 3, 9)
    np.testing.assert_allclose(got.numpy(), oracle(7, level, stream, row_offset, 3, 9), rtol=0, atol=TOLERANCE)


@native
@pytest.mark.parametrize("codes", [5, 96])
def test_row_offset_continues_the_rows(codes: int) -> None:
    whole = noise(11, 0, 0, 0, 700, codes)
    assert torch.equal(noise(11, 0, 0, 300, 400, codes), whole[300:])


@native
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_noise(shape: tuple[int, int]) -> None:
    assert noise(1, 0, 0, 0, *shape).shape == shape


@native
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(noise(5, 0, 0, 0, 301, 1021))  # several grains, the last one not full
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@native
def test_noise_is_gumbel_distributed() -> None:
    sample = np.sort(noise(int(np.random.randint(2**62)), 0, 0, 0, 1000, 1000).numpy().ravel().astype(np.float64))
    cumulative = np.exp(-np.exp(-sample))
    distance = np.abs(cumulative - (np.arange(sample.size) + 0.5) / sample.size).max()
    assert distance < 2.5 / np.sqrt(sample.size)  # Kolmogorov-Smirnov, p < 1e-5


@native
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 0, 1, 1), "level"),
        ((0, 2**32, 0, 1, 1), "stream"),
        ((0, 0, -1, 1, 1), "row_offset"),
        ((0, 0, 2**32 - 1, 2, 1), "row_offset"),
        ((0, 0, 0, -1, 1), "rows"),
        ((0, 0, 0, 1, 2**40), "codes"),
    ],
)
def test_direct_callers_are_stopped_too(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"gumbel_noise: {message} must be"):
        noise(0, *arguments)


@native
@pytest.mark.parametrize("seed", [torch.tensor([1.0]), torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64)])
def test_seed_must_be_one_int64(seed: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match="seed must be an int64 tensor of one element"):
        torch.ops.dgi_kernels.gumbel_noise(seed, 0, 0, 0, 1, 1)


@native
def test_noise_is_well_registered() -> None:
    library.opcheck(torch.ops.dgi_kernels.gumbel_noise.default, (torch.tensor([3]), 1, 0, 5, 6, 7))
