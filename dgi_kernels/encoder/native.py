"""Calls into the compiled extension: an encoder's layers in C++ (``csrc/cpu/encoder``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgi_kernels._extension import fake_kernel
from dgi_kernels.encoder.layer import EncoderLayer


def encoder_layers(states: Tensor, layers: Sequence[EncoderLayer], mask: Tensor, heads: int, eps: float) -> Tensor:
    """As :func:`dgi_kernels.encoder_layers`, float32; no argument need be contiguous.

    Raises:
        RuntimeError: a shape or a dtype does not fit.
    """
    return torch.ops.dgi_kernels.encoder_layers.default(
        states.contiguous(),
        [part.contiguous() for layer in layers for pair in layer for part in pair],
        mask.contiguous(),
        heads,
        eps,
    )


@fake_kernel("encoder_layers")
def _(states: Tensor, parameters: list[Tensor], mask: Tensor, heads: int, eps: float) -> Tensor:
    return torch.empty_like(states)
