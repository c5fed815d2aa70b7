"""Model and checkpoint files: what is written comes back to the bit, and what is damaged or does not fit is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgi.config import ModelConfig, from_dict, to_dict
from dgi.model.dgi_model import DGIModel, DualEncoder
from dgi.training.checkpoint import (
    CheckpointError,
    Checkpoints,
    MetricsLog,
    RunFolder,
    copy_tensors,
    load_model,
    read_tensors,
    save_model,
    unique_tensors,
    write_tensors,
)
from tests.dgi.tiny_runs import MODEL

TENSORS = {
    "float32": torch.tensor([[1.5, -0.0], [float("nan"), float("-inf")]]),
    "bfloat16": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    "int64": torch.tensor(2**62),
    "bool": torch.tensor([True, False, True]),
    "empty": torch.empty(0, 3),
    "transposed": torch.arange(6).reshape(2, 3).T,
}


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...], list[int]]]:
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, tensor in tensors.items()
    }


def tiny_model(**fields: object) -> DGIModel:
    return DGIModel(from_dict(ModelConfig, MODEL | fields)).eval()


def test_tensors_and_description_come_back(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, {"kind": "sample", "note": ["τ", 1, None]})
    tensors, description = read_tensors(path, "sample")
    assert bits(tensors) == bits(TENSORS)
    assert description == {"kind": "sample", "note": ["τ", 1, None], "version": 1}


def test_every_damaged_byte_and_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, TENSORS, {"kind": "sample", "step": 12})
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :])
        try:
            tensors, description = read_tensors(path, "sample")
        except CheckpointError:
            continue
        assert bits(tensors) == bits(TENSORS) and description["step"] == 12  # white space of the header
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="file.safetensors"):
            read_tensors(path, "sample")


def test_a_file_of_another_kind_version_or_origin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    write_tensors(path, {}, {"kind": "sample"})
    with pytest.raises(CheckpointError, match="holds a sample; a checkpoint is needed"):
        read_tensors(path, "checkpoint")
    write_tensors(path, {}, {"kind": "sample", "version": 2})
    with pytest.raises(CheckpointError, match="has format version 2; this version of dgi reads 1"):
        read_tensors(path, "sample")
    path.write_bytes(b"PK\x03\x04 something else altogether")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_tensors(path, "sample")
    with pytest.raises(FileNotFoundError):
        read_tensors(tmp_path / "none.safetensors", "sample")


@pytest.mark.parametrize("heads", ["shared", "separate"])
def test_a_model_comes_back_with_its_shared_parameters(heads: str, tmp_path: Path) -> None:
    model = tiny_model(heads=heads)
    model.quantizer.count(torch.tensor([[1, 2], [1, 3]]))
    save_model(model, tmp_path / "model.safetensors")
    stored, _ = read_tensors(tmp_path / "model.safetensors", "DGIModel")
    loaded = load_model(tmp_path / "model.safetensors")
    assert not loaded.training and loaded.config == model.config
    assert bits(unique_tensors(loaded)) == bits(unique_tensors(model)) == bits(stored)
    assert ("heads.0.weight" in stored) == (heads == "separate")  # a shared codebook is stored once
    for j, head in enumerate(loaded.heads):
        assert (head.weight is loaded.quantizer.codebooks[j]) == (heads == "shared")
        assert head.log_scale is loaded.quantizer.log_scale


def test_a_model_whose_scale_was_0d_is_read(tmp_path: Path) -> None:
    """Files from before log_scale had a dimension for FSDP; moments of an optimizer go the same way."""
    model = tiny_model()
    tensors = unique_tensors(model)
    older = tensors | {"quantizer.log_scale": tensors["quantizer.log_scale"].reshape(())}
    write_tensors(tmp_path / "old.safetensors", older, {"kind": "DGIModel", "model_config": to_dict(model.config)})
    assert bits(unique_tensors(load_model(tmp_path / "old.safetensors"))) == bits(tensors)
    state = model.state_dict() | {"quantizer.log_scale": torch.tensor(3.0)}
    model.quantizer.load_state_dict(
        {name.removeprefix("quantizer."): x for name, x in state.items() if name.startswith("quantizer.")}
    )
    assert model.quantizer.log_scale.tolist() == [3.0] and model.heads[0].scale.ndim == 0


def test_a_dual_encoder_is_not_taken_for_a_dgi_model(tmp_path: Path) -> None:
    model = DualEncoder(from_dict(ModelConfig, MODEL))
    save_model(model, tmp_path / "model.safetensors")
    assert bits(unique_tensors(load_model(tmp_path / "model.safetensors", DualEncoder))) == bits(unique_tensors(model))
    with pytest.raises(CheckpointError, match="holds a DualEncoder; a DGIModel is needed"):
        load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"a": torch.zeros(2)}, "x.safetensors lacks 1 of the tensors: b"),
        ({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}, "has unexpected 1 of the tensors: c"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(1, 3)},
            r"has b as torch.float32 \(1, 3\); torch.float32 \(3,\) is needed",
        ),
        ({"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.float64)}, "has b as torch.float64"),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(source: dict[str, Tensor], message: str) -> None:
    target = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(CheckpointError, match=message):
        copy_tensors(source, target, "x.safetensors")
    assert all((tensor == 1).all() for tensor in target.values())


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.load() is None
    for step in (2, 4, 6):
        checkpoints.save(step, {"w": torch.tensor(float(step))}, {})
    (checkpoints.folder / "step-00000009.safetensors").write_bytes(b"damaged")
    checkpoints.save(8, {"w": torch.tensor(8.0)}, {})
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "step-00000006.safetensors",
        "step-00000008.safetensors",
    ]
    loaded = checkpoints.load()
    assert loaded is not None
    path, tensors, description = loaded
    assert (path.name, tensors["w"].item(), description["step"]) == ("step-00000008.safetensors", 8.0, 8)


def test_metrics_are_cut_back_to_a_step(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.cut(5) == {} and log.path.read_text() == ""
    for step in (1, 2, 3):
        log.append({"step": step, "loss": step / 3})
    assert log.cut(2) == {"step": 2, "loss": 2 / 3}
    assert log.path.read_text() == '{"step": 1, "loss": 0.3333333333333333}\n{"step": 2, "loss": 0.6666666666666666}\n'


def test_only_leftovers_of_the_run_itself_are_removed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.save(1, {}, {})
    for name in (".metrics.jsonl.1a.tmp", ".model.safetensors.2b.tmp", "checkpoints/.step-00000002.safetensors.3c.tmp"):
        (tmp_path / name).write_bytes(b"half a fi")
    (tmp_path / ".notes.tmp").write_text("the user's")
    folder.remove_leftovers()
    files = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert files == [".notes.tmp", "step-00000001.safetensors"]
