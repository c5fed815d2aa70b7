"""Differentiable residual quantization (paper eq. 6, 7, 10), with the noise of :mod:`dgi_kernels.gumbel`.

    s_j = scale * r^_{j-1} . e^_j        p_j = softmax((s_j + sigma g_j) / tau),    g ~ Gumbel(0, 1)
    z~_j = p_j E_j                       r_j = r_{j-1} - z~_j,                      r_0 = z

One seed gives one sample on every backend and any tiling, see :mod:`dgi_kernels.noise`.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels import noise as reference_noise
from dgi_kernels.backend import choose
from dgi_kernels.enums import METRICS
from dgi_kernels.gumbel import draw_noise, inner_backend
from dgi_kernels.quantize import native, reference
from dgi_kernels.quantize.options import Operands, QuantizeOptions
from dgi_kernels.quantize.result import ResidualQuantization
from dgi_kernels.quantize.rotation import rotate
from dgi_kernels.types import Backend, Metric, Mode

__all__ = ["ResidualQuantization", "assign_codes", "residual_quantize"]

_MODES = get_args(Mode)


def residual_quantize(
    z: Tensor,
    codebooks: Iterable[Tensor],
    scale: float | Tensor = 1.0,
    tau: float | Tensor = 1.0,
    *,
    mode: Mode = "soft",
    metric: Metric = "cosine",
    values: Iterable[Tensor] | None = None,
    noise: bool = True,
    noise_scale: float | Tensor | None = None,
    noise_rows: Tensor | None = None,
    mask: Tensor | None = None,
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> ResidualQuantization:
    """Quantize vectors by a sequence of codebooks, each level the residual of the levels before (paper eq. 6, 7, 10).

    Level j has logits s_j, by the metric, and probabilities ``p_j = softmax((s_j + sigma g_j) / tau)``, emits z~_j and
    leaves ``r_j = r_{j-1} - z~_j``, with ``r_0 = z``. What it emits is the mode's:

    - ``"soft"``: ``z~_j = p_j E_j``.
    - ``"straight_through"``: the row of E_j with the largest ``s_j + sigma g_j``, exactly; backward takes the softmax's
      Jacobian for the one-hot's, as ``F.gumbel_softmax(hard=True) @ E_j`` does.
    - ``"hard"``: the row of E_j with the largest ``s_j``, exactly, without noise and gradients: the final codes.
    - ``"rotation"``: as ``"hard"``, and ``quantized`` and ``residuals`` carry a gradient to ``z`` alone, in which each
      level is a rotation and rescaling of its residual (the rotation trick, arXiv 2410.06424).

    The logits of a metric are:

    - ``"cosine"``: ``s_j = scale * r^_{j-1} . e^_j``, where x^ = x / ||x||.
    - ``"dot"``: ``s_j = scale * r_{j-1} . e_j``, in which long codes win.
    - ``"euclidean"``: ``s_j = -scale * ||r_{j-1} - e_j||^2``, the squared distance. The codes are those of exact
      distances wherever the two nearest differ by more than 1e-5 of the distance, however far from 0 the vectors are.

    Everything is computed in float32 (float64 for float64 inputs). A row of ``z`` with a NaN has ``log_normalizer``
    NaN in every mode and emits NaN, in hard mode code 0.

    Args:
        z: (..., D) float32, bfloat16, float16 or float64; any strides and leading dimensions, which may be empty.
        codebooks: m >= 1 tensors (K_j, D), K_j >= 1, in the dtype of ``z`` (under ``torch.autocast`` in any).
        scale: the logit scale (gamma), a finite float or a 0-d tensor, which receives its gradient.
        tau: temperature, positive and finite; a float or a 0-d tensor, which receives its gradient.
        mode: ``"soft"``, ``"straight_through"``, ``"hard"`` or ``"rotation"``.
        metric: ``"cosine"``, ``"dot"`` or ``"euclidean"``.
        values: m tensors (K_j, V), to be mixed by the same weights as the codebooks; they receive their gradients.
        noise: add Gumbel noise g to the logits; False: g = 0. In the modes hard and rotation noise is drawn only where
            a ``seed`` is given as well, and shows in ``sampled`` and ``log_normalizer`` alone.
        noise_scale: sigma, a finite float or a 0-d tensor, which receives its gradient; None: 1.
        noise_rows: (...) bool: only these rows get noise; None: all.
        mask: (...) bool, True for rows that are padding (as ``key_padding_mask`` in PyTorch): they come out as zeros
            and codes of -1, have no gradient and do not count in ``usage``, whatever they hold.
        seed: as in :func:`dgi_kernels.gumbel_noise`, whose stream 0 this is. A row's number is its flattened leading
            index.
        row_offset: number of the first row, for the noise: data-parallel ranks draw what one process would.
        eps: lower bound of the norms; a zero vector has cosine 0 with everything. Of the cosine alone.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ResidualQuantization, a named tuple. ``quantized``, ``usage``, ``residuals``, ``log_normalizer`` and
        ``mixtures`` carry gradients to ``z``, every codebook, ``scale``, ``tau``, ``noise_scale`` and ``values``; in
        hard mode nothing does.

        - ``quantized`` (..., m, D), z~_j, in the dtype of ``z`` (promoted with the codebooks').
        - ``codes`` (..., m) int64, the argmax of ``s_j``, without noise, on the path that the mode takes; ties go to
          the lower code.
        - ``sampled`` (..., m) int64, the argmax of ``s_j + sigma g_j``; equal to ``codes`` without noise.
        - ``usage``, a list of m tensors (K_j,), the batch mean of p_j, in hard mode the frequency of the codes; zeros
          for an empty batch; float32 (float64).
        - ``residuals`` (..., m, D), the r_{j-1} that level j saw, in the dtype of ``quantized``.
        - ``log_normalizer`` (..., m), ``logsumexp_k((s_j + sigma g_j) / tau)``, the log-normalizer of p_j; float32
          (float64).
        - ``mixtures`` (..., m, V), ``p_j V_j``, or where a level emits a row of E_j the same row of V_j (with the
          gradient that the mode has; in rotation to ``values`` alone); None without ``values``.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or device, or is out of range; it is named.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> codebooks = [torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])]
        >>> result = dgi_kernels.residual_quantize(torch.tensor([[5.0, 0.1]]), codebooks, 30.0, mode="hard")
        >>> result.codes, result.quantized.sum(1)
        (tensor([[0, 0]]), tensor([[5., 0.]]))
    """
    checks.float_tensor("z", z, min_ndim=1)
    codebooks = check_codebooks(codebooks, z)
    values = None if values is None else _check_values(values, codebooks, z)
    scale, tau = checks.scalar("scale", scale, z), checks.scalar("tau", tau, z, positive=True)
    checks.choice("mode", mode, _MODES)
    checks.choice("metric", metric, METRICS)
    if not isinstance(noise, bool):
        raise TypeError(f"noise must be a bool; got {type(noise).__name__}")
    if noise_scale is not None:
        noise_scale = checks.scalar("noise_scale", noise_scale, z)
    noise_rows, mask = _check_rows("noise_rows", noise_rows, z), _check_rows("mask", mask, z)
    eps = checks.number("eps", eps, positive=True)
    leading, rows = z.shape[:-1], math.prod(z.shape[:-1])
    is_hard = mode in ("hard", "rotation")
    options = QuantizeOptions(
        "hard" if is_hard else mode, metric, reference_noise.check_row_offset(row_offset, rows), eps
    )
    if seed is not None or (noise and not is_hard):
        seed = reference_noise.resolve_seed(seed, z.device)
    seed = seed if noise else None
    dtype = _common_dtype(z, codebooks if values is None else [*codebooks, *values])
    chosen = choose("residual_quantize", backend, z.device, dtype)
    compute = dtype if chosen == "triton" else checks.compute_dtype(dtype)

    def in_pytorch(operands: Operands) -> ResidualQuantization:
        z, codebooks, scale, tau, noise_scale, values, seed, padding = operands
        level_noise = None if seed is None else _level_noise(seed, rows, noise_scale, options.row_offset, backend)
        return reference.residual_quantize(z, codebooks, scale, tau, level_noise, options, values, padding)

    with _without_autocast(z.device.type):
        if z.ndim != 2:
            z = z.reshape(rows, z.shape[-1])
        if mask is not None:
            mask = mask.reshape(rows)
            z = z.masked_fill(mask.unsqueeze(1), 0.0)
        operands = Operands(
            z.to(compute),
            _converted(codebooks, compute),
            checks.to_dtype(scale, compute) if chosen != "triton" else scale,
            checks.to_dtype(tau, compute) if chosen != "triton" else tau,
            None if seed is None else _noise_scale(noise_scale, noise_rows, z, checks.compute_dtype(dtype)),
            None if values is None or is_hard else _converted(values, compute),
            seed,
            mask,
        )
        with torch.no_grad() if is_hard else contextlib.nullcontext():
            if chosen == "triton":
                from dgi_kernels.quantize import triton

                result = triton.residual_quantize(operands, options)
            elif chosen == "native":
                result = native.residual_quantize(operands, options, in_pytorch)
            else:
                result = in_pytorch(operands)
        if is_hard and values is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and mode == "rotation"):
                result = result._replace(mixtures=_mixtures_of(values, result.codes))
        if mode == "rotation" and torch.is_grad_enabled():
            quantized, residuals = rotate(operands.z, result.quantized, result.residuals)
            result = result._replace(quantized=quantized, residuals=residuals)
        return _in_shape(result, leading, mask, dtype)


@torch.no_grad()
def assign_codes(
    z: Tensor, codebooks: Iterable[Tensor], *, metric: Metric = "cosine", eps: float = 1e-12, backend: Backend = "auto"
) -> Tensor:
    """The final codes of vectors: those of ``residual_quantize(z, codebooks, scale, mode="hard")`` for any scale > 0.

    An argmax and a gather per level and nothing else: what assigning the codes of a whole catalog needs.
    If two codes are within rounding of each other, either may be returned.

    Args:
        z, codebooks, metric, eps, backend: as in :func:`residual_quantize`.

    Returns:
        (..., m) int64.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or device, or is out of range; it is named.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> codebooks = [torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])]
        >>> dgi_kernels.assign_codes(torch.tensor([[5.0, 0.1], [0.1, 3.0]]), codebooks)
        tensor([[0, 0],
                [1, 0]])
    """
    checks.float_tensor("z", z, min_ndim=1)
    codebooks = check_codebooks(codebooks, z)
    checks.choice("metric", metric, METRICS)
    options = QuantizeOptions("hard", metric, 0, checks.number("eps", eps, positive=True))
    dtype = _common_dtype(z, codebooks)
    if choose("assign_codes", backend, z.device, dtype) == "native":
        compute = checks.compute_dtype(dtype)
        rows = z if z.ndim == 2 else z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
        codes = native.assign_codes(rows.to(compute), _converted(codebooks, compute), options)
        return codes if z.ndim == 2 else codes.reshape(*z.shape[:-1], len(codebooks))
    return residual_quantize(
        z, codebooks, 1.0, mode="hard", metric=metric, noise=False, eps=options.eps, backend=backend
    ).codes


def _without_autocast(device: str) -> contextlib.AbstractContextManager[object]:
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()  # which costs nothing


def _common_dtype(z: Tensor, codebooks: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (codebook.dtype for codebook in codebooks), z.dtype)


def check_codebooks(codebooks: Iterable[Tensor], z: Tensor) -> list[Tensor]:
    codebooks = _check_list("codebooks", codebooks, "(K_j, D)")
    if not codebooks:
        raise ValueError("codebooks must hold at least one (K_j, D) tensor; got none")
    if all(_fits(codebook, z) for codebook in codebooks):
        return codebooks
    for level, codebook in enumerate(codebooks):
        name = f"codebooks[{level}]"
        checks.float_tensor(name, codebook, ndim=2, like=z)
        checks.shape(name, codebook, (None, z.shape[-1]), "(K_j, D)")
        checks.same_dtype(name, codebook, "z", z)
        if codebook.shape[0] == 0:
            raise ValueError(f"{name} must have at least one row; got shape {tuple(codebook.shape)}")
    return codebooks


def _fits(codebook: object, z: Tensor) -> bool:
    """Whether a codebook needs no closer look: as fast as can be, for calls with few rows."""
    return (
        isinstance(codebook, Tensor)
        and codebook.dtype is z.dtype
        and codebook.ndim == 2
        and codebook.shape[1] == z.shape[-1]
        and codebook.shape[0] > 0
        and codebook.device == z.device
        and codebook.layout is torch.strided
        and not codebook.is_nested
    )


def _converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [x if x.dtype is dtype else x.to(dtype) for x in tensors]


def _check_values(values: Iterable[Tensor], codebooks: Sequence[Tensor], z: Tensor) -> list[Tensor]:
    values = _check_list("values", values, "(K_j, V)")
    if len(values) != len(codebooks):
        raise ValueError(f"values must hold one tensor per codebook, {len(codebooks)}; got {len(values)}")
    for level, (value, codebook) in enumerate(zip(values, codebooks, strict=True)):
        name = f"values[{level}]"
        checks.float_tensor(name, value, ndim=2, like=z)
        checks.shape(name, value, (codebook.shape[0], values[0].shape[1]), "(K_j, V)")
        checks.same_dtype(name, value, "z", z)
    return values


def _check_list(name: str, tensors: Iterable[Tensor], shape: str) -> list[Tensor]:
    needed = f"{name} must be a sequence of {shape} tensors, one per level; got "
    if isinstance(tensors, Tensor):
        raise TypeError(needed + "one tensor")
    try:
        return list(tensors)
    except TypeError:
        raise TypeError(needed + type(tensors).__name__) from None


def _check_rows(name: str, marked: Tensor | None, z: Tensor) -> Tensor | None:
    if marked is None:
        return None
    checks.tensor(name, marked, dtypes=(torch.bool,), like=z)
    checks.shape(name, marked, tuple(z.shape[:-1]), "(...), that of z without D")
    return marked


def _noise_scale(
    noise_scale: float | Tensor | None, noise_rows: Tensor | None, z: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """What multiplies the noise of each row of z (N, D): (N,), or None where that is 1."""
    if noise_scale is None and noise_rows is None:
        return None
    sigma = checks.scalar_tensor(1.0 if noise_scale is None else noise_scale, dtype, z.device)
    if noise_rows is None:
        return sigma.expand(z.shape[0])
    return sigma * noise_rows.reshape(z.shape[0]).to(dtype)


def _level_noise(
    seed: Tensor, rows: int, noise_scale: Tensor | None, row_offset: int, backend: str
) -> Callable[[int, int], Tensor]:
    """sigma g_j of :func:`residual_quantize` as a function of the level and its number of codes."""

    def noise(level: int, codes: int) -> Tensor:
        g = draw_noise(
            seed, level, rows, codes, reference_noise.STREAM_RESIDUAL_QUANTIZE, row_offset, inner_backend(backend)
        )
        return g if noise_scale is None else noise_scale.unsqueeze(1) * g

    return noise


def _mixtures_of(values: Sequence[Tensor], codes: Tensor) -> Tensor:
    """m of (K_j, V), (N, m) -> (N, m, V): the rows of the codes."""
    return torch.stack([F.embedding(codes[:, level], value) for level, value in enumerate(values)], dim=1)


def _in_shape(
    result: ResidualQuantization, leading: torch.Size, padding: Tensor | None, dtype: torch.dtype
) -> ResidualQuantization:
    """The results of (N, D) as those of (..., D), with padding blanked and vectors in their dtype."""

    def shaped(x: Tensor, blank: float) -> Tensor:
        if padding is not None:
            x = x.masked_fill(padding.view(-1, *[1] * (x.ndim - 1)), blank)
        return x if len(leading) == 1 else x.reshape(*leading, *x.shape[1:])

    return ResidualQuantization(
        quantized=shaped(result.quantized.to(dtype), 0.0),
        codes=shaped(result.codes, -1),
        sampled=shaped(result.sampled, -1),
        usage=result.usage,
        residuals=shaped(result.residuals.to(dtype), 0.0),
        log_normalizer=shaped(result.log_normalizer, 0.0),
        mixtures=None if result.mixtures is None else shaped(result.mixtures.to(dtype), 0.0),
    )
