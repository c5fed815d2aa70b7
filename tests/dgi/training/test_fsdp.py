"""FSDP over two processes: the cases of :mod:`tests.dgi.training.fsdp_cases`; and files from before it could."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dgi.config import ModelConfig, from_dict
from dgi.model.dgi_model import DGIModel
from dgi.training.checkpoint import load_model, read_tensors, save_model, write_tensors
from dgi_kernels import CosineCrossEntropyLoss, CosineLinear
from tests.dgi.tiny_runs import MODEL

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_modules_and_models_can_be_sharded() -> None:
    """Guards against parameters of 0 dimensions, which fully_shard refuses."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "tests.dgi.training.fsdp_cases",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("make", [lambda: CosineLinear(4, 3, scale=7.0), lambda: CosineCrossEntropyLoss(7.0)])
def test_a_scale_of_an_old_file_is_read(make: type[nn.Module]) -> None:
    module, stored = make(), make().state_dict()
    assert stored["log_scale"].shape == (1,) and module.scale.shape == ()
    stored["log_scale"] = torch.tensor(2.5)
    module.load_state_dict(stored)
    assert module.log_scale.tolist() == [2.5]
    stored["log_scale"] = torch.tensor([1.0, 2.0])
    with pytest.raises(RuntimeError, match="size mismatch for log_scale"):
        module.load_state_dict(stored)


def test_a_model_file_with_a_scale_of_no_dimension_is_read(tmp_path: Path) -> None:
    model = DGIModel(from_dict(ModelConfig, MODEL))
    path = tmp_path / "model.safetensors"
    save_model(model, path)
    tensors, description = read_tensors(path, "DGIModel")
    assert tensors["quantizer.log_scale"].shape == (1,)
    tensors["quantizer.log_scale"] = torch.tensor(0.25)
    del description["version"]
    write_tensors(path, tensors, description)
    assert load_model(path).quantizer.log_scale.tolist() == [0.25]
