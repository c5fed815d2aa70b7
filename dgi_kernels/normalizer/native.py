"""Calls into the compiled extension: log-sum-exp in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels._extension import fake_kernel


def log_normalizer(logits: Tensor) -> Tensor:
    """``logits`` (..., V) of any float dtype and strides -> (...)."""
    return torch.ops.dgi_kernels.log_normalizer.default(logits)


@fake_kernel("log_normalizer")
def _(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[:-1], dtype=checks.compute_dtype(logits.dtype))
