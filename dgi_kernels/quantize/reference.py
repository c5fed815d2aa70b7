"""Residual quantization in plain PyTorch (paper eq. 6, 7).

    s_j = scale * r^_{j-1} . e^_j        p_j = softmax((s_j + g_j) / tau)        (metric "cosine"; x^ = x / ||x||)
    s_j = scale * r_{j-1} . e_j                                                  (metric "dot")
    s_j = -scale * ||r_{j-1} - e_j||^2                                           (metric "euclidean")
    z~_j = p_j E_j                       r_j = r_{j-1} - z~_j                    mixtures_j = p_j V_j

Inputs arrive checked and in the compute dtype (float32, or float64 for float64 inputs); the noise ``g``, times its
scale, is an input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.quantize.options import QuantizeOptions
from dgi_kernels.quantize.result import ResidualQuantization


def residual_quantize(
    z: Tensor,
    codebooks: Sequence[Tensor],
    scale: float | Tensor,
    tau: float | Tensor,
    noise: Callable[[int, int], Tensor] | None,
    options: QuantizeOptions,
    values: Sequence[Tensor] | None = None,
    padding: Tensor | None = None,
) -> ResidualQuantization:
    """(N, D), m of (K_j, D) -> ResidualQuantization; ``noise(level, K_j)`` is g_j (N, K_j), None for no noise.

    ``values`` are m of (K_j, V); ``padding`` (N,) marks rows that ``usage`` does not count.
    """
    residual = z
    levels, mixtures = [], []
    for level, codebook in enumerate(codebooks):
        s = scale * _similarity(residual, codebook, options)
        noisy = s if noise is None else s + noise(level, codebook.shape[0]).to(s.dtype)
        codes = _nearest(residual, codebook, s, scale, options) if options.metric == "euclidean" else s.argmax(dim=-1)
        sampled = codes if noise is None else noisy.argmax(dim=-1)
        weights = None if options.mode == "hard" else (noisy / tau).softmax(dim=-1)
        chosen = sampled if options.mode == "straight_through" else codes
        quantized = _mix(weights, chosen, codebook, options.mode)
        if values is not None:
            mixtures.append(_mix(weights, chosen, values[level], options.mode))
        usage = _usage(weights, codes, s, padding)
        levels.append((quantized, codes, sampled, usage, residual, (noisy / tau).logsumexp(dim=-1)))
        residual = residual - quantized
    all_quantized, all_codes, all_sampled, usages, residuals, log_normalizers = zip(*levels, strict=True)
    return ResidualQuantization(
        quantized=torch.stack(all_quantized, dim=1),
        codes=torch.stack(all_codes, dim=1),
        sampled=torch.stack(all_sampled, dim=1),
        usage=list(usages),
        residuals=torch.stack(residuals, dim=1),
        log_normalizer=torch.stack(log_normalizers, dim=1),
        mixtures=torch.stack(mixtures, dim=1) if mixtures else None,
    )


def _similarity(residual: Tensor, codebook: Tensor, options: QuantizeOptions) -> Tensor:
    """What the scale multiplies, (N, K)."""
    if options.metric == "dot":
        return residual @ codebook.T
    if options.metric == "euclidean":
        # relative to the mean of the codes: the squares must not cancel where all vectors are far from 0
        centre = codebook.detach().mean(dim=0)
        r, e = residual - centre, codebook - centre
        return 2 * r @ e.T - r.square().sum(dim=-1, keepdim=True) - e.square().sum(dim=-1)
    return F.normalize(residual, dim=-1, eps=options.eps) @ F.normalize(codebook, dim=-1, eps=options.eps).T


CANDIDATES = 8  # codes whose distances are taken once more, from the differences: more than rounding makes alike


@torch.no_grad()
def _nearest(residual: Tensor, codebook: Tensor, s: Tensor, scale: float | Tensor, options: QuantizeOptions) -> Tensor:
    """The argmax of s (N, K) as float64 has it, with the distances of the best few from the differences; the lower code
    of equal ones."""
    exact = scale * _similarity(residual.double(), codebook.double(), options)
    best = exact.topk(min(CANDIDATES, s.shape[1]), dim=-1).indices.sort(dim=-1).values
    distances = (residual.double().unsqueeze(1) - codebook.double()[best]).square().sum(dim=-1)
    chosen = best.gather(1, (-scale * distances).argmax(dim=-1, keepdim=True)).squeeze(1)
    return torch.where(s.isnan().any(dim=-1), s.argmax(dim=-1), chosen)


def _mix(weights: Tensor | None, chosen: Tensor, vectors: Tensor, mode: str) -> Tensor:
    """What one level makes of its codes' vectors (K, V) by its p (N, K), None in hard mode: (N, V)."""
    if weights is None:
        return vectors[chosen]
    if mode == "soft":
        return weights @ vectors
    # The one-hot y of `chosen` in the place of p: dz~/dE through y, dy/ds := dp/ds. Indexing and x - x keep E's bits.
    soft = weights @ vectors.detach()
    return vectors[chosen] + (soft - soft.detach())


def _usage(weights: Tensor | None, codes: Tensor, s: Tensor, padding: Tensor | None) -> Tensor:
    """How often each code is used, (K,), by the rows that are no padding."""
    counted = None if padding is None else (~padding).to(s.dtype)
    # an empty batch uses no code: zeros, not 0 / 0
    rows = max(s.shape[0], 1) if counted is None else counted.sum().clamp(min=1)
    if weights is None:
        uses = torch.ones_like(codes, dtype=s.dtype) if counted is None else counted
        return s.new_zeros(s.shape[1]).index_add(0, codes, uses) / rows
    return (weights if padding is None else weights.masked_fill(padding.unsqueeze(1), 0.0)).sum(dim=0) / rows
