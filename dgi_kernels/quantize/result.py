"""What residual quantization returns, whichever backend makes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ResidualQuantization(NamedTuple):
    """Result of :func:`dgi_kernels.residual_quantize` for N vectors and m levels; j counts levels.

    Attributes:
        quantized: (N, m, D) the quantized vectors z~_j, in the dtype of ``z``.
        codes: (N, m) int64 argmax of s_j, without noise, on the path that the mode takes.
        sampled: (N, m) int64 argmax of s_j + g_j; equal to ``codes`` without noise.
        usage: m tensors (K_j,), the batch mean of p_j; in hard mode the frequency of the codes.
        residuals: (N, m, D) the residual r_{j-1} that level j saw, in the dtype of ``quantized``.
        log_normalizer: (N, m) logsumexp over k of (s_j + g_j) / tau.
    """

    quantized: Tensor
    codes: Tensor
    sampled: Tensor
    usage: list[Tensor]
    residuals: Tensor
    log_normalizer: Tensor
