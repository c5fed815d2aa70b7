"""Calls into the compiled extension: residual quantization in C++ (``csrc/cpu/quantize``).

Forward saves inputs, residuals and, of the rows of which few entries count, those entries, but nothing of size N x K;
backward makes noise and assignments of the other rows again.  Gradients of gradients are those of the reference, which
every function here is given for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels._extension import fake_kernel
from dgi_kernels.native_common import create_graph, gradients_of, wants_gradients
from dgi_kernels.quantize.options import QuantizeOptions
from dgi_kernels.quantize.result import ResidualQuantization

# Entries per row and level that backward may be left as lists, 8 bytes each; what is not used is never touched.
LIST_ROOM = 64


def residual_quantize(
    z: Tensor,
    codebooks: Sequence[Tensor],
    scale: float | Tensor,
    tau: float | Tensor,
    seed: Tensor | None,
    options: QuantizeOptions,
    reference: Callable[..., ResidualQuantization],
) -> ResidualQuantization:
    """(N, D), m of (K_j, D), all float32 or all float64 -> ResidualQuantization; without a seed there is no noise.

    ``reference(z, codebooks, scale, tau)`` is the op in plain PyTorch.
    """
    scale, tau = (checks.scalar_tensor(value, z.dtype, z.device) for value in (scale, tau))
    joined, sizes = _join(codebooks)
    if options.mode != "hard" and wants_gradients(z, joined, scale, tau):
        result = _ResidualQuantize.apply(z, joined, scale, tau, seed, sizes, options, reference)
    else:
        result = _quantize(z, joined, scale, tau, seed, sizes, options, list_room=0)
    quantized, codes, sampled, usage, residuals, log_normalizer = result[:6]
    return ResidualQuantization(quantized, codes, sampled, list(usage.split(sizes)), residuals, log_normalizer)


def assign_codes(z: Tensor, codebooks: Sequence[Tensor], options: QuantizeOptions) -> Tensor:
    """(N, D), m of (K_j, D), all float32 or all float64 -> (N, m) int64, the codes of hard mode alone."""
    joined, sizes = _join(codebooks)
    return torch.ops.dgi_kernels.assign_codes(
        z.contiguous(), joined.contiguous(), sizes, options.metric_number, options.eps
    )


def _join(codebooks: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """All codebooks as one (sum K_j, D), and their sizes."""
    joined = codebooks[0] if len(codebooks) == 1 else torch.cat(list(codebooks))
    return joined, [codebook.shape[0] for codebook in codebooks]


def _quantize(
    z: Tensor,
    codebooks: Tensor,
    scale: Tensor,
    tau: Tensor,
    seed: Tensor | None,
    sizes: list[int],
    options: QuantizeOptions,
    list_room: int,
) -> tuple[Tensor, ...]:
    return torch.ops.dgi_kernels.residual_quantize(
        z.contiguous(),
        codebooks.contiguous(),
        sizes,
        scale,
        tau,
        seed,
        options.row_offset,
        options.mode_number,
        options.metric_number,
        options.eps,
        list_room,
    )


class _ResidualQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        codebooks: Tensor,
        scale: Tensor,
        tau: Tensor,
        seed: Tensor | None,
        sizes: list[int],
        options: QuantizeOptions,
        reference: Callable[..., ResidualQuantization],
    ) -> tuple[Tensor, ...]:
        list_room = LIST_ROOM if z.dtype == torch.float32 else 0
        result = _quantize(z, codebooks, scale, tau, seed, sizes, options, list_room)
        _, codes, sampled, _, residuals, log_normalizer, *lists = result
        ctx.mark_non_differentiable(codes, sampled, *lists)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, codebooks, scale, tau, seed, residuals, sampled, log_normalizer, *lists)
        ctx.sizes, ctx.options, ctx.reference = sizes, options, reference
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        z, codebooks, scale, tau, seed, *saved = ctx.saved_tensors
        sizes, options = ctx.sizes, ctx.options
        wanted = ctx.needs_input_grad[:4]
        dquantized, _, _, dusage, dresiduals, dlog_normalizer = upstream[:6]
        if create_graph():
            with torch.enable_grad():
                result = ctx.reference(z, codebooks.split(sizes), scale, tau)
                outputs = [result.quantized, torch.cat(result.usage), result.residuals, result.log_normalizer]
                gradients = gradients_of(
                    outputs, [dquantized, dusage, dresiduals, dlog_normalizer], (z, codebooks, scale, tau), wanted
                )
                return *gradients, None, None, None, None
        gradients = torch.ops.dgi_kernels.residual_quantize_backward(
            *(x if x is None else x.contiguous() for x in (dquantized, dusage, dresiduals, dlog_normalizer)),
            *saved,
            codebooks.contiguous(),
            sizes,
            scale,
            tau,
            seed,
            options.row_offset,
            options.mode_number,
            options.metric_number,
            options.eps,
            *wanted,
        )
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None, None, None


@fake_kernel("residual_quantize")
def _(
    z: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    scale: Tensor,
    tau: Tensor,
    seed: Tensor | None,
    row_offset: int,
    mode: int,
    metric: int,
    eps: float,
    list_room: int,
) -> tuple[Tensor, ...]:
    rows, levels = z.shape[0], len(sizes)
    vectors, codes = z.new_empty((rows, levels, z.shape[1])), z.new_empty((rows, levels), dtype=torch.int64)
    return (
        vectors,
        codes,
        torch.empty_like(codes),
        z.new_empty(codebooks.shape[0]),
        torch.empty_like(vectors),
        z.new_empty((rows, levels)),
        codes.new_empty((rows, levels, 2)),
        z.new_empty((rows, levels, list_room), dtype=torch.int32),
        z.new_empty((rows, levels, list_room)),
    )


@fake_kernel("assign_codes")
def _(z: Tensor, codebooks: Tensor, sizes: list[int], metric: int, eps: float) -> Tensor:
    return z.new_empty((z.shape[0], len(sizes)), dtype=torch.int64)


@fake_kernel("residual_quantize_backward")
def _(
    dquantized: Tensor | None,
    dusage: Tensor | None,
    dresiduals: Tensor | None,
    dlog_normalizer: Tensor | None,
    residuals: Tensor,
    sampled: Tensor,
    log_normalizer: Tensor,
    list_range: Tensor,
    list_code: Tensor,
    list_p: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    scale: Tensor,
    tau: Tensor,
    seed: Tensor | None,
    row_offset: int,
    mode: int,
    metric: int,
    eps: float,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    shapes = ((residuals.shape[0], residuals.shape[2]), codebooks.shape, (), ())
    return tuple(codebooks.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))
