"""Sharding by FSDP against plain modules; what every one of torchrun's processes does."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from dgi.config import ModelConfig, from_dict
from dgi.model.dgi_model import DGIModel
from dgi.model.losses import DGILoss
from dgi.training.data import TrainingData
from dgi_kernels import CosineCrossEntropyLoss, CosineLinear
from tests.dgi.tiny_runs import MODEL, tiny_data


class Net(nn.Module):
    """A head over a body, with each of the modules that hold a scale."""

    def __init__(self, learnable: bool) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = CosineLinear(8, 6, learnable_scale=learnable)
        self.contrast = CosineCrossEntropyLoss(20.0, learnable_scale=learnable)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        target = torch.arange(len(x)) % 6
        return (
            self.head(h).square().mean() + self.head.loss(h, target) + self.contrast(h, h.flip(0), torch.arange(len(x)))
        )


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def assert_sharding_changes_nothing(
    make: Callable[[], nn.Module],
    loss_of: Callable[[nn.Module], Tensor],
    shard: Callable[[nn.Module], Iterable[nn.Module]],
) -> None:
    """Loss, gradients, averaged over the ranks, and the weights after a step are those of the plain module."""
    torch.manual_seed(5)
    plain = make()
    sharded = copy.deepcopy(plain)
    for module in shard(sharded):
        fully_shard(module)
    fully_shard(sharded)
    torch.testing.assert_close(expected := loss_of(plain), actual := loss_of(sharded))
    expected.backward()
    actual.backward()
    for (name, parameter), own in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        assert (parameter.grad is None) == (own.grad is None), name
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
            torch.testing.assert_close(full(own.grad), parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    for module in (plain, sharded):
        torch.optim.AdamW(module.parameters(), 1e-2, foreach=False).step()
    for (name, parameter), own in zip(plain.named_parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(full(own), parameter, rtol=1e-3, atol=1e-4, msg=name)


def modules(learnable: bool) -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    for parts in (lambda net: [], lambda net: [net.body, net.contrast]):
        assert_sharding_changes_nothing(lambda: Net(learnable), lambda net: net(x), parts)

    def head_apart(net: nn.Module) -> Iterator[nn.Module]:
        yield net.head
        register_fsdp_forward_method(net.head, "loss")  # which gathers the head's weight as its forward does

    assert_sharding_changes_nothing(lambda: Net(learnable), lambda net: net(x), head_apart)


def model() -> None:
    catalog, interactions = tiny_data(3)
    made = from_dict(ModelConfig, MODEL | {"dropout": 0.0})
    data = TrainingData.prepare(DGIModel(made), catalog, interactions)
    batch = data.batch(torch.arange(8 * dist.get_rank(), 8 * dist.get_rank() + 8))

    def loss_of(model: nn.Module) -> Tensor:
        output = model(batch, tau=0.7, seed=4, row_offset=8 * dist.get_rank())
        return DGILoss()(output, list(model.heads), list(model.quantizer.codebooks))["loss"]

    assert_sharding_changes_nothing(lambda: DGIModel(made), loss_of, lambda model: [])
    parts = lambda model: [model.encoder.layers, model.decoder]  # noqa: E731
    assert_sharding_changes_nothing(lambda: DGIModel(made), loss_of, parts)


def main() -> None:
    dist.init_process_group("gloo")
    modules(True)
    modules(False)
    model()
    dist.barrier()
    os._exit(0)  # torch keeps groups in caches, and their threads now and then abort a process that ends as usual


if __name__ == "__main__":
    main()
