"""What the tests of Gumbel-Softmax and of residual quantization share: tolerances, and gradients compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.bfloat16: 2**-6, torch.float16: 2**-9}

# In Triton.
VALUES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}  # relative to the norm of all of a result
GRADIENTS = {torch.float32: 5e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.double() for gradient in torch.autograd.grad(loss, leaves)]


def assert_gradients_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=tolerance * max(1, e.abs().max().item()))
