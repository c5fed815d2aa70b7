"""Launchers of residual quantization in Triton, as operators that torch.compile keeps whole.

Formulas, what is kept and what is made again: :mod:`dgi_kernels.quantize.triton_kernels`. The codebooks come as one
tensor (sum K_j, D) and a list of sizes. Grids depend on shapes alone and nothing is read back, so a CUDA graph can hold
a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, library

from dgi_kernels import checks
from dgi_kernels.quantize.options import Operands, QuantizeOptions
from dgi_kernels.quantize.result import ResidualQuantization
from dgi_kernels.quantize.triton_gradients import (
    NO_ENTRY,
    RowSums,
    chunked_gradients,
    enter_last,
    entry_of,
    flash_gradients,
    upstream_of,
    upstream_with_mixture,
)
from dgi_kernels.quantize.triton_levels import (
    HARD,
    SOFT,
    Sampling,
    chunked_level,
    emit,
    flash,
    flash_forward,
    flash_level,
    levels_of,
)
from dgi_kernels.triton_common import LN2, norms, or_one


def residual_quantize(operands: Operands, options: QuantizeOptions) -> ResidualQuantization:
    """All of one dtype -> ResidualQuantization."""
    z, codebooks, scale, tau, sigma, values, seed, padding = operands
    sizes = [len(codebook) for codebook in codebooks]
    dim = z.shape[1]
    more = max(16, (dim + 15) // 16 * 16) - dim  # rows are read 16 bytes at a time
    weight = torch.cat(list(codebooks))
    if more:  # else it would copy
        z, weight = F.pad(z, (0, more)), F.pad(weight, (0, more))
    width = 0 if values is None else values[0].shape[1]
    mixed = F.pad(torch.cat(list(values)), (0, -width % 16)) if values is not None and width else None
    scale, tau = (checks.scalar_tensor(value, torch.float32, z.device) for value in (scale, tau))
    bias = centres = vectors = None
    if options.metric == "euclidean":
        vectors = weight.detach()
        centres = torch.stack([part.float().mean(0) for part in vectors.split(sizes)])
        weight = torch.cat([part.float() - own for part, own in zip(weight.split(sizes), centres, strict=True)])
        weight = weight.to(z.dtype)
        bias = -scale * weight.float().square().sum(1)
    noisy = seed is not None
    seed = torch.zeros(1, dtype=torch.int64, device=z.device) if seed is None else seed
    quantized, codes, sampled, usage, residuals, log_normalizer, mixtures, *_ = _forward(
        z,
        weight,
        sizes,
        scale,
        tau,
        seed,
        padding,
        None if sigma is None else sigma.contiguous(),
        bias,
        centres,
        vectors,
        mixed,
        options.row_offset,
        options.eps,
        options.mode_number,
        options.metric_number,
        noisy,
    )
    if centres is not None:
        squares = residuals.float().square().sum(-1)
        log_normalizer = log_normalizer - scale * squares / tau  # the row's own part of its scores
        residuals = (residuals.float() + centres).to(z.dtype)
    return ResidualQuantization(
        quantized[..., :dim],
        codes,
        sampled,
        list(usage.split(sizes)),
        residuals[..., :dim],
        log_normalizer,
        None if values is None else mixtures[..., :width],
    )


@library.custom_op("dgi_kernels::residual_quantize_triton", mutates_args=())
def _forward(
    z: Tensor,
    weight: Tensor,
    sizes: list[int],
    scale: Tensor,
    tau: Tensor,
    seed: Tensor,
    padding: Tensor | None,
    sigma: Tensor | None,
    bias: Tensor | None,
    centres: Tensor | None,
    vectors: Tensor | None,
    values: Tensor | None,
    row_offset: int,
    eps: float,
    mode: int,
    metric: int,
    noisy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> quantized, codes, sampled, usage, residuals, log_normalizer, mixtures; rnorm, rnorm_e for backward.

    ``weight`` (sum K_j, D) is relative to ``centres`` (m, D), where there are any, and ``vectors`` (sum K_j, D) are the
    codebooks; so are the residuals, and log_normalizer lacks the row's own part of the scores. ``values`` are
    (sum K_j, V).
    """
    outputs = _empty_outputs(z, weight, sizes, values)
    quantized, codes, sampled, usage, residuals, lse, mixtures, rnorm, rnorm_e = outputs
    rows = z.shape[0]
    if rows == 0:
        usage.zero_()
        return outputs
    weight = weight.contiguous()
    sampling = Sampling(scale, tau, seed, padding, sigma, row_offset, eps, mode, metric, noisy)
    left = z if z.stride(1) == 1 else z.contiguous()
    rest = z.new_empty(z.shape, dtype=torch.float32) if len(sizes) > 1 else None
    if bias is not None:  # its nearest codes are by exact differences
        left = rest = torch.empty_like(z, dtype=torch.float32, memory_format=torch.contiguous_format).copy_(z)
    usages = usage.split(sizes)
    with torch.cuda.device_of(z):
        if sampling.plain:
            rnorm_e.fill_(1.0)
        else:
            norms(weight, eps, rnorm_e)
        shared = (sizes, weight, bias, centres, vectors, rnorm_e, rnorm_e * scale.sign())
        levels = list(levels_of(*shared, residuals, codes, sampled, lse, rnorm, None, values, mixtures))
        emit(left, None, None, None, None, levels[0], sampling)
        for level, after in zip(levels, [*levels[1:], None], strict=True):
            run = flash_level if flash_forward(rows, weight, values) else chunked_level
            mean = run(level, sampling, left, usages[level.index])
            if after is None:
                rest = None
            emit(left, rest, mean, level, quantized[:, level.index], after, sampling)
            left = left if rest is None else rest
            if mode == HARD:
                uses = torch.ones_like(level.codes) if padding is None else (~padding).long()
                usages[level.index].copy_(uses.new_zeros(len(level.e)).index_add_(0, level.codes, uses))
    usage.div_(sampling.counted(rows))
    return outputs


def _empty_outputs(
    z: Tensor, weight: Tensor, sizes: Sequence[int], values: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, dim), levels, codes = z.shape, len(sizes), weight.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return z.new_empty(shape, dtype=dtype)

    return (
        empty(rows, levels, dim, dtype=z.dtype),
        empty(rows, levels, dtype=torch.int64),
        empty(rows, levels, dtype=torch.int64),
        empty(codes),
        empty(rows, levels, dim, dtype=z.dtype),
        empty(rows, levels),
        empty(rows, levels, 0 if values is None else values.shape[1], dtype=z.dtype),
        empty(rows, levels),
        empty(codes),
    )


@_forward.register_fake
def _(z, weight, sizes, scale, tau, seed, padding, sigma, bias, centres, vectors, values, *_):
    return _empty_outputs(z, weight, sizes, values)


@library.custom_op("dgi_kernels::residual_quantize_triton_backward", mutates_args=())
def _backward(
    dquantized: Tensor | None,
    dusage: Tensor | None,
    dresiduals: Tensor | None,
    dlse: Tensor | None,
    dmixtures: Tensor | None,
    weight: Tensor,
    scale: Tensor,
    tau: Tensor,
    seed: Tensor,
    padding: Tensor | None,
    sigma: Tensor | None,
    bias: Tensor | None,
    centres: Tensor | None,
    values: Tensor | None,
    quantized: Tensor | None,
    codes: Tensor,
    sampled: Tensor,
    residuals: Tensor,
    lse: Tensor,
    rnorm: Tensor,
    rnorm_e: Tensor,
    sizes: list[int],
    row_offset: int,
    eps: float,
    mode: int,
    metric: int,
    noisy: bool,
    wants_tau: bool,
    wants_sigma: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dz, dweight, dscale; dtau, of no value where it is not wanted; dsigma, dbias and dvalues, which are empty
    then."""
    rows, _, dim = residuals.shape
    dz = residuals.new_empty(rows, dim)
    # The gradient of r_j, then of r_{j-1}; the first level's goes to ``dz``.
    flow = residuals.new_empty(rows if len(sizes) > 1 or dresiduals is not None else 0, dim, dtype=torch.float32)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dtau = torch.zeros_like(tau) if wants_tau else torch.empty_like(tau)
    dbias = scale.new_zeros(0 if bias is None else len(weight))
    dsigma = scale.new_zeros(rows if wants_sigma else 0)
    dvalues = weight.new_zeros(0 if values is None else values.shape)
    if rows == 0:
        return dz, dweight.zero_(), torch.zeros_like(scale), dtau, dsigma, dbias, dvalues
    weight = weight.contiguous()
    sampling = Sampling(scale, tau, seed, padding, sigma, row_offset, eps, mode, metric, noisy)
    parts = dweight.split(sizes)
    dusages = (dusage.float() / sampling.counted(rows)).split(sizes) if dusage is not None else [None] * len(sizes)
    # The chunked form has noise at hand where it has the weights.
    run = flash_gradients if flash(rows, weight, values) and not wants_sigma else chunked_gradients
    with torch.cuda.device_of(residuals):
        shared = (sizes, weight, bias, centres, None, rnorm_e, or_one(rnorm_e))
        levels = list(levels_of(*shared, residuals, codes, sampled, lse, rnorm, quantized, values, None))
        value_parts = [None] * len(sizes) if dmixtures is None or values is None else dvalues.split(sizes)
        bias_parts = [None] * len(sizes) if bias is None else dbias.split(sizes)
        # Of each row and level, what the gradients of scale and tau are sums of.
        of_scale, of_tau = flow.new_empty(len(sizes), rows), flow.new_empty(len(sizes) if wants_tau else 0, rows)
        comes: Tensor | None = None  # ``flow``, once something has come
        gradients = [None] * len(sizes) if dquantized is None else dquantized.unbind(1)
        normalizers = None if dlse is None else dlse.contiguous()
        entry = NO_ENTRY
        if dmixtures is None:
            entry = entry_of(levels[-1], gradients[-1])
            enter_last(entry)
        for j, level in reversed(list(enumerate(levels))):
            of_level = (dusages[j], None if normalizers is None else normalizers[:, j])
            if dmixtures is None:
                upstream = upstream_of(level, sampling, entry, *of_level)
                entry = entry_of(levels[j - 1], gradients[j - 1]) if j > 0 else NO_ENTRY
            else:
                upstream = upstream_with_mixture(level, sampling, gradients[j], comes, *of_level, dmixtures[:, j])
            if dresiduals is not None:
                comes = flow.copy_(dresiduals[:, j]) if comes is None else flow.add_(dresiduals[:, j])
            of_sigma = torch.empty_like(dsigma) if wants_sigma else None
            out = flow if j > 0 else dz
            rows_of = RowSums(out, comes, of_scale[j], of_tau[j] if wants_tau else None, of_sigma, entry)
            run(level, sampling, upstream, rows_of, parts[j], bias_parts[j], value_parts[j])
            comes = flow
            if of_sigma is not None:
                dsigma.add_(of_sigma, alpha=LN2.value)
            if wants_tau and upstream.dlse is not None:
                dtau -= torch.where(upstream.dlse == 0, 0.0, level.lse * upstream.dlse).sum()
    if wants_tau:
        dtau = (dtau - of_tau.sum() * LN2.value) / tau
    return dz, dweight, of_scale.sum() / tau, dtau, dsigma.div_(tau), dbias.div_(tau), dvalues


@_backward.register_fake
def _(
    dquantized,
    dusage,
    dresiduals,
    dlse,
    dmixtures,
    weight,
    scale,
    tau,
    seed,
    padding,
    sigma,
    bias,
    centres,
    values,
    quantized,
    codes,
    sampled,
    residuals,
    lse,
    rnorm,
    rnorm_e,
    sizes,
    row_offset,
    eps,
    mode,
    metric,
    noisy,
    wants_tau,
    wants_sigma,
):
    rows, _, dim = residuals.shape
    return (
        residuals.new_empty(rows, dim),
        weight.new_empty(weight.shape),
        torch.empty_like(scale),
        torch.empty_like(tau),
        scale.new_empty(rows if wants_sigma else 0),
        scale.new_empty(0 if bias is None else len(weight)),
        weight.new_empty(0 if values is None else values.shape),
    )


def _save(ctx, inputs, output) -> None:
    _, weight, ctx.sizes, scale, tau, seed, padding, sigma, bias, centres, _, values, *ctx.options = inputs
    quantized, codes, sampled, _, residuals, lse, _, rnorm, rnorm_e = output
    is_flash = flash(len(residuals), weight, values)
    mean = quantized if is_flash and ctx.options[2] == SOFT else None
    saved = (codes, sampled, residuals, lse, rnorm, rnorm_e)
    ctx.save_for_backward(weight, scale, tau, seed, padding, sigma, bias, centres, values, mean, *saved)
    ctx.has_bias, ctx.has_values = bias is not None, values is not None
    ctx.mark_non_differentiable(codes, sampled, rnorm, rnorm_e)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dquantized, _codes, _sampled, dusage, dresiduals, dlse, dmixtures, *_):
    wants_tau, wants_sigma = ctx.needs_input_grad[4], ctx.needs_input_grad[7]
    dmixtures = dmixtures if ctx.has_values else None
    dz, dweight, dscale, dtau, dsigma, dbias, dvalues = _backward(
        dquantized,
        dusage,
        dresiduals,
        dlse,
        dmixtures,
        *ctx.saved_tensors,
        ctx.sizes,
        *ctx.options,
        wants_tau,
        wants_sigma,
    )
    dtau, dsigma = dtau if wants_tau else None, dsigma if wants_sigma else None
    dbias, dvalues = dbias if ctx.has_bias else None, dvalues if ctx.has_values else None
    return dz, dweight, None, dscale, dtau, None, None, dsigma, dbias, None, None, dvalues, *([None] * 5)


_forward.register_autograd(_differentiate, setup_context=_save)
