"""The noise of docs/method.md against Random123's vectors, a Philox in Python integers, and the Gumbel distribution."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import scipy.stats
import torch

from dgi_kernels import backends, gumbel_noise, noise

BACKENDS = ["reference", *(["native"] if backends()["native"].available else [])]

ERROR = 2e-6  # what a float32 kernel may lose: half a unit in the last place of the largest g is 1e-6

# Random123, examples/kat_vectors: philox4x32, 10 rounds: counter, key, result
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def hexadecimal(words: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in words.split())


def python_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 % 2**32, (product0 >> 32) ^ c3 ^ k1, product0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def python_gumbel(seed: int, level: int, row: int, code: int, stream: int) -> float:
    seed %= 2**64
    word = python_philox((code // 4, row, level, stream), (seed & 0xFFFFFFFF, seed >> 32))[code % 4]
    return -math.log(-math.log1p(-(word + 0.5) * 2.0**-32))


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_random123s_known_answers(counter: str, key: str, expected: str) -> None:
    assert python_philox(hexadecimal(counter), hexadecimal(key)) == hexadecimal(expected)
    words = noise.philox4x32(torch.tensor(hexadecimal(counter)), torch.tensor(hexadecimal(key)))
    assert tuple(words.tolist()) == hexadecimal(expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, 0x123456789ABCDEF0])
def test_noise_is_the_defined_function(backend: str, seed: int) -> None:
    level, stream = random.choice([0, 3, 2**32 - 1]), random.choice([0, 1, 2**32 - 1])
    row_offset, rows, codes = random.choice([0, 12345, 2**31 - 2, 2**32 - 5]), 5, 11
    expected = [
        [python_gumbel(seed, level, row_offset + row, code, stream) for code in range(codes)] for row in range(rows)
    ]
    actual = gumbel_noise(seed, level, rows, codes, stream=stream, row_offset=row_offset, backend=backend)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=ERROR)
    if backend == "reference":
        np.testing.assert_array_max_ulp(actual.numpy(), np.array(expected, dtype=np.float32), maxulp=1)


@pytest.mark.parametrize("codes", [1, 2, 3, 4, 5, 65])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_backends_agree(rows: int, codes: int) -> None:
    seed = random.randrange(2**64)
    results = [gumbel_noise(seed, 2, rows, codes, backend=backend).numpy() for backend in [*BACKENDS, "auto"]]
    for result in results:
        assert result.shape == (rows, codes)
        np.testing.assert_allclose(result, results[0], rtol=0, atol=ERROR)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_tiling_gives_the_same_bits(backend: str) -> None:
    whole = gumbel_noise(7, 1, 20, 30, stream=1, row_offset=100, backend=backend)
    for _ in range(10):
        first, rows, codes = random.randrange(20), random.randrange(5), random.randrange(31)
        tile = gumbel_noise(7, 1, rows, codes, stream=1, row_offset=100 + first, backend=backend)
        assert torch.equal(tile[: 20 - first], whole[first : first + rows, :codes])


def test_tails_keep_their_resolution() -> None:
    """Guards against float32 or a plain log(u): u -> 0 gave at most 16 values above g = 16, and u = 1 gave inf."""
    words = torch.tensor([0, 1, 2, 2**32 - 2, 2**32 - 1])
    expected = [-math.log(-math.log1p(-(word + 0.5) / 2**32)) for word in words.tolist()]
    np.testing.assert_array_max_ulp(noise.gumbel_from_words(words).numpy(), np.array(expected, np.float32), maxulp=1)
    assert expected[0] == pytest.approx(33 * math.log(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ints_and_tensors_are_the_same_seed(backend: str) -> None:
    expected = gumbel_noise(-3, 0, 4, 5, backend=backend)
    for seed in (2**64 - 3, np.int64(-3), torch.tensor(-3), torch.tensor([[-3]])):
        assert torch.equal(gumbel_noise(seed, 0, 4, 5, backend=backend), expected)


def test_no_seed_draws_from_torchs_default_generator() -> None:
    def draw() -> torch.Tensor:
        return gumbel_noise(None, 0, 3, 4)

    torch.manual_seed(11)
    first, second = draw(), draw()
    torch.manual_seed(11)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_integers_will_do(backend: str) -> None:
    expected = gumbel_noise(5, 1, 2, 3, stream=1, row_offset=4, backend=backend)
    seed, level, rows, codes, stream, row_offset = map(np.int64, (5, 1, 2, 3, 1, 4))
    actual = gumbel_noise(seed, level, rows, codes, stream=stream, row_offset=row_offset, backend=backend)
    assert torch.equal(actual, expected)


SAMPLES = 200_000


def sample(seed: int = 0, level: int = 0, stream: int = 0, row_offset: int = 0) -> np.ndarray:
    return gumbel_noise(seed, level, 200, SAMPLES // 200, stream=stream, row_offset=row_offset).numpy().ravel()


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63])
def test_noise_is_gumbel_distributed(seed: int) -> None:
    """Fixed seeds: the p-values below are facts about these samples, not chances."""
    g = sample(seed).astype(np.float64)
    assert g.mean() == pytest.approx(np.euler_gamma, abs=5 * math.pi / math.sqrt(6 * SAMPLES))
    assert g.var() == pytest.approx(math.pi**2 / 6, abs=0.04)
    assert scipy.stats.kstest(g, "gumbel_r").pvalue > 1e-3


def test_seeds_levels_streams_rows_and_codes_are_independent() -> None:
    variants = [sample(), sample(seed=1), sample(seed=2**32), sample(level=1), sample(stream=1), sample(row_offset=200)]
    variants += [np.roll(variants[0], 1), np.roll(variants[0], 4), np.roll(variants[0], SAMPLES // 200)]
    for a, b in itertools.combinations(variants, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(SAMPLES)


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("seed", {"seed": 1.5}, TypeError),
        ("seed", {"seed": "1"}, TypeError),
        ("seed", {"seed": True}, TypeError),
        ("seed", {"seed": 2**64}, ValueError),
        ("seed", {"seed": -(2**63) - 1}, ValueError),
        ("seed", {"seed": torch.tensor(1, dtype=torch.int32)}, TypeError),
        ("seed", {"seed": torch.tensor([1, 2])}, ValueError),
        ("seed", {"seed": torch.tensor(1), "device": "meta"}, ValueError),
        ("level", {"level": -1}, ValueError),
        ("level", {"level": 2**32}, ValueError),
        ("level", {"level": 0.0}, TypeError),
        ("rows", {"rows": -1}, ValueError),
        ("rows", {"rows": torch.tensor(3)}, TypeError),
        ("codes", {"codes": -1}, ValueError),
        ("codes", {"codes": 2**34 + 1}, ValueError),
        ("stream", {"stream": 2**32}, ValueError),
        ("row_offset", {"row_offset": -1}, ValueError),
        ("row_offset", {"row_offset": 2**32}, ValueError),
        ("row_offset", {"row_offset": 2**32 - 2}, ValueError),
        ("device", {"device": "gpu"}, ValueError),
        ("device", {"device": 1.5}, ValueError),
        ("backend", {"backend": "cuda"}, ValueError),
        ("backend", {"backend": np.zeros(2)}, ValueError),
    ],
)
def test_bad_arguments_are_named(name: str, arguments: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must"):
        gumbel_noise(**{"seed": 0, "level": 0, "rows": 3, "codes": 4, **arguments})
