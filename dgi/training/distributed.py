"""The processes of a ``torchrun``: joining them, this one's device, and rank 0's state for all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

# Before any group exists: its functions have the default group of their import as an argument, and a group that they
# keep is never taken down. Its threads then run on while the interpreter ends, which now and then aborts the process.
import torch.distributed.nn.functional
from torch import Tensor

from dgi_kernels.collectives import gather_rows, global_mean, rank, world_size

__all__ = ["broadcast", "gather_rows", "global_mean", "local_device", "process_group", "rank", "world_size"]


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that ``torchrun`` started, one GPU each where there are GPUs; without it, do nothing.

    After an error the group is left as it is: to take it down would wait for ranks that may never come.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_device())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    dist.barrier()  # torchrun stops all ranks as soon as one has failed, and rank 0 may still be writing
    dist.destroy_process_group()


def local_device() -> torch.device:
    """This process's own device: the GPU of its ``LOCAL_RANK`` (0 outside ``torchrun``), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite ``tensors`` with rank 0's; every rank passes the same shapes in the same order."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
