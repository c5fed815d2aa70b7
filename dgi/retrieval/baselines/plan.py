"""What the trained systems of a comparison have in common: configuration, budget, folder; and one call that trains."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgi.config import ModelConfig, TrainConfig
from dgi.data import Dataset, Interactions, SequenceRows, training_rows
from dgi.model.dgi_model import DualEncoder
from dgi.training.sequences import SequenceTrainer
from dgi.training.trainer import Trainer
from dgi_kernels.beam import beam_widths

VALIDATION_SAMPLE = 8000  # validation requests that settings are chosen on; among 2,000, a choice is mostly chance


@dataclass(frozen=True)
class Plan:
    """How the trained systems of a comparison are trained: all with the same encoder and the same number of steps.

    Attributes:
        model: encoder, width and codebooks.
        training: rates, batch size and seed; its ``epochs`` or ``steps`` are the budget of every system.
        encoder_share: for generative systems that start from a trained encoder, the part of the steps that trains it.
            It is trained once for all of them; their decoders get the other steps.
        folder: where runs are kept, or None to keep everything in memory. A run that is there is continued.
        device: where to train and search.
        progress: show progress bars.
        curve_points: how often the model is measured on the validation set in training.
        num_beams: semantic IDs that survive each level of a search, in all generative systems: one number or one per
            level. The decoder does not read the last level's beams again, so that they may be many.
        exclude_history: leave the items of a request's history out when settings are chosen.
    """

    model: ModelConfig
    training: TrainConfig
    encoder_share: float = 0.5
    folder: Path | None = None
    device: torch.device | str = "cpu"
    progress: bool = False
    curve_points: int = 5
    num_beams: int | tuple[int, ...] = 200
    exclude_history: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.encoder_share < 1:
            raise ValueError(f"encoder_share must be strictly between 0 and 1; got {self.encoder_share}")
        beam_widths(self.num_beams, len(self.model.codebook_sizes))

    def steps(self, data: Dataset) -> int:
        """The budget in steps."""
        rows = self.rows(data)
        batch = min(self.training.batch_size, rows)
        return self.training.steps or self.training.epochs * (rows // batch)

    def on_sequences(self, data: Dataset) -> bool:
        """Whether models train on users' whole sequences, not on one request after another."""
        return self.model.causal and data.sequences is not None

    def rows(self, data: Dataset) -> int:
        """What a batch is made of: how many sequences or interactions there are."""
        return len(self._sequence_rows(data)) if self.on_sequences(data) else len(data.train)

    def trainer(self, model: DualEncoder, config: TrainConfig, data: Dataset, *args: Any, **settings: Any) -> Trainer:
        """A trainer on the data's sequences or interactions; further arguments are those of :class:`Trainer`."""
        if self.on_sequences(data):
            rows = self._sequence_rows(data)
            return SequenceTrainer(model, config, data.catalog, rows, *args, **settings)  # type: ignore[arg-type]
        return Trainer(model, config, data.catalog, data.train, *args, **settings)

    def _sequence_rows(self, data: Dataset) -> SequenceRows:
        assert data.sequences is not None  # asked before
        return training_rows(data.sequences, max_history=self.model.max_history)

    def part(self, name: str, steps: int, **settings: Any) -> tuple[TrainConfig, Path | None]:
        """The configuration of a run of so many steps, and its folder."""
        # A tenth of a short run is enough to warm up.
        warmup = min(self.training.warmup_steps, max(1, steps // 10))
        config = dataclasses.replace(self.training, steps=steps, warmup_steps=warmup, **settings)
        return config, None if self.folder is None else self.folder / f"{name}-{self.training.seed}"


@dataclass
class Training:
    """What one run of training leaves beside the model.

    Attributes:
        curve: a row for each logged step: ``step``, losses, ``grad_norm`` and, where measured, validation.
        seconds: of training, over all its parts where it was interrupted.
    """

    curve: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


def train(
    model: DualEncoder,
    config: TrainConfig,
    data: Dataset,
    folder: Path | None,
    plan: Plan,
    validate: Callable[[], Mapping[str, float]] | None = None,
) -> Training:
    """Train ``model`` on ``data.train``, from the last checkpoint in ``folder`` where there is one."""
    every = max(1, config.steps // plan.curve_points) if validate is not None else 0
    config = dataclasses.replace(config, log_every=max(1, config.steps // 50))
    trainer = plan.trainer(
        model,
        config,
        data,
        folder,
        device=plan.device,
        progress=plan.progress,
        validate=validate,
        validate_every=every,
    )
    last = trainer.fit(resume=trainer.folder is not None and bool(trainer.folder.checkpoints.paths()))
    rows = [last] if folder is None else _rows(folder / "metrics.jsonl")
    return Training(rows, _seconds(rows))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _seconds(rows: list[dict[str, Any]]) -> float:
    """Each part of an interrupted run counts its seconds from 0."""
    seconds = [row["seconds"] for row in rows]
    ends = [value for value, following in zip(seconds, [*seconds[1:], 0.0], strict=True) if following < value]
    return float(sum(ends))


def validation_sample(data: Dataset, size: int = VALIDATION_SAMPLE, seed: int = 0) -> Interactions:
    """A fixed sample of the validation set.

    Raises:
        ValueError: the data set has none.
    """
    if data.validation is None:
        raise ValueError(f"{data.name} has no validation set to choose settings on; see dgi.data.with_validation")
    if len(data.validation) <= size:
        return data.validation
    rows = np.random.default_rng(seed).choice(len(data.validation), size, replace=False)
    return data.validation.take(np.sort(rows))
