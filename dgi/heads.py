"""Output heads: logits over the codes of one level, scaled cosine with the level's codebook.

``P(c_j = k | q, c_{<j}) = softmax_k(γ · ĥ_j · ê_{j,k})`` (eq. 13).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dgi_kernels import cosine_cross_entropy, cosine_logits


class CosineHead(nn.Module):
    """The head of one level, over a codebook that it may share with the quantizer (eq. 9).

    Args:
        weight: (K, D) the codebook parameter itself; passing the quantizer's shares it.
        log_scale: 0-d parameter holding log γ, shared likewise.
        detached: stop the gradient at the codebook (the two-stage ablation).
        eps: lower bound of the norms; with a shared codebook the quantizer's, so that both see the same cosines.
        backend: backend of the ops.
    """

    def __init__(self, weight: nn.Parameter, log_scale: nn.Parameter, *, detached: bool = False, eps: float = 1e-12,
                 backend: str = "auto") -> None:
        super().__init__()
        self.weight = weight
        self.log_scale = log_scale
        self.detached = detached
        self.eps = eps
        self.backend = backend

    @property
    def codebook(self) -> Tensor:
        """(K, D) the codebook as this head sees it."""
        return self.weight.detach() if self.detached else self.weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., K) of hidden states (..., D)."""
        return cosine_logits(hidden, self.codebook, self.log_scale.exp(), eps=self.eps, backend=self.backend)

    def loss(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Mean cross-entropy of ``codes`` (...) under the logits of ``hidden`` (..., D), never forming them whole."""
        return cosine_cross_entropy(hidden, self.codebook, codes, self.log_scale.exp(), eps=self.eps,
                                    backend=self.backend)


class InnerProductHead(CosineHead):
    """The ablation without scaled cosine: logits ``h · e_k``, where long vectors win."""

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.codebook)

    def loss(self, hidden: Tensor, codes: Tensor) -> Tensor:
        return F.cross_entropy(self(hidden).flatten(0, -2).float(), codes.flatten())
