"""The residual quantizer: codebooks, soft and hard assignment, K-means initialisation, revival of dead codes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dgi.config import SimilarityKind
from dgi.model.clustering import cosine_kmeans
from dgi_kernels import ResidualQuantization, assign_codes, checks, residual_quantize
from dgi_kernels.cosine.modules import read_0d_log_scale
from dgi_kernels.enums import METRICS
from dgi_kernels.types import Backend, Metric, Mode

# A code is dead when its decayed count is below this; with the decay of ResidualQuantizer.count, one use fades to it in
# 300 batches.
DEAD_BELOW = 0.05


class ResidualQuantizer(nn.Module):
    """Soft residual quantization (eq. 6, 7, 10) with learnable codebooks and logit scale γ.

    Args:
        dim: width D of the vectors.
        codebook_sizes: K_j of every level.
        initial_scale: starting γ; it is learnt as log γ and so stays positive.
        similarity: ``cosine``, or ``inner_product`` for the paper's ablation, which has no γ.
        metric: ``cosine``, ``dot`` or ``euclidean``, of :func:`dgi_kernels.residual_quantize`, with γ; None: that of
            ``similarity``.
        eps: lower bound of the norms.  An item that K-means leaves alone in a cluster has a residual of almost nothing,
            and the cosine's gradient there is γ / max(‖r‖, eps): with the ops' own 1e-12 it drowns all others.
        backend: backend of the op.

    Attributes:
        codebooks: m parameters (K_j, D).
        metric: how residuals are compared with codes.
        log_scale: parameter of shape (1,), log γ. Files in which it is 0-d can be loaded.
        code_counts: m float buffers (K_j,): decayed counts of hard codes seen in training, for :meth:`revive`.
    """

    def __init__(
        self,
        dim: int,
        codebook_sizes: Sequence[int],
        *,
        initial_scale: float = 30.0,
        similarity: SimilarityKind = "cosine",
        metric: Metric | None = None,
        eps: float = 0.1,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.codebooks = nn.ParameterList(nn.Parameter(torch.randn(size, dim) / dim**0.5) for size in codebook_sizes)
        self.log_scale = nn.Parameter(torch.tensor([math.log(initial_scale)]))
        self.register_load_state_dict_pre_hook(read_0d_log_scale)
        if metric is not None:
            checks.choice("metric", metric, METRICS)
        self.similarity = similarity
        self.metric: Metric = metric or ("dot" if similarity == "inner_product" else "cosine")
        self.is_scaled = metric is not None or similarity == "cosine"
        self.eps = eps
        self.backend = backend
        for level, size in enumerate(codebook_sizes):
            self.register_buffer(f"code_counts_{level}", torch.ones(size))

    @property
    def code_counts(self) -> list[Tensor]:
        return [self.get_buffer(f"code_counts_{level}") for level in range(len(self.codebooks))]

    @property
    def scale(self) -> Tensor:
        """0-d γ, with its gradient."""
        return self.log_scale.exp().squeeze(0)

    def forward(
        self,
        z: Tensor,
        tau: float | Tensor = 1.0,
        *,
        mode: Mode = "soft",
        noise: bool = True,
        seed: int | Tensor | None = None,
        row_offset: int = 0,
    ) -> ResidualQuantization:
        """Quantize ``z`` (..., D); see :func:`dgi_kernels.residual_quantize`."""
        return residual_quantize(
            z,
            list(self.codebooks),
            self.scale if self.is_scaled else 1.0,
            tau,
            mode=mode,
            metric=self.metric,
            noise=noise,
            seed=seed,
            row_offset=row_offset,
            eps=self.eps,
            backend=self.backend,
        )

    @torch.no_grad()
    def assign(self, z: Tensor, *, batch_size: int = 65536) -> Tensor:
        """Final semantic IDs: noise-free hard codes (N, m) int64 of ``z`` (N, D), in batches."""
        if len(z) == 0:
            return torch.empty(0, len(self.codebooks), dtype=torch.int64, device=z.device)
        codebooks = list(self.codebooks)
        return torch.cat(
            [
                assign_codes(batch, codebooks, metric=self.metric, eps=self.eps, backend=self.backend)
                for batch in z.split(batch_size)
            ]
        )

    def embed(self, codes: Tensor, level: int) -> Tensor:
        """(..., D) the vectors ``e_{level, c}`` of ``codes`` (...); a dead beam's -1 takes code 0's."""
        return self.codebooks[level][codes.clamp(min=0)]

    @torch.no_grad()
    def initialize(self, z: Tensor, *, generator: torch.Generator | None = None, iterations: int = 20) -> None:
        """Set every codebook to the K-means centres of what the levels before it leave of ``z`` (N, D).

        What a level leaves goes by the quantizer's own metric, and so do the centres, but for ``dot``, whose centres
        are those of the cosine: by inner products the longest centre would take most points.
        """
        metric: Metric = "euclidean" if self.metric == "euclidean" else "cosine"
        residual = z.detach().to(self.codebooks[0].dtype)
        for codebook in self.codebooks:
            codebook.copy_(
                cosine_kmeans(residual, len(codebook), metric=metric, iterations=iterations, generator=generator)
            )
            chosen = residual_quantize(
                residual, [codebook.detach()], 1.0, mode="hard", metric=self.metric, eps=self.eps, backend=self.backend
            )
            residual = residual - chosen.quantized[:, 0]

    @torch.no_grad()
    def count(self, codes: Tensor, *, decay: float = 0.99, unless: Tensor | None = None) -> None:
        """Add a batch's hard ``codes`` (N, m) to the decayed counts that :meth:`revive` goes by.

        Args:
            codes: int64.
            decay: what is kept of the counts before.
            unless: 0-d bool; where it is True, nothing is counted.
        """
        for level, counts in enumerate(self.code_counts):
            own = codes[:, level]
            # Sums of ones are exact in any order; bincount would wait for the device.
            counted = torch.zeros_like(counts).scatter_add_(0, own, counts.new_ones(()).expand(len(own)))
            counted += counts * decay
            counts.copy_(counted if unless is None else torch.where(unless, counts, counted))

    @torch.no_grad()
    def usage(self) -> list[float]:
        """Share of each level's codes that are in use, that is, not dead."""
        return [float((counts >= DEAD_BELOW).double().mean()) for counts in self.code_counts]

    @torch.no_grad()
    def revive(self, residuals: Tensor, *, generator: torch.Generator | None = None) -> int:
        """Move codes that training no longer uses onto residuals that it sees; return how many moved.

        Args:
            residuals: (N, m, D) what each level saw of the current batch.
            generator: source of the choice.
        """
        moved = 0
        for level, (codebook, counts) in enumerate(zip(self.codebooks, self.code_counts, strict=True)):
            dead = (counts < DEAD_BELOW).nonzero()[:, 0][: len(residuals)]
            chosen = torch.randperm(len(residuals), generator=generator)[: len(dead)].to(residuals.device)
            codebook[dead] = residuals[chosen, level].to(codebook.dtype)
            counts[dead] = 1.0
            moved += len(dead)
        return moved
