"""The five terms of the objective (eq. 16-20)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgi.config import LOSS_TERMS, ContrastiveKind, SimilarityKind
from dgi.model.dgi_model import DGIOutput
from dgi.model.distillation import code_targets
from dgi.model.heads import CosineHead
from dgi_kernels import ResidualQuantization, cosine_cross_entropy
from dgi_kernels.collectives import gather_rows, global_mean
from dgi_kernels.cosine.contrastive import sampled_softmax
from dgi_kernels.types import Backend

_LOG_EPSILON = 1e-9


class DGILoss(nn.Module):
    """The objective as named terms and their weighted sum.

    | term          | formula                                                                         |
    |---------------|---------------------------------------------------------------------------------|
    | ``ntp``       | ``−Σ_j log P(c_j | q, c_{<j})``: cosine cross-entropy per level, mean over rows |
    | ``global``    | ``1 − cos(z, Σ_j z̃_j)``                                                         |
    | ``local``     | ``Σ_j ‖sg[r_{j-1}] − e_{j,c_j}‖² + β‖r_{j-1} − sg[e_{j,c_j}]‖²``                |
    | ``infonce``   | cross-entropy of ``ẑ_q · ẑ_n / τ_CL − log q_n`` over candidate items n              |
    | ``diversity`` | ``Σ_j Σ_k p̄ log(p̄ + ε)``, p̄ the mean over the global batch                      |

    Args:
        weights: weight by name; a term left out has weight 1, and a weight of 0 leaves the term uncomputed.
        beta: commitment weight β.
        contrastive_temperature: τ_CL.
        similarity: ``inner_product`` for the ablation without cosine in InfoNCE.
        contrastive: candidates of InfoNCE: ``in_batch`` the distinct items of the global batch, ``sampled`` the batch's
            candidates and a query's own item, ``all_items`` the batch's candidates, which are the whole catalog.
        distillation: the part of the next-token targets that comes of the softmax over all items
            (:mod:`dgi.model.distillation`); needs ``all_items``.
        item_log_q: (num_items,) log of the probability that each item is a candidate of a batch, or of one draw; None
            for no correction. ``all_items`` needs none.
        backend: backend of the ops.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        beta: float = 0.25,
        contrastive_temperature: float = 0.05,
        similarity: SimilarityKind = "cosine",
        contrastive: ContrastiveKind = "in_batch",
        item_log_q: Tensor | None = None,
        distillation: float = 0.0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        unknown = sorted(set(weights or {}) - set(LOSS_TERMS))
        if unknown:
            raise ValueError(f"weights must name terms among {', '.join(LOSS_TERMS)}; got {', '.join(unknown)}")
        self.weights = dict.fromkeys(LOSS_TERMS, 1.0) | dict(weights or {})
        self.beta = beta
        self.contrastive_temperature = contrastive_temperature
        self.similarity = similarity
        self.contrastive = contrastive
        self.item_log_q = None if contrastive == "all_items" else item_log_q
        self.distillation = distillation
        self.backend = backend

    def forward(
        self,
        output: DGIOutput,
        heads: Sequence[CosineHead] = (),
        codebooks: Sequence[Tensor] = (),
        item_codes: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Every computed term by name, 0-d float32, and ``loss``, their weighted sum.

        Args:
            output: of :class:`dgi.DGIModel`, or of a :class:`dgi.DualEncoder` (then InfoNCE alone). Its ``item_bias``
                is read with ``all_items`` only.
            heads, codebooks: the model's, one per level.
            item_codes: (num_items, m) codes of all items, for distillation.
        """
        terms: dict[str, Tensor] = {}
        quantization, hidden, codes = output.quantization, output.hidden, output.codes
        if hidden is not None and codes is not None and self.weights["ntp"]:
            targets: Sequence[Tensor] = codes.unbind(1)
            if self.distillation and item_codes is not None:
                probabilities = self._item_softmax(output)
                sizes = [len(head.weight) for head in heads]
                targets = code_targets(probabilities, item_codes, codes, sizes, self.distillation)
            terms["ntp"] = torch.stack(
                [_token_loss(head, hidden[:, j], targets[j]) for j, head in enumerate(heads)]
            ).sum()
        if quantization is not None:
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

    @torch.no_grad()
    def _item_softmax(self, output: DGIOutput) -> Tensor:
        """(B, N) what InfoNCE over all items believes."""
        if output.candidates is None:
            raise ValueError("output must have all items as candidates for distillation; it has none")
        if self.similarity == "inner_product":
            logits = output.query.float() @ output.candidates.float().T
        else:
            unit = F.normalize(output.candidates.float(), dim=1)
            logits = F.normalize(output.query.float(), dim=1) @ unit.T / self.contrastive_temperature
        return (logits if output.item_bias is None else logits + output.item_bias).softmax(1)

    def _infonce(self, output: DGIOutput) -> Tensor:
        """InfoNCE over the candidates, each with its bias −log q."""
        if self.contrastive == "in_batch":
            items, rows, targets, again = _items_of_batch(output)
            bias = self._bias(rows)
            bias = output.query.new_zeros(len(rows), dtype=torch.float32) if bias is None else bias
            return self._softmax(output.query, items, targets, bias.masked_fill(again, -torch.inf))
        if output.candidates is None or output.candidate_rows is None:
            raise ValueError(f"output must have candidates where contrastive is {self.contrastive!r}; it has none")
        if self.contrastive == "all_items":
            bias = None if output.item_bias is None else output.item_bias[output.candidate_rows]
            return self._softmax(output.query, output.candidates, output.item_rows, bias)
        if self.similarity == "inner_product":
            return self._sampled_inner_products(output)
        rows = output.candidate_rows
        return sampled_softmax(
            output.query,
            output.z,
            output.candidates,
            1.0 / self.contrastive_temperature,
            self._bias(rows),
            output.item_rows,
            rows,
            1e-12,
            self.backend,
        ).mean()

    def _bias(self, rows: Tensor) -> Tensor | None:
        return None if self.item_log_q is None else -self.item_log_q[rows]

    def _softmax(self, query: Tensor, items: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        if self.similarity == "inner_product":
            logits = (query @ items.T).float()
            return F.cross_entropy(logits if bias is None else logits + bias, targets)
        return cosine_cross_entropy(
            query, items, targets, 1.0 / self.contrastive_temperature, bias=bias, backend=self.backend
        )

    def _sampled_inner_products(self, output: DGIOutput) -> Tensor:
        """As :class:`dgi_kernels.SampledSoftmaxLoss`, for the ablation."""
        assert output.candidates is not None and output.candidate_rows is not None  # checked by the caller
        logits = (output.query @ output.candidates.T).float()
        bias = self._bias(output.candidate_rows)
        if bias is not None:
            logits = logits + bias - math.log(len(bias))
        own = output.item_rows.unsqueeze(1) == output.candidate_rows
        chosen = (output.query * output.z).sum(-1, keepdim=True).float()
        logits = torch.cat([chosen, logits.masked_fill(own, -torch.inf)], 1)
        return F.cross_entropy(logits, torch.zeros_like(output.item_rows))


def _token_loss(head: CosineHead, hidden: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of codes (B,), or of distributions over the codes (B, K)."""
    return head.loss(hidden, target) if target.ndim == 1 else F.cross_entropy(head(hidden).float(), target.float())


def _items_of_batch(output: DGIOutput) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vectors and rows (B, d), (B,) of the global batch's items, the place of every query's own, and (B,) repetitions.

    An item clicked twice is no negative of itself: its place is the first, and the others are True in the repetitions,
    so that no shape depends on how many items differ.  Items are gathered: with as many items as queries on every rank,
    to gather the queries instead (:func:`dgi_kernels.vocabulary_parallel_cosine_cross_entropy`) sends as many bytes, in
    more exchanges.
    """
    rows, items = gather_rows(output.item_rows), gather_rows(output.z)
    ranked, order = rows.sort(stable=True)
    place = order[torch.searchsorted(ranked, rows)]
    again = place != torch.arange(len(rows), device=rows.device)
    return items, rows, order[torch.searchsorted(ranked, output.item_rows)], again


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
