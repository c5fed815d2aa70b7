"""What the tests of Gumbel-Softmax share: its formula in float64, with the noise of the reference."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import gumbel_noise


def noisy_logits(logits: Tensor, seed: int | Tensor) -> Tensor:
    """logits + g in float64, with the gradient of ``logits``."""
    rows = math.prod(logits.shape[:-1])
    noise = gumbel_noise(seed, 0, rows, logits.shape[-1], stream=1, device=logits.device, backend="reference")
    return logits.double() + noise.reshape(logits.shape).double()


def one_hot_argmax(noisy: Tensor) -> Tensor:
    return F.one_hot(noisy.argmax(-1), noisy.shape[-1]).double()
