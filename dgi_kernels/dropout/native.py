"""Calls into the compiled extension: dropout and attention with dropout in C++ (``csrc/cpu/dropout``).

Forward saves its inputs and the seed; backward makes mask and probabilities again. Gradients of gradients of the
attention are those of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dgi_kernels._extension import fake_kernel
from dgi_kernels.native_common import create_graph, gradients_of, wants_gradients


def dropout(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    """``x`` (N, K) float32 -> (N, K)."""
    if not wants_gradients(x) and (residual is None or not wants_gradients(residual)):
        return _drop(x, residual, p, seed)
    return _Dropout.apply(x, residual, p, seed)


def _drop(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    residual = None if residual is None else residual.contiguous()
    return torch.ops.dgi_kernels.dropout.default(x.contiguous(), residual, p, seed)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.p, ctx.adds = p, residual is not None
        return _drop(x, residual, p, seed)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        dx = dropout(upstream, None, ctx.p, seed) if ctx.needs_input_grad[0] else None
        return dx, upstream if ctx.adds else None, None, None


def attention(
    queries: Tensor,
    keys_values: Tensor | None,
    mask: Tensor | None,
    heads: int,
    causal: bool,
    p: float,
    seed: Tensor,
    reference: Callable[..., Tensor],
) -> Tensor:
    """As :func:`dgi_kernels.attention`, float32; ``reference`` is the op in plain PyTorch."""
    queries = queries.contiguous()
    keys_values = None if keys_values is None else keys_values.contiguous()
    mask = None if mask is None else mask.contiguous()
    if not wants_gradients(queries) and (keys_values is None or not wants_gradients(keys_values)):
        return torch.ops.dgi_kernels.attention.default(queries, keys_values, mask, heads, causal, p, seed)
    return _Attention.apply(queries, keys_values, mask, heads, causal, p, seed, reference)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys_values: Tensor | None,
        mask: Tensor | None,
        heads: int,
        causal: bool,
        p: float,
        seed: Tensor,
        reference: Callable[..., Tensor],
    ) -> Tensor:
        ctx.save_for_backward(queries, keys_values, mask, seed)
        ctx.options, ctx.reference = (heads, causal, p), reference
        return torch.ops.dgi_kernels.attention.default(queries, keys_values, mask, heads, causal, p, seed)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys_values, mask, seed = ctx.saved_tensors
        if create_graph():
            with torch.enable_grad():
                mixed = ctx.reference(queries, keys_values, mask, *ctx.options, seed)
                inputs = [queries] if keys_values is None else [queries, keys_values]
                wanted = gradients_of([mixed], [upstream], inputs, ctx.needs_input_grad[: len(inputs)])
                return *wanted, *[None] * (8 - len(wanted))
        dqueries, dkeys_values = torch.ops.dgi_kernels.attention_backward.default(
            upstream.contiguous(), queries, keys_values, mask, *ctx.options, seed
        )
        return dqueries, None if keys_values is None else dkeys_values, None, None, None, None, None, None


@fake_kernel("dropout")
def _(x: Tensor, residual: Tensor | None, p: float, seed: Tensor) -> Tensor:
    return torch.empty_like(x)


@fake_kernel("attention")
def _(
    queries: Tensor, keys_values: Tensor | None, mask: Tensor | None, heads: int, causal: bool, p: float, seed: Tensor
) -> Tensor:
    dim = queries.shape[2] if keys_values is not None else queries.shape[2] // 3
    return queries.new_empty(*queries.shape[:2], dim)


@fake_kernel("attention_backward")
def _(
    dout: Tensor,
    queries: Tensor,
    keys_values: Tensor | None,
    mask: Tensor | None,
    heads: int,
    causal: bool,
    p: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(queries), queries.new_empty(0) if keys_values is None else torch.empty_like(keys_values)
