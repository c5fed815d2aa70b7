"""The demo on a tiny data set, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dgi.demo
from dgi.cli import main
from dgi.data import load_dataset
from dgi.demo import verdict
from dgi.evaluation.evaluate import sample
from dgi.retrieval.index import DGIIndex
from dgi.retrieval.search import Searcher
from dgi.training.checkpoint import load_model
from tests.dgi.tiny_folder import write_data


def test_the_demo_leaves_what_it_prints_and_can_be_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures are counted again from the files it leaves; a second run goes on from the checkpoints."""
    monkeypatch.setattr(dgi.demo, "TEST_SAMPLE", 30)
    folder, output = write_data(tmp_path / "data", np.random.default_rng(2)), tmp_path / "out"
    assert main(["demo", "--data", str(folder), "--output", str(output), "--no-progress"]) == 0
    printed = capsys.readouterr().out
    for name in ("metrics.json", "buckets.png", "training_curve.png", "index.safetensors", "model.safetensors"):
        assert (output / name).exists() and name in printed
    metrics = json.loads((output / "metrics.json").read_text())
    assert list(metrics["systems"]) == ["popularity", "dense", "DGI"] and metrics["queries"] == 30
    assert "sample of 30 of the 40 test interactions" in printed
    for system in metrics["systems"].values():
        assert f"{system['overall']['hit_rate@10']:.4f}" in printed and f"{system['overall']['ndcg@10']:.4f}" in printed

    ours, dense = (metrics["systems"][name]["overall"]["hit_rate@10"] for name in ("DGI", "dense"))
    assert metrics["difference"]["mean"] == pytest.approx(ours - dense) and f"difference {ours - dense:+.3f}" in printed
    assert metrics["training"]["contrastive"] == "all_items", "the fair dense baseline"

    data = load_dataset(folder)
    model, index = load_model(output / "model.safetensors"), DGIIndex.load(output / "index.safetensors")
    searcher, test = Searcher(model, index, data.catalog), sample(data.test, 30)
    found = searcher.search_interactions(test, k=10, exclude_history=True)
    hits = [target in items for target, items in zip(test.items, found.items.tolist(), strict=True)]
    assert metrics["systems"]["DGI"]["overall"]["hit_rate@10"] == pytest.approx(np.mean(hits))
    assert printed.count("chosen next") == 5, "each example marks or names the item chosen"

    monkeypatch.setattr("dgi.training.curve.training_curve", lambda *_: None)
    monkeypatch.setattr("dgi.evaluation.plots.bucket_picture", lambda *_, **__: None)
    assert main(["demo", "--data", str(folder), "--output", str(output), "--no-progress", "--full"]) == 0
    assert "all 40 test interactions" in capsys.readouterr().out
    assert json.loads((output / "metrics.json").read_text())["index"] == metrics["index"], "nothing was trained again"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.01, 0.03, "DGI is ahead of"), (-0.02, -0.01, "DGI is behind"), (-0.01, 0.01, "cannot be told apart from")],
)
def test_the_verdict_follows_the_interval(low: float, high: float, expected: str) -> None:
    systems = {"DGI": {"overall": {"hit_rate@10": 0.1}}, "dense": {"overall": {"hit_rate@10": 0.1}}}
    assert expected in verdict({"systems": systems, "difference": {"low": low, "high": high}})
