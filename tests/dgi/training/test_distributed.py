"""Two processes of torchrun, each with half of every batch, against one process with all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from dgi.training.distributed import gather_rows, global_mean, process_group, rank, world_size
from tests.dgi import tiny_runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SEED = 20240229  # one for all tests of this file, which share a run; the numbers must agree to rounding for any


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of :func:`tiny_runs.main` under torchrun with two gloo processes."""
    output = tmp_path_factory.mktemp("two")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "tests.dgi.tiny_runs",
        str(output),
        str(SEED),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return output


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same variants, trained here."""
    output = tmp_path_factory.mktemp("one")
    torch.set_default_dtype(torch.float64)
    tiny_runs.run_variants(output, SEED)
    torch.set_default_dtype(torch.float32)
    yield output


def metrics(path: Path) -> list[Any]:
    """Numbers of the last row of metrics, by name, without the time."""
    row = json.loads(path.read_text())
    return [value for name, value in sorted(row.items()) if name != "seconds"]


@pytest.mark.parametrize("variant", tiny_runs.VARIANTS)
def test_two_processes_train_as_one_does(variant: str, two_processes: Path, one_process: Path) -> None:
    """Guards InfoNCE's and diversity's gradients across ranks, the noise's row offset, revival, and unused parameters.

    In float64, since AdamW turns rounding errors of a gradient that should be 0 (a key's bias) into whole steps.
    """
    for actual, expected in zip(
        *(metrics(folder / f"{variant}.0.json") for folder in (two_processes, one_process)), strict=True
    ):
        assert actual == pytest.approx(expected, rel=1e-5)
    actual, expected = (
        safetensors.torch.load_file(folder / f"{variant}.0.safetensors") for folder in (two_processes, one_process)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("variant", tiny_runs.VARIANTS)
def test_both_processes_end_with_the_same_bits(variant: str, two_processes: Path) -> None:
    first, second = ((two_processes / f"{variant}.{rank}.safetensors").read_bytes() for rank in range(2))
    assert first == second


def test_a_resumed_pair_of_processes_ends_with_the_bits_of_an_uninterrupted_one(two_processes: Path) -> None:
    """Guards rank 1's moments and dropout, of which it has no file."""
    folder = two_processes / "resumed"
    assert (folder / "model.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()


def test_without_torchrun_there_is_one_process() -> None:
    value = torch.randn(3, 2)
    with process_group():
        assert (world_size(), rank()) == (1, 0)
        assert gather_rows(value) is value
        assert global_mean(value) is value


def test_batch_size_must_divide_among_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dgi.training.trainer.world_size", lambda: 3)
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 3 processes; got 8"):
        tiny_runs.tiny_trainer(None, SEED)
