"""Vocabulary-parallel cosine cross-entropy: every rank holds some rows of the weight and never sees the others.

    loss_n = LSE_n - s_nt,    LSE_n = log sum_r exp LSE_nr,    LSE_nr = log sum_{k on rank r} exp s_nk

A rank's part comes from one call of the fused loss with one of its rows, j, as target: the right row if it has it.
nll = LSE_nr - s_nj, and s_nj is one dot product.  The gradient is w for nll and w - [j = t] for s_nj, where
w = exp(LSE_nr - LSE_n): with w near 1, as trained models have it, nearly all of the gradient is the fused op's own.
Rows j other than t cancel out, to rounding, and are spread over the shard: no one row gathers the rounding of all.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.backend import checks_values
from dgi_kernels.collectives import Group, all_gather, all_reduce, gather_rows, rank, sum_gradients, world_size
from dgi_kernels.cosine import check_loss, check_operands, cosine_cross_entropy, cosine_logits
from dgi_kernels.types import Backend, Reduction, Rows

ROWS: tuple[str, ...] = get_args(Rows)


def _outside_of_graphs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``torch.compiler.disable``, which imports all of the compiler, from the first call on that could be compiled."""
    disabled: Callable[..., Tensor] | None = None

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Tensor:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **options)
        disabled = disabled or torch.compiler.disable(function)
        return disabled(*args, **options)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # not traced itself
    return call


@_outside_of_graphs
def vocabulary_parallel_cosine_cross_entropy(
        h: Tensor, weight: Tensor, target: Tensor, scale: float | Tensor, *, group: Group = None,
        rows: Rows = "replicated", ignore_index: int = -100, reduction: Reduction = "mean",
        label_smoothing: float = 0.0, eps: float = 1e-12, backend: Backend = "auto") -> Tensor:
    """:func:`cosine_cross_entropy` over a weight whose rows are spread over the ranks of a process group.

    Equal, to rounding, to ``cosine_cross_entropy(h, torch.cat(all ranks' weights), target, ...)`` in one process, loss
    and gradients.  No row of the weight and no gradient of one ever leaves its rank.  Without an initialised process
    group, or alone in it, this is :func:`cosine_cross_entropy`.  All ranks of ``group`` must call it together, forward
    and backward.  Under ``torch.compile`` it is a graph break.

    ``rows="replicated"`` is a head over a sharded codebook or vocabulary (tensor parallelism). ``h``, ``target`` and
    ``scale`` are the same on every rank, and so is the loss; every rank calls backward on it, and all get the same
    gradients of ``h`` and ``scale``.

    ``rows="sharded"`` is InfoNCE over the items of all ranks. Every rank has its own queries, equally many, and its
    loss is reduced over these alone. Gradients are those of the *sum* of all ranks' losses, as for any loss across
    ranks that DistributedDataParallel then averages; ``scale`` gets this rank's share, its weight's, of which they are
    the sum.  The mean of ranks' means is the mean over all queries where equally many count on every rank.

    How it scales, per rank, with R ranks, N rows of ``h`` in all (N / R on each if sharded) and b bytes per element of
    ``h`` and weight; bytes are those of rings (NCCL's), times (R - 1) / R.

    |                  | this op                            | gathering the weight, ``h`` sharded     |
    |------------------|------------------------------------|-----------------------------------------|
    | sent, replicated | 24 N + 2 b N D                     | ..                                      |
    | sent, sharded    | 36 N + 2 b N D                     | 2 b K D                                 |
    | multiply-adds    | 8 N (K / R) D                      | 6 to 8 (N / R) K D                      |
    | memory           | O(N D + K D / R), a tile of logits | O(N D / R + K D), a tile of logits      |

    So its traffic does not grow with K: it is the cheaper way wherever the ranks hold more rows of the weight than of
    ``h``.  Where they hold as many (in-batch InfoNCE) it sends 1 + 18 / (b D) times as much, in five more steps, and
    on the CPU cannot make the gradients together with the loss: there it is better to gather the weight.

    Args:
        h: (..., D); if sharded, this rank's, of the same shape on every rank.
        weight: (K_r, D) this rank's rows; K_r may differ from rank to rank, and be 0.
        target: (...) integers, ``h.shape[:-1]``: rows of the ranks' weights, counted through from rank 0's first.
        scale: the logit scale (gamma), as for :func:`cosine_cross_entropy`; the same on every rank.
        group: a ``torch.distributed.ProcessGroup``; None for all processes.
        rows: ``"replicated"`` or ``"sharded"``.
        ignore_index, reduction, label_smoothing, eps, backend: as for :func:`cosine_cross_entropy`; smoothing spreads
            over all K rows of all ranks.

    Returns:
        () for ``"mean"`` and ``"sum"``, (...) for ``"none"``; float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`cosine_cross_entropy`; also where shapes or ``rows`` do not
            agree between ranks and, then on every rank, where any rank's target is out of range.  On CUDA, these two
            are checked inside ``dgi_kernels.debug()`` only.

    Examples:
        >>> h, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])   # one process has all rows
        >>> dgi_kernels.vocabulary_parallel_cosine_cross_entropy(h, weight, torch.tensor([1]), 10.0)
        tensor(0.1269)
    """
    checks.choice("rows", rows, ROWS)
    if world_size(group) == 1:
        return cosine_cross_entropy(h, weight, target, scale, ignore_index=ignore_index, reduction=reduction,
                                    label_smoothing=label_smoothing, eps=eps, backend=backend)
    h, weight, scale, eps = check_operands(h, weight, scale, eps)
    ignore_index, label_smoothing = check_loss(h, target, ignore_index, reduction, label_smoothing)
    sharded, shape = rows == "sharded", target.shape
    h, target = h.reshape(target.numel(), h.shape[-1]), target.flatten().long()

    sizes = _shard_sizes(h, weight, sharded, group)
    if sharded:
        h, target = gather_rows(h, group), all_gather(target, group)
    else:
        h = sum_gradients(h, group)
        scale = sum_gradients(scale, group) if isinstance(scale, Tensor) else scale
    codes = sizes.sum()
    if checks_values(h.device):
        checks.index("target", target, 0, int(codes), also=ignore_index)

    ignored = target == ignore_index
    h = h.masked_fill(ignored.unsqueeze(-1), 0)  # padding may be anything, NaN too
    place = target - sizes[:rank(group)].sum()
    owned = ~ignored & (place >= 0) & (place < weight.shape[0])
    nll, logit = _partial_loss(h, weight, place, owned, ignored, scale, eps, backend)
    smoothing = torch.zeros_like(nll)
    if label_smoothing:
        even = _sum_of_logits(h, weight, scale, eps) / codes
        smoothing = label_smoothing * (logit.masked_fill(~owned, 0) - even)
    loss = _AcrossRanks.apply(nll, logit, smoothing, owned, sharded, group)

    counted, wild = ~ignored, ~ignored & ((target < 0) | (target >= codes))
    if sharded:
        counted, wild = (mask.chunk(world_size(group))[rank(group)] if len(mask) else mask for mask in (counted, wild))
    loss = loss.masked_fill(~counted, 0).masked_fill(wild, torch.nan)
    if reduction == "mean":
        return loss.sum() / counted.sum()
    return loss.sum() if reduction == "sum" else loss.reshape(shape)


def _shard_sizes(h: Tensor, weight: Tensor, sharded: bool, group: Group) -> Tensor:
    """(R,) int64: every rank's number of rows of the weight.  What must be the same on all ranks is, or all raise."""
    own = torch.stack([torch.full((), value, device=h.device) for value in (*weight.shape, h.shape[0], sharded)])
    everyone = all_gather(own[None], group)
    if checks_values(h.device):
        for index, what in ((1, "D of weight"), (2, "number of rows of h"), (3, "rows")):
            values = everyone[:, index].tolist()
            if len(set(values)) > 1:
                raise ValueError(f"{what} must be the same on every rank; got {values}")
    return everyone[:, 0]


def _partial_loss(h: Tensor, weight: Tensor, place: Tensor, owned: Tensor, ignored: Tensor, scale: float | Tensor,
                  eps: float, backend: Backend) -> tuple[Tensor, Tensor]:
    """nll and s_nj (N,) over this rank's rows of the weight, j the target where it is ``owned``, else any."""
    if weight.shape[0] == 0:  # log-sum-exp of nothing, through ops that keep every input in the graph
        logits = cosine_logits(h, weight, scale, eps=eps, backend=backend).to(checks.compute_dtype(h.dtype))
        return logits.logsumexp(-1), logits.sum(-1)
    row = torch.where(owned, place, torch.arange(len(place), device=place.device) % weight.shape[0])
    nll = cosine_cross_entropy(h, weight, row.masked_fill(ignored, -100), scale, reduction="none", eps=eps,
                               backend=backend)
    with torch.autocast(h.device.type, enabled=False):
        h, weight = h.to(nll.dtype), weight.to(nll.dtype)
        chosen = F.normalize(F.embedding(row, weight), dim=-1, eps=eps)
        logit = scale * (F.normalize(h, dim=-1, eps=eps) * chosen).sum(-1)
    return nll, logit


def _sum_of_logits(h: Tensor, weight: Tensor, scale: float | Tensor, eps: float) -> Tensor:
    """(N,) the sum of each row's logits over this rank's rows of the weight: scale h^ . sum_k w^_k."""
    with torch.autocast(h.device.type, enabled=False):
        h, weight = (x.to(checks.compute_dtype(x.dtype)) for x in (h, weight))
        total = weight.norm(dim=-1).clamp(min=eps).reciprocal() @ weight
        return scale * (F.normalize(h, dim=-1, eps=eps) @ total)


class _AcrossRanks(torch.autograd.Function):
    """nll, s_nj and the smoothing's part (N,) of this rank -> the loss (N,), or of this rank's own rows (N / R,)."""

    @staticmethod
    def forward(ctx: Any, nll: Tensor, logit: Tensor, smoothing: Tensor, owned: Tensor, sharded: bool,
                group: Group) -> Tensor:
        lse = nll + logit
        top = all_reduce(lse, group, dist.ReduceOp.MAX)
        mass = (lse - top).exp()
        # LSE - s_t = log sum_r mass_r + (top - LSE_r + nll of the rank r that has t): without cancellation where that
        # rank has nearly all mass.
        target_part = torch.where(owned, top - lse + nll, 0) + smoothing
        total, rest = all_reduce(torch.stack([mass, target_part]), group)
        ctx.save_for_backward(mass / total, owned)
        ctx.sharded, ctx.group = sharded, group
        loss = total.log() + rest
        return loss.chunk(world_size(group))[rank(group)].clone() if sharded and len(loss) else loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        share, owned = ctx.saved_tensors
        upstream = all_gather(upstream, ctx.group) if ctx.sharded else upstream
        return upstream * share, upstream * (share - owned.to(share.dtype)), upstream, None, None, None
