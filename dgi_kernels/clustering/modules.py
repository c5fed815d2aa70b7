"""Quantizers with codebooks that follow the data: exponential moving averages or gradients, K-means start, revival.

Forward returns what the modules of vector-quantize-pytorch return, and makes the same updates:

    code_n = argmin_k cost(x_n, e_k)                        the metric's, or balanced by Sinkhorn
    loss   = commitment_weight mean (x - e_code)^2
    N_k <- decay N_k + (1 - decay) |{n: code_n = k}|        S_k <- decay S_k + (1 - decay) sum_{n: code_n = k} x_n
    e_k <- S_k / (N_k + eps) * (sum N + K eps) / sum N
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgi_kernels import checks
from dgi_kernels.backend import choose
from dgi_kernels.clustering import balanced_codes, implementation, kmeans
from dgi_kernels.collectives import all_gather, all_reduce, world_size
from dgi_kernels.quantize import assign_codes
from dgi_kernels.quantize.rotation import rotate
from dgi_kernels.types import Backend

Gradient = Literal["rotation", "straight_through"]
VectorMetric = Literal["euclidean", "cosine"]


class VectorQuantizer(nn.Module):
    """One codebook: ``forward(x) -> (quantized, codes, loss)``, as ``vector_quantize_pytorch.VectorQuantize``.

    In training the codebook follows the data by exponential moving averages, or by the gradient of the loss
    (``learnable_codebook``), and codes that few vectors use move onto vectors of the batch. With the cosine, vectors
    and codes have norm 1. Under ``torch.distributed`` sums are over all ranks; for K-means and for dead codes their
    batches must have equally many rows.

    Args:
        dim: width D of the vectors.
        codebook_size: number K of codes.
        metric: ``"euclidean"`` or ``"cosine"``.
        decay: of the moving averages, in [0, 1].
        eps: added to the counts that a code's sum is divided by.
        learnable_codebook: train the codebook by the loss's gradient instead of moving averages. Not with the cosine.
        commitment_weight: factor of the loss, at least 0.
        kmeans_init: start with K-means of the first batch in training; until then codes are 0.
        kmeans_iterations: rounds of it.
        dead_below: a code of which the moving count falls below this takes a random vector of the batch; 0 never.
        gradient: how x gets a gradient from what is emitted: ``"rotation"`` (arXiv 2410.06424) or
            ``"straight_through"``, the identity.
        balanced: in training use :func:`dgi_kernels.balanced_codes` with this epsilon; None for the nearest codes.
        backend: backend of the ops.
        device, dtype: of the codebook.

    Attributes:
        codebook: (K, D) parameter, or buffer that follows the data.
        counts: (K,) buffer, the moving counts N_k.
        sums: (K, D) buffer, the moving sums S_k.
        is_started: bool buffer: False before K-means has run.

    Raises:
        ValueError, TypeError: an argument is out of range or has the wrong type; it is named.

    Examples:
        >>> quantizer = dgi_kernels.VectorQuantizer(16, 256, kmeans_init=True)
        >>> quantized, codes, loss = quantizer(torch.randn(4, 100, 16))
        >>> quantized.shape, codes.shape, loss.shape
        (torch.Size([4, 100, 16]), torch.Size([4, 100]), torch.Size([]))
    """

    counts: Tensor
    sums: Tensor
    is_started: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        metric: VectorMetric = "euclidean",
        decay: float = 0.8,
        eps: float = 1e-5,
        learnable_codebook: bool = False,
        commitment_weight: float = 1.0,
        kmeans_init: bool = False,
        kmeans_iterations: int = 10,
        dead_below: float = 0.0,
        gradient: Gradient = "rotation",
        balanced: float | None = None,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.integer("dim", dim, low=1)
        self.codebook_size = checks.integer("codebook_size", codebook_size, low=1)
        checks.choice("metric", metric, ("euclidean", "cosine"))
        checks.choice("gradient", gradient, ("rotation", "straight_through"))
        if learnable_codebook and metric == "cosine":
            raise ValueError('learnable_codebook must be False with metric="cosine", whose codes have norm 1')
        self.metric: VectorMetric = metric
        self.decay = checks.number("decay", decay, low=0.0, high=1.0)
        self.eps = checks.number("eps", eps, positive=True)
        self.commitment_weight = checks.number("commitment_weight", commitment_weight, low=0.0, high=torch.inf)
        self.kmeans_iterations = checks.integer("kmeans_iterations", kmeans_iterations, low=0)
        self.dead_below = checks.number("dead_below", dead_below, low=0.0, high=torch.inf)
        self.balanced = balanced if balanced is None else checks.number("balanced", balanced, positive=True)
        self.learnable_codebook, self.gradient, self.backend = learnable_codebook, gradient, backend
        start = torch.zeros(codebook_size, dim, device=device, dtype=dtype)
        if not kmeans_init:
            nn.init.kaiming_uniform_(start)
            start = F.normalize(start, dim=1) if metric == "cosine" else start
        if learnable_codebook:
            self.codebook: Tensor = nn.Parameter(start)
        else:
            self.register_buffer("codebook", start)
        self.register_buffer("counts", start.new_ones(codebook_size))
        self.register_buffer("sums", start.clone())
        self.register_buffer("is_started", torch.tensor(not kmeans_init, device=device))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize vectors, and in training let the codebook follow them.

        Args:
            x: (..., D) floating-point.
            mask: (...) bool, True where a row counts. The others give zeros and code -1.

        Returns:
            ``quantized`` (..., D) in the dtype of ``x``, with a gradient to ``x``; ``codes`` (...) int64; ``loss``, 0-d
            in the dtype of the codebook, 0 in evaluation.
        """
        checks.float_tensor("x", x, min_ndim=1, like=self.codebook)
        checks.shape("x", x, (*x.shape[:-1], self.codebook.shape[1]), "(..., D)")
        rows = x.reshape(-1, x.shape[-1])
        if mask is not None:
            checks.tensor("mask", mask, dtypes=(torch.bool,), like=x)
            checks.shape("mask", mask, tuple(x.shape[:-1]), "(...)")
            rows = rows[mask.reshape(-1)]
        rows = rows.to(self.codebook.dtype)
        rows = F.normalize(rows, dim=1) if self.metric == "cosine" else rows
        if self.training and not self.is_started:
            self._start(rows.detach())
        codes = self._assign(rows.detach())
        chosen = F.embedding(codes, self.codebook)
        loss = self.codebook.new_zeros(())
        quantized = chosen
        if self.training and len(rows):
            target = chosen if self.learnable_codebook else chosen.detach()
            loss = self.commitment_weight * F.mse_loss(target, rows)
            quantized = self._with_gradient(rows, chosen)
            self._follow(rows.detach(), codes)
        quantized = quantized.to(x.dtype)
        if mask is None:
            return quantized.reshape(x.shape), codes.reshape(x.shape[:-1]), loss
        place = mask.reshape(-1)
        all_quantized = quantized.new_zeros(len(place), x.shape[-1]).masked_scatter(place.unsqueeze(1), quantized)
        all_codes = codes.new_full((len(place),), -1).masked_scatter(place, codes)
        return all_quantized.reshape(x.shape), all_codes.reshape(x.shape[:-1]), loss

    def _assign(self, rows: Tensor) -> Tensor:
        codebook = self.codebook.detach()
        if self.training and self.balanced is not None:
            return balanced_codes(rows, codebook, metric=self.metric, epsilon=self.balanced, backend=self.backend)
        return assign_codes(rows, [codebook], metric=self.metric, backend=self.backend)[:, 0]

    def _with_gradient(self, rows: Tensor, chosen: Tensor) -> Tensor:
        if not rows.requires_grad or not torch.is_grad_enabled():
            return chosen
        if self.gradient == "rotation":
            return rotate(rows, chosen.detach().unsqueeze(1), rows.detach().unsqueeze(1))[0].squeeze(1)
        return chosen.detach() + (rows - rows.detach())

    @torch.no_grad()
    def _start(self, rows: Tensor) -> None:
        """K-means of the batches of all ranks."""
        rows = rows if world_size() == 1 else all_gather(rows)
        if not len(rows):
            return
        seed = _same_on_all_ranks(torch.randint(2**62, (1,), device=rows.device))
        result = kmeans(
            rows,
            self.codebook_size,
            metric=self.metric,
            iterations=self.kmeans_iterations,
            seed=seed,
            tol=0.0,
            backend=self.backend,
        )
        centroids = F.normalize(result.centroids, dim=1) if self.metric == "cosine" else result.centroids
        self.counts.copy_(result.codes.bincount(minlength=self.codebook_size).clamp(min=1))
        self.sums.copy_(centroids * self.counts.unsqueeze(1))
        self.codebook.copy_(centroids)
        self.is_started.fill_(True)

    @torch.no_grad()
    def _follow(self, rows: Tensor, codes: Tensor) -> None:
        if self.learnable_codebook and self.dead_below == 0:
            return
        kernels = implementation(choose("kmeans", self.backend, rows.device, rows.dtype))
        sums, counts = kernels.cluster_sums(rows.contiguous(), codes, None, self.codebook_size)
        if world_size() > 1:
            sums, counts = all_reduce(sums), all_reduce(counts)
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - self.decay)
        self.sums.lerp_(sums.to(self.sums.dtype), 1 - self.decay)
        if not self.learnable_codebook:
            total = self.counts.sum()
            smooth = (self.counts + self.eps) / (total + self.codebook_size * self.eps) * total
            codebook = self.sums / smooth.unsqueeze(1)
            self.codebook.copy_(F.normalize(codebook, dim=1) if self.metric == "cosine" else codebook)
        if self.dead_below > 0:
            self._revive(rows)

    def _revive(self, rows: Tensor) -> None:
        """Move dead codes onto different vectors of the batch; what a batch has no vector for waits for the next."""
        dead = (self.counts < self.dead_below).nonzero()[:, 0]
        if not len(dead):
            return
        rows = rows if world_size() == 1 else all_gather(rows)
        order = _same_on_all_ranks(torch.randperm(len(rows), device=rows.device))[: len(dead)]
        dead = dead[: len(order)]
        self.codebook[dead] = rows[order]
        self.counts[dead] = self.dead_below
        self.sums[dead] = rows[order] * self.dead_below


class ResidualVectorQuantizer(nn.Module):
    """A :class:`VectorQuantizer` for each level, on what the levels before leave, as
    ``vector_quantize_pytorch.ResidualVQ``.

    Args:
        dim: width D of the vectors.
        codebook_sizes: K_j of each of m levels.
        **options: those of :class:`VectorQuantizer`, for every level.

    Attributes:
        levels: the m quantizers.

    Examples:
        >>> quantizer = dgi_kernels.ResidualVectorQuantizer(16, [64, 64, 64])
        >>> quantized, codes, losses = quantizer(torch.randn(100, 16))
        >>> quantized.shape, codes.shape, losses.shape
        (torch.Size([100, 16]), torch.Size([100, 3]), torch.Size([3]))
    """

    def __init__(self, dim: int, codebook_sizes: Sequence[int], **options: object) -> None:
        super().__init__()
        if not len(codebook_sizes):
            raise ValueError("codebook_sizes must hold at least one number of codes; got none")
        self.levels = nn.ModuleList(
            VectorQuantizer(dim, size, **options)  # type: ignore[arg-type]
            for size in codebook_sizes
        )

    @property
    def codebooks(self) -> list[Tensor]:
        """m tensors (K_j, D)."""
        return [level.codebook for level in self.levels]  # type: ignore[misc]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize vectors level by level.

        Args:
            x, mask: as in :meth:`VectorQuantizer.forward`.

        Returns:
            ``quantized`` (..., D), the sum over the levels, with a gradient to ``x``; ``codes`` (..., m) int64;
            ``losses`` (m,).
        """
        residual, total, codes, losses = x, torch.zeros_like(x), [], []
        for level in self.levels:
            quantized, code, loss = level(residual, mask)
            residual = residual - quantized.detach()
            total = total + quantized
            codes.append(code)
            losses.append(loss)
        return total, torch.stack(codes, dim=-1), torch.stack(losses)


def _same_on_all_ranks(value: Tensor) -> Tensor:
    """The first rank's value."""
    return value if world_size() == 1 else all_gather(value)[: len(value)]
