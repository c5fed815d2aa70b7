"""``dgi index`` by two processes of torchrun against one: the same file, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dgi.cli import main
from dgi.config import ModelConfig, from_dict
from dgi.model.dgi_model import DGIModel
from dgi.retrieval.index import DGIIndex
from dgi.retrieval.shares import share_of
from dgi.training.checkpoint import save_model
from tests.dgi.tiny_folder import ITEMS, write_data
from tests.dgi.tiny_runs import MODEL

ROOT = Path(__file__).parents[3]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many as torchrun gives each of its processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_processes_write_the_file_of_one(tmp_path: Path, one_thread: None) -> None:
    """Guards batches and padding that depend on the share, and codes made unique within a share only."""
    data = write_data(tmp_path / "data", np.random.default_rng(1))
    lines = (data / "items.tsv").read_text().splitlines()
    lines[-1] += " of more words than all"  # in the last share only, which all of them are padded for
    (data / "items.tsv").write_text("\n".join(lines) + "\n")
    model = DGIModel(from_dict(ModelConfig, {**MODEL, "codebook_sizes": [6, 5]}))  # as many IDs as items
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model/model.safetensors")
    arguments = ["index", "--model", str(tmp_path / "model"), "--data", str(data), "--tune", "--no-progress"]
    arguments += ["--batch-size", "7", "--output"]
    assert main([*arguments, str(tmp_path / "one.safetensors")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dgi"]
    finished = subprocess.run(
        [*torchrun, *arguments, str(tmp_path / "two.safetensors")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("is the index") == 1
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    index = DGIIndex.load(tmp_path / "one.safetensors")
    assert index.cosine_weight is not None and len(index.codes.unique(dim=0)) == ITEMS


@pytest.mark.parametrize("items, batch_size, ranks", [(30, 7, 2), (1, 8, 4), (64, 8, 8), (100, 3, 7)])
def test_shares_are_whole_batches_in_order(items: int, batch_size: int, ranks: int) -> None:
    shares = [share_of(items, batch_size, ranks, number) for number in range(ranks)]
    assert [row for share in shares for row in share] == list(range(items))
    assert shares[0] and all(share.start % batch_size == 0 for share in shares if share)
    assert max(map(len, shares)) - batch_size <= items / ranks
