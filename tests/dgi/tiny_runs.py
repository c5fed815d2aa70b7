"""Training runs small enough for tests, in this process, in one that gets killed, or in torchrun's."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgi.config import ModelConfig, TrainConfig, from_dict
from dgi.data import Catalog, Interactions
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.training import curve
from dgi.training.checkpoint import save_model
from dgi.training.distributed import process_group, rank
from dgi.training.trainer import Trainer

MODEL = {
    "dim": 16,
    "codebook_sizes": [5, 4],
    "attention_heads": 2,
    "history_layers": 1,
    "text_layers": 1,
    "decoder_layers": 1,
    "dropout": 0.1,
    "vocabulary_size": 64,
    "max_tokens": 4,
    "max_history": 3,
}
TRAIN = {"epochs": 2, "batch_size": 8, "warmup_steps": 2, "revive_every": 1, "log_every": 1, "checkpoint_every": 1}


def tiny_data(seed: int, rows: int = 26, items: int = 60) -> tuple[Catalog, Interactions]:
    """Random clicks on items named by two words; some rows lack a query, some histories are short or empty.

    There are many items to a code: the residual of an item alone in its cluster is 0, where cosine has no gradient.
    """
    random = np.random.default_rng(seed)
    catalog = Catalog(tuple(f"id{i}" for i in range(items)), tuple(f"name{i} kind{i % 5}" for i in range(items)))
    histories = np.sort(random.integers(-4, items, (rows, 5)).clip(-1), axis=1)
    chosen = random.integers(0, items, rows)
    queries = tuple(f"kind{item % 5}" if random.random() < 0.8 else "" for item in chosen)
    return catalog, Interactions(queries, histories, chosen, np.arange(rows, dtype=np.float64))


def tiny_trainer(
    output: Path | None,
    seed: int,
    model: dict[str, Any] | None = None,
    train: dict[str, Any] | None = None,
    kind: type[DualEncoder] = DGIModel,
    **options: Any,
) -> Trainer:
    """A trainer for :func:`tiny_data`, with fields of ``MODEL`` and ``TRAIN`` replaced, and options of its own.

    A code that the first batches do not use counts as dead, so that revival has something to do.
    """
    torch.manual_seed(seed + rank())  # only rank 0's weights may count
    made = kind(from_dict(ModelConfig, MODEL | (model or {})))
    if isinstance(made, DGIModel):
        for counts in made.quantizer.code_counts:
            counts.zero_()
    config = from_dict(TrainConfig, {**TRAIN, "seed": seed, **(train or {})})
    return Trainer(made, config, *tiny_data(seed), output, progress=False, **options)


def train_until_killed(output: Path, seed: int, train: dict[str, Any], function: str | None, calls: int) -> None:
    """Resume a run, or start it; die by SIGKILL on entering ``os.<function>`` for the ``calls``-th time."""
    torch.set_num_threads(1)
    curve.training_curve = lambda *_: None  # what takes longest in a run so small, and is none of these tests' business
    if function is not None:
        genuine, left = getattr(os, function), calls

        def deadly(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return genuine(*args, **kwargs)

        setattr(os, function, deadly)
    tiny_trainer(output, seed, train=train).fit(resume=True)


# Nine steps: every kind of stage, codes that are refreshed, made again and renumbered, soft and item targets.
STAGES: dict[str, Any] = {
    "contrastive": "all_items",
    "item_bias": True,
    "stages": [
        {"name": "encoder", "epochs": 0.7, "contrastive": "in_batch"},
        {"name": "quantizer"},
        {"name": "joint", "epochs": 1.3, "codes": "epoch", "inputs": "mixed", "distillation": 0.3},
        {"name": "quantizer"},
        {"name": "decoder", "epochs": 1, "rates": {"decoder": 0.002}, "distillation": 1.0},
    ],
}

# name -> (fields of the model, fields of the training, kind of model)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], type[DualEncoder]]] = {
    "dgi": ({}, {}, DGIModel),
    "straight-through, separate heads": ({"gradient": "straight_through", "heads": "separate"}, {}, DGIModel),
    "detached": ({"gradient": "detached"}, {}, DGIModel),
    "inner product, no use of γ": ({"similarity": "inner_product"}, {}, DGIModel),
    "euclidean": ({"metric": "euclidean"}, {}, DGIModel),
    "no use of the decoder": ({}, {"loss_weights": {"ntp": 0}}, DGIModel),
    "dual encoder": ({}, {}, DualEncoder),
    "stages": ({}, STAGES, DGIModel),
    "joint, then decoder": ({}, {"stages": [{"name": "joint"}, {"name": "decoder"}]}, DGIModel),
}


def run_variants(output: Path, seed: int) -> None:
    """Train every variant without dropout; leave its weights and last metrics in ``output``, from every rank."""
    for name, (model, train, kind) in VARIANTS.items():
        trainer = tiny_trainer(None, seed, model | {"dropout": 0.0}, train, kind)
        metrics = trainer.fit()
        save_model(trainer.model, output / f"{name}.{rank()}.safetensors")
        (output / f"{name}.{rank()}.json").write_text(json.dumps(metrics))


def run_resumed(output: Path, seed: int) -> None:
    """Train into ``output/resumed`` with dropout, keep the model as whole.safetensors, and resume from the middle."""
    folder, train = output / "resumed", {"checkpoint_every": 2}
    tiny_trainer(folder, seed, train=train).fit()
    if rank() == 0:
        (folder / "model.safetensors").rename(folder / "whole.safetensors")
        max((folder / "checkpoints").iterdir()).unlink()
    tiny_trainer(folder, seed, train=train).fit(resume=True)


def main(output: Path, seed: int) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with process_group():
        run_variants(output, seed)
        run_resumed(output, seed)
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not any("gloo" in thread for thread in threads), f"the group's threads outlive it: {threads}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
