"""Residual quantization in plain PyTorch (paper eq. 6, 7).

    s_j = scale * r^_{j-1} . e^_j        p_j = softmax((s_j + g_j) / tau)        (metric "cosine"; x^ = x / ||x||)
    s_j = scale * r_{j-1} . e_j                                                  (metric "dot")
    s_j = -scale * ||r_{j-1} - e_j||^2                                           (metric "euclidean")
    z~_j = p_j E_j                       r_j = r_{j-1} - z~_j

Inputs arrive checked and in the compute dtype (float32, or float64 for float64 inputs); the noise ``g`` is an input.
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
) -> ResidualQuantization:
    """(N, D), m of (K_j, D) -> ResidualQuantization; ``noise(level, K_j)`` is g_j (N, K_j), None for no noise."""
    residual = z
    levels = []
    for level, codebook in enumerate(codebooks):
        s = scale * _similarity(residual, codebook, options)
        noisy = s if noise is None else s + noise(level, codebook.shape[0]).to(s.dtype)
        codes = _nearest(residual, codebook, s, scale) if options.metric == "euclidean" else s.argmax(dim=-1)
        sampled = codes if noise is None else noisy.argmax(dim=-1)
        quantized, usage = _emit(noisy / tau, codebook, options.mode, codes, sampled)
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
def _nearest(residual: Tensor, codebook: Tensor, s: Tensor, scale: float | Tensor) -> Tensor:
    """The argmax of s (N, K), with the distances of the best few from the differences; the lower code of equal ones."""
    best = s.topk(min(CANDIDATES, s.shape[1]), dim=-1).indices.sort(dim=-1).values
    distances = (residual.unsqueeze(1) - codebook[best]).double().square().sum(dim=-1)
    chosen = best.gather(1, (-scale * distances).argmax(dim=-1, keepdim=True)).squeeze(1)
    return torch.where(s.isnan().any(dim=-1), s.argmax(dim=-1), chosen)


def _emit(logits: Tensor, codebook: Tensor, mode: str, codes: Tensor, sampled: Tensor) -> tuple[Tensor, Tensor]:
    """What one level emits, (N, D), and how often it uses each code, (K,)."""
    rows = max(logits.shape[0], 1)  # an empty batch uses no code: zeros, not 0 / 0
    if mode == "hard":
        counts = logits.new_zeros(codebook.shape[0]).index_add(0, codes, torch.ones_like(codes, dtype=logits.dtype))
        return codebook[codes], counts / rows
    p = logits.softmax(dim=-1)
    if mode == "soft":
        return p @ codebook, p.sum(dim=0) / rows
    # The one-hot y of `sampled` in the place of p: dz~/dE through y, dy/ds := dp/ds. Indexing and x - x keep E's bits.
    soft = p @ codebook.detach()
    return codebook[sampled] + (soft - soft.detach()), p.sum(dim=0) / rows
