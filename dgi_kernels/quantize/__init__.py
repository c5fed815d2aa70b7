"""Differentiable residual quantization (paper eq. 6, 7, 10), with the noise of :mod:`dgi_kernels.gumbel`.

    s_j = scale * r^_{j-1} . e^_j        p_j = softmax((s_j + g_j) / tau),    g ~ Gumbel(0, 1)
    z~_j = p_j E_j                       r_j = r_{j-1} - z~_j,                r_0 = z

One seed gives one sample on every backend and any tiling, see :mod:`dgi_kernels.noise`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels import noise as reference_noise
from dgi_kernels.backend import choose
from dgi_kernels.enums import METRICS, MODES
from dgi_kernels.gumbel import draw_noise, inner_backend
from dgi_kernels.quantize import native, reference
from dgi_kernels.quantize.options import QuantizeOptions
from dgi_kernels.quantize.result import ResidualQuantization
from dgi_kernels.types import Backend, Metric, Mode

__all__ = ["ResidualQuantization", "assign_codes", "residual_quantize"]


def residual_quantize(
    z: Tensor,
    codebooks: Iterable[Tensor],
    scale: float | Tensor,
    tau: float | Tensor = 1.0,
    *,
    mode: Mode = "soft",
    metric: Metric = "cosine",
    noise: bool = True,
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> ResidualQuantization:
    """Quantize vectors by a sequence of codebooks, each level the residual of the levels before (paper eq. 6, 7, 10).

    Level j has logits s_j, by the metric, and probabilities ``p_j = softmax((s_j + g_j) / tau)``, emits
    z~_j and leaves ``r_j = r_{j-1} - z~_j``, with ``r_0 = z``. What it emits is the mode's:

    - ``"soft"``: ``z~_j = p_j E_j``.
    - ``"straight_through"``: the row of E_j with the largest ``s_j + g_j``, exactly; backward takes the softmax's
      Jacobian for the one-hot's, as ``F.gumbel_softmax(hard=True) @ E_j`` does.
    - ``"hard"``: the row of E_j with the largest ``s_j``, exactly, without noise and gradients: the final codes.

    The logits of a metric are:

    - ``"cosine"``: ``s_j = scale * r^_{j-1} . e^_j``, where x^ = x / ||x||.
    - ``"dot"``: ``s_j = scale * r_{j-1} . e_j``, in which long codes win.
    - ``"euclidean"``: ``s_j = -scale * ||r_{j-1} - e_j||^2``, the squared distance. The codes are those of exact
      distances wherever the two nearest differ by more than 1e-5 of the distance, however far from 0 the vectors are.

    Everything is computed in float32 (float64 for float64 inputs). A row of ``z`` with a NaN has ``log_normalizer``
    NaN in every mode and emits NaN, in hard mode code 0.

    Args:
        z: (N, D) float32, bfloat16, float16 or float64; any strides; N may be 0.
        codebooks: m >= 1 tensors (K_j, D), K_j >= 1, in the dtype of ``z`` (under ``torch.autocast`` in any).
        scale: the logit scale (gamma), a finite float or a 0-d tensor, which receives its gradient.
        tau: temperature, positive and finite; a float or a 0-d tensor, which receives its gradient.
        mode: ``"soft"``, ``"straight_through"`` or ``"hard"``.
        metric: ``"cosine"``, ``"dot"`` or ``"euclidean"``.
        noise: add Gumbel noise g to the logits; False: g = 0. In hard mode noise is drawn only where a ``seed`` is
            given as well, and shows in ``sampled`` and ``log_normalizer`` alone.
        seed: as in :func:`dgi_kernels.gumbel_noise`, whose stream 0 this is.
        row_offset: number of the first row, for the noise: data-parallel ranks draw what one process would.
        eps: lower bound of the norms; a zero vector has cosine 0 with everything. Of the cosine alone.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"native"``.

    Returns:
        ResidualQuantization, a named tuple. ``quantized``, ``usage``, ``residuals`` and ``log_normalizer`` carry
        gradients to ``z``, every codebook, ``scale`` and ``tau``; in hard mode nothing does.

        - ``quantized`` (N, m, D), z~_j, in the dtype of ``z`` (promoted with the codebooks').
        - ``codes`` (N, m) int64, the argmax of ``s_j``, without noise, on the path that the mode takes; ties go to the
          lower code.
        - ``sampled`` (N, m) int64, the argmax of ``s_j + g_j``; equal to ``codes`` without noise.
        - ``usage``, a list of m tensors (K_j,), the batch mean of p_j, in hard mode the frequency of the codes; zeros
          for an empty batch; float32 (float64).
        - ``residuals`` (N, m, D), the r_{j-1} that level j saw, in the dtype of ``quantized``.
        - ``log_normalizer`` (N, m), ``logsumexp_k((s_j + g_j) / tau)``, the log-normalizer of p_j; float32 (float64).

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or device, or is out of range; it is named.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> codebooks = [torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])]
        >>> result = dgi_kernels.residual_quantize(torch.tensor([[5.0, 0.1]]), codebooks, 30.0, mode="hard")
        >>> result.codes, result.quantized.sum(1)
        (tensor([[0, 0]]), tensor([[5., 0.]]))
    """
    checks.float_tensor("z", z, ndim=2)
    codebooks = _check_codebooks(codebooks, z)
    scale, tau = checks.scalar("scale", scale, z), checks.scalar("tau", tau, z, positive=True)
    checks.choice("mode", mode, MODES)
    checks.choice("metric", metric, METRICS)
    if not isinstance(noise, bool):
        raise TypeError(f"noise must be a bool; got {type(noise).__name__}")
    eps = checks.number("eps", eps, positive=True)
    options = QuantizeOptions(mode, metric, reference_noise.check_row_offset(row_offset, z.shape[0]), eps)
    if seed is not None or (noise and mode != "hard"):
        seed = reference_noise.resolve_seed(seed, z.device)
    seed = seed if noise else None
    dtype = _common_dtype(z, codebooks)
    chosen = choose("residual_quantize", backend, z.device, dtype, {"metric": metric})
    compute = checks.compute_dtype(dtype)
    gradients = torch.is_grad_enabled() and mode != "hard"

    def in_pytorch(
        z: Tensor, codebooks: Sequence[Tensor], scale: float | Tensor, tau: float | Tensor
    ) -> ResidualQuantization:
        level_noise = None if seed is None else _level_noise(seed, z.shape[0], options.row_offset, backend)
        return reference.residual_quantize(z, codebooks, scale, tau, level_noise, options)

    with torch.autocast(z.device.type, enabled=False), torch.set_grad_enabled(gradients):
        if chosen == "triton":
            from dgi_kernels.quantize import triton

            return triton.residual_quantize(
                z.to(dtype), [codebook.to(dtype) for codebook in codebooks], scale, tau, seed, options
            )
        inputs = (
            z.to(compute),
            [codebook.to(compute) for codebook in codebooks],
            checks.to_dtype(scale, compute),
            checks.to_dtype(tau, compute),
        )
        if chosen == "native":
            result = native.residual_quantize(*inputs, seed, options, in_pytorch)
        else:
            result = in_pytorch(*inputs)
        return result._replace(quantized=result.quantized.to(dtype), residuals=result.residuals.to(dtype))


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
        (N, m) int64.

    Raises:
        ValueError, TypeError: an argument has the wrong shape, type or device, or is out of range; it is named.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> codebooks = [torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])]
        >>> dgi_kernels.assign_codes(torch.tensor([[5.0, 0.1], [0.1, 3.0]]), codebooks)
        tensor([[0, 0],
                [1, 0]])
    """
    checks.float_tensor("z", z, ndim=2)
    codebooks = _check_codebooks(codebooks, z)
    checks.choice("metric", metric, METRICS)
    options = QuantizeOptions("hard", metric, 0, checks.number("eps", eps, positive=True))
    dtype = _common_dtype(z, codebooks)
    if choose("assign_codes", backend, z.device, dtype, {"metric": metric}) == "native":
        compute = checks.compute_dtype(dtype)
        return native.assign_codes(z.to(compute), [codebook.to(compute) for codebook in codebooks], options)
    return residual_quantize(
        z, codebooks, 1.0, mode="hard", metric=metric, noise=False, eps=options.eps, backend=backend
    ).codes


def _common_dtype(z: Tensor, codebooks: Sequence[Tensor]) -> torch.dtype:
    return functools.reduce(torch.promote_types, (codebook.dtype for codebook in codebooks), z.dtype)


def _check_codebooks(codebooks: Iterable[Tensor], z: Tensor) -> list[Tensor]:
    if isinstance(codebooks, Tensor):
        raise TypeError("codebooks must be a sequence of (K_j, D) tensors, one per level; got one tensor")
    try:
        codebooks = list(codebooks)
    except TypeError:
        raise TypeError(
            f"codebooks must be a sequence of (K_j, D) tensors, one per level; got {type(codebooks).__name__}"
        ) from None
    if not codebooks:
        raise ValueError("codebooks must hold at least one (K_j, D) tensor; got none")
    for level, codebook in enumerate(codebooks):
        name = f"codebooks[{level}]"
        checks.float_tensor(name, codebook, ndim=2, like=z)
        checks.shape(name, codebook, (None, z.shape[1]), "(K_j, D)")
        checks.same_dtype(name, codebook, "z", z)
        if codebook.shape[0] == 0:
            raise ValueError(f"{name} must have at least one row; got shape {tuple(codebook.shape)}")
    return codebooks


def _level_noise(seed: Tensor, rows: int, row_offset: int, backend: str) -> Callable[[int, int], Tensor]:
    """g_j of :func:`residual_quantize` as a function of the level and its number of codes."""

    def noise(level: int, codes: int) -> Tensor:
        return draw_noise(
            seed, level, rows, codes, reference_noise.STREAM_RESIDUAL_QUANTIZE, row_offset, inner_backend(backend)
        )

    return noise
