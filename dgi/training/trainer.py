"""Training: one loop for :class:`dgi.DGIModel` and the dense :class:`dgi.DualEncoder`, resumable bit for bit.

Everything random is a function of the seed and of the step, not a state: data order, dropout, Gumbel noise, K-means
and revival.  A checkpoint therefore holds weights, moments and the number of steps done, and nothing else; and several
processes, each with its contiguous part of the global batch, take the steps that one process would.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dgi import pictures
from dgi.config import LOSS_TERMS, TrainConfig, from_file, stages_of, to_dict
from dgi.data import Catalog, Interactions
from dgi.data.batches import Batch
from dgi.model.dgi_model import DGIModel, DualEncoder, item_keys
from dgi.model.encoding import encode_items, evaluating
from dgi.progress import Progress
from dgi.training import item_codes
from dgi.training.candidates import Candidates
from dgi.training.checkpoint import Checkpoints, RunFolder, copy_tensors, save_model, unique_tensors
from dgi.training.data import TrainingData
from dgi.training.diagnostics import diagnose
from dgi.training.distributed import broadcast, gather_rows, local_device, rank, world_size
from dgi.training.loss_step import LossStep, StepResult, build_optimizer, parts_of, stage_weights
from dgi.training.schedule import REVIVED_SHARE as REVIVED_SHARE
from dgi.training.schedule import Schedule, Span
from dgi.training.seeds import CANDIDATES, CLUSTERING, DROPOUT, NOISE, ORDER, PATHS, REVIVAL, derived_seed, generator
from dgi.training.update import CapturedUpdate, Update, check_captured

logger = logging.getLogger("dgi")


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
        cuda_graph: take the steps as CUDA graphs, one a stage (:class:`dgi.training.update.CapturedUpdate`): for models
            of which a step takes longer to launch than to run.

    Raises:
        ValueError: no interactions, ``batch_size`` is no multiple of the number of processes, or ``cuda_graph`` where
            there is no CUDA device, under ``DGI_DEBUG``, with several processes, and with models whose steps have no
            fixed shape (causal ones, and encoders that do not read item vectors).
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
        cuda_graph: bool = False,
    ) -> None:
        if config.batch_size % world_size():
            raise ValueError(f"batch_size must be a multiple of the {world_size()} processes; got {config.batch_size}")
        if len(interactions) < world_size():
            raise ValueError(
                f"interactions must hold at least one row per process ({world_size()}); got {len(interactions)}"
            )
        self.device = local_device() if device is None else torch.device(device)
        self.model = model.to(self.device)
        self.cuda_graph = cuda_graph
        # A GPU's host prepares the next step while it runs one.
        self._checks_every_step = self.device.type == "cpu" and not cuda_graph
        if cuda_graph:
            check_captured(model, self.device)
        self.config = config
        self.data = self.prepare(model, catalog, interactions)
        self._keep_items(catalog)
        # Fewer interactions than a batch make one batch; of more, an epoch leaves the last incomplete batch out.
        self.rank_batch = min(config.batch_size, len(self.data)) // world_size()
        self.epoch_steps = len(self.data) // (self.rank_batch * world_size())
        epochs = sum(stage.epochs for stage in config.stages if stage.name != "quantizer") or config.epochs
        self.schedule = Schedule(config, config.steps or max(1, round(epochs * self.epoch_steps)))
        self.candidates = {
            kind: Candidates(
                kind,
                self.data.targets,
                len(self.data.item_features),
                batch_size=round(self.rank_batch * world_size() * len(self.data.targets) / len(self.data)),
                samples=config.contrastive_samples,
            )
            for kind in {stage.contrastive or config.contrastive for stage in stages_of(config)}
        }
        self.changed_codes = torch.full((), math.nan)
        self._epoch, self._order = -1, torch.empty(0)
        self.optimizer = build_optimizer(model, config, captured=cuda_graph)
        self.steps_done = torch.zeros((), dtype=torch.int64)
        self.progress = progress and rank() == 0
        self.validate = validate if rank() == 0 else None
        self.validate_every = validate_every
        self.folder = RunFolder(Path(output)) if output is not None and rank() == 0 else None

    def _keep_items(self, catalog: Catalog) -> None:
        """Room in the model for what stages give to items, from the start: the state of training keeps its tensors."""
        coded = any(span.codes != "step" for span in Schedule(self.config, 1).spans if span.stage.name != "encoder")
        if not (coded or self.config.item_bias):
            return
        if not isinstance(self.model, DGIModel):
            raise ValueError(f"stages and item_bias need a DGIModel; got {type(self.model).__name__}")
        self.model.keep_items(len(catalog), codes=coded, bias=self.config.item_bias)
        if self.model.item_keys is not None:
            self.model.item_keys.copy_(item_keys(catalog.ids))

    def prepare(self, model: DualEncoder, catalog: Catalog, interactions: Any) -> TrainingData:
        """What batches are made of."""
        return TrainingData.prepare(model, catalog, interactions)

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
            FloatingPointError: a loss or the gradient is no longer finite; nothing was updated with it.  On a GPU this
                is told where the host waits: where metrics or a checkpoint are due, or codes are revived.
        """
        if resume and self.folder is None and rank() == 0:
            raise ValueError("resume needs the output folder of the run to continue; output is None")
        row = self._start(resume)
        self.model.train()
        started = time.perf_counter()
        done = int(self.steps_done)
        with Progress(self.schedule.total_steps, "training", unit="steps", done=done, shown=self.progress) as bar:
            for step in range(done, self.schedule.total_steps):
                span = self.schedule.span(step)
                self._tend_items(step, span)
                if step in (done, span.start):
                    first, update = step, self._stage_update(span)
                result = self._update(update, self._batch(step, span), step)
                if self._checks_every_step or self._tells(step, span):
                    values = self._values(update, first)
                self._tend_codes(step, result)
                self.steps_done += 1
                bar.update()
                measured = self._validated(step)
                if measured or self._is_due(step, self.config.log_every) or self._ends_epoch(step, span):
                    row = self._metrics(step, span, result, values)
                    row |= self._diagnosed(step, span, update.batch)
                    row["seconds"] = round(time.perf_counter() - started, 3)
                    row |= measured
                    bar.note(_summary(row))
                    if self.folder is not None:
                        self.folder.metrics.append(row)
                if self.folder is not None and self._is_due(step, self.config.checkpoint_every):
                    self.folder.metrics.sync()
                    self.folder.checkpoints.save(step + 1, self._state(), self._description)
        self.model.eval()
        for parameter in self.optimizer.state:
            parameter.requires_grad_(True)
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
        clusters = any(stage.name == "quantizer" for stage in self.config.stages)
        if self.steps_done == 0 and isinstance(self.model, DGIModel) and not clusters:
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

    def _stage_update(self, span: Span) -> Update:
        """What takes a stage's steps; parameters that it does not train get no gradient."""
        if self.config.stages:
            for part, parameters in parts_of(self.model).items():
                for parameter in parameters:
                    parameter.requires_grad_(part in span.parts and parameter in self.optimizer.state)
        log_q = self._candidates(span).log_q if self.config.log_q else None
        log_q = None if log_q is None else log_q.to(self.device)
        self.model.train()
        loss_step = _distributed(LossStep(self.model, self.config, span, log_q))
        common = (loss_step, self.model, self.optimizer, self.config.clip_norm, self.device)
        return CapturedUpdate(*common, num_items=len(self.data.item_features)) if self.cuda_graph else Update(*common)

    def _tend_items(self, step: int, span: Span) -> None:
        """Give the items their semantic IDs where a stage or an epoch begins that wants them."""
        if not isinstance(self.model, DGIModel) or self.model.item_codes is None:
            return
        stale = False
        for number, entered in enumerate(self.schedule.spans):
            if entered.start == step and entered.stage.name == "quantizer":
                source = generator(self.config.seed, CLUSTERING, number)
                self.changed_codes.fill_(item_codes.cluster(self.model, self.data.item_features, source))
                self._reset_codebooks()
            elif entered.start == step == span.start and entered is span:
                stale = span.codes != "step" and span.stage.name != "encoder" and self._moved_before(number)
        place = step - span.start
        if stale or (span.codes == "epoch" and place > 0 and place % self.epoch_steps == 0):
            self.changed_codes.fill_(item_codes.refresh(self.model, self.data.item_features))
        if step == span.start or span.codes == "epoch":
            broadcast([self.model.item_codes, *self.model.quantizer.codebooks])

    def _moved_before(self, number: int) -> bool:
        """Whether semantic IDs followed the vectors in the stage that last had some."""
        for span in reversed(self.schedule.spans[:number]):
            if span.stage.name in ("quantizer", "decoder", "joint"):
                return span.codes == "step" and span.stage.name == "joint"
        return False

    def _reset_codebooks(self) -> None:
        """Codebooks that K-means has replaced have no past: their moments are 0 again."""
        for parameter in parts_of(self.model)["quantizer"]:
            for tensor in self.optimizer.state[parameter].values():
                tensor.zero_()

    def _candidates(self, span: Span) -> Candidates:
        return self.candidates[span.stage.contrastive or self.config.contrastive]

    def _batch(self, step: int, span: Span) -> Batch:
        """This process's part of a step's batch; each epoch has its own order."""
        epoch, place = divmod(step, self.epoch_steps)
        first = (place * world_size() + rank()) * self.rank_batch
        wanted = stage_weights(self.config, span)["infonce"] or span.stage.distillation
        source = generator(self.config.seed, CANDIDATES, step)
        candidates = self._candidates(span).draw(source) if wanted else None
        return self.data.batch(self._order_of(epoch)[first : first + self.rank_batch], candidates)

    def _order_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(len(self.data), generator=generator(self.config.seed, ORDER, epoch))
        return self._order

    def _update(self, update: Update, batch: Batch, step: int) -> StepResult:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            rate = self.schedule.peak(step, group["part"]) * self.schedule.rate(step, group["part"])
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        torch.manual_seed(derived_seed(self.config.seed, DROPOUT, step, rank()))
        seed = derived_seed(self.config.seed, NOISE, step)
        return update(batch, self.schedule.tau(step), seed, rank() * self.rank_batch)

    def _values(self, update: Update, first: int) -> dict[str, float]:
        """Values of the last step of an update whose first one was ``first``, if all have been finite."""
        failed, values = update.values()
        if failed is None:
            return values
        step = first + failed
        self.steps_done.fill_(step)
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        backbone, quantizer = (self.schedule.learning_rate(step, part) for part in ("backbone", "quantizer"))
        raise FloatingPointError(
            f"training stopped in step {step + 1}, before its update: {', '.join(bad)}; the learning rates were "
            f"{backbone:.2g} (backbone) and {quantizer:.2g} (quantizer): lower them, or raise warmup_steps"
        )

    def _tend_codes(self, step: int, result: StepResult) -> None:
        """Revive dead codes; every process sees the whole batch and so does the same."""
        if isinstance(self.model, DGIModel) and result.residuals is not None and self.schedule.revives(step):
            source = generator(self.config.seed, REVIVAL, step)
            self.model.quantizer.revive(gather_rows(result.residuals), generator=source)

    def _validated(self, step: int) -> Mapping[str, float]:
        if self.validate is None or not (self.validate_every and self._is_due(step, self.validate_every)):
            return {}
        with evaluating(self.model):
            return self.validate()

    def _tells(self, step: int, span: Span) -> bool:
        """Whether metrics or a checkpoint follow a step, or it revives codes."""
        config = self.config
        due = [every for every in (config.log_every, config.checkpoint_every, self.validate_every) if every]
        return (
            any(self._is_due(step, every) for every in due)
            or self._ends_epoch(step, span)
            or self.schedule.revives(step)
        )

    def _is_due(self, step: int, every: int) -> bool:
        return (step + 1) % every == 0 or step + 1 == self.schedule.total_steps

    def _ends_epoch(self, step: int, span: Span) -> bool:
        """Whether a step is the last of a stage, or of an epoch of it; not told apart where there are no stages."""
        return bool(self.config.stages) and (step + 1 == span.end or (step + 1 - span.start) % self.epoch_steps == 0)

    def _diagnosed(self, step: int, span: Span, batch: Batch) -> dict[str, float]:
        decodes = isinstance(self.model, DGIModel) and span.stage.name != "encoder"
        if not (decodes and self._ends_epoch(step, span)):
            return {}
        assert isinstance(self.model, DGIModel)
        table = None if span.codes == "step" else self.model.item_codes
        return diagnose(self.model, table, batch, self.schedule.tau(step), derived_seed(self.config.seed, PATHS, step))

    def _metrics(self, step: int, span: Span, result: StepResult, values: dict[str, float]) -> dict[str, Any]:
        row: dict[str, Any] = {
            "step": step + 1,
            "epoch": step // self.epoch_steps + 1,
            **values,
            "lr": self.schedule.learning_rate(step, "backbone"),
        }
        if self.config.stages:
            row["stage"] = self.schedule.spans.index(span) + 1
        if not self.changed_codes.isnan():
            row["changed_codes"] = float(self.changed_codes)
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
        if self.config.stages:
            state["changed_codes"] = self.changed_codes
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
