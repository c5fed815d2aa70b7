"""Launchers of the chunked form for 16-bit operands; :mod:`dgi_kernels.cosine.triton_products` has its kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dgi_kernels import tiles as measured
from dgi_kernels import triton_common as common
from dgi_kernels.cosine import triton_products as products
from dgi_kernels.cosine.triton_launch import finish
from dgi_kernels.cosine.triton_saved import Saved, Upstream
from dgi_kernels.triton_common import Tiles, add_product, multiprocessors, or_one, product

STEP = 64  # dimensions of a step of the products
# Architecture -> dimensions up to -> tiles. With short vectors the epilogue is as long as the products, and two blocks
# on a multiprocessor do one's beside the other's; with long ones the L2's reads bind, which a larger tile has less of.
# Chosen for Hopper. Elsewhere product_weights_kernel, which finishes rows, has registers for one block alone.
_LARGE = Tiles(128, 128, 8, 3)
TILES = {
    8: {128: _LARGE, 256: _LARGE, 1024: _LARGE},
    9: {128: Tiles(128, 128, 4, 2), 256: Tiles(128, 128, 4, 2), 1024: Tiles(128, 256, 8, 3)},
    10: {128: _LARGE, 256: _LARGE, 1024: _LARGE},
}
PARTS = 16  # of the columns: neighbouring programs then read a square of operands that the L2 holds
PARTS_BLOCK = 128
CHUNK_BYTES = 32 << 20  # of a chunk's weights, which the L2 then keeps for the products behind
LEAST_ROWS = 1024  # of a chunk, whatever the number of columns: fewer do not fill the GPU


def fused_tiles(dim: int, device: torch.device) -> Tiles:
    """For columns that have their vectors alone, and of a number that whole vectors of the hardware read and write."""
    table = TILES.get(common.architecture(device), TILES[8])
    largest = min((size for size in table if dim <= size), default=max(table))
    return measured.pick("cosine.products", largest, table[largest], device)


def fitting_tiles(dim: int, codes: int, device: torch.device, *, plain: bool) -> Tiles:
    """The same for any: options of columns, a second gradient of rows, ragged ends take registers of the epilogue."""
    tiles = fused_tiles(dim, device)
    return tiles if plain and codes % 16 == 0 else tiles._replace(step=min(tiles.step, 64))


def loss_of_rows(
    h: Tensor,
    weight: Tensor,
    columns: dict[str, Tensor | None],
    rows_of: dict[str, Tensor],
    results: dict[str, Tensor],
    smoothing: float,
    smooth_apart: bool,
    large_alone: bool = False,
) -> None:
    """Fill ``results``: loss, lse, residue. ``columns``: 1 / norms, bias, group; ``rows_of``: what each row has.

    large_alone: only for a scale that is not plain is there anything in the results; else each program ends at once.
    """
    (rows, dim), codes = h.shape, len(weight)
    plain = columns["p_bias"] is None and columns["p_group"] is None
    tiles = fitting_tiles(dim, codes, h.device, plain=plain)
    row_tiles, column_tiles = triton.cdiv(rows, tiles.owned), max(1, triton.cdiv(codes, tiles.step))
    parts = min(column_tiles, max(1 if large_alone else PARTS, triton.cdiv(2 * multiprocessors(h), row_tiles)))
    kept = h.new_empty(4 if smooth_apart else 2, parts, rows, dtype=torch.float32)
    parts_of = {
        "p_top": kept[0],
        "p_others": kept[1],
        "p_total": kept[2] if smooth_apart else None,
        "p_count": kept[3] if smooth_apart else None,
    }
    products.product_loss_kernel[(parts, row_tiles)](
        h,
        weight,
        p_rnorm_h=rows_of["p_rnorm_h"],
        **columns,
        p_label=rows_of["p_label"],
        p_scale=rows_of["p_scale"],
        **parts_of,
        N=rows,
        K=codes,
        D=dim,
        stride_h=h.stride(0),
        stride_w=weight.stride(0),
        large_alone=large_alone,
        **blocks(tiles),
    )
    products.parts_loss_kernel[(triton.cdiv(rows, PARTS_BLOCK),)](
        **parts_of,
        p_logit=rows_of["p_logit"],
        p_extra=rows_of["p_extra"],
        p_label=rows_of["p_label"],
        **results,
        N=rows,
        parts=parts,
        smoothing=smoothing,
        b_n=PARTS_BLOCK,
        num_warps=4,
    )


def blocks(tiles: Tiles) -> dict[str, int]:
    return {"b_n": tiles.owned, "b_k": tiles.step, "b_d": STEP, "num_warps": tiles.warps, "num_stages": tiles.stages}


def gradients(
    upstream: Upstream,
    saved: Saved,
    per_row: Tensor,
    gain: Tensor | None,
    dh: Tensor,
    dweight: Tensor,
    dbias: Tensor,
) -> Tensor:
    """Fill dh, dweight and dbias where they have elements; return each row's part of dscale.

    Columns' norms are in the weights, and so are the rows' (``per_row``), so that operands of products are the stored
    vectors.
    """
    h, weight, rnorm_h, rnorm_w = saved.h, saved.weight, saved.rnorm_h, saved.rnorm_w
    (rows, dim), codes = h.shape, len(weight)
    tiles = fitting_tiles(dim, codes, h.device, plain=upstream.both is None and saved.bias is None)
    total = rnorm_h.new_empty(codes if dweight.numel() else 0, dim)
    radial, factor_w = torch.empty_like(upstream.loss), or_one(rnorm_w)
    budget = measured.number("cosine.chunk_bytes", CHUNK_BYTES, h.device)
    size = max(LEAST_ROWS, budget // (2 * max(codes, 1)) // tiles.owned * tiles.owned)
    g = h.new_empty(min(rows, size), codes)
    row_total = rnorm_h.new_empty(1, len(g), dim)
    row_tiles = triton.cdiv(len(g), tiles.owned)
    of_bias = rnorm_h.new_zeros(row_tiles, codes) if dbias.numel() else None
    for first in range(0, rows, len(g)):
        own = slice(first, min(first + len(g), rows))
        count = own.stop - first
        chunk, own_h = g[:count], h[own]
        row_tiles = triton.cdiv(count, tiles.owned)
        if codes:
            products.product_gradient_kernel[(triton.cdiv(codes, tiles.step), row_tiles)](
                h,
                weight,
                g,
                p_rnorm_h=rnorm_h,
                p_lse=saved.lse,
                p_residue=saved.residue,
                p_upstream=per_row,
                p_factor_w=factor_w,
                p_both=upstream.both,
                p_own=upstream.own,
                p_even=upstream.even,
                p_label=saved.label,
                **saved.shared(),
                p_dbias=of_bias,
                first=first,
                rows=count,
                D=dim,
                stride_h=h.stride(0),
                stride_w=weight.stride(0),
                centre=saved.smoothing / codes,
                **blocks(tiles),
            )
        if of_bias is not None:
            dbias += of_bias[:row_tiles].sum(0)
        if dweight.numel():
            add_product(chunk.T, own_h, total, begins=first == 0)
        part = row_total[:, :count]
        product(chunk, weight, part[0])
        finish(part, None, own_h, rnorm_h[own], gain, None, saved.scale, saved.eps, True, dh[own], radial[own])
    if dweight.numel():
        finish(total[None], None, weight, rnorm_w, gain, None, saved.scale, saved.eps, True, dweight, None)
    return radial
