"""Calls into the compiled extension: noise, Gumbel-Softmax and residual quantization in C++ (``csrc/cpu``), the first
two also in CUDA (``csrc/cuda``).

Forward saves inputs, residuals and, of the rows of which few entries count, those entries, but nothing of size N x K;
backward makes noise and assignments of the other rows again.  Gradients of gradients are those of the reference, which
every function here is given for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dgi_kernels.gumbel.reference import ResidualQuantization

MODES = {"soft": 0, "straight_through": 1, "hard": 2}

# Entries per row and level that backward may be left as lists, 8 bytes each; what is not used is never touched.
LIST_ROOM = 64

Noise = Callable[[int, int], Tensor]  # g_j of a level and its number of codes, for the reference


def gumbel_noise(seed: Tensor, level: int, stream: int, row_offset: int, rows: int, codes: int) -> Tensor:
    """``seed`` int64 of one element -> (rows, codes) float32 on its device."""
    return torch.ops.dgi_kernels.gumbel_noise(seed, level, stream, row_offset, rows, codes)


def gumbel_softmax(logits: Tensor, tau: float | Tensor, hard: bool, seed: Tensor,
                   reference: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(..., K) -> (..., K) of the same dtype; ``reference(logits, tau)`` is the op in plain PyTorch."""
    compute = torch.float64 if logits.dtype == torch.float64 else torch.float32
    tau = _scalar(tau, compute, logits.device)
    if not _wants_gradients(logits, tau):
        return _softmax(logits, tau, seed, hard)
    return _GumbelSoftmax.apply(logits, tau, seed, hard, reference)


def residual_quantize(z: Tensor, codebooks: Sequence[Tensor], scale: float | Tensor, tau: float | Tensor, mode: str,
                      seed: Tensor | None, row_offset: int, eps: float,
                      reference: Callable[..., ResidualQuantization]) -> ResidualQuantization:
    """(N, D), m of (K_j, D), all float32 or all float64 -> ResidualQuantization; without a seed there is no noise.

    ``reference(z, codebooks, scale, tau)`` is the op in plain PyTorch.
    """
    scale, tau = _scalar(scale, z.dtype, z.device), _scalar(tau, z.dtype, z.device)
    sizes = [codebook.shape[0] for codebook in codebooks]
    joined = codebooks[0] if len(codebooks) == 1 else torch.cat(list(codebooks))
    options = _Options(sizes, seed, row_offset, MODES[mode], eps)
    if mode != "hard" and _wants_gradients(z, joined, scale, tau):
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


def _scalar(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the device without a copy from the host, which a CUDA graph could not capture."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if device.type == "cpu":
        return torch.tensor(value, dtype=dtype)
    return torch.full((), value, dtype=dtype, device=device)


def _wants_gradients(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def _create_graph() -> bool:
    """Whether backward runs with ``create_graph=True``; what is compiled cannot."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _rows(x: Tensor) -> Tensor:
    """(..., K) -> (N, K) without gaps."""
    return (x if x.ndim == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])).contiguous()


def _softmax(logits: Tensor, tau: Tensor, seed: Tensor, hard: bool) -> Tensor:
    return torch.ops.dgi_kernels.gumbel_softmax(_rows(logits), tau, seed, hard).view(logits.shape)


def _quantize(z: Tensor, codebooks: Tensor, scale: Tensor, tau: Tensor, options: _Options) -> tuple[Tensor, ...]:
    return torch.ops.dgi_kernels.residual_quantize(
        z.contiguous(), codebooks.contiguous(), options.sizes, scale, tau, options.seed, options.row_offset,
        options.mode, options.eps, options.list_room)


class _GumbelSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tau: Tensor, seed: Tensor, hard: bool,
                reference: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(logits, tau, seed)
        ctx.reference = reference
        return _softmax(logits, tau, seed, hard)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, tau, seed = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        if _create_graph():
            with torch.enable_grad():
                return *_gradients_of([ctx.reference(logits, tau)], [upstream], (logits, tau), wanted), None, None, None
        dlogits, dtau = torch.ops.dgi_kernels.gumbel_softmax_backward(_rows(upstream), _rows(logits), tau, seed,
                                                                        wanted[1])
        return dlogits.view(logits.shape), dtau if wanted[1] else None, None, None, None


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
        if _create_graph():
            with torch.enable_grad():
                result = ctx.reference(z, codebooks.split(sizes), scale, tau)
                outputs = [result.quantized, torch.cat(result.usage), result.residuals, result.log_normalizer]
                gradients = _gradients_of(outputs, [dquantized, dusage, dresiduals, dlog_normalizer],
                                          (z, codebooks, scale, tau), wanted)
                return *gradients, None, None
        gradients = torch.ops.dgi_kernels.residual_quantize_backward(
            *(x if x is None else x.contiguous() for x in (dquantized, dusage, dresiduals, dlog_normalizer)),
            *saved, codebooks.contiguous(), sizes, scale, tau, seed, row_offset, mode, eps, *wanted)
        return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None


def _gradients_of(outputs: Sequence[Tensor], upstream: Sequence[Tensor | None], inputs: Sequence[Tensor],
                  wanted: Sequence[bool]) -> list[Tensor | None]:
    """Gradients that can be differentiated themselves."""
    pairs = [(output, g) for output, g in zip(outputs, upstream, strict=True) if g is not None and output.requires_grad]
    leaves = [x for x, want in zip(inputs, wanted, strict=True) if want]
    gradients = iter(torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], create_graph=True,
                                         allow_unused=True) if pairs else [None] * len(leaves))
    return [next(gradients) if want else None for want in wanted]
