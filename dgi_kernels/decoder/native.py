"""Calls into the compiled extension: a decoder's step in C++ (``csrc/cpu/decoder``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgi_kernels._extension import fake_kernel
from dgi_kernels.backend import tracing
from dgi_kernels.decoder.layer import DecoderLayer


def decoder_step(
    states: Tensor,
    layers: Sequence[DecoderLayer],
    memory: Sequence[Tensor],
    mask: Tensor,
    past: Sequence[Tensor],
    ancestors: Sequence[Tensor],
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As :func:`dgi_kernels.decoder_step`, float32; no argument need be contiguous.

    Raises:
        RuntimeError: a shape or a dtype does not fit, or an ancestor is out of range.
    """
    if tracing() and not past:  # AOTInductor's programs pass None for an empty list
        past, ancestors = [states.new_empty(0)], [mask.new_empty(0, dtype=torch.int64)]
    return torch.ops.dgi_kernels.decoder_step.default(
        states.contiguous(),
        [part.contiguous() for layer in layers for pair in layer for part in pair],
        [slots.contiguous() for slots in memory],
        mask.contiguous(),
        [before.contiguous() for before in past],
        [of.contiguous() for of in ancestors],
        heads,
        eps,
    )


@fake_kernel("decoder_step")
def _(
    states: Tensor,
    parameters: list[Tensor],
    memory: list[Tensor],
    mask: Tensor,
    past: list[Tensor],
    ancestors: list[Tensor],
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    batch, beams, dim = states.shape
    return torch.empty_like(states), states.new_empty(len(memory), batch, beams, 2 * dim)
