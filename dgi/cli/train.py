"""``dgi train``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from dgi.cli.common import DATA_FORMAT, MODEL_FILE, add_data, add_run_options, device, load_data, next_command
from dgi.config import BEFORE, ModelConfig, TrainConfig, from_dict, to_dict

HELP = "train a model on the interactions of a data set"
CONFIG_FILE = "config.json"
_INDENT = " " * 4
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)  # JSON has no .1 and no 1.


def _fields(config: type) -> str:
    """Names and defaults of a configuration, as JSON."""
    values = json.loads(json.dumps({field.name: _default(field) for field in dataclasses.fields(config)}))
    return "\n".join(f"{_INDENT}{name} = {json.dumps(value)}" for name, value in values.items())


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


EPILOG = f"""\
examples:
  dgi train --data my-data --output run --set epochs=5 --set codebook_sizes=256,128,64
  torchrun --nproc-per-node 4 -m dgi train --data my-data --output run
  dgi train --data my-data --output run --resume

{DATA_FORMAT}

settings, for --config (one JSON object) and --set, with their defaults; dgi/config.py explains them:
  model
{_fields(ModelConfig)}
  training
{_fields(TrainConfig)}

The output folder receives {MODEL_FILE}, {CONFIG_FILE}, metrics.jsonl (the losses and the use of codes, a JSON object
per line: docs/tutorial.md, "What training writes", explains each value), training_curve.png and checkpoints/.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data(parser)
    parser.add_argument("--output", metavar="DIR", required=True, type=Path, help="folder of the run")
    add_settings(parser)
    parser.add_argument(
        "--hold-out",
        action="store_true",
        help="leave a validation set out of training (the data's own, or the last tenth), so that dgi index --tune "
        "chooses on what the model has not seen",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help=f"continue the run in --output from its last checkpoint, with its {CONFIG_FILE}",
    )
    parser.add_argument(
        "--cuda-graph",
        action="store_true",
        help="take each step as one CUDA graph, for models of which a step takes longer to launch than to run; needs a "
        "CUDA device and one process",
    )
    add_run_options(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", type=Path, help="settings as a JSON file")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="one setting, over those of --config; may be repeated",
    )


def run(args: argparse.Namespace) -> None:
    import torch

    from dgi.data import with_validation
    from dgi.model.dgi_model import DGIModel
    from dgi.model.encoders import start_at_principal_axes
    from dgi.training.distributed import process_group, rank
    from dgi.training.recipes import recommended
    from dgi.training.trainer import Trainer

    with process_group():
        data = with_validation(load_data(args.data)) if args.hold_out else load_data(args.data)
        vectors = data.catalog.vectors
        settings = _settings(args)
        model_config, train_config = configs(settings, 0 if vectors is None else vectors.shape[1])
        train_config, why = recommended(model_config, train_config, settings.keys(), len(data.catalog), len(data.train))
        if rank() == 0:
            print(why, flush=True)
        torch.manual_seed(train_config.seed)
        model = DGIModel(model_config)
        start_at_principal_axes(model, data.catalog)
        trainer = Trainer(
            model,
            train_config,
            data.catalog,
            data.train,
            args.output,
            device=None if args.device is None else device(args.device),
            progress=args.progress,
            cuda_graph=args.cuda_graph,
        )
        if trainer.folder is not None and not trainer.folder.checkpoints.paths():
            _write_config(args.output / CONFIG_FILE, model_config, train_config)
        last = trainer.fit(resume=args.resume)
        if rank() == 0:
            print(
                f"trained {int(trainer.steps_done):,} steps on {len(data.train):,} interactions with "
                f"{len(data.catalog):,} items; loss {last['loss']:.4g}"
            )
            made = [
                name
                for name in (MODEL_FILE, CONFIG_FILE, "metrics.jsonl", "training_curve.png")
                if (args.output / name).is_file()
            ]
            print(f"{args.output} holds {', '.join(made[:-1])} and {made[-1]}")
            print(
                next_command(
                    "dgi",
                    "index",
                    "--model",
                    args.output,
                    "--data",
                    args.data,
                    "--output",
                    args.output / "index.safetensors",
                )
            )


def configs(settings: dict[str, Any], vector_dim: int) -> tuple[ModelConfig, TrainConfig]:
    """Split flat settings into the two configurations; ``vector_dim`` is that of the catalog's vectors.

    Raises:
        ValueError: a setting is unknown or has a wrong value.
    """
    of_model = {field.name for field in dataclasses.fields(ModelConfig)}
    of_training = {field.name for field in dataclasses.fields(TrainConfig)}
    unknown = sorted(set(settings) - of_model - of_training)
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}; known are {', '.join(sorted(of_model | of_training))}")
    if settings.get("encoder") == "vectors":
        settings = {"vector_dim": vector_dim, **settings}
    return (
        from_dict(ModelConfig, {name: value for name, value in settings.items() if name in of_model}),
        from_dict(TrainConfig, {name: value for name, value in settings.items() if name in of_training}),
    )


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    stored = args.output / CONFIG_FILE
    settings = BEFORE | _read_config(stored) if args.resume and stored.is_file() else {}
    return settings | read_settings(args)


def read_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--config`` and ``--set`` say, as flat settings."""
    settings = {} if args.config is None else _read_config(args.config)
    for text in args.settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set takes NAME=VALUE; got {text!r}")
        settings[name.strip()] = _parse(value.strip())
    return settings


def _parse(text: str) -> Any:
    """JSON, a list without its brackets, numbers such as .1, or a plain word."""
    for candidate in (text, f"[{text}]"):
        try:
            return json.loads(candidate)
        except (ValueError, RecursionError):
            continue
    parts = [part.strip() for part in text.split(",")]
    if all(map(_NUMBER.fullmatch, parts)):
        numbers = [float(part) for part in parts]
        return numbers if len(numbers) > 1 else numbers[0]
    return text


def _read_config(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold one JSON object of settings; it holds a {type(settings).__name__}")
    return settings


def _write_config(path: Path, model: ModelConfig, training: TrainConfig) -> None:
    from dgi_kernels.files import atomic_write

    with atomic_write(path) as file:
        file.write(json.dumps({**to_dict(model), **to_dict(training)}, indent=2).encode() + b"\n")
