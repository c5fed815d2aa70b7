"""Training: one loop for :class:`dgi.DGIModel` and the dense :class:`dgi.DualEncoder`, resumable bit for bit.

Everything random is a function of the seed and of the step, not a state: data order, dropout, Gumbel noise, K-means
and revival.  A checkpoint therefore holds weights, moments and the number of steps done, and nothing else; and several
processes, each with its contiguous part of the global batch, take the steps that one process would.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgi import pictures
from dgi.config import LOSS_TERMS, TrainConfig, from_file, to_dict
from dgi.data import Catalog, Interactions
from dgi.data.batches import Batch, make_batch
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.model.encoding import Requests, encode_items, evaluating
from dgi.model.losses import DGILoss
from dgi.progress import Progress
from dgi.training.candidates import Candidates
from dgi.training.checkpoint import Checkpoints, RunFolder, copy_tensors, save_model, unique_tensors
from dgi.training.distributed import broadcast, gather_rows, global_mean, local_device, rank, world_size

REVIVED_SHARE = 0.8  # of training; see Schedule.revives

# What a derived seed is for: two purposes never share a stream of random numbers.
ORDER, DROPOUT, NOISE, CLUSTERING, REVIVAL, CANDIDATES = range(6)

logger = logging.getLogger("dgi")


def derived_seed(*words: int) -> int:
    """A 64-bit seed that depends on every one of ``words``, all at least 0."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def generator(*words: int) -> torch.Generator:
    """A CPU generator seeded with :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*words))


@dataclass(frozen=True)
class Schedule:
    """Learning rate, temperature and revivals of every step; steps count from 0 to ``total_steps - 1``."""

    config: TrainConfig
    total_steps: int

    def rate(self, step: int) -> float:
        """Share of the peak learning rate: linear up to 1 at the end of warm-up, then linear down to 0 at the end."""
        if step < self.config.warmup_steps:
            return (step + 1) / self.config.warmup_steps
        return (self.total_steps - step) / (self.total_steps - self.config.warmup_steps)

    def tau(self, step: int) -> float:
        """Gumbel-Softmax temperature, geometric from ``tau_start`` in the first step to ``tau_end`` in the last."""
        start, end = self.config.tau_start, self.config.tau_end
        return start * (end / start) ** (step / max(1, self.total_steps - 1))

    def revives(self, step: int) -> bool:
        """Whether dead codes are revived after ``step``: every ``revive_every`` steps, but not in the last fifth.

        A revived code changes the semantic IDs of the items around it, which the decoder then has to learn again; in
        the last fifth, with the learning rate near zero, it no longer could.
        """
        every, done = self.config.revive_every, step + 1
        return every > 0 and done % every == 0 and done <= REVIVED_SHARE * self.total_steps


@dataclass(frozen=True)
class TrainingData:
    """Items and interactions as the encoder reads them, prepared once, on the CPU.

    Attributes:
        item_features: (num_items, ...).
        requests: n queries and histories.
        targets: (n,) int64 catalog rows of the items chosen.
    """

    item_features: Tensor
    requests: Requests
    targets: Tensor

    @classmethod
    def prepare(cls, model: DualEncoder, catalog: Catalog, interactions: Interactions) -> TrainingData:
        return cls(
            model.encoder.prepare_items(catalog), Requests.of(model, interactions), torch.from_numpy(interactions.items)
        )

    def __len__(self) -> int:
        return len(self.targets)

    def batch(self, rows: Tensor, candidates: Tensor | None = None) -> Batch:
        """The interactions ``rows`` (B,), and the items ``candidates`` (C,) to rank with theirs."""
        queries = None if self.requests.query_features is None else self.requests.query_features[rows]
        return make_batch(self.item_features, self.requests.histories[rows], self.targets[rows], queries, candidates)

    def sha256(self) -> str:
        """Tells one data set from another, so that no run is resumed on other data."""
        digest = hashlib.sha256()
        for tensor in (self.item_features, self.requests.histories, self.requests.query_features, self.targets):
            if tensor is not None:
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(np.ascontiguousarray(tensor.numpy()).data)
        return digest.hexdigest()


class StepResult(NamedTuple):
    """Terms of the objective with their gradient, and without any what logging and revival read.

    Attributes:
        terms: by name, ``loss`` their weighted sum.
        item_rows: (B,) catalog rows of the clicked items.
        codes: (B, m) their hard codes, or None for a :class:`dgi.DualEncoder`.
        residuals: (B, m, d) what every level saw of them, or None.
    """

    terms: dict[str, Tensor]
    item_rows: Tensor
    codes: Tensor | None
    residuals: Tensor | None


class LossStep(nn.Module):
    """Model and objective in one forward pass, which is what DistributedDataParallel wraps."""

    def __init__(self, model: DualEncoder, config: TrainConfig, item_log_q: Tensor | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss = DGILoss(
            config.loss_weights,
            beta=config.beta,
            similarity=model.config.similarity,
            contrastive_temperature=config.contrastive_temperature,
            contrastive=config.contrastive,
            item_log_q=item_log_q,
        )

    def forward(self, batch: Batch, tau: float, seed: int, row_offset: int) -> StepResult:
        output = self.model(batch, tau=tau, seed=seed, row_offset=row_offset)
        if not isinstance(self.model, DGIModel):
            return StepResult(self.loss(output), output.item_rows, None, None)
        terms = self.loss(output, list(self.model.heads), list(self.model.quantizer.codebooks))
        residuals = None if output.quantization is None else output.quantization.residuals.detach()
        return StepResult(terms, output.item_rows, output.codes, residuals)


def build_optimizer(model: DualEncoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with a separate learning rate for codebooks, heads and γ, which do not decay.

    Neither do norms, biases and other vectors of the backbone.  The moments are made here, at zero, not in the first
    step: the state of training then has the same tensors from start to end, to be saved, loaded and broadcast alike.
    """
    quantizer: set[nn.Parameter] = set()
    if isinstance(model, DGIModel):
        quantizer = {*model.quantizer.parameters(), *model.heads.parameters()}
    backbone = [p for p in model.parameters() if p.requires_grad and p not in quantizer]
    groups = [
        _group([p for p in model.parameters() if p in quantizer], config.quantizer_lr, 0.0),
        _group([p for p in backbone if p.ndim > 1], config.backbone_lr, config.weight_decay),
        _group([p for p in backbone if p.ndim <= 1], config.backbone_lr, 0.0),
    ]
    # One pass over each tensor, where torch's own default takes some ten on a CPU.
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def _group(parameters: list[nn.Parameter], peak_lr: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "peak_lr": peak_lr, "lr": peak_lr, "weight_decay": weight_decay}


def collision_rate(item_rows: Tensor, codes: Tensor) -> float:
    """Share of the distinct items whose semantic ID another one has too; (B,) and (B, m)."""
    items = torch.unique(torch.cat([item_rows.unsqueeze(1), codes], 1), dim=0)
    _, group, sizes = torch.unique(items[:, 1:], dim=0, return_inverse=True, return_counts=True)
    return float((sizes[group] > 1).double().mean())


class Trainer:
    """Trains a model on interactions, alone or as one of ``torchrun``'s processes.

    Under ``torchrun``, construct and use it within :func:`dgi.training.distributed.process_group`.  Rank 0's weights
    count, and only rank 0 reads and writes ``output``.

    Args:
        model: :class:`dgi.DGIModel` or :class:`dgi.DualEncoder`, moved to ``device``; its weights as made by the
            caller, who seeds them.
        config: how to train.
        catalog: the items.
        interactions: what to learn from.
        output: folder of the run, or None to keep everything in memory.  It receives ``metrics.jsonl``,
            ``training_curve.png``, ``model.safetensors`` (see :func:`dgi.training.checkpoint.load_model`) and, for
            resuming, ``checkpoints/``.
        device: None for this process's GPU, or the CPU where there is none.
        progress: show a progress bar (rank 0).
        validate: measures the model, in evaluation mode, every ``validate_every`` steps and at the end; its values join
            the row of metrics of that step (rank 0).

    Raises:
        ValueError: no interactions, or ``batch_size`` is no multiple of the number of processes.
    """

    def __init__(
        self,
        model: DualEncoder,
        config: TrainConfig,
        catalog: Catalog,
        interactions: Interactions,
        output: str | os.PathLike[str] | None,
        *,
        device: torch.device | str | None = None,
        progress: bool = True,
        validate: Callable[[], Mapping[str, float]] | None = None,
        validate_every: int = 0,
    ) -> None:
        if config.batch_size % world_size():
            raise ValueError(f"batch_size must be a multiple of the {world_size()} processes; got {config.batch_size}")
        if len(interactions) < world_size():
            raise ValueError(
                f"interactions must hold at least one row per process ({world_size()}); got {len(interactions)}"
            )
        self.device = local_device() if device is None else torch.device(device)
        self.model = model.to(self.device)
        self.config = config
        self.data = TrainingData.prepare(model, catalog, interactions)
        # Fewer interactions than a batch make one batch; of more, an epoch leaves the last incomplete batch out.
        self.rank_batch = min(config.batch_size, len(self.data)) // world_size()
        self.epoch_steps = len(self.data) // (self.rank_batch * world_size())
        self.schedule = Schedule(config, config.steps or config.epochs * self.epoch_steps)
        self.candidates = Candidates(
            config.contrastive,
            self.data.targets,
            len(self.data.item_features),
            batch_size=self.rank_batch * world_size(),
            samples=config.contrastive_samples,
        )
        self.optimizer = build_optimizer(model, config)
        self.steps_done = torch.zeros((), dtype=torch.int64)
        self.progress = progress and rank() == 0
        self.validate = validate if rank() == 0 else None
        self.validate_every = validate_every
        self.folder = RunFolder(Path(output)) if output is not None and rank() == 0 else None

    def fit(self, resume: bool = False) -> dict[str, Any]:
        """Train to the end and return the last row of metrics.

        Args:
            resume: continue from the newest checkpoint in ``output``; where there is none, start from the beginning.
                On the CPU the result has the bits of a run that was never interrupted.

        Raises:
            ValueError: ``resume`` without ``output``, or with a configuration or data that are not the checkpoint's.
            CheckpointError: no checkpoint can be read.
            FileExistsError: without ``resume``, ``output`` holds checkpoints already.
            OSError: ``output`` cannot be written to, or its disk has no room for the checkpoints; told before training.
            FloatingPointError: a loss or the gradient is no longer finite; nothing was updated with it.
        """
        if resume and self.folder is None and rank() == 0:
            raise ValueError("resume needs the output folder of the run to continue; output is None")
        row = self._start(resume)
        self.model.train()
        log_q = self.candidates.log_q if self.config.log_q else None
        loss_step = _distributed(LossStep(self.model, self.config, None if log_q is None else log_q.to(self.device)))
        started = time.perf_counter()
        done = int(self.steps_done)
        with Progress(self.schedule.total_steps, "training", unit="steps", done=done, shown=self.progress) as bar:
            for step, batch in self._batches(done):
                result, values = self._update(loss_step, batch, step)
                self._tend_codes(step, result)
                self.steps_done += 1
                bar.update()
                measured = self._validated(step)
                if measured or self._is_due(step, self.config.log_every):
                    row = {**self._metrics(step, result, values), "seconds": round(time.perf_counter() - started, 3)}
                    row |= measured
                    bar.note(_summary(row))
                    if self.folder is not None:
                        self.folder.metrics.append(row)
                if self.folder is not None and self._is_due(step, self.config.checkpoint_every):
                    self.folder.metrics.sync()
                    self.folder.checkpoints.save(step + 1, self._state(), self._description)
        self.model.eval()
        if self.folder is not None:
            self._write_results(self.folder)
        return row

    def _start(self, resume: bool) -> dict[str, Any]:
        """Bring all processes to the same state, a checkpoint's or the first; return the last row of metrics so far."""
        if self.folder is not None:
            self.folder.check(sum(tensor.nbytes for tensor in self._state().values()))
        if self.folder is not None and resume:
            self.folder.remove_leftovers()
            self._load_checkpoint(self.folder.checkpoints)
        elif self.folder is not None and self.folder.checkpoints.paths():
            raise FileExistsError(
                f"{self.folder.checkpoints.folder} holds checkpoints of an earlier run: resume it, "
                f"remove the folder, or choose another output"
            )
        broadcast([self.steps_done])
        if self.steps_done == 0 and isinstance(self.model, DGIModel):
            self.model.initialize(
                encode_items(self.model, self.data.item_features), generator=generator(self.config.seed, CLUSTERING)
            )
        broadcast(self._state().values())
        return {} if self.folder is None else self.folder.metrics.cut(int(self.steps_done))

    def _load_checkpoint(self, checkpoints: Checkpoints) -> None:
        checkpoint = checkpoints.load()
        if checkpoint is None:
            logger.warning("no checkpoint in %s to resume from: training starts from the beginning", checkpoints.folder)
            return
        path, tensors, description = checkpoint
        description["model_config"] = to_dict(from_file(type(self.model.config), description["model_config"]))
        description["train_config"] = to_dict(from_file(TrainConfig, description["train_config"]))
        stored = _as_json(description)
        for name, value in self._description.items():
            _check_same(path, name, stored[name], value)
        copy_tensors(tensors, self._state(), path)
        checkpoints.prune(path)
        logger.info("resuming from %s", path)

    def _batches(self, start: int) -> Iterator[tuple[int, Batch]]:
        """Every step from ``start`` with this process's part of its batch; each epoch has its own order."""
        order = torch.empty(0)
        for step in range(start, self.schedule.total_steps):
            epoch, place = divmod(step, self.epoch_steps)
            if step == start or place == 0:
                order = torch.randperm(len(self.data), generator=generator(self.config.seed, ORDER, epoch))
            first = (place * world_size() + rank()) * self.rank_batch
            candidates = self.candidates.draw(generator(self.config.seed, CANDIDATES, step))
            yield step, self.data.batch(order[first : first + self.rank_batch], candidates).to(self.device)

    def _update(self, loss_step: nn.Module, batch: Batch, step: int) -> tuple[StepResult, dict[str, float]]:
        """One step of the optimizer; the terms, as means over all processes, and the gradient's norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * self.schedule.rate(step)
        torch.manual_seed(derived_seed(self.config.seed, DROPOUT, step, rank()))
        with self._autocast():
            result = loss_step(
                batch, self.schedule.tau(step), derived_seed(self.config.seed, NOISE, step), rank() * self.rank_batch
            )
        self.optimizer.zero_grad()
        result.terms["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        with torch.no_grad():
            means = global_mean(torch.stack([*result.terms.values(), norm]))
        values = dict(zip([*result.terms, "grad_norm"], means.tolist(), strict=True))
        self._check_finite(step, values)
        self.optimizer.step()
        return result, values

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.autocast("cuda", torch.bfloat16)
        return contextlib.nullcontext()

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if bad:
            rate = self.schedule.rate(step)
            raise FloatingPointError(
                f"training stopped in step {step + 1}, before its update: {', '.join(bad)}; the learning rates were "
                f"{rate * self.config.backbone_lr:.2g} (backbone) and {rate * self.config.quantizer_lr:.2g} "
                f"(quantizer): lower them, or raise warmup_steps"
            )

    def _tend_codes(self, step: int, result: StepResult) -> None:
        """Count the codes in use, and revive dead ones; every process sees the whole batch and so does the same."""
        if not isinstance(self.model, DGIModel) or result.codes is None or result.residuals is None:
            return
        self.model.quantizer.count(gather_rows(result.codes))
        if self.schedule.revives(step):
            source = generator(self.config.seed, REVIVAL, step)
            self.model.quantizer.revive(gather_rows(result.residuals), generator=source)

    def _validated(self, step: int) -> Mapping[str, float]:
        if self.validate is None or not (self.validate_every and self._is_due(step, self.validate_every)):
            return {}
        with evaluating(self.model):
            return self.validate()

    def _is_due(self, step: int, every: int) -> bool:
        return (step + 1) % every == 0 or step + 1 == self.schedule.total_steps

    def _metrics(self, step: int, result: StepResult, values: dict[str, float]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": step + 1,
            "epoch": step // self.epoch_steps + 1,
            **values,
            "lr": self.schedule.rate(step) * self.config.backbone_lr,
        }
        if isinstance(self.model, DGIModel) and result.codes is not None:
            row |= {
                "gamma": float(self.model.quantizer.scale.detach()),
                "tau": self.schedule.tau(step),
                "usage": self.model.quantizer.usage(),
                "collisions": collision_rate(gather_rows(result.item_rows), gather_rows(result.codes)),
            }
        return row

    def _state(self) -> dict[str, Tensor]:
        """The live tensors that training consists of, by name."""
        state = {"steps_done": self.steps_done}
        state |= {f"model.{name}": tensor for name, tensor in unique_tensors(self.model).items()}
        for name, parameter in self.model.named_parameters():
            for moment, tensor in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{name}.{moment}"] = tensor
        return state

    @functools.cached_property
    def _description(self) -> dict[str, Any]:
        """What a checkpoint must agree in with the run that resumes it."""
        description = {
            "model": type(self.model).__name__,
            "model_config": to_dict(self.model.config),
            "train_config": to_dict(self.config),
            "data": self.data.sha256(),
        }
        return _as_json(description)

    def _write_results(self, folder: RunFolder) -> None:
        def draw() -> None:
            from dgi.training.curve import training_curve

            training_curve(folder.metrics.path, folder.curve_path)

        save_model(self.model, folder.model_path)
        pictures.attempt(draw, folder.curve_path)


def _distributed(loss_step: LossStep) -> nn.Module:
    """Average gradients over the processes, if there are several.

    An ablation or a weight of 0 leaves parameters without a gradient (the decoder, γ), but the same ones in every step:
    ``static_graph`` finds them once, where ``find_unused_parameters`` would walk the graph in every step.
    """
    return DistributedDataParallel(loss_step, static_graph=True) if world_size() > 1 else loss_step


def _as_json(value: dict[str, Any]) -> dict[str, Any]:
    """A description as it will be read back, tuples being lists."""
    return json.loads(json.dumps(value))


def _check_same(path: Path, name: str, stored: Any, current: Any) -> None:
    """Compare two JSON values field by field; the first that differs is named."""
    if isinstance(stored, dict) and isinstance(current, dict):
        for field in sorted(stored.keys() | current.keys()):
            _check_same(path, f"{name}.{field}", stored.get(field), current.get(field))
    elif stored != current:
        raise ValueError(
            f"{name} is {current!r} now and was {stored!r} in the run that {path} is of; "
            f"a run can only be resumed as it was started"
        )


def _summary(row: dict[str, Any]) -> str:
    """A row of metrics, as short as a progress bar needs it."""
    parts = [f"{name} {row[name]:.3g}" for name in ("loss", *LOSS_TERMS) if name in row]
    if "gamma" in row:
        parts += [
            f"γ {row['gamma']:.3g}",
            f"τ {row['tau']:.2f}",
            f"collisions {row['collisions']:.1%}",
            "usage " + "/".join(f"{share:.0%}" for share in row["usage"]),
        ]
    return ", ".join(parts)
