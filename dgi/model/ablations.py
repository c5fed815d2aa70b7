"""The paper's ablation without scaled cosine: residual quantization with inner-product logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import ResidualQuantization, gumbel_noise


def inner_product_residual_quantize(z: Tensor, codebooks: Sequence[Tensor], tau: float | Tensor = 1.0, *,
                                    mode: str = "soft", noise: bool = True, seed: int | Tensor | None = None,
                                    row_offset: int = 0) -> ResidualQuantization:
    """:func:`dgi_kernels.residual_quantize` with ``s_{j,k} = r_{j-1} · e_{j,k}`` in place of ``γ · r̂ · ê``.

    Arguments, noise and results are those of the cosine op; only the logits differ.
    """
    if seed is None:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64)
    with torch.set_grad_enabled(torch.is_grad_enabled() and mode != "hard"):
        residual, levels = z, []
        for level, codebook in enumerate(codebooks):
            logits = (residual @ codebook.T).float()
            noisy = logits
            if noise and mode != "hard":
                rows, codes = logits.shape
                noisy = logits + gumbel_noise(seed, level, rows, codes, row_offset=row_offset).to(logits.device)
            chosen, sampled = logits.argmax(-1), noisy.argmax(-1)
            soft = torch.softmax(noisy / tau, dim=-1)
            one_hot = F.one_hot(sampled, len(codebook)).to(soft.dtype)
            weights = {"soft": soft, "straight_through": one_hot + soft - soft.detach(), "hard": one_hot}[mode]
            emitted = weights.to(codebook.dtype) @ codebook
            usage = (one_hot if mode == "hard" else soft).mean(0)
            levels.append((emitted, chosen, sampled, usage, residual, torch.logsumexp(noisy / tau, dim=-1)))
            residual = residual - emitted
    emissions, choices, samples, usages, residuals, normalizers = zip(*levels, strict=True)
    return ResidualQuantization(
        quantized=torch.stack(emissions, 1), codes=torch.stack(choices, 1), sampled=torch.stack(samples, 1),
        usage=list(usages), residuals=torch.stack(residuals, 1), log_normalizer=torch.stack(normalizers, 1))
