"""Dropout as the library's other noise is: a function of seed and place, made again in backward and saved nowhere."""

from __future__ import annotations

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.backend import choose
from dgi_kernels.dropout import native, reference
from dgi_kernels.noise import check_row_offset, resolve_seed
from dgi_kernels.types import Backend

__all__ = ["attention", "dropout"]


def dropout(
    x: Tensor,
    p: float = 0.5,
    *,
    residual: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Zero elements with probability ``p``, divide the others by 1 - p, and add ``residual``.

    Element k of row n (of all leading dimensions, counted together) is kept where word ``k % 4`` of Philox4x32-10 with
    the key of ``seed`` and counter ``(k // 4, n, 0, 3)`` is at least p 2**32.

    Args:
        x: (..., K).
        p: in [0, 1).
        residual: of the shape and dtype of ``x``.
        seed: an int, an int64 tensor of one element, or None: drawn from torch's default generator.
        backend: ``"auto"``, ``"reference"`` or ``"native"`` (float32 on the CPU).

    Returns:
        (..., K), with gradients to ``x`` and ``residual``.

    Raises:
        ValueError, TypeError: an argument is out of range, or has the wrong shape, dtype or device.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> x = torch.ones(2, 6)
        >>> torch.equal(dgi_kernels.dropout(x, 0.5, seed=3), dgi_kernels.dropout(x, 0.5, seed=3))
        True
    """
    checks.float_tensor("x", x, min_ndim=1)
    p = _probability(p)
    if residual is not None:
        checks.float_tensor("residual", residual, like=x)
        checks.shape("residual", residual, tuple(x.shape), "of x")
        checks.same_dtype("residual", residual, "x", x)
    seed = resolve_seed(seed, x.device)
    rows = x.shape[:-1].numel()
    check_row_offset(0, rows)
    run = native if choose("dropout", backend, x.device, x.dtype) == "native" else reference
    flat = None if residual is None else residual.reshape(rows, x.shape[-1])
    return run.dropout(x.reshape(rows, x.shape[-1]), flat, p, seed).view(x.shape)


def attention(
    queries: Tensor,
    keys_values: Tensor | None = None,
    *,
    heads: int,
    mask: Tensor | None = None,
    causal: bool = False,
    p: float = 0.0,
    seed: int | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Attention with dropout of its weights, ``dropout(softmax(Q Kᵀ / sqrt(D / heads))) V`` in each head.

    Made for short sequences: one head's scores are in the cache together. Weight s of query t of head h of sequence b
    is kept by the word of row ``(b heads + h) T + t`` and column s, as in :func:`dropout`, with 4 in place of 3 in the
    counter. A query that sees nothing but padding gives 0.

    Args:
        queries: (B, T, D); or (B, T, 3 D), queries, keys and values one after the other, without ``keys_values``.
        keys_values: (B, S, 2 D), keys and values one after the other.
        heads: attention heads.
        mask: (B, S) bool, False where a key is padding; None: there is none.
        causal: query t sees the keys up to t.
        p: of the dropout, in [0, 1).
        seed, backend: as in :func:`dropout`.

    Returns:
        (B, T, D), with gradients to ``queries`` and ``keys_values``.

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`dropout`.

    Examples:
        >>> dgi_kernels.attention(torch.randn(2, 5, 24), heads=2, causal=True, p=0.1).shape
        torch.Size([2, 5, 8])
    """
    checks.float_tensor("queries", queries, ndim=3)
    p = _probability(p)
    batch, length, width = queries.shape
    parts = 3 if keys_values is None else 1
    if width == 0 or width % (parts * checks.integer("heads", heads, low=1)):
        raise ValueError(f"heads must divide the width of the queries ({width}, of {parts} parts); got {heads}")
    slots = length
    if keys_values is not None:
        checks.float_tensor("keys_values", keys_values, like=queries)
        checks.shape("keys_values", keys_values, (batch, None, 2 * width), "(B, S, 2 D)")
        checks.same_dtype("keys_values", keys_values, "queries", queries)
        slots = keys_values.shape[1]
    if mask is not None:
        checks.tensor("mask", mask, dtypes=(torch.bool,), like=queries)
        checks.shape("mask", mask, (batch, slots), "(B, S)")
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool; got {type(causal).__name__}")
    seed = resolve_seed(seed, queries.device)
    check_row_offset(0, batch * heads * length)
    arguments = (queries, keys_values, mask, heads, causal, p, seed)
    if choose("attention", backend, queries.device, queries.dtype) == "native":
        return native.attention(*arguments, reference.attention)
    return reference.attention(*arguments)


def _probability(p: float) -> float:
    p = checks.number("p", p, low=0, high=1)
    if p == 1:
        raise ValueError("p must be less than 1; got 1.0")
    return p
