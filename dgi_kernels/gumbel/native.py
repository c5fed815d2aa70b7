"""Calls into the compiled extension: the noise of the contract in C++."""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel_noise(seed: Tensor, level: int, stream: int, row_offset: int, rows: int, codes: int) -> Tensor:
    """``seed`` int64 of one element, on the CPU -> (rows, codes) float32."""
    return torch.ops.dgi_kernels.gumbel_noise(seed, level, stream, row_offset, rows, codes)
