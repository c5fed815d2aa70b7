"""Which form of residual quantization's kernels a call takes, and their tiles.

The launchers look everything up here, so that a test can choose the form in one place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dgi_kernels import tiles as measured
from dgi_kernels import triton_common as common
from dgi_kernels.triton_common import HALF as HALF
from dgi_kernels.triton_common import ORDER_FROM as ORDER_FROM
from dgi_kernels.triton_common import Tiles as Tiles

# Tiles of codes whose p are all below this part of their row are left out: what is lost of a row's mass, at most K
# times as much, stays below the rounding of 16-bit weights.
LOG2_SKIP = {torch.float32: -24.0, torch.float16: -22.0, torch.bfloat16: -20.0}


class FlashConfig(NamedTuple):
    """Tiles of the passes that own rows, forward and backward, and of the two that own codes.

    What matters is noted for tiles of ``codes.step`` rows and ``codes.owned`` codes: multiples of these are what
    ``gradient`` owns, and divisors what it steps by.
    """

    forward: Tiles
    gradient: Tiles
    codes: Tiles


_WIDE = FlashConfig(Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(128, 32, 8, 2))
_NARROW = FlashConfig(Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2), Tiles(128, 16, 8, 2))
_SMALL = FlashConfig(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1))

# Architecture -> dimensions up to -> tiles: all that the launchers can choose, each compiled by bench/gpu_code.py. They
# are the largest that spill at most two words; which of these is fastest is to be measured, and is then kept by GPU
# model in dgi_kernels/tiles. Others than 9 and 10 take those of 8.
FLASH = {
    8: {64: _WIDE, 128: _NARROW},
    9: {
        64: FlashConfig(Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), _WIDE.codes),
        128: _WIDE._replace(codes=_NARROW.codes),
    },
    10: {64: _WIDE, 128: _SMALL},
}
FLASH_LARGEST = 128
FLASH_ROWS = 8192  # from which the rows alone fill a GPU: 64 tiles
# Products and weights of one chunk. In the L2's 50 MB they would be nearer, but N = 65536 rows would come in 200 chunks
# of a dozen launches each, for which the host takes longer than the GPU.
CHUNK_BYTES = 256 << 20
# Codes of one pass of the chunked epilogues: with one warp a row, reductions need no shared memory, and 16 codes a
# thread share their cost.
CHUNK_STEP, CHUNK_WARPS = 512, 1


def uses_flash(dim: int, dtype: torch.dtype) -> bool:
    """Flash or chunked form: the one place that chooses.

    float32 is chunked: Triton's exact float32 product does not reach cuBLAS's. So are D > 128: for each (row, code) the
    flash form makes 11 products of length D and the noise 5 times, the chunked form 7 and 2 times, but moves 38 bytes.
    Where rows are near their codes the flash form leaves out most of it. By the counts of bench/gpu_time.py the chunked
    form is the faster already at D = 64 where they are not: 4.5 ms to 5.8 (H200, N = 65536). To be measured.
    """
    return dtype in HALF and dim <= FLASH_LARGEST


def is_flash(rows: int, dim: int, dtype: torch.dtype) -> bool:
    """The same for so many rows: few take the chunked form, whose products cuBLAS splits."""
    return rows >= FLASH_ROWS and uses_flash(dim, dtype)


def flash_config(dim: int, device: torch.device) -> tuple[int, FlashConfig]:
    """Dimensions of a tile, and the tiles, for vectors of ``dim`` dimensions."""
    table = FLASH.get(common.architecture(device), FLASH[8])
    b_d = min(largest for largest in table if dim <= largest)
    config = FlashConfig(
        *(measured.pick(f"quantize.{name}", b_d, tiles, device) for name, tiles in table[b_d]._asdict().items())
    )
    if config.gradient.owned % config.codes.step or config.codes.owned % config.gradient.step:
        raise ValueError(
            f"tiles of the quantizer for D <= {b_d} do not fit: gradient must own a multiple of the rows "
            f"that codes steps by, and step by a divisor of the codes that it owns; got {config}"
        )
    return b_d, config


def blocks(b_d: int, tiles: Tiles, *, own: str, step: str) -> dict[str, int]:
    return {own: tiles.owned, step: tiles.step, "b_d": b_d, "num_warps": tiles.warps, "num_stages": tiles.stages}
