"""The paper's ablation without scaled cosine: residual quantization with inner-product logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dgi_kernels import ResidualQuantization, residual_quantize
from dgi_kernels.types import Backend, Mode


def inner_product_residual_quantize(
    z: Tensor,
    codebooks: Sequence[Tensor],
    tau: float | Tensor = 1.0,
    *,
    mode: Mode = "soft",
    noise: bool = True,
    seed: int | Tensor | None = None,
    row_offset: int = 0,
    backend: Backend = "auto",
) -> ResidualQuantization:
    """:func:`dgi_kernels.residual_quantize` with ``s_{j,k} = r_{j-1} · e_{j,k}`` in place of ``γ · r̂ · ê``."""
    return residual_quantize(
        z, codebooks, 1.0, tau, mode=mode, metric="dot", noise=noise, seed=seed, row_offset=row_offset, backend=backend
    )
