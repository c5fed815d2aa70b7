"""The optimizer's steps of a stage: losses, gradients and the update, without a wait for the device in between."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from dgi.data.batches import OF_ITEMS, Batch
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.training.distributed import gather_rows, global_mean, world_size
from dgi.training.loss_step import StepResult
from dgi_kernels import cuda_graphs
from dgi_kernels.backend import checks_values
from dgi_kernels.noise import resolve_seed


@dataclass(eq=False, repr=False)
class Update:
    """Takes the steps of one stage.

    A step whose losses or gradient are not finite changes nothing in the model, and neither does any after it: that is
    decided on the device, and :meth:`values` tells.

    Args:
        loss_step: a :class:`dgi.training.loss_step.LossStep`, or what distributes it over processes.
        model: what it trains.
        optimizer: of :func:`dgi.training.loss_step.build_optimizer`.
        clip_norm: largest norm of the whole gradient.
        device: the model's.

    Attributes:
        batch: of the last step, on the device.
    """

    loss_step: nn.Module
    model: DualEncoder
    optimizer: torch.optim.Optimizer
    clip_norm: float
    device: torch.device
    batch: Batch = field(init=False)

    def __post_init__(self) -> None:
        device = self.device
        self._failed = torch.zeros((), dtype=torch.float32, device=device)  # 1 once a value was not finite
        self._taken = torch.zeros((), dtype=torch.int64, device=device)  # steps before that one
        self._names: list[str] = []
        self._last = self._failing = torch.empty(0, device=device)  # values by name: of the last step, of that one
        # The scale of float16's gradients asks the same of the fused update: to leave weights and moments as they are.
        self.optimizer.found_inf = self._failed  # type: ignore[attr-defined]

    def __call__(self, batch: Batch, tau: float, seed: int, row_offset: int) -> StepResult:
        """Take a step; the result has no gradient.

        Args:
            batch: this process's rows.
            tau: Gumbel-Softmax temperature.
            seed, row_offset: of the quantizer's noise.
        """
        self.batch = batch.to(self.device)
        return self._step(self.batch, tau, seed, row_offset)

    def values(self) -> tuple[int | None, dict[str, float]]:
        """None, and the terms and ``grad_norm`` of the last step; or which step was not finite, from 0, and its values.

        Terms are means over all processes.  Waits for the device.
        """
        ends = torch.stack([self._failed, self._taken])
        failed, taken, *values = torch.cat([ends, self._last, self._failing]).double().tolist()
        count = len(self._names)
        chosen = values[count:] if failed else values[:count]
        return int(taken) if failed else None, dict(zip(self._names, chosen, strict=True))

    def _step(self, batch: Batch, tau: float | Tensor, seed: int | Tensor, row_offset: int) -> StepResult:
        with self._autocast():
            result = cast(StepResult, self.loss_step(batch, tau, seed, row_offset))
        self.optimizer.zero_grad()
        result.terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        terms = {name: term.detach() for name, term in result.terms.items()}
        self._keep({**terms, "grad_norm": norm})
        self.optimizer.step()
        if isinstance(self.model, DGIModel) and result.codes is not None and result.residuals is not None:
            self.model.quantizer.count(gather_rows(result.codes), unless=self._failed > 0)
        return result._replace(terms=terms)

    @torch.no_grad()
    def _keep(self, values: dict[str, Tensor]) -> None:
        """Note the values of a step, and whether it is the first that is not finite."""
        self._names = [*values]
        self._last = global_mean(torch.stack([*values.values()]))
        if not len(self._failing):
            self._failing = torch.zeros_like(self._last)
        before = self._failed > 0
        self._failing.copy_(torch.where(before, self._failing, self._last))
        self._failed.copy_(before | ~self._last.isfinite().all())
        self._taken += self._failed == 0

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()


@dataclass(eq=False, repr=False)
class CapturedUpdate(Update):
    """Steps that are one CUDA graph: the first few are taken as any others, the next is recorded, and that replayed.

    A graph reads and writes the same memory at every step, so what differs from step to step is copied there: batch,
    temperature and seed, and the learning rates, which the optimizer has as tensors
    (``build_optimizer(captured=True)``).  What a step returns is overwritten by the next one.

    Args:
        num_items: size of the catalog.
        others: as of :class:`Update`.
    """

    num_items: int

    def __post_init__(self) -> None:
        super().__post_init__()
        self._tau = torch.zeros((), device=self.device)
        self._seed = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._warmups = 0
        self._recorded: tuple[torch.cuda.CUDAGraph, StepResult] | None = None

    def __call__(self, batch: Batch, tau: float, seed: int, row_offset: int) -> StepResult:
        if not self._warmups:
            self.batch = room_for(batch, self.num_items, self.device)
        self._read(batch)
        self._tau.fill_(tau)
        self._seed.copy_(resolve_seed(seed, self._seed.device))

        def step() -> StepResult:
            return self._step(self.batch, self._tau, self._seed, row_offset)

        if self._warmups < cuda_graphs.WARMUPS:
            self._warmups += 1
            return cuda_graphs.aside(step, self.device)
        if self._recorded is None:
            self._recorded = cuda_graphs.capture(step, self.device)
        graph, result = self._recorded
        graph.replay()
        return result

    def _read(self, batch: Batch) -> None:
        """Copy a batch to where the graph reads it, its items before what room for more there is."""
        kept, given = self.batch.tensors(), batch.tensors()
        shapes, others = ({name: _shape(name, x) for name, x in fields.items()} for fields in (kept, given))
        if shapes != others:
            raise ValueError(f"batch must have the shapes of the first one for a CUDA graph, {shapes}; got {others}")
        for name, value in given.items():
            if self.device.type == "cuda":  # from other memory the copy would wait for the step before
                value = value.pin_memory()
            kept[name][: len(value)].copy_(value, non_blocking=True)


def room_for(batch: Batch, num_items: int, device: torch.device) -> Batch:
    """A batch on the device with the shapes of ``batch``, but room for as many items as any of these shapes can have.

    Behind the items that a batch has are vectors that nothing reads: at first all are the first item's.
    """
    read = [rows.numel() for rows in (batch.targets, batch.histories, batch.candidates) if rows is not None]
    most = min(num_items, sum(read))
    room: dict[str, Tensor] = {}
    for name, value in batch.tensors().items():
        if name in OF_ITEMS:
            room[name] = value[:1].to(device).expand(most, *value.shape[1:]).contiguous()
        else:
            room[name] = torch.empty_like(value, device=device)
    return dataclasses.replace(batch, **room)


def check_captured(model: DualEncoder, device: torch.device) -> None:
    """Whether the steps of a model's training can be CUDA graphs.

    Raises:
        ValueError: naming what stands in the way.
    """
    if not cuda_graphs.possible(device):
        raise ValueError(f"cuda_graph needs a CUDA device; the model is on {device}")
    if device.type == "cuda" and checks_values(device):
        raise ValueError(
            "cuda_graph needs ops that do not look at values; unset DGI_DEBUG, or leave dgi_kernels.debug()"
        )
    if world_size() > 1:
        raise ValueError(f"cuda_graph needs training in one process; there are {world_size()}")
    if model.config.causal or not model.encoder.reads_item_vectors:
        kind = "a causal model" if model.config.causal else f"the encoder {type(model.encoder).__name__}"
        raise ValueError(f"cuda_graph needs steps of one shape, whatever the batch; {kind} cuts padding off")


def _shape(name: str, value: Tensor) -> tuple[int, ...]:
    """Of what may not differ from batch to batch: not the number of items."""
    return tuple(value.shape[name in OF_ITEMS :])
