"""Output heads: logits over the codes of one level, scaled cosine with the level's codebook.

``P(c_j = k | q, c_{<j}) = softmax_k(γ · ĥ_j · ê_{j,k})`` (eq. 13).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dgi_kernels import CosineLinear, HiddenStates
from dgi_kernels.types import Backend


class CosineHead(CosineLinear):
    """The head of one level, over a codebook that it may share with the quantizer (eq. 9).

    Args:
        weight: (K, D) the codebook parameter itself; passing the quantizer's shares it.
        log_scale: parameter of shape (1,) holding log γ, shared likewise.
        detached: stop the gradient at the codebook (the two-stage ablation).
        eps: lower bound of the norms; with a shared codebook the quantizer's, so that both see the same cosines.
        backend: backend of the ops.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        log_scale: nn.Parameter,
        *,
        detached: bool = False,
        eps: float = 1e-12,
        backend: Backend = "auto",
    ) -> None:
        codes, dim = weight.shape
        super().__init__(dim, codes, weight=weight, log_scale=log_scale, eps=eps, backend=backend)
        self.detached = detached

    @property
    def vectors(self) -> Tensor:
        """(K, D) the codebook as this head sees it."""
        return self.weight.detach() if self.detached else self.weight

    def for_search(self, h: Tensor) -> Tensor | HiddenStates:
        """What a step of :func:`dgi_kernels.beam_search` returns for hidden states (B, M, D): no logits are formed."""
        return HiddenStates(h, self.vectors, self.scale, self.eps)


class InnerProductHead(CosineHead):
    """The ablation without scaled cosine: logits ``h · e_k``, where long vectors win."""

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.vectors)

    def for_search(self, h: Tensor) -> Tensor | HiddenStates:
        return self(h)

    def loss(self, h: Tensor, target: Tensor, **options: Any) -> Tensor:
        loss = F.cross_entropy(self(h).flatten(0, -2).float(), target.flatten().long(), **options)
        return loss.view(target.shape) if options.get("reduction") == "none" else loss
