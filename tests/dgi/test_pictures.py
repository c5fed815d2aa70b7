"""Pictures: that the data given are the data drawn, and that a PNG is written whole or not at all."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.image import imread

from dgi import pictures
from dgi.evaluation import evaluate, plots
from dgi.evaluation.metrics import code_usage, evaluate_rankings
from dgi.training import curve


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved, kept for a look at what it shows."""
    saved: list[Figure] = []
    save = pictures.save

    def keep(figure: Figure, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    for module in (curve, plots):
        monkeypatch.setattr(module, "save", keep)
    return saved


def write_metrics(path: Path, rows: int) -> list[dict]:
    written = [
        {
            "step": 10 * i,
            "epoch": i / 7,
            "loss": float(np.random.randn()),
            "ntp": 5.0,
            "global": 0.4,
            "local": 0.1,
            "infonce": 2.0,
            "diversity": -3.0,
            "gamma": 30 + i,
            "tau": 0.5,
            "usage": [0.5, 0.25, 1.0],
            "collisions": 0.1,
            "lr": [5e-5, 5e-4],
        }
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in written))
    return written


def results(num_systems: int) -> dict[str, dict]:
    counts, targets = np.arange(40), np.random.randint(40, size=300)
    return {
        f"system {i}": evaluate_rankings(np.argsort(np.random.rand(300, 40), axis=1)[:, :20], targets, counts)
        for i in range(num_systems)
    }


def test_training_curve_draws_what_was_logged(tmp_path: Path, figures: list[Figure]) -> None:
    rows = write_metrics(tmp_path / "metrics.jsonl", 12)
    curve.training_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    losses, quantizer, codes, gamma, _, rates, diversity = figures[0].axes
    drawn = {line.get_label(): line for line in losses.lines}
    np.testing.assert_array_equal(drawn["total"].get_xdata(), [row["step"] for row in rows])
    np.testing.assert_array_equal(drawn["total"].get_ydata(), [row["loss"] for row in rows])
    assert set(drawn) == {"total", "next token", "InfoNCE"}
    # Diversity has an axis of its own: beside -20 the two others would be one flat line.
    assert {line.get_label() for line in quantizer.lines} == {"global (1 − cos)", "local"}
    np.testing.assert_array_equal(diversity.lines[0].get_ydata(), [row["diversity"] for row in rows])
    assert len(quantizer.get_legend().get_texts()) == 3
    levels = {line.get_label(): line.get_ydata()[0] for line in codes.lines}
    assert levels == {"used, level 1": 0.5, "used, level 2": 0.25, "used, level 3": 1.0, "items sharing a SID": 0.1}
    np.testing.assert_array_equal(gamma.lines[0].get_ydata(), [row["gamma"] for row in rows])
    assert [line.get_ydata()[0] for line in rates.lines] == [5e-5, 5e-4]
    assert imread(tmp_path / "curve.png").shape[:2] == (840, 1560)


def test_long_runs_are_smoothed_by_their_mean() -> None:
    values = np.random.randn(500)
    smooth = curve._running_mean(values, 11)
    for i in (0, 3, 250, 499):
        assert smooth[i] == pytest.approx(values[max(0, i - 5) : i + 6].mean())


def test_a_run_killed_while_it_wrote_can_be_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    """Guards against a half-written last line, as SIGKILL leaves it, spoiling the whole picture."""
    write_metrics(tmp_path / "metrics.jsonl", 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "lo')
    curve.training_curve(tmp_path / "metrics.jsonl", tmp_path / "curve.png")
    assert len(figures[0].axes[0].lines[0].get_xdata()) == 3


def test_missing_terms_leave_their_panel_empty(tmp_path: Path, figures: list[Figure]) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0, "tau": 0.5}\n')
    curve.training_curve(tmp_path / "m.jsonl", tmp_path / "curve.png")
    assert [len(panel.lines) for panel in figures[0].axes] == [1, 0, 0, 0, 1, 0]
    assert figures[0].axes[1].texts[0].get_text() == "not logged"


def test_unusable_metrics(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("")
    with pytest.raises(ValueError, match="there is nothing to draw"):
        curve.training_curve(tmp_path / "m.jsonl", tmp_path / "curve.png")
    (tmp_path / "m.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        curve.training_curve(tmp_path / "m.jsonl", tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_bars_are_the_measures(tmp_path: Path, figures: list[Figure]) -> None:
    given = results(3)
    plots.bucket_picture(given, tmp_path / "buckets.png")
    for panel, key in zip(figures[0].axes, ("hit_rate@10", "ndcg@10"), strict=True):
        assert [bars.get_label() for bars in panel.containers if hasattr(bars, "patches")] == list(given)
        for bars, result in zip(panel.containers, given.values(), strict=True):
            expected = [group[key] or 0.0 for group in (result["overall"], *result["buckets"])]
            assert [bar.get_height() for bar in bars] == pytest.approx(expected)
    labels = [label.get_text() for label in figures[0].axes[0].get_xticklabels()]
    assert labels[0] == "all\n300 queries" and labels[1].startswith("1 (head)\n") and labels[-1].startswith("unseen\n")
    assert imread(tmp_path / "buckets.png").shape[1] == 1080


def test_codes_panel(tmp_path: Path, figures: list[Figure]) -> None:
    usage = code_usage(np.random.randint(0, 4, size=(50, 2)), [8, 4])
    plots.bucket_picture(results(1), tmp_path / "eval.png", k=5, codes=usage)
    used, perplexity = figures[0].axes[2].containers
    assert [bar.get_height() for bar in used] == [level["used"] for level in usage]
    assert [bar.get_height() for bar in perplexity] == [level["perplexity"] / level["size"] for level in usage]


def test_bucket_picture_wants_one_test_set(tmp_path: Path) -> None:
    one, other = results(1), evaluate_rankings(np.zeros((2, 20), np.int64), np.zeros(2, np.int64), np.array([3]))
    with pytest.raises(ValueError, match="the same buckets for every system"):
        plots.bucket_picture({**one, "other": other}, tmp_path / "b.png")
    with pytest.raises(ValueError, match="at least one system"):
        plots.bucket_picture({}, tmp_path / "b.png")


def test_a_failed_picture_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots.bucket_picture(results(1), tmp_path / "b.png")
    before = (tmp_path / "b.png").read_bytes()

    def fail(self: Figure, file: io.BufferedIOBase, **_: object) -> None:
        file.write(b"half a pict")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        plots.bucket_picture(results(1), tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["b.png"]


def test_a_backend_that_is_not_here_keeps_no_picture_from_being_drawn(tmp_path: Path) -> None:
    """Guards against MPLBACKEND of a notebook, which ended a training after its last step."""
    code = (
        "import os, sys; from dgi import pictures; picture = pictures.figure(); "
        "pictures.save(picture, sys.argv[1]); print(os.environ['MPLBACKEND'])"
    )
    environment = {**os.environ, "MPLBACKEND": "module://not_here.backend_inline"}
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == environment["MPLBACKEND"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_results_are_kept_where_no_picture_can_be_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    results = {"systems": {"DGI": {"overall": {}, "buckets": []}}, "index": {"codes": []}}
    with caplog.at_level(logging.WARNING, "dgi"):
        assert not evaluate.write_results(tmp_path, results)
    assert json.loads((tmp_path / "metrics.json").read_text()) == results
    assert "buckets.png was not drawn: matplotlib cannot be imported" in caplog.text
