"""Gumbel noise against torch's exponential_, which is what a Gumbel-Softmax in plain PyTorch draws its noise with.

Run: make bench, or pytest bench/bench_gumbel.py
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from dgi_kernels import noise
from dgi_kernels.gumbel import native

SHAPES = [(2048, 4096), (2048, 1024), (2048, 256)]  # (rows, codes) of one training step
SEED = torch.tensor([42])


def exponential(rows: int, codes: int) -> torch.Tensor:
    return torch.empty(rows, codes).exponential_()


def reference(rows: int, codes: int) -> torch.Tensor:
    return noise.gumbel_noise(SEED, 0, rows, codes, 0, 0)


def compiled(rows: int, codes: int) -> torch.Tensor:
    return native.gumbel_noise(SEED, 0, 0, 0, rows, codes)


@pytest.mark.parametrize("make", [exponential, reference, compiled])
@pytest.mark.parametrize(("rows", "codes"), SHAPES)
def test_gumbel_noise(benchmark: BenchmarkFixture, make: Callable[[int, int], torch.Tensor], rows: int,
                      codes: int) -> None:
    benchmark.group = f"gumbel noise ({rows}, {codes}), {torch.get_num_threads()} threads"
    benchmark(make, rows, codes)
