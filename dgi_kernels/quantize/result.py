"""What residual quantization returns, whichever backend makes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ResidualQuantization(NamedTuple):
    """Result of :func:`dgi_kernels.residual_quantize` for vectors (..., D) and m levels; j counts levels.

    Attributes:
        quantized: (..., m, D) the quantized vectors z~_j, in the dtype of ``z``.
        codes: (..., m) int64 argmax of s_j, without noise, on the path that the mode takes; -1 for padding.
        sampled: (..., m) int64 argmax of s_j + sigma g_j; equal to ``codes`` without noise.
        usage: m tensors (K_j,), the mean of p_j over the rows that are no padding; in hard mode the frequency of codes.
        residuals: (..., m, D) the residual r_{j-1} that level j saw, in the dtype of ``quantized``.
        log_normalizer: (..., m) logsumexp over k of (s_j + sigma g_j) / tau.
        mixtures: (..., m, V) p_j V_j, in hard mode the code's row of V_j; None without ``values``.
    """

    quantized: Tensor
    codes: Tensor
    sampled: Tensor
    usage: list[Tensor]
    residuals: Tensor
    log_normalizer: Tensor
    mixtures: Tensor | None = None
