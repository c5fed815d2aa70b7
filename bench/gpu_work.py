"""What the kernels of each launch have to do, for gpu_time.py: elements of logits, operations of products, bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Work:
    """elements: (row, column) pairs, each with the loops' instructions; operations of products; ``reread``: bytes that
    tiles read of their operands, from the L2; ``moved``: bytes of tensors, None: every argument once. ``whole``: a tile
    is the whole kernel, not a loop's body, or what every program does."""

    elements: float = 0.0
    operations: float = 0.0
    reread: float = 0.0
    moved: float | None = None
    whole: bool = False


Values = dict[str, Any]


def flash(products: int, *, owns_rows: bool) -> Callable[[Values, tuple[int, ...]], Work]:
    """A kernel that owns rows (or columns) and passes over all of the others."""

    def work(v: Values, grid: tuple[int, ...]) -> Work:
        n, k, d = v["N"], v["K"], v["D"]
        tiles, others = (math.ceil(n / v["b_n"]), k) if owns_rows else (math.ceil(k / v["b_k"]), n)
        return Work(n * k, 2 * products * n * k * d, 2 * tiles * others * d)

    return work


def tiles_of_products(v: Values, grid: tuple[int, ...]) -> Work:
    """A matrix product with an epilogue; the copies of its inner loop are under way while its products run."""
    rows, k, d = v["rows"] if "rows" in v else v["N"], v["K"], v["D"]
    reread = 2 * rows * k * d * (1 / v["b_n"] + 1 / v["b_k"])
    out = v.get("p_g", v.get("p_out"))
    moved = 2 * (rows + k) * d + (0 if out is None else out.element_size() * rows * k)
    return Work(rows * k, 2 * rows * k * d, reread, moved, whole=out is not None)


def products_for_loss(v: Values, grid: tuple[int, ...]) -> Work:
    """The target shapes' scale is plain."""
    return Work() if v["large_alone"] else tiles_of_products(v, grid)


def tiles_of_weights(v: Values, grid: tuple[int, ...]) -> Work:
    """The last program of each tile of rows also reads their sums, and reads and writes the rows."""
    work, rows = tiles_of_products(v, grid), v["p_rows"]
    finished = 4 * grid[0] * v["rows"] + (0 if rows is None else 4 * rows.numel())
    return replace(work, reread=work.reread + finished, whole=False)


def rows_of_chunk(v: Values, grid: tuple[int, ...]) -> Work:
    return Work(grid[0] * v["K"])


def whole_rows(v: Values, grid: tuple[int, ...]) -> Work:
    return Work(v["N"] * v["K"])


def forward(v: Values, grid: tuple[int, ...]) -> Work:
    """The target shapes' scale is plain."""
    if v["plain"] is False:
        return Work()
    return flash(1 + v["with_mean"], owns_rows=True)(v, grid)


def kept_bytes(v: Values, times: int) -> int:
    """Of p and the weights of a chunk, each read or written once."""
    return times * v["N"] * v["K"] * v["p_kept"].element_size()


def level(v: Values, grid: tuple[int, ...]) -> Work:
    work = flash(1 + v["soft"], owns_rows=True)(v, grid)
    if v["p_kept"] is None:
        return work
    of_rows = v["N"] * ((2 + 4 * v["soft"]) * v["D"] + 24)  # what is read and mixed; two codes and the log-normalizer
    return replace(work, moved=kept_bytes(v, 1) + v["p_top"].numel() * 4 + of_rows)


def usage(v: Values, grid: tuple[int, ...]) -> Work:
    return Work(v["N"] * v["K"], moved=kept_bytes(v, 1) + v["p_top"].numel() * 4)


def probabilities(v: Values, grid: tuple[int, ...]) -> Work:
    work = flash(1, owns_rows=True)(v, grid)
    return replace(work, moved=kept_bytes(v, 1) + 2 * v["N"] * v["D"] * grid[1])


def weights(v: Values, grid: tuple[int, ...]) -> Work:
    sums = v["p_out"] is not None
    work = flash(1 + sums, owns_rows=True)(v, grid)
    return replace(work, moved=kept_bytes(v, 2 + v["straight_through"]) + (2 + 4 * sums) * v["N"] * v["D"])


WORK: dict[str, Callable[[Values, tuple[int, ...]], Work]] = {
    "flash_forward_kernel": forward,
    "flash_weight_kernel": flash(2, owns_rows=False),
    "product_loss_kernel": products_for_loss,
    "product_weights_kernel": tiles_of_weights,
    "product_gradient_kernel": tiles_of_products,
    "cosine_logits_kernel": tiles_of_products,
    "chunk_loss_kernel": rows_of_chunk,
    "chunk_gradient_kernel": rows_of_chunk,
    "level_kernel": level,
    "usage_kernel": usage,
    "probability_kernel": probabilities,
    "weight_kernel": weights,
    "chunk_level_kernel": rows_of_chunk,
    "row_level_kernel": whole_rows,
    "row_gradient_kernel": rows_of_chunk,
}


def work_of(kernel: str, values: Values, grid: tuple[int, ...]) -> Work:
    return WORK[kernel](values, grid) if kernel in WORK else Work()
