"""Calls into the compiled extension: residual quantization in C++ (``csrc/cpu/quantize``).

Forward saves inputs, residuals and, of the rows of which few entries count, those entries, but nothing of size N x K;
backward makes noise and assignments of the other rows again.  Gradients of gradients are those of the reference, which
every function here is given for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgi_kernels.enums import MODES
from dgi_kernels.native_common import create_graph, gradients_of, scalar, wants_gradients
from dgi_kernels.quantize.result import ResidualQuantization

# Entries per row and level that backward may be left as lists, 8 bytes each; what is not used is never touched.
LIST_ROOM = 64


def residual_quantize(z: Tensor, codebooks: Sequence[Tensor], scale: float | Tensor, tau: float | Tensor, mode: str,
                      seed: Tensor | None, row_offset: int, eps: float,
                      reference: Callable[..., ResidualQuantization]) -> ResidualQuantization:
    """(N, D), m of (K_j, D), all float32 or all float64 -> ResidualQuantization; without a seed there is no noise.

    ``reference(z, codebooks, scale, tau)`` is the op in plain PyTorch.
    """
    scale, tau = scalar(scale, z.dtype, z.device), scalar(tau, z.dtype, z.device)
    sizes = [codebook.shape[0] for codebook in codebooks]
    joined = codebooks[0] if len(codebooks) == 1 else torch.cat(list(codebooks))
    options = _Options(sizes, seed, row_offset, MODES.index(mode), eps)
    if mode != "hard" and wants_gradients(z, joined, scale, tau):
        options = options._replace(list_room=LIST_ROOM if z.dtype == torch.float32 else 0)
        result = _ResidualQuantize.apply(z, joined, scale, tau, options, reference)
    else:
        result = _quantize(z, joined, scale, tau, options)
    quantized, codes, sampled, usage, residuals, log_normalizer = result[:6]
    return ResidualQuantization(quantized, codes, sampled, list(usage.split(sizes)), residuals, log_normalizer)


def assign_codes(z: Tensor, codebooks: Sequence[Tensor], eps: float) -> Tensor:
    """(N, D), m of (K_j, D), all float32 or all float64 -> (N, m) int64, the codes of hard mode alone."""
    sizes = [codebook.shape[0] for codebook in codebooks]
    joined = codebooks[0] if len(codebooks) == 1 else torch.cat(list(codebooks))
    return torch.ops.dgi_kernels.assign_codes(z.contiguous(), joined.contiguous(), sizes, eps)


class _Options(NamedTuple):
    sizes: list[int]
    seed: Tensor | None
    row_offset: int
    mode: int
    eps: float
    list_room: int = 0


def _quantize(z: Tensor, codebooks: Tensor, scale: Tensor, tau: Tensor, options: _Options) -> tuple[Tensor, ...]:
    return torch.ops.dgi_kernels.residual_quantize(
        z.contiguous(), codebooks.contiguous(), options.sizes, scale, tau, options.seed, options.row_offset,
        options.mode, options.eps, options.list_room)


class _ResidualQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, codebooks: Tensor, scale: Tensor, tau: Tensor, options: _Options,
                reference: Callable[..., ResidualQuantization]) -> tuple[Tensor, ...]:
        result = _quantize(z, codebooks, scale, tau, options)
        _, codes, sampled, _, residuals, log_normalizer, *lists = result
        ctx.mark_non_differentiable(codes, sampled, *lists)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, codebooks, scale, tau, residuals, sampled, log_normalizer, *lists, options.seed)
        ctx.options, ctx.reference = options._replace(seed=None), reference
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        z, codebooks, scale, tau, *saved, seed = ctx.saved_tensors
        sizes, _, row_offset, mode, eps, _ = ctx.options
        wanted = ctx.needs_input_grad[:4]
        dquantized, _, _, dusage, dresiduals, dlog_normalizer = upstream[:6]
        if create_graph():
            with torch.enable_grad():
                result = ctx.reference(z, codebooks.split(sizes), scale, tau)
                outputs = [result.quantized, torch.cat(result.usage), result.residuals, result.log_normalizer]
                gradients = gradients_of(outputs, [dquantized, dusage, dresiduals, dlog_normalizer],
                                         (z, codebooks, scale, tau), wanted)
                return *gradients, None, None
        gradients = torch.ops.dgi_kernels.residual_quantize_backward(
            *(x if x is None else x.contiguous() for x in (dquantized, dusage, dresiduals, dlog_normalizer)),
            *saved, codebooks.contiguous(), sizes, scale, tau, seed, row_offset, mode, eps, *wanted)
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None
