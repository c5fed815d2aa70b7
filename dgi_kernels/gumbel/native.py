"""Calls into the compiled extension: noise and Gumbel-Softmax in C++ (``csrc/cpu/gumbel``) and CUDA (``csrc/cuda``).

Forward saves only its inputs; backward computes the noise and the probabilities again.  Gradients of
gradients are those of the reference, which the function is given for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels._extension import fake_kernel
from dgi_kernels.native_common import create_graph, gradients_of, wants_gradients


def gumbel_noise(seed: Tensor, level: int, stream: int, row_offset: int, rows: int, codes: int) -> Tensor:
    """``seed`` int64 of one element -> (rows, codes) float32 on its device."""
    return torch.ops.dgi_kernels.gumbel_noise(seed, level, stream, row_offset, rows, codes)


def gumbel_softmax(
    logits: Tensor, tau: float | Tensor, hard: bool, seed: Tensor, reference: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """(..., K) -> (..., K) of the same dtype; ``reference(logits, tau)`` is the op in plain PyTorch."""
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tau = checks.scalar_tensor(tau, compute, logits.device)
    if not wants_gradients(logits, tau):
        return _softmax(logits, tau, seed, hard)
    return _GumbelSoftmax.apply(logits, tau, seed, hard, reference)


def _rows(x: Tensor) -> Tensor:
    """(..., K) -> (N, K) without gaps."""
    return (x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])).contiguous()


def _softmax(logits: Tensor, tau: Tensor, seed: Tensor, hard: bool) -> Tensor:
    return torch.ops.dgi_kernels.gumbel_softmax(_rows(logits), tau, seed, hard).view(logits.shape)


class _GumbelSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tau: Tensor, seed: Tensor, hard: bool, reference: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(logits, tau, seed)
        ctx.reference = reference
        return _softmax(logits, tau, seed, hard)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, tau, seed = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if create_graph():
            with torch.enable_grad():
                return *gradients_of([ctx.reference(logits, tau)], [upstream], (logits, tau), wanted), None, None, None
        dlogits, dtau = torch.ops.dgi_kernels.gumbel_softmax_backward(
            _rows(upstream), _rows(logits), tau, seed, wanted[1]
        )
        return dlogits.view(logits.shape), dtau if wanted[1] else None, None, None, None


@fake_kernel("gumbel_noise")
def _(seed: Tensor, level: int, stream: int, row_offset: int, rows: int, codes: int) -> Tensor:
    return seed.new_empty((rows, codes), dtype=torch.float32)


@fake_kernel("gumbel_softmax")
def _(logits: Tensor, tau: Tensor, seed: Tensor, hard: bool) -> Tensor:
    return torch.empty_like(logits)


@fake_kernel("gumbel_softmax_backward")
def _(dout: Tensor, logits: Tensor, tau: Tensor, seed: Tensor, wants_tau: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(logits), tau.new_empty(()) if wants_tau else tau.new_empty(0)
