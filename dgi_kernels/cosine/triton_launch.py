"""Tiles of the cosine cross-entropy's kernels, and the launches that no option of the loss changes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from dgi_kernels import tiles as measured
from dgi_kernels import triton_common as common
from dgi_kernels.cosine import triton_kernels as kernels
from dgi_kernels.triton_common import HALF, NORM_BLOCK, Tiles, finish_block, gain_of, or_one


class FlashConfig(NamedTuple):
    """Tiles of the pass that keeps a mean of w for every row, and of the two others: for dw, and for the loss alone."""

    forward: Tiles
    weight: Tiles


# Architecture -> dimensions up to -> tiles: all that the launchers can choose, each compiled by bench/gpu_code.py. They
# are the largest tried that spill no registers, on Hopper for D <= 64 those of least time by the counts of
# bench/gpu_time.py; which are the fastest is to be measured, and is then kept by GPU model in dgi_kernels/tiles. Others
# than 9 and 10 take those of 8, which need at most 99 KB of shared memory.
FLASH = {
    8: {
        64: FlashConfig(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
        128: FlashConfig(Tiles(128, 32, 8, 3), Tiles(128, 64, 8, 2)),
    },
    9: {
        64: FlashConfig(Tiles(64, 32, 4, 2), Tiles(128, 64, 4, 3)),
        128: FlashConfig(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
    },
    10: {
        64: FlashConfig(Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 3)),
        128: FlashConfig(Tiles(128, 32, 8, 3), Tiles(64, 64, 8, 3)),
    },
}
FLASH_LARGEST = 128
IN_RANGE = (torch.bfloat16,)  # dtypes that hold exponentials of all scores of a plain scale
FLASH_ROWS = 8192  # from which the rows alone fill a GPU: 64 tiles or more
SUM_BLOCK = (32, 64)
SUM_PROGRAMS = 64


def uses_flash(dim: int, dtype: torch.dtype) -> bool:
    """Flash or chunked form: the one place that chooses.

    float32 is chunked: Triton's exact float32 product does not reach cuBLAS's. Beyond D = 128 the accumulators of whole
    rows leave room for one block a multiprocessor, which waits for its products: by the counts of bench/gpu_time.py the
    chunked form takes 1.2 ms at D = 256 (1.0 of a reduced loss) where the flash form takes 1.8 (H200, N = 65536,
    K = 4096). Both crossovers are to be measured on a GPU.
    """
    return dtype in HALF and dim <= FLASH_LARGEST


def flash_config(dim: int, device: torch.device) -> tuple[int, FlashConfig]:
    """Dimensions of a tile, and the tiles, for vectors of ``dim`` dimensions."""
    table = FLASH.get(common.architecture(device), FLASH[8])
    b_d = min(largest for largest in table if dim <= largest)
    return b_d, FlashConfig(
        *(measured.pick(f"cosine.{name}", b_d, tiles, device) for name, tiles in table[b_d]._asdict().items())
    )


def with_columns(tiles: Tiles, b_d: int) -> Tiles:
    """Those of a pass whose columns have options, or whose rows have two gradients: smaller, not to spill."""
    return tiles._replace(step=min(tiles.step, 32) if b_d <= 64 else max(16, tiles.step // 2))


def weighted_sum(x: Tensor, weight: Tensor, factor: float, out: Tensor) -> None:
    """out (D,) = factor sum_n weight_n x_n; no pass over x for the factor 0 of a loss without smoothing."""
    rows, dim = x.shape
    if factor == 0 or rows == 0:
        out.zero_()
        return
    b_n, b_d = SUM_BLOCK
    rows_each = triton.cdiv(triton.cdiv(rows, SUM_PROGRAMS), b_n) * b_n
    partial = x.new_empty(triton.cdiv(rows, rows_each), dim, dtype=torch.float32)
    kernels.weighted_sum_kernel[(len(partial), triton.cdiv(dim, b_d))](
        x,
        p_weight=weight,
        p_partial=partial,
        N=rows,
        D=dim,
        stride=x.stride(0),
        rows_each=rows_each,
        b_n=b_n,
        b_d=b_d,
        num_warps=4,
    )
    torch.mul(partial.sum(0), factor, out=out)


def meet_targets(
    h: Tensor,
    weight: Tensor,
    inputs: dict[str, Tensor],
    terms: dict[str, Tensor | None],
    outputs: dict[str, Tensor],
    ignore_index: int,
    eps: float,
    smoothing: float,
) -> None:
    """Fill ``outputs``, what a row knows before it meets the codebook; names are those of the kernel's arguments."""
    (rows, dim), (b_n, b_d) = h.shape, NORM_BLOCK
    kernels.target_kernel[(triton.cdiv(rows, b_n),)](
        h,
        weight,
        **inputs,
        **terms,
        **outputs,
        N=rows,
        K=len(weight),
        D=dim,
        stride_h=h.stride(0),
        stride_w=weight.stride(0),
        ignore_index=ignore_index,
        eps=eps,
        smoothing=smoothing,
        b_n=b_n,
        b_d=b_d,
        num_warps=4,
    )


def flash_forward(
    h: Tensor,
    weight: Tensor,
    arguments: dict[str, Tensor | None],
    smoothing: float,
    with_mean: bool,
    tiles: Tiles,
    b_d: int,
) -> None:
    """Fill the outputs among ``arguments``, by the names that the kernel has for them.

    Whether the scale is plain is known on the device alone: of two launches one ends at once.
    """
    has_columns = any(arguments[name] is not None for name in ("p_bias", "p_group"))
    for plain in (True, False) if h.dtype in IN_RANGE and not has_columns else (None,):
        kernels.flash_forward_kernel[(triton.cdiv(len(h), tiles.owned),)](
            h,
            weight,
            **arguments,
            N=len(h),
            K=len(weight),
            D=h.shape[1],
            stride_h=h.stride(0),
            stride_w=weight.stride(0),
            smoothing=smoothing,
            with_mean=with_mean,
            plain=plain,
            whole=len(weight) % tiles.step == 0,
            b_n=tiles.owned,
            b_k=tiles.step,
            b_d=b_d,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )


def flash_hidden(
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    centre: Tensor,
    scale: Tensor,
    rows: dict[str, Tensor | None],
    smoothing: float,
    eps: float,
    dh: Tensor,
) -> Tensor:
    """Fill dh where it has elements; return each row's part of dscale. ``rows``: 1 / norms and what each row has."""
    radial = h.new_empty(len(h), dtype=torch.float32)
    b_n, b_d = finish_block(h.shape[1])
    kernels.flash_hidden_kernel[(triton.cdiv(len(h), b_n),)](
        mean,
        h,
        weight,
        **rows,
        p_scale=scale,
        p_centre=centre,
        p_out=dh,
        p_radial=radial,
        N=len(h),
        D=h.shape[1],
        width=dh.shape[1],
        stride_h=h.stride(0),
        stride_w=weight.stride(0),
        smoothing=smoothing,
        eps=eps,
        b_n=b_n,
        b_d=b_d,
        num_warps=4,
    )
    return radial


def finish(
    partial: Tensor,
    largest: Tensor | None,
    x: Tensor,
    rnorm: Tensor,
    gain: Tensor | None,
    centre: Tensor | None,
    scale: Tensor,
    eps: float,
    scaled: bool,
    out: Tensor,
    product: Tensor | None,
    label: Tensor | None = None,
) -> None:
    """out (rows, width), or nothing at all, from partial (splits, rows, dim), times largest (splits, rows)."""
    splits, rows, dim = partial.shape
    width = out.shape[1] if out.numel() else 0
    b_n, b_d = finish_block(dim)
    kernels.finish_kernel[(triton.cdiv(rows, b_n),)](
        partial,
        p_largest=largest,
        p_x=x,
        p_rnorm=rnorm,
        p_scale=scale,
        p_gain=gain,
        p_centre=centre,
        p_label=label,
        p_out=out,
        p_product=product,
        splits=splits,
        N=rows,
        D=dim,
        width=width,
        stride=x.stride(0),
        eps=eps,
        scaled=scaled,
        b_n=b_n,
        b_d=b_d,
        num_warps=4,
    )


def tiled(x: Tensor) -> Tensor:
    """x (rows, D), padded with zeros to a multiple of 16 dimensions where rows cannot be read 16 bytes at a time."""
    if x.stride(1) == 1 and x.shape[1] and x.shape[1] % 16 == 0 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(len(x), tiled_dim(x.shape[1]))
    padded[:, : x.shape[1]] = x
    return padded


def tiled_dim(dim: int) -> int:
    return max(16, (dim + 15) // 16 * 16)


def chunk_gain(per_row: Tensor, rnorm_w: Tensor, dtype: torch.dtype) -> Tensor | None:
    """For weights of up to per_row (N,) times the reciprocal norm of the column."""
    if dtype != torch.float16 or per_row.numel() == 0:
        return None
    largest = per_row.abs().amax()
    return gain_of(largest * or_one(rnorm_w).amax() if rnorm_w.numel() else largest, dtype)
