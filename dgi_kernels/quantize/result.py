"""What residual quantization returns, whichever backend makes it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ResidualQuantization(NamedTuple):
    """Result of :func:`dgi_kernels.residual_quantize` for N vectors and m levels; j counts levels."""

    quantized: Tensor  # (N, m, D), the quantized vectors z~_j
    codes: Tensor  # (N, m) int64, argmax_k s_j: the code without noise
    sampled: Tensor  # (N, m) int64, argmax_k (s_j + g_j)
    usage: list[Tensor]  # m of (K_j,), mean over N of p_j; hard: frequency of the codes
    residuals: Tensor  # (N, m, D), the residual r_{j-1} that level j saw
    log_normalizer: Tensor  # (N, m), logsumexp_k((s_j + g_j) / tau)
