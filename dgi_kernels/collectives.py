"""Collectives that carry gradients, over the processes of one group; with a single process they do nothing.

A process's gradients are those of the sum of all processes' losses, each of which may depend on what others hold.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # a torch.distributed.ProcessGroup, whose type not every build of torch has; None: all processes


def world_size(group: Group = None) -> int:
    """Number of processes; 1 where ``torch.distributed`` was not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """This process's number in the group; 0 where ``torch.distributed`` was not initialised."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


def gather_rows(value: Tensor, group: Group = None) -> Tensor:
    """Concatenate (B, ...) of all ranks, rank by rank, with the gradient of every rank's use flowing back."""
    return value if world_size(group) == 1 else _GatherRows.apply(value, group)


def sum_gradients(value: Tensor, group: Group = None) -> Tensor:
    """``value``, the same on every rank and used differently by each: its gradient is the sum of theirs."""
    return value if world_size(group) == 1 else _SumGradients.apply(value, group)


def global_mean(value: Tensor) -> Tensor:
    """Mean of equally weighted values of all ranks, with its gradient."""
    return value if world_size() == 1 else gather_rows(value.unsqueeze(0)).mean(0)


def all_gather(value: Tensor, group: Group = None) -> Tensor:
    """Concatenate (B, ...) of all ranks, without gradient."""
    value = value.contiguous()
    ranks = world_size(group)
    gathered = value.new_empty(ranks * value.shape[0], *value.shape[1:])
    if value.numel():
        dist.all_gather(list(gathered.chunk(ranks)), value, group=group)
    return gathered


def all_reduce(value: Tensor, group: Group = None, operation: Any = None) -> Tensor:
    """The sum of all ranks' values, or another reduction, without gradient."""
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, dist.ReduceOp.SUM if operation is None else operation, group=group)
    return total


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.rows = group, value.shape[0]
        return all_gather(value, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = grad.new_empty(ctx.rows, *grad.shape[1:])
        if own.numel():
            parts = grad.contiguous().chunk(world_size(ctx.group))
            dist.reduce_scatter(own, list(parts), group=ctx.group)
        return own, None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grad, ctx.group), None
