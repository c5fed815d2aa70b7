"""The five terms of the objective (eq. 16-20)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgi.config import LOSS_TERMS, SimilarityKind
from dgi.model.dgi_model import DGIOutput
from dgi.model.heads import CosineHead
from dgi_kernels import ResidualQuantization, cosine_cross_entropy
from dgi_kernels.collectives import gather_rows, global_mean
from dgi_kernels.types import Backend

_LOG_EPSILON = 1e-9


class DGILoss(nn.Module):
    """The objective as named terms and their weighted sum.

    | term          | formula                                                                         |
    |---------------|---------------------------------------------------------------------------------|
    | ``ntp``       | ``−Σ_j log P(c_j | q, c_{<j})``: cosine cross-entropy per level, mean over rows |
    | ``global``    | ``1 − cos(z, Σ_j z̃_j)``                                                         |
    | ``local``     | ``Σ_j ‖sg[r_{j-1}] − e_{j,c_j}‖² + β‖r_{j-1} − sg[e_{j,c_j}]‖²``                |
    | ``infonce``   | cross-entropy of ``ẑ_q · ẑ_n / τ_CL`` over the distinct items of the global batch |
    | ``diversity`` | ``Σ_j Σ_k p̄ log(p̄ + ε)``, p̄ the mean over the global batch                      |

    Args:
        weights: weight by name; a term left out has weight 1, and a weight of 0 leaves the term uncomputed.
        beta: commitment weight β.
        contrastive_temperature: τ_CL.
        similarity: ``inner_product`` for the ablation without cosine in InfoNCE.
        backend: backend of the ops.
    """

    def __init__(self, weights: Mapping[str, float] | None = None, *, beta: float = 0.25,
                 contrastive_temperature: float = 0.05, similarity: SimilarityKind = "cosine",
                 backend: Backend = "auto") -> None:
        super().__init__()
        unknown = sorted(set(weights or {}) - set(LOSS_TERMS))
        if unknown:
            raise ValueError(f"weights must name terms among {', '.join(LOSS_TERMS)}; got {', '.join(unknown)}")
        self.weights = dict.fromkeys(LOSS_TERMS, 1.0) | dict(weights or {})
        self.beta = beta
        self.contrastive_temperature = contrastive_temperature
        self.similarity = similarity
        self.backend = backend

    def forward(self, output: DGIOutput, heads: Sequence[CosineHead] = (),
                codebooks: Sequence[Tensor] = ()) -> dict[str, Tensor]:
        """Every computed term by name, 0-d float32, and ``loss``, their weighted sum.

        Args:
            output: of :class:`dgi.DGIModel`, or of a :class:`dgi.DualEncoder` (then InfoNCE alone).
            heads, codebooks: the model's, one per level.
        """
        terms: dict[str, Tensor] = {}
        quantization, hidden, codes = output.quantization, output.hidden, output.codes
        if quantization is not None and hidden is not None and codes is not None:
            if self.weights["ntp"]:
                terms["ntp"] = torch.stack(
                    [head.loss(hidden[:, j], codes[:, j]) for j, head in enumerate(heads)]).sum()
            if self.weights["global"]:
                terms["global"] = reconstruction_loss(output.z, quantization)
            if self.weights["local"]:
                terms["local"] = commitment_loss(quantization, codebooks, self.beta)
            if self.weights["diversity"]:
                terms["diversity"] = diversity_loss(quantization)
        if self.weights["infonce"]:
            terms["infonce"] = self._infonce(output)
        terms["loss"] = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return terms

    def _infonce(self, output: DGIOutput) -> Tensor:
        """InfoNCE over the distinct items of the global batch: an item clicked twice is no negative of itself.

        Items are gathered: with as many items as queries on every rank, to gather the queries instead
        (:func:`dgi_kernels.vocabulary_parallel_cosine_cross_entropy`) sends as many bytes, in more exchanges.
        """
        rows, items = gather_rows(output.item_rows), gather_rows(output.z)
        distinct, group = torch.unique(rows, return_inverse=True)
        first = torch.full_like(distinct, len(rows)).scatter_reduce_(
            0, group, torch.arange(len(rows), device=rows.device), "amin")
        targets = torch.searchsorted(distinct, output.item_rows)
        scale = 1.0 / self.contrastive_temperature
        if self.similarity == "inner_product":
            return F.cross_entropy((output.query @ items[first].T).float(), targets)
        return cosine_cross_entropy(output.query, items[first], targets, scale, backend=self.backend)


def reconstruction_loss(z: Tensor, quantization: ResidualQuantization) -> Tensor:
    """``1 − cos(z, Σ_j z̃_j)``, mean over rows."""
    return (1.0 - F.cosine_similarity(z.float(), quantization.quantized.sum(1).float(), dim=-1)).mean()


def commitment_loss(quantization: ResidualQuantization, codebooks: Sequence[Tensor], beta: float) -> Tensor:
    """``Σ_j ‖sg[r_{j-1}] − e_{j,c_j}‖² + β‖r_{j-1} − sg[e_{j,c_j}]‖²``, mean over rows."""
    total = quantization.residuals.new_zeros((), dtype=torch.float32)
    for level, codebook in enumerate(codebooks):
        residual, code = quantization.residuals[:, level], codebook[quantization.codes[:, level]]
        pull = (residual.detach() - code).float().square().sum(-1).mean()
        commit = (residual - code.detach()).float().square().sum(-1).mean()
        total = total + pull + beta * commit
    return total


def diversity_loss(quantization: ResidualQuantization) -> Tensor:
    """``Σ_j Σ_k p̄_{j,k} log(p̄_{j,k} + ε)``: least when every code of every level is used alike."""
    means = [global_mean(usage.float()) for usage in quantization.usage]
    return torch.stack([(mean * torch.log(mean + _LOG_EPSILON)).sum() for mean in means]).sum()
