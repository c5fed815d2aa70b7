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

from dgi_kernels import checks
from dgi_kernels._extension import fake_kernel
from dgi_kernels.native_common import create_graph, gradients_of, wants_gradients
from dgi_kernels.quantize.options import Operands, QuantizeOptions
from dgi_kernels.quantize.result import ResidualQuantization

# Entries per row and level that backward may be left as lists, 8 bytes each; what is not used is never touched.
LIST_ROOM = 64


def residual_quantize(
    operands: Operands, options: QuantizeOptions, reference: Callable[[Operands], ResidualQuantization]
) -> ResidualQuantization:
    """All float32 or all float64 -> ResidualQuantization; ``reference`` is the op in plain PyTorch."""
    z = operands.z
    joined, sizes = _join(operands.codebooks)
    values = None if operands.values is None else _join(operands.values)[0]
    scale, tau = (checks.scalar_tensor(value, z.dtype, z.device) for value in (operands.scale, operands.tau))
    inputs = _Inputs(z, joined, scale, tau, operands.noise_scale, values)
    others = (operands.seed, operands.padding, sizes, options)
    if options.mode != "hard" and wants_gradients(*(x for x in inputs if x is not None)):
        result = _ResidualQuantize.apply(*inputs, *others, reference)
    else:
        result = _quantize(inputs, *others, list_room=0)
    quantized, codes, sampled, usage, residuals, log_normalizer, mixtures = result[:7]
    return ResidualQuantization(
        quantized,
        codes,
        sampled,
        list(usage.split(sizes)),
        residuals,
        log_normalizer,
        None if values is None else mixtures,
    )


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


class _Inputs(NamedTuple):
    """What may carry a gradient: all but z (N, D) and the noise's scale (N,) as the operator takes them."""

    z: Tensor
    codebooks: Tensor  # (sum K_j, D)
    scale: Tensor
    tau: Tensor
    noise_scale: Tensor | None
    values: Tensor | None  # (sum K_j, V)


def _quantize(
    inputs: _Inputs,
    seed: Tensor | None,
    padding: Tensor | None,
    sizes: list[int],
    options: QuantizeOptions,
    list_room: int,
) -> tuple[Tensor, ...]:
    return torch.ops.dgi_kernels.residual_quantize(
        inputs.z.contiguous(),
        inputs.codebooks.contiguous(),
        sizes,
        inputs.scale,
        inputs.tau,
        seed,
        _contiguous(inputs.noise_scale),
        _contiguous(inputs.values),
        _contiguous(padding),
        options.row_offset,
        options.mode_number,
        options.metric_number,
        options.eps,
        list_room,
    )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class _ResidualQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        codebooks: Tensor,
        scale: Tensor,
        tau: Tensor,
        noise_scale: Tensor | None,
        values: Tensor | None,
        seed: Tensor | None,
        padding: Tensor | None,
        sizes: list[int],
        options: QuantizeOptions,
        reference: Callable[[Operands], ResidualQuantization],
    ) -> tuple[Tensor, ...]:
        inputs = _Inputs(z, codebooks, scale, tau, noise_scale, values)
        # the gradient of the noise's scale needs the noise of all codes
        is_dense = z.dtype == torch.float64 or ctx.needs_input_grad[4]
        result = _quantize(inputs, seed, padding, sizes, options, 0 if is_dense else LIST_ROOM)
        _, codes, sampled, _, residuals, log_normalizer, _, *lists = result
        ctx.mark_non_differentiable(codes, sampled, *lists)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, seed, padding, residuals, sampled, log_normalizer, *lists)
        ctx.sizes, ctx.options, ctx.reference = sizes, options, reference
        return result

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, (seed, padding, *saved) = _Inputs(*ctx.saved_tensors[:6]), ctx.saved_tensors[6:]
        sizes, options = ctx.sizes, ctx.options
        wanted = ctx.needs_input_grad[:6]
        dquantized, _, _, dusage, dresiduals, dlog_normalizer, dmixtures = upstream[:7]
        given = (dquantized, dusage, dresiduals, dlog_normalizer, dmixtures)
        if create_graph():
            with torch.enable_grad():
                return *_gradients_of_the_reference(inputs, seed, padding, ctx, given, wanted), *[None] * 5
        gradients = torch.ops.dgi_kernels.residual_quantize_backward(
            *(_contiguous(x) for x in given),
            *saved,
            inputs.codebooks.contiguous(),
            sizes,
            inputs.scale,
            inputs.tau,
            seed,
            _contiguous(inputs.noise_scale),
            _contiguous(inputs.values),
            _contiguous(padding),
            options.row_offset,
            options.mode_number,
            options.metric_number,
            options.eps,
            *wanted,
        )
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *[None] * 5


def _gradients_of_the_reference(
    inputs: _Inputs,
    seed: Tensor | None,
    padding: Tensor | None,
    ctx: Any,
    upstream: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    z, codebooks, scale, tau, noise_scale, values = inputs
    parts = None if values is None else values.split(ctx.sizes)
    result = ctx.reference(Operands(z, codebooks.split(ctx.sizes), scale, tau, noise_scale, parts, seed, padding))
    outputs = [result.quantized, torch.cat(result.usage), result.residuals, result.log_normalizer]
    if result.mixtures is not None:
        outputs.append(result.mixtures)
    return gradients_of(outputs, upstream[: len(outputs)], inputs, wanted)


@fake_kernel("residual_quantize")
def _(
    z: Tensor,
    codebooks: Tensor,
    sizes: list[int],
    scale: Tensor,
    tau: Tensor,
    seed: Tensor | None,
    noise_scale: Tensor | None,
    values: Tensor | None,
    padding: Tensor | None,
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
        z.new_empty((rows, levels, 0 if values is None else values.shape[1])),
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
    dmixtures: Tensor | None,
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
    noise_scale: Tensor | None,
    values: Tensor | None,
    padding: Tensor | None,
    row_offset: int,
    mode: int,
    metric: int,
    eps: float,
    *wanted: bool,
) -> tuple[Tensor, ...]:
    rows, _, dim = residuals.shape
    shapes = ((rows, dim), codebooks.shape, (), (), (rows,), (0,) if values is None else values.shape)
    return tuple(codebooks.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True))
