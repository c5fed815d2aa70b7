"""The sort behind trie construction against numpy's lexsort.

Run: make bench, or pytest bench/bench_trie.py
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

SIZES = [10**5, 10**6, 10**7]  # items, with three codes of 2048


def lexsort(codes: torch.Tensor) -> object:
    return np.lexsort(codes.numpy().T[::-1])


def compiled(codes: torch.Tensor) -> object:
    return torch.ops.dgi_kernels.trie_sort(codes)


@pytest.mark.parametrize("sort", [lexsort, compiled])
@pytest.mark.parametrize("items", SIZES)
def test_trie_sort(benchmark: BenchmarkFixture, sort: Callable[[torch.Tensor], object], items: int) -> None:
    codes = torch.randint(0, 2048, (items, 3), generator=torch.Generator().manual_seed(0))
    benchmark.group = f"sort of {items} items"
    benchmark.pedantic(sort, (codes,), rounds=5, warmup_rounds=1)
