"""Tiles of products whose codes lie as Hopper's tensor cores hold their columns.

Four threads share a row of a tile of products: of every 16 columns, thread t has 2t, 2t + 1, 2t + 8 and 2t + 9. The
flash kernels load a codebook so that these are the codes 4t ... 4t + 3. Then a thread makes its codes' noise by itself,
four at a time, and finds the best of them by itself: a tile (b_n, b_k) is seen as (b_n, 4, b_k / 4), each thread's
codes in ascending order, and nothing moves between threads. Other GPUs hold columns otherwise: with ``threads`` of 1
everything here leaves a tile (b_n, b_k) as it is, and Triton moves what it must.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dgi_kernels.triton_common import NONE


@triton.jit
def codes_of_columns(b_k: tl.constexpr, threads: tl.constexpr):
    """(b_k,) the code of each column of a tile, from its first."""
    column = tl.arange(0, b_k)
    if threads == 1:
        return column
    else:
        return column // 16 * 16 + column % 8 // 2 * 4 + column // 8 % 2 * 2 + column % 2


@triton.jit
def codes_of_threads(b_k: tl.constexpr, threads: tl.constexpr):
    """(4, b_k / 4) the codes of each thread, or (b_k,)"""
    if threads == 1:
        return tl.arange(0, b_k)
    else:
        return code_of(tl.arange(0, 4)[:, None], tl.arange(0, b_k // 4)[None, :])


@triton.jit
def blocks_of_threads(b_k: tl.constexpr, threads: tl.constexpr):
    """The same in blocks of four codes: (4, b_k / 16), or (b_k / 4,)"""
    if threads == 1:
        return tl.arange(0, b_k // 4)
    else:
        return tl.arange(0, 4)[:, None] + tl.arange(0, b_k // 16)[None, :] * 4


@triton.jit
def code_of(thread, item):
    return item // 4 * 16 + thread * 4 + item % 4


@triton.jit
def by_thread(x, threads: tl.constexpr):
    """(b_n, b_k), in columns -> (b_n, 4, b_k / 4)"""
    if threads == 1:
        return x
    else:
        x = tl.permute(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 4, 2)), (0, 2, 1, 3))
        return tl.reshape(x, (x.shape[0], 4, x.shape[2] * 2))


@triton.jit
def by_column(x):
    """The opposite: a thread's items lie two by two."""
    return side_by_side(x, 2)


@triton.jit
def by_code(x):
    """(b_n, 4, b_k / 4) -> (b_n, b_k), in the order of the codes: a thread's items lie four by four."""
    return side_by_side(x, 4)


@triton.jit
def side_by_side(x, run: tl.constexpr):
    """The threads' items in one row, ``run`` of each thread in turn."""
    if len(x.shape) == 2:
        return x
    else:
        x = tl.permute(tl.reshape(x, (x.shape[0], 4, x.shape[2] // run, run)), (0, 2, 1, 3))
        return tl.reshape(x, (x.shape[0], x.shape[1] * 4 * run))


@triton.jit
def over_rows(x, threads: tl.constexpr):
    """What is of rows, as it is to be combined with a tile."""
    return x[:, None] if threads == 1 else x[:, None, None]


@triton.jit
def over_codes(x):
    """What is of codes, likewise."""
    return tl.expand_dims(x, 0)


@triton.jit
def of_threads(value, dtype: tl.constexpr, b_n: tl.constexpr, threads: tl.constexpr):
    """What each thread keeps of a row, at first."""
    if threads == 1:
        return tl.full((b_n,), value, dtype)
    else:
        return tl.full((b_n, threads), value, dtype)


@triton.jit
def largest_in_row(x):
    """Of what threads keep -> (b_n,)"""
    return x if len(x.shape) == 1 else tl.max(x, axis=1)


@triton.jit
def sum_in_row(x):
    return x if len(x.shape) == 1 else tl.sum(x, axis=1)


@triton.jit
def sum_of(x):
    """Of a tile's codes, for each thread."""
    return tl.sum(x, axis=len(x.shape) - 1)


@triton.jit
def halves(x):
    """(N, T, I) -> its first and its last items, (N, T, I / 2) each"""
    items: tl.constexpr = x.shape[2]
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], x.shape[1], 2, items // 2)), (0, 1, 3, 2)))


@triton.jit
def largest_of(x):
    """(N, T, I) -> (N, T), or of whole rows (N, I) -> (N,)"""
    if len(x.shape) == 2:
        return tl.max(x, axis=1)
    elif x.shape[2] == 1:
        return tl.reshape(x, (x.shape[0], x.shape[1]))
    else:
        first, last = halves(x)
        return tl.maximum(largest_of(first), largest_of(last))


@triton.jit
def best_of(x):
    """The largest, and which is the first of the items that equals it; any, if none does."""
    if len(x.shape) == 2:
        largest = tl.max(x, axis=1)
        is_best = x == largest[:, None]
        return largest, tl.min(tl.where(is_best, tl.arange(0, x.shape[1])[None, :], NONE), axis=1)
    else:
        even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))
        pairs = tl.maximum(even, odd)
        largest = largest_of(pairs)
        pair, own = first_of(pairs, even, largest)
        return largest, 2 * pair + tl.where(own == largest, 0, 1)


@triton.jit
def first_of(x, others, value):
    """The place in x of the first item that equals ``value``, and what ``others`` has there: half of the items is left
    at each step, which takes fewer instructions than to compare them all."""
    if x.shape[2] == 1:
        return tl.zeros(value.shape, tl.int32), tl.reshape(others, value.shape)
    else:
        first, last = halves(x)
        others_first, others_last = halves(others)
        is_first = largest_of(first) == value
        left = tl.where(is_first[:, :, None], first, last)
        others_left = tl.where(is_first[:, :, None], others_first, others_last)
        place, other = first_of(left, others_left, value)
        return tl.where(is_first, place, place + first.shape[2]), other


@triton.jit
def first_code(largest, item):
    """Of the largest that each thread has found, and their items: the first code of the largest of all, (N,)"""
    if len(largest.shape) == 1:
        return item
    else:
        is_best = largest == tl.max(largest, axis=1)[:, None]
        return tl.min(tl.where(is_best, code_of(tl.arange(0, 4)[None, :], item), NONE), axis=1)
