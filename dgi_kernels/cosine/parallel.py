"""Vocabulary-parallel cosine cross-entropy: every rank holds some rows of the weight and never sees the others.

    loss_n = LSE_n - s_nt,    LSE_n = log sum_r exp LSE_nr,    LSE_nr = log sum_{k on rank r} exp s_nk

A rank's part comes from one call of the fused loss with one of its rows, j, as target: the right row if it has it.
nll = LSE_nr - s_nj, and s_nj is one dot product.  The gradient is w for nll and w - [j = t] for s_nj, where
w = exp(LSE_nr - LSE_n): with w near 1, as trained models have it, nearly all of the gradient is the fused op's own.
Rows j other than t cancel out, to rounding, and are spread over the shard: no one row gathers the rounding of all.

With a bias the fused loss returns LSE_nr itself, since s_nj may be -inf, and a rank without t takes a row more for j.
With ``same_as`` the rows of t's item leave LSE_nr on every rank (:mod:`dgi_kernels.cosine.left_out`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.backend import checks_values
from dgi_kernels.collectives import Group, all_gather, all_reduce, gather_rows, rank, sum_gradients, world_size
from dgi_kernels.cosine import (
    check_loss,
    check_operands,
    cosine_cross_entropy,
    cosine_logits,
    left_out,
)
from dgi_kernels.cosine.options import Columns
from dgi_kernels.types import Backend, Reduction, Rows

ROWS: tuple[str, ...] = get_args(Rows)


def _outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compiler.disable``, which imports all of the compiler, from the first call on that could be compiled."""
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args, **options)
        disabled = disabled or torch.compiler.disable(function)
        return disabled(*args, **options)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # not traced itself
    return call


@_outside_of_graphs
def vocabulary_parallel_cosine_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float | Tensor,
    *,
    group: Group = None,
    rows: Rows = "replicated",
    bias: Tensor | None = None,
    same_as: Tensor | None = None,
    return_log_normalizer: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    eps: float = 1e-12,
    backend: Backend = "auto",
) -> Any:
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

    ``same_as`` adds 8 N to both, and 8 N more with smoothing.

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
        bias, same_as: (K_r,) of this rank's rows of the weight, as for :func:`cosine_cross_entropy`; given on all ranks
            or on none. Ids mean the same item on every rank.
        return_log_normalizer: return the log normalizers over all ranks' rows too, with their gradient.
        ignore_index, reduction, label_smoothing, eps, backend: as for :func:`cosine_cross_entropy`; smoothing spreads
            over all K rows of all ranks.

    Returns:
        The loss: () for ``"mean"`` and ``"sum"``, (...) for ``"none"``; float32 (float64 for float64 inputs). With
        ``return_log_normalizer`` a pair of the loss and the log normalizers (...).

    Raises:
        ValueError, TypeError, BackendUnavailable: as :func:`cosine_cross_entropy`; also where shapes, ``rows`` or which
            options are given do not agree between ranks and, then on every rank, where any rank's target is out of
            range.  On CUDA, these two are checked inside ``dgi_kernels.debug()`` only.

    Examples:
        >>> h, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # one process has all rows
        >>> dgi_kernels.vocabulary_parallel_cosine_cross_entropy(h, weight, torch.tensor([1]), 10.0)
        tensor(0.1269)
    """
    checks.choice("rows", rows, ROWS)
    if world_size(group) == 1:
        return cosine_cross_entropy(
            h,
            weight,
            target,
            scale,
            bias=bias,
            same_as=same_as,
            return_log_normalizer=return_log_normalizer,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
            eps=eps,
            backend=backend,
        )
    h, weight, scale, eps = check_operands(h, weight, scale, eps)
    options = check_loss(h, target, ignore_index, reduction, label_smoothing, eps, return_log_normalizer)
    own = Columns.check(weight, bias=bias, same_as=same_as)
    sharded, shape, ignore_index = rows == "sharded", target.shape, options.ignore_index
    h, target = h.reshape(target.numel(), h.shape[-1]), target.flatten().long()

    sizes = _shard_sizes(h, weight, sharded, own.given, group)
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
    place = target - sizes[: rank(group)].sum()
    owned = ~ignored & (place >= 0) & (place < weight.shape[0])
    shard = _Shard(weight, own.bias, scale, eps, backend)
    columns = None if own.same_as is None else left_out.find(_items(own.same_as, place, owned, group), own.same_as)
    if own.bias is None and columns is None:
        nll, logit, lse = shard.part(h, place, owned, ignored)
    else:
        nll, logit, lse = shard.part_of_columns(h, place, owned, ignored, columns)
    smoothing = torch.zeros_like(nll)
    if options.label_smoothing:
        total, left = shard.sum_of_logits(h), codes
        if columns is not None:
            other, count = _sum_of_repeated(shard, columns, h)
            total = total - (other - logit.masked_fill(~owned, 0))
            left = (codes - all_reduce(count - owned.to(count.dtype), group)).clamp(min=1)  # 0 in ignored rows
        smoothing = options.label_smoothing * (logit.masked_fill(~owned, 0) - total / left)
    loss, log_normalizer = _AcrossRanks.apply(nll, lse, smoothing, owned, sharded, group)

    wild = ~ignored & ((target < 0) | (target >= codes))
    if sharded:
        target, ignored, wild = (
            x.chunk(world_size(group))[rank(group)] if len(x) else x for x in (target, ignored, wild)
        )
    loss = options.reduce(loss.masked_fill(ignored, 0).masked_fill(wild, torch.nan), target)
    loss = loss.reshape(shape) if options.reduction == "none" else loss
    if not return_log_normalizer:
        return loss
    return loss, log_normalizer.masked_fill(ignored, 0).masked_fill(wild, torch.nan).reshape(shape)


def _shard_sizes(h: Tensor, weight: Tensor, sharded: bool, given: dict[str, bool], group: Group) -> Tensor:
    """(R,) int64: every rank's number of rows of the weight.  What must be the same on all ranks is, or all raise."""
    flags = sum(2**i for i, there in enumerate((sharded, *given.values())) if there)
    values = (*weight.shape, h.shape[0], flags)
    own = torch.stack([torch.full((), value, device=h.device) for value in values])
    everyone = all_gather(own[None], group)
    if checks_values(h.device):
        _, dim, rows, all_flags = everyone.unbind(1)
        for what, numbers in (
            ("D of weight", dim),
            ("number of rows of h", rows),
            ("rows", all_flags % 2),
            (f"which of {' and '.join(given)} are given", all_flags // 2),
        ):
            seen = numbers.tolist()
            if len(set(seen)) > 1:
                raise ValueError(f"{what} must be the same on every rank; got {seen}")
    return everyone[:, 0]


def _items(same_as: Tensor, place: Tensor, owned: Tensor, group: Group) -> Tensor:
    """(N,) the id of every row's target, whichever rank has it; of rows without one any."""
    own = F.pad(same_as, (0, 1))[place.clamp(0, same_as.shape[0])] * owned
    return all_reduce(own, group)


class _Shard(NamedTuple):
    """This rank's rows of the weight, and how logits are made of them."""

    weight: Tensor
    bias: Tensor | None
    scale: float | Tensor
    eps: float
    backend: Backend

    def part(self, h: Tensor, place: Tensor, owned: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """nll, s_nj and LSE_nr (N,), j the target where it is ``owned``, else any."""
        codes = self.weight.shape[0]
        if codes == 0:
            return self._nothing(h)
        row = torch.where(owned, place, torch.arange(len(place), device=place.device) % codes)
        nll = cosine_cross_entropy(
            h,
            self.weight,
            row.masked_fill(ignored, -100),
            self.scale,
            reduction="none",
            eps=self.eps,
            backend=self.backend,
        )
        logit = self.logit(h, row)
        return nll, logit, nll + logit

    def part_of_columns(
        self, h: Tensor, place: Tensor, owned: Tensor, ignored: Tensor, columns: left_out.Columns | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`part`, with a bias, and without the rows of the target's item but for the target itself."""
        codes, dtype = self.weight.shape[0], checks.compute_dtype(h.dtype)
        bias = self.weight.new_zeros(codes, dtype=dtype) if self.bias is None else self.bias.to(dtype)
        more = self._replace(weight=F.pad(self.weight, (0, 0, 0, 1)), bias=F.pad(bias, (0, 1), value=left_out.LEAST))
        row = torch.where(owned, place, codes if columns is None else columns.first)
        nll, lse = cosine_cross_entropy(
            h,
            more.weight,
            row.masked_fill(ignored, -100),
            self.scale,
            bias=more.bias,
            same_as=None if columns is None else columns.ids,
            return_log_normalizer=True,
            reduction="none",
            eps=self.eps,
            backend=self.backend,
        )
        if columns is not None:
            lse = left_out.without_target(nll, lse, columns.found & ~owned & ~ignored)
        logit = more.logit(h, row.masked_fill(~owned, codes))
        return nll.masked_fill(~owned, 0), logit.masked_fill(~owned, 0), lse

    def _nothing(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-sum-exps of nothing, through ops that keep every input in the graph."""
        logits = cosine_logits(h, self.weight, self.scale, eps=self.eps, backend=self.backend)
        logits = logits.to(checks.compute_dtype(h.dtype))
        lse, none = logits.logsumexp(-1), logits.sum(-1)
        return lse, none, lse

    def logit(self, h: Tensor, row: Tensor) -> Tensor:
        """s_nj of row j of the weight for every row of h."""
        with torch.autocast(h.device.type, enabled=False):
            h, weight = (x.to(checks.compute_dtype(x.dtype)) for x in (h, self.weight))
            chosen = F.normalize(F.embedding(row, weight), dim=-1, eps=self.eps)
            logit = self.scale * (F.normalize(h, dim=-1, eps=self.eps) * chosen).sum(-1)
            return logit if self.bias is None else logit + self.bias[row]

    def sum_of_logits(self, h: Tensor) -> Tensor:
        """(N,) the sum of each row's logits over this rank's rows of the weight: scale h^ . sum_k w^_k + sum_k b_k."""
        with torch.autocast(h.device.type, enabled=False):
            h, weight = (x.to(checks.compute_dtype(x.dtype)) for x in (h, self.weight))
            total = weight.norm(dim=-1).clamp(min=self.eps).reciprocal() @ weight
            logits = self.scale * (F.normalize(h, dim=-1, eps=self.eps) @ total)
            return logits if self.bias is None else logits + self.bias.sum()


def _sum_of_repeated(shard: _Shard, columns: left_out.Columns, h: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) the sum of the logits of the rows with the item of each row's target, and how many there are."""
    codes = shard.weight.shape[0]
    ids = columns.ids[:codes]
    with torch.autocast(h.device.type, enabled=False):
        h, weight = (x.to(checks.compute_dtype(x.dtype)) for x in (h, shard.weight))
        unit = F.normalize(weight, dim=-1, eps=shard.eps)
        sums = unit.new_zeros(codes + 1, unit.shape[1]).index_add(0, ids, unit)
        logits = shard.scale * (F.normalize(h, dim=-1, eps=shard.eps) * sums[columns.row_ids]).sum(-1)
        if shard.bias is not None:
            bias = shard.bias.to(logits.dtype)
            logits = logits + bias.new_zeros(codes + 1).index_add(0, ids, bias)[columns.row_ids]
    return logits, torch.bincount(ids, minlength=codes + 1)[columns.row_ids]


class _AcrossRanks(torch.autograd.Function):
    """nll, LSE_nr, the smoothing's part (N,) of this rank -> loss and LSE_n (N,), or of this rank's rows (N / R,)."""

    @staticmethod
    def forward(
        ctx: Any, nll: Tensor, lse: Tensor, smoothing: Tensor, owned: Tensor, sharded: bool, group: Group
    ) -> tuple[Tensor, Tensor]:
        top = all_reduce(lse, group, dist.ReduceOp.MAX)
        mass = (lse - top).exp()
        # LSE - s_t = log sum_r mass_r + (top - LSE_r + nll of the rank r that has t): without cancellation where that
        # rank has nearly all mass.
        target_part = torch.where(owned, top - lse + nll, 0) + smoothing
        total, rest = all_reduce(torch.stack([mass, target_part]), group)
        ctx.save_for_backward(mass / total, owned)
        ctx.sharded, ctx.group = sharded, group
        ctx.set_materialize_grads(False)
        loss, log_normalizer = total.log() + rest, top + total.log()
        if sharded and len(loss):
            loss, log_normalizer = (x.chunk(world_size(group))[rank(group)].clone() for x in (loss, log_normalizer))
        return loss, log_normalizer

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, upstream: Tensor | None, upstream_log_normalizer: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        share, owned = ctx.saved_tensors
        nothing = torch.zeros_like(share)
        of_loss, of_log_normalizer = (
            nothing if x is None else all_gather(x, ctx.group) if ctx.sharded else x
            for x in (upstream, upstream_log_normalizer)
        )
        mine = of_loss * owned
        return mine, (of_loss + of_log_normalizer) * share - mine, of_loss, None, None, None
