"""The cases of :mod:`tests.kernels.parallel_cases` with three processes and with a group of two; and alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dgi_kernels import cosine_cross_entropy, vocabulary_parallel_cosine_cross_entropy

ROOT = Path(__file__).parents[2]


def test_ranks_with_shards_of_the_weight_compute_what_one_process_does(seed: int) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=3",
        "-m",
        "tests.kernels.parallel_cases",
        str(seed),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_alone_it_is_the_plain_loss() -> None:
    h, weight, target = torch.randn(4, 3), torch.randn(5, 3), torch.randint(5, (4,))
    for rows in ("replicated", "sharded"):
        loss = vocabulary_parallel_cosine_cross_entropy(h, weight, target, 9.0, rows=rows, label_smoothing=0.1)
        assert torch.equal(loss, cosine_cross_entropy(h, weight, target, 9.0, label_smoothing=0.1))
    with pytest.raises(ValueError, match="^rows must be one of"):
        vocabulary_parallel_cosine_cross_entropy(h, weight, target, 9.0, rows="mine")
