"""Files of a training run: tensors with their configuration, checkpoints, and the metrics beside them.

A file is safetensors, with a JSON description and a SHA-256 in its metadata.  The sum covers the description and every
tensor's name, dtype, shape and bytes, so that a truncated or altered file is detected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dgi.config import ModelConfig, from_file, to_dict
from dgi.extras import require
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.model.encoders import SequenceEncoder
from dgi.model.tokenizer import Tokenizer
from dgi_kernels.files import atomic_write, check_output

safetensors, safetensors_torch = require("safetensors"), require("safetensors.torch")

FORMAT_VERSION = 1
METADATA_KEY = "dgi"
TOKENIZER = "tokenizer"  # name of the bytes of a tokenizer.json among a model's tensors
KEPT_CHECKPOINTS = 2  # the newest, and the one before in case the newest cannot be read

Model = TypeVar("Model", bound=DualEncoder)
logger = logging.getLogger("dgi")


class CheckpointError(ValueError):
    """A model or checkpoint file is damaged, of another kind, or does not fit; the message names file and fault."""


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; one that several modules share comes once, by its first name."""
    names: dict[int, str] = {}
    tensors = module.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), name)
    return {name: tensors[name] for name in names.values()}


def write_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write ``tensors`` and the JSON ``description`` as one safetensors file, whole or not at all."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = {"version": FORMAT_VERSION, **description}
    # One entry, since several would come in an order that differs from run to run.
    metadata = {METADATA_KEY: json.dumps({"description": description, "sha256": _digest(description, stored)})}
    content = safetensors_torch.save(stored, metadata)
    with atomic_write(path) as file:
        file.write(content)


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_tensors` wrote with ``description["kind"] == kind``.

    Raises:
        CheckpointError: the file is truncated, altered, or not of this kind and version.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    try:
        envelope = json.loads(metadata[METADATA_KEY])
        description, sha256 = envelope["description"], envelope["sha256"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or not of dgi: its metadata has no entry {METADATA_KEY!r} with a "
            f"description and its SHA-256"
        ) from error
    if sha256 != _digest(description, tensors):
        raise CheckpointError(f"{path} is damaged: its content does not have the SHA-256 that it was written with")
    if description["version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {description['version']}; this version of dgi reads {FORMAT_VERSION}"
        )
    if description["kind"] != kind:
        raise CheckpointError(f"{path} holds a {description['kind']}; a {kind} is needed")
    return tensors, description


def _digest(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def copy_tensors(source: Mapping[str, Tensor], target: Mapping[str, Tensor], origin: object) -> None:
    """Copy ``source`` into the live tensors of ``target``, which must agree in names, shapes and dtypes.

    Raises:
        CheckpointError: they do not; ``origin`` is the file that the message names.
    """
    for problem, names in (("lacks", target.keys() - source.keys()), ("has unexpected", source.keys() - target.keys())):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", …" if len(names) > 5 else "")
            raise CheckpointError(f"{origin} {problem} {len(names)} of the tensors: {shown}")
    # Scales were 0-d once.
    source = {name: x.reshape(1) if x.ndim == 0 and target[name].shape == (1,) else x for name, x in source.items()}
    for name, tensor in target.items():
        stored = source[name]
        if stored.shape != tensor.shape or stored.dtype != tensor.dtype:
            raise CheckpointError(
                f"{origin} has {name} as {stored.dtype} {tuple(stored.shape)}; {tensor.dtype} "
                f"{tuple(tensor.shape)} is needed"
            )
    for name, tensor in target.items():
        tensor.copy_(source[name])


def save_model(model: DualEncoder, path: str | os.PathLike[str]) -> None:
    """Write a model's weights, buffers and configuration to one safetensors file.

    A tokenizer of the user's own is written with them. Beside the file of a Hugging Face encoder, ``NAME.backbone/``
    receives its configuration and tokenizer.
    """
    tensors = unique_tensors(model)
    if isinstance(model.encoder, SequenceEncoder) and model.encoder.tokenizer is not None:
        tensors[TOKENIZER] = torch.frombuffer(bytearray(model.encoder.tokenizer.to_bytes()), dtype=torch.uint8)
    if model.config.encoder == "t5":
        from dgi.model.t5 import T5Encoder  # transformers is an optional dependency

        if isinstance(model.encoder, T5Encoder):
            model.encoder.save_backbone(_backbone(path))
    write_tensors(path, tensors, {"kind": type(model).__name__, "model_config": to_dict(model.config)})


def load_model(path: str | os.PathLike[str], kind: type[Model] = DGIModel) -> Model:  # type: ignore[assignment]
    """Build the model that :func:`save_model` wrote, on the CPU, in evaluation mode.

    Args:
        path: the file.
        kind: :class:`dgi.DGIModel` or :class:`dgi.DualEncoder`, as was saved.

    Raises:
        CheckpointError: the file is damaged, of another kind, or does not fit its own configuration.
    """
    tensors, description = read_tensors(path, kind.__name__)
    config = from_file(ModelConfig, description["model_config"])
    encoder = None
    if TOKENIZER in tensors:
        content = tensors.pop(TOKENIZER).numpy().tobytes()
        encoder = SequenceEncoder(config, Tokenizer.from_bytes(content, path))
    if config.encoder == "t5":
        if not _backbone(path).is_dir():
            raise CheckpointError(f"{path} needs the folder {_backbone(path)}, which was written with it, beside it")
        config = dataclasses.replace(config, pretrained=str(_backbone(path)))
    model = kind(config, encoder)
    if isinstance(model, DGIModel):
        codes, bias = "item_codes" in tensors, "item_bias" in tensors
        if codes or bias:
            model.keep_items(len(tensors["item_codes" if codes else "item_bias"]), codes=codes, bias=bias)
    copy_tensors(tensors, unique_tensors(model), path)
    return model.eval()


def _backbone(path: str | os.PathLike[str]) -> Path:
    return Path(path).with_suffix(".backbone")


class Checkpoints:
    """The folder of a run's checkpoints, ``step-00000100.safetensors`` and so on.

    Args:
        folder: created on the first :meth:`save`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    def save(self, step: int, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step``, then :meth:`prune`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:08d}.safetensors"
        write_tensors(path, tensors, {"kind": "checkpoint", "step": step, **description})
        self.prune(path)

    def prune(self, current: Path) -> None:
        """Remove all checkpoints but ``current`` and the one before it.

        Later ones go too: they are damaged ones that :meth:`load` passed over.
        """
        kept = [path for path in self.paths() if path <= current][-KEPT_CHECKPOINTS:]
        for path in self.paths():
            if path not in kept:
                path.unlink()

    def load(self) -> tuple[Path, dict[str, Tensor], dict[str, Any]] | None:
        """Path, tensors and description of the newest readable checkpoint, None where there are no checkpoints.

        A damaged one is reported by a warning, and the one before is taken.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        damaged: list[CheckpointError] = []
        for path in reversed(self.paths()):
            try:
                return path, *read_tensors(path, "checkpoint")
            except CheckpointError as error:
                logger.warning("%s; trying the checkpoint before it", error)
                damaged.append(error)
        if damaged:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read; remove the folder to start over. The newest: {damaged[0]}"
            )
        return None


class MetricsLog:
    """Rows of metrics as JSON lines, appended to ``path`` as they come.

    Its writer's death can leave a part of a line at the end, which :meth:`cut` drops.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        with open(self.path, "ab") as file:
            file.write(_line(row))

    def sync(self) -> None:
        """Make sure that the rows so far outlive a crash of the machine, as a checkpoint does that counts on them."""
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())

    def cut(self, step: int) -> dict[str, Any]:
        """Drop all rows after ``step``; return the last one that stays, {} if none does."""
        rows = [row for row in self._rows() if row["step"] <= step]
        with atomic_write(self.path) as file:
            file.writelines(map(_line, rows))
        return rows[-1] if rows else {}

    def _rows(self) -> Iterable[dict[str, Any]]:
        if self.path.exists():
            for line in self.path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise CheckpointError(
                        f"{self.path} is damaged: it holds a line that is not JSON ({error}); remove "
                        f"the line, or start over in another folder"
                    ) from None
                if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                    raise CheckpointError(
                        f"{self.path} is damaged: it holds a line without a step; remove the line, "
                        f"or start over in another folder"
                    )
                yield row


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"


class RunFolder:
    """The output folder of one run, created here, and the files in it.

    Raises:
        OSError: there can be no such folder, or no file can be written into it.
    """

    def __init__(self, path: Path) -> None:
        self.checkpoints = Checkpoints(path / "checkpoints")
        self.metrics = MetricsLog(path / "metrics.jsonl")
        self.model_path = path / "model.safetensors"
        self.curve_path = path / "training_curve.png"
        self.path = path
        check_output(path, [self.metrics.path, self.model_path, self.curve_path])

    def check(self, nbytes: int) -> None:
        """Raise OSError where the disk has no room for what training will write, a checkpoint being so many bytes.

        There are ``KEPT_CHECKPOINTS`` and the one being written, and the model, which is smaller.
        """
        still_to_come = max(1, KEPT_CHECKPOINTS + 1 - len(self.checkpoints.paths()))
        check_output(self.path, nbytes=(still_to_come + 1) * nbytes)

    def remove_leftovers(self) -> None:
        """Remove the temporary files of a run that was killed while it wrote."""
        written = [self.metrics.path, self.model_path, self.curve_path, self.checkpoints.folder / "step-*"]
        for path in written:
            for leftover in path.parent.glob(f".{path.name}.*.tmp"):
                leftover.unlink()
