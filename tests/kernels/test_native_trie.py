"""The sort behind the trie in C++ against numpy's lexsort."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dgi_kernels import _extension

pytestmark = pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))


def check(codes: np.ndarray) -> None:
    order, first_diff = torch.ops.dgi_kernels.trie_sort(torch.from_numpy(codes))
    expected = np.lexsort(codes.T[::-1])
    np.testing.assert_array_equal(order.numpy(), expected)
    rows = codes[expected]
    differs = np.ones((len(rows), codes.shape[1] + 1), bool)  # the last column: equal rows differ "at L"
    differs[1:, :-1] = rows[1:] != rows[:-1]
    np.testing.assert_array_equal(first_diff.numpy(), differs.argmax(axis=1))


@pytest.mark.parametrize("columns", range(1, 9))
@pytest.mark.parametrize("values", [1, 2, 3, 300, 2048])
def test_random_codes(columns: int, values: int) -> None:
    check(np.random.randint(0, values, (2000, columns)))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 256, 257])
def test_few_rows(rows: int) -> None:
    check(np.random.randint(0, 4, (rows, 3)))


def test_equal_rows_keep_their_order() -> None:
    check(np.repeat(np.random.randint(0, 50, (40, 3)), 30, axis=0))
    check(np.full((100, 4), 7))


def test_sequences_that_end_early_sort_first() -> None:
    codes = np.random.randint(0, 5, (3000, 4))
    codes[np.arange(4) >= np.random.randint(1, 5, (3000, 1))] = -1
    check(codes)


@pytest.mark.parametrize(("columns", "bits"), [(1, 40), (3, 40), (8, 40), (2, 62), (5, 25), (1, 63)])
def test_codes_of_more_bits_than_one_word_holds(columns: int, bits: int) -> None:
    codes = np.random.randint(0, 2**bits - 1, (1500, columns))
    codes[::3] = codes[0]  # so that later columns decide
    codes[::3, -1] = np.random.randint(-1, 2**bits - 1, 500)
    check(codes)


def test_the_whole_range_of_codes() -> None:
    codes = np.random.randint(0, 9, (500, 2))
    codes[np.random.randint(0, 500, 20), 0] = 2**63 - 1
    codes[np.random.randint(0, 500, 20), 1] = -1
    check(codes)


def test_columns_of_unequal_width() -> None:
    check(np.stack([np.random.randint(0, high, 4000) for high in (4096, 1, 2, 2**30, 256)], axis=1))


@pytest.mark.parametrize("codes", [torch.zeros(3, dtype=torch.int64), torch.zeros(2, 3),
                                   torch.zeros(4, 3, dtype=torch.int64).T])
def test_direct_callers_are_stopped_too(codes: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"codes must be a contiguous int64 tensor of shape \(N, L\)"):
        torch.ops.dgi_kernels.trie_sort(codes)


def test_codes_below_minus_one_are_refused() -> None:
    with pytest.raises(RuntimeError, match="codes must be at least -1; got -2"):
        torch.ops.dgi_kernels.trie_sort(torch.tensor([[0, 1], [-2, 1]]))


def test_trie_sort_is_well_registered() -> None:
    torch.library.opcheck(torch.ops.dgi_kernels.trie_sort.default, (torch.randint(-1, 5, (20, 3)),))
