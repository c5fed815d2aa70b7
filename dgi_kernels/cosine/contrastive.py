"""Losses over candidates that were drawn: in-batch and sampled softmax, corrected for how often each is drawn.

With -log q added to the logit of a candidate that was drawn with probability q, the softmax over the drawn estimates
the softmax over all (Bengio and Senécal, 2008; Yi et al., 2019).  Without it, items are pushed away for being frequent.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.collectives import Group, all_gather, gather_rows, rank, world_size
from dgi_kernels.cosine import cosine_cross_entropy, left_out
from dgi_kernels.cosine.modules import ScaledLoss, scale_repr
from dgi_kernels.types import Backend, Reduction


class _ContrastiveLoss(ScaledLoss):
    """What both losses keep beside the scale: whose candidates count."""

    def __init__(
        self,
        scale: float = 20.0,
        *,
        learnable_scale: bool = False,
        max_scale: float | None = None,
        reduction: Reduction = "mean",
        across_ranks: bool = False,
        group: Group = None,
        eps: float = 1e-12,
        backend: Backend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(scale, learnable_scale, max_scale, reduction, eps, backend, device, dtype)
        self.across_ranks = across_ranks
        self.group = group

    @property
    def ranks(self) -> int:
        """How many processes put their candidates together."""
        return world_size(self.group) if self.across_ranks else 1

    def extra_repr(self) -> str:
        return f"{scale_repr(self.log_scale)}, reduction={self.reduction!r}" + (
            ", across_ranks=True" if self.across_ranks else ""
        )


class InfoNCELoss(_ContrastiveLoss):
    """In-batch softmax: every query's item against all items of the batch.

        loss_n = -log softmax_k(gamma q^_n . x^_k - log q_k)[n]

    Args:
        scale: gamma to start from, positive: 1 / temperature.
        learnable_scale: whether gamma is trained.
        max_scale: bound of gamma; None for none.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over the queries of this process.
        across_ranks: whether the items of all processes are candidates. Each has queries of its own, equally many.
        group: the processes; None for all.
        eps, backend: of :func:`dgi_kernels.cosine_cross_entropy`.
        device, dtype: of the scale.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
    """

    def forward(
        self,
        queries: Tensor,
        items: Tensor,
        *,
        log_q: Tensor | None = None,
        same_as: Tensor | None = None,
        return_log_normalizer: bool = False,
    ) -> Any:
        """Return the loss.

        Args:
            queries: (N, D).
            items: (M, D), M >= N: item n is that of query n; those from N on are more candidates, no query's own.
            log_q: (M,) log of the probability of each item to be among the candidates, or of anything proportional to
                it, such as its count in the training data; :class:`dgi_kernels.FrequencyEstimator` learns it. None
                where all are alike.
            same_as: (M,) integers, the id of each item: one that is there twice is no negative of itself.
            return_log_normalizer: as of :func:`dgi_kernels.cosine_cross_entropy`.

        Raises:
            ValueError, TypeError, BackendUnavailable: as :func:`dgi_kernels.cosine_cross_entropy`.
        """
        checks.float_tensor("queries", queries, ndim=2)
        checks.float_tensor("items", items, ndim=2, like=queries)
        count = queries.shape[0]
        if items.shape[0] < count:
            raise ValueError(f"items must have a row for every query, {count} or more; got {items.shape[0]}")
        bias = _minus(log_q, "log_q", items)
        target = torch.arange(count, device=queries.device)
        if self.ranks > 1:
            target = target + rank(self.group) * items.shape[0]
            items = gather_rows(items, self.group)
            bias, same_as = (None if x is None else all_gather(x, self.group) for x in (bias, same_as))
        return cosine_cross_entropy(
            queries,
            items,
            target,
            self.scale,
            bias=bias,
            same_as=same_as,
            return_log_normalizer=return_log_normalizer,
            reduction=self.reduction,
            eps=self.eps,
            backend=self.backend,
        )


class SampledSoftmaxLoss(_ContrastiveLoss):
    """Softmax over a query's own item and M items that were drawn, as an estimate of the softmax over all items.

        loss_n = log(exp(s_n) + sum_j exp(s_nj - log(M q_j))) - s_n,    s = gamma q^ . x^

    On average over M draws with probabilities q_j the sum is that over all items but n's own. Where n's own was drawn
    too, it is left out.

    Args:
        scale, learnable_scale, max_scale, reduction, group, eps, backend, device, dtype: as of :class:`InfoNCELoss`.
        across_ranks: whether what any process has drawn counts for all, equally many each.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument has the wrong type.
    """

    def forward(
        self,
        queries: Tensor,
        items: Tensor,
        sampled: Tensor,
        *,
        log_q: Tensor | None = None,
        item_ids: Tensor | None = None,
        sampled_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            queries: (N, D).
            items: (N, D), each query's own.
            sampled: (M, D), drawn with replacement, the same for all queries.
            log_q: (M,) log of the probability q_j of each drawn item in one draw; None for drawn evenly: the sum over
                the drawn then counts as it is.
            item_ids, sampled_ids: (N,) and (M,) integers, which items they are; both or none.

        Raises:
            ValueError, TypeError, BackendUnavailable: as :func:`dgi_kernels.cosine_cross_entropy`.
        """
        checks.float_tensor("queries", queries, ndim=2)
        checks.float_tensor("items", items, like=queries)
        checks.shape("items", items, tuple(queries.shape), "queries.shape")
        checks.float_tensor("sampled", sampled, ndim=2, like=queries)
        bias = _minus(log_q, "log_q", sampled)
        if (item_ids is None) != (sampled_ids is None):
            raise ValueError("item_ids and sampled_ids must both be given, or none of them")
        if sampled_ids is not None and item_ids is not None:
            checks.tensor("item_ids", item_ids, dtypes=checks.INDEX_DTYPES, like=queries)
            checks.shape("item_ids", item_ids, (queries.shape[0],), "(N,)")
            checks.tensor("sampled_ids", sampled_ids, dtypes=checks.INDEX_DTYPES, like=queries)
            checks.shape("sampled_ids", sampled_ids, (sampled.shape[0],), "(M,)")
        if self.ranks > 1:
            sampled = gather_rows(sampled, self.group)
            bias, sampled_ids = (None if x is None else all_gather(x, self.group) for x in (bias, sampled_ids))
        loss = sampled_softmax(queries, items, sampled, self.scale, bias, item_ids, sampled_ids, self.eps, self.backend)
        if self.reduction == "mean":
            return loss.mean()
        return loss.sum() if self.reduction == "sum" else loss


def sampled_softmax(
    queries: Tensor,
    items: Tensor,
    sampled: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    item_ids: Tensor | None,
    sampled_ids: Tensor | None,
    eps: float,
    backend: Backend,
) -> Tensor:
    """(N,) losses of :class:`SampledSoftmaxLoss`; ``bias`` (M,) is -log q, and arguments are checked."""
    if bias is not None:
        bias = bias - math.log(max(1, sampled.shape[0]))
    lse = _log_sum(queries, sampled, scale, bias, item_ids, sampled_ids, eps, backend)
    with torch.autocast(queries.device.type, enabled=False):
        query, item = (F.normalize(x.to(lse.dtype), dim=-1, eps=eps) for x in (queries, items))
        return F.softplus(lse - checks.to_dtype(scale, lse.dtype) * (query * item).sum(-1), threshold=math.inf)


def _log_sum(
    queries: Tensor,
    sampled: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    item_ids: Tensor | None,
    sampled_ids: Tensor | None,
    eps: float,
    backend: Backend,
) -> Tensor:
    """(N,) log-sum-exp over what was drawn and is not the query's own item."""
    dtype = checks.compute_dtype(torch.promote_types(queries.dtype, sampled.dtype))
    count = sampled.shape[0]
    bias = queries.new_zeros(count, dtype=dtype) if bias is None else bias.to(dtype)
    if sampled_ids is None or item_ids is None:
        ids, target = None, torch.full((queries.shape[0],), count, device=queries.device)
    else:
        ids, target, _ = left_out.find(item_ids.long(), sampled_ids.long())
    nll, lse = cosine_cross_entropy(
        queries,
        F.pad(sampled, (0, 0, 0, 1)),
        target,
        scale,
        bias=F.pad(bias, (0, 1), value=left_out.LEAST),
        same_as=ids,
        return_log_normalizer=True,
        reduction="none",
        eps=eps,
        backend=backend,
    )
    return left_out.without_target(nll, lse, target < count)


def _minus(log_q: Tensor | None, name: str, items: Tensor) -> Tensor | None:
    if log_q is None:
        return None
    checks.float_tensor(name, log_q, like=items)
    checks.shape(name, log_q, (items.shape[0],), "(M,)")
    return -log_q
