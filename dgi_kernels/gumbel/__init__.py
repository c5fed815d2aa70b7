"""Gumbel-Softmax (paper eq. 6), with noise that is a function.

    p = softmax((logits + g) / tau),    g ~ Gumbel(0, 1)

One seed gives one sample on every backend and any tiling, see :mod:`dgi_kernels.noise`.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels import noise as reference_noise
from dgi_kernels.backend import choose
from dgi_kernels.gumbel import native, reference
from dgi_kernels.types import Backend

__all__ = ["gumbel_noise", "gumbel_softmax"]

MOVED = ("ResidualQuantization", "assign_codes", "residual_quantize")  # now in dgi_kernels.quantize


def __getattr__(name: str) -> Any:
    """Names that have moved to :mod:`dgi_kernels.quantize` are still found here."""
    if name in MOVED:
        return getattr(importlib.import_module("dgi_kernels.quantize"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def gumbel_noise(
    seed: int | Tensor | None,
    level: int,
    rows: int,
    codes: int,
    *,
    stream: int = 0,
    row_offset: int = 0,
    device: torch.device | str | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Gumbel(0, 1) noise for rows ``row_offset ... row_offset + rows - 1`` and codes ``0 ... codes - 1`` of one level.

    The noise of (row, code) depends on ``seed``, ``level``, ``stream``, the row's number and the code only, not on how
    many rows and codes are asked for: see :mod:`dgi_kernels.noise` for the formula.

    Args:
        seed: an int in ``[-2**63, 2**64)``, taken modulo ``2**64``; an int64 tensor of one element, used on its device
            without reading it; or None: drawn from torch's default generator.
        level: level of the quantizer, 0 <= level < 2**32.
        rows, codes: the counts.
        stream: 0 is the noise of :func:`residual_quantize`, 1 that of :func:`gumbel_softmax`; below 2**32.
        row_offset: added to the row numbers; row numbers end below 2**32.
        device: of the result; None: the seed's where it is a tensor, else the CPU.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        (rows, codes) float32.

    Raises:
        ValueError, TypeError: an argument is out of range, of the wrong type or on the wrong device; it is named.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> whole = dgi_kernels.gumbel_noise(7, level=0, rows=100, codes=50)
        >>> part = dgi_kernels.gumbel_noise(7, level=0, rows=40, codes=50, row_offset=60)
        >>> torch.equal(whole[60:], part)
        True
    """
    level = checks.integer("level", level, low=0, high=reference_noise.WORD)
    rows, codes = checks.integer("rows", rows, low=0), checks.integer("codes", codes, low=0, high=2**34)
    stream = checks.integer("stream", stream, low=0, high=reference_noise.WORD)
    row_offset = reference_noise.check_row_offset(row_offset, rows)
    if device is None:
        device = seed.device if isinstance(seed, Tensor) else "cpu"
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device must be a torch.device or its name; got {device!r}: {error}") from None
    return draw_noise(reference_noise.resolve_seed(seed, device), level, rows, codes, stream, row_offset, backend)


def gumbel_softmax(
    logits: Tensor,
    tau: float | Tensor = 1.0,
    hard: bool = False,
    *,
    seed: int | Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Sample from the Gumbel-Softmax distribution over the last dimension (paper eq. 6).

    Drop-in for ``F.gumbel_softmax(logits, tau, hard, dim=-1)`` with the noise of :func:`gumbel_noise` at level 0 and
    stream 1, where a row's number is its flattened leading index: ``softmax((logits + g) / tau)``. Computed in float32
    (float64 for float64 logits).

    Args:
        logits: (..., K) float32, bfloat16, float16 or float64; any strides. A logit of -inf has probability 0; a row
            that holds only -inf, or any NaN or +inf, gives NaN, as softmax does.
        tau: temperature, positive and finite; a float or a 0-d tensor, which receives its gradient.
        hard: return the one-hot of the argmax of ``logits + g``, with the gradient of the soft sample.
        seed: as in :func:`gumbel_noise`.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        (..., K) in the dtype of ``logits``.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or device, or is out of range; it is named.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> dgi_kernels.gumbel_softmax(torch.tensor([[0.0, 9.0, 0.0]]), tau=0.5, hard=True, seed=1)
        tensor([[0., 1., 0.]])
    """
    checks.float_tensor("logits", logits, min_ndim=1)
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one entry in the last dimension; got shape {tuple(logits.shape)}")
    tau = checks.scalar("tau", tau, logits, positive=True)
    if not isinstance(hard, bool):
        raise TypeError(f"hard must be a bool; got {type(hard).__name__}")
    seed = reference_noise.resolve_seed(seed, logits.device)
    chosen = choose("gumbel_softmax", backend, logits.device, logits.dtype)
    compute = checks.compute_dtype(logits.dtype)
    rows, codes = math.prod(logits.shape[:-1]), logits.shape[-1]
    reference_noise.check_row_offset(0, rows)

    def in_pytorch(logits: Tensor, tau: float | Tensor) -> Tensor:
        noise = draw_noise(seed, 0, rows, codes, reference_noise.STREAM_GUMBEL_SOFTMAX, 0, inner_backend(backend))
        with torch.autocast(logits.device.type, enabled=False):
            p = reference.gumbel_softmax(
                logits.to(compute), noise.reshape(logits.shape).to(compute), checks.to_dtype(tau, compute), hard
            )
        return p.to(logits.dtype)

    if chosen == "native":
        return native.gumbel_softmax(logits, tau, hard, seed, in_pytorch)
    if chosen == "triton":
        from dgi_kernels.gumbel import triton_softmax

        return triton_softmax.gumbel_softmax(logits, tau, hard, seed)
    return in_pytorch(logits, tau)


def draw_noise(seed: Tensor, level: int, rows: int, codes: int, stream: int, row_offset: int, backend: str) -> Tensor:
    """As :func:`gumbel_noise`, from checked arguments."""
    chosen = choose("gumbel_noise", backend, seed.device)
    if chosen == "native":
        return native.gumbel_noise(seed, level, stream, row_offset, rows, codes)
    if chosen == "triton":
        from dgi_kernels.gumbel import triton_softmax

        return triton_softmax.gumbel_noise(seed, level, stream, row_offset, rows, codes)
    return reference_noise.gumbel_noise(seed, level, rows, codes, stream, row_offset)


def inner_backend(backend: str) -> str:
    """The backend of the noise inside another op's reference: PyTorch's alone where that was asked for by name."""
    return "reference" if backend == "reference" else "auto"
