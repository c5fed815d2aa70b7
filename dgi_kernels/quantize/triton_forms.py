"""Which form of residual quantization's kernels a call takes, and their tiles.

The launchers look everything up here, so that a test can choose the form in one place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dgi_kernels import tiles as measured
from dgi_kernels import triton_common as common
from dgi_kernels.triton_common import HALF as HALF
from dgi_kernels.triton_common import Tiles as Tiles


class FlashConfig(NamedTuple):
    """Tiles of the passes over codes, all of which own rows: a level forward (None: in chunks of products), its softmax
    once more, and the weights of its gradients."""

    forward: Tiles | None
    probabilities: Tiles
    weights: Tiles


# Architecture -> dimensions up to -> tiles: all that the launchers can choose, each compiled by bench/gpu_code.py;
# those of Hopper take the least time by the counts of bench/gpu_time.py. Which are fastest is to be measured, and is
# then kept by GPU model in dgi_kernels/tiles. Others than 9 and 10 take those of 8.
_NARROW = Tiles(64, 32, 4, 2)
_WIDE = Tiles(64, 64, 4, 2)
FLASH = {
    8: {
        64: FlashConfig(_WIDE, _WIDE, _NARROW),
        128: FlashConfig(Tiles(64, 64, 8, 2), _NARROW, _NARROW),
        256: FlashConfig(None, _NARROW, _NARROW),
    },
    9: {
        64: FlashConfig(_WIDE, _WIDE, _WIDE),
        128: FlashConfig(_NARROW, _NARROW, _WIDE),
        256: FlashConfig(None, _NARROW, _WIDE),
    },
    10: {
        64: FlashConfig(_NARROW, _WIDE, _WIDE),
        128: FlashConfig(_NARROW, _NARROW, _NARROW),
        256: FlashConfig(None, _NARROW, _NARROW),
    },
}
FLASH_LARGEST = 256
SUMS_LARGEST = 64  # dimensions of rows' gradients that fit the registers beside their weights
FLASH_ROWS = 8192  # from which the rows alone fill a GPU: 128 tiles
# Products and weights of one chunk. In the L2's 50 MB they would be nearer, but N = 65536 rows would come in 200 chunks
# of a dozen launches each, for which the host takes longer than the GPU. At K = 4096 two waves of 64 rows for each of
# an H200's multiprocessors keep their p, and one its p and weights.
CHUNK_BYTES = 272 << 20
# Codes of one pass of the chunked epilogues: with one warp a row, reductions need no shared memory, and 16 codes a
# thread share their cost.
CHUNK_STEP, CHUNK_WARPS = 512, 1
# Codes of a row that fits the registers of a program, and of each of its threads: a level's epilogue takes a sixth
# fewer instructions a code with 32 than with 16, which share the reductions; that of the gradients waits for memory. Of
# the former's programs a multiprocessor holds so many warps, and threads have so many registers that there is room.
ROW_LARGEST, ROW_CODES, ROW_GRADIENT_CODES = 8192, 32, 16
ROW_WARPS, ROW_REGISTERS = 12, 168


def uses_flash(dim: int, dtype: torch.dtype) -> bool:
    """Flash or chunked form: the one place that chooses.

    float32 is chunked: Triton's exact float32 product does not reach cuBLAS's. So are D > 256, whose products take most
    of the time and are cuBLAS's then. To be measured.
    """
    return dtype in HALF and dim <= FLASH_LARGEST


def is_flash(rows: int, dim: int, dtype: torch.dtype) -> bool:
    """The same for so many rows: few take the chunked form, whose products cuBLAS splits."""
    return rows >= FLASH_ROWS and uses_flash(dim, dtype)


def flash_config(dim: int, device: torch.device) -> tuple[int, FlashConfig]:
    """Dimensions of a tile, and the tiles, for vectors of ``dim`` dimensions."""
    table = FLASH.get(common.architecture(device), FLASH[8])
    b_d = min(largest for largest in table if dim <= largest)

    def chosen(name: str, tiles: Tiles) -> Tiles:
        return measured.pick(f"quantize.{name}", b_d, tiles, device)

    forward, probabilities, weights = table[b_d]
    return b_d, FlashConfig(
        None if forward is None else chosen("forward", forward),
        chosen("probabilities", probabilities),
        chosen("weights", weights),
    )


def threads_of_row(device: torch.device) -> int:
    """Those among which the tensor cores divide a row of a tile of products (triton_columns.py), or 1."""
    return 4 if common.architecture(device) == 9 else 1


def blocks(b_d: int, tiles: Tiles, *, own: str, step: str) -> dict[str, int]:
    return {own: tiles.owned, step: tiles.step, "b_d": b_d, "num_warps": tiles.warps, "num_stages": tiles.stages}
