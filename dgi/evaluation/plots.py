"""Pictures of a run: the training curve, and quality by popularity.  Each is one PNG, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dgi_kernels.files import atomic_write

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# Panel title -> (y label, {key of the metrics: label}).
PANELS = {
    "Retrieval losses": ("nats", {"loss": "total", "ntp": "next token", "infonce": "InfoNCE"}),
    "Quantizer losses": ("loss", {"global": "global (1 − cos)", "local": "local", "diversity": "diversity"}),
    "Codes": ("share", {"usage": "used, level", "collisions": "items sharing a SID"}),
    "Logit scale γ": ("", {"gamma": "γ"}),
    "Temperature τ": ("", {"tau": "τ"}),
    "Learning rate": ("", {"lr": "learning rate"}),
}
SCHEDULES = ("gamma", "tau", "lr")  # drawn as they are; other curves of many points as a running mean over their noise
SMOOTHED_FROM = 100


def training_curve(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draw losses, code usage, γ, τ and the learning rate over the steps of a run.

    Args:
        metrics_path: JSONL, one object per logged step with ``step`` and any of ``loss ntp global local infonce
            diversity gamma tau usage collisions lr``; ``usage`` and ``lr`` may be lists.  A half-written last line,
            left by a run that was killed, is passed over.
        png_path: where the PNG goes.

    Raises:
        ValueError: the file holds no such object, or a line before the last is not JSON.
    """
    rows = _read_metrics(Path(metrics_path))
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for panel, (title, (y_label, labels)) in zip(axes.flat, PANELS.items(), strict=True):
        lines = 0
        for key, label in labels.items():
            for name, steps, values in _series(rows, key, label):
                colour = COLOURS[lines % len(COLOURS)]
                if key not in SCHEDULES and len(values) >= SMOOTHED_FROM:
                    panel.plot(steps, values, color=colour, linewidth=0.6, alpha=0.25)
                    values = _running_mean(values, len(values) // 40)
                panel.plot(steps, values, color=colour, label=name, linewidth=1.6,
                           marker="." if len(values) == 1 else None)
                lines += 1
        _dress(panel, title, y_label)
        if lines > 1:
            panel.legend(fontsize=9, framealpha=0.7, edgecolor="none")
        if not lines:
            panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center", va="center", color="0.5")
    axes[0, 2].set_ylim(-0.03, 1.03)
    for panel in axes[1]:
        panel.set_xlabel("step")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for panel in axes[1, 1:]:
        panel.set_ylim(bottom=0)
    _save(figure, png_path)


def bucket_picture(results: Mapping[str, Mapping[str, Any]], png_path: str | os.PathLike[str], *, k: int = 10,
                   codes: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Draw HitRate@k and NDCG@k of one or more systems, overall and by the popularity of the target.

    Args:
        results: system name -> what ``metrics.evaluate_rankings`` returned, all for the same test set.
        png_path: where the PNG goes.
        k: one of the cutoffs evaluated.
        codes: what ``metrics.code_usage`` returned; adds a panel with the use of each codebook.
    """
    if not results:
        raise ValueError("results must hold at least one system; got none")
    groups = {system: [{"name": "all", **result["overall"]}, *result["buckets"]] for system, result in results.items()}
    names = [[group["name"] for group in of_system] for of_system in groups.values()]
    if any(other != names[0] for other in names):
        raise ValueError(f"results must have the same buckets for every system; got {names}")
    figure = Figure(figsize=(9, 7.5 if codes is None else 10.5), layout="constrained")
    panels = figure.subplots(2 if codes is None else 3, 1)
    measures = ((f"hit_rate@{k}", f"HitRate@{k}"), (f"ndcg@{k}", f"NDCG@{k}"))
    for panel, (key, title) in zip(panels[:2], measures, strict=True):
        _grouped_bars(panel, {system: [group[key] for group in of_system] for system, of_system in groups.items()})
        labels = [f"{group['name']}\n{group['queries']:,} queries" for group in next(iter(groups.values()))]
        panel.set_xticks(range(len(labels)), labels, fontsize=9)
        panel.axvline(0.5, color="0.6", linewidth=1, linestyle=":")
        _dress(panel, f"{title} by popularity of the target", title)
    panels[1].set_xlabel("popularity bucket of the target in training, head to tail")
    if len(results) > 1:
        panels[0].legend(frameon=False, fontsize=9)
    if codes is not None:
        _code_panel(panels[2], codes)
    _save(figure, png_path)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}: line {number} is not JSON ({error})") from None
    rows = [row for row in rows if isinstance(row, dict) and "step" in row]
    if not rows:
        raise ValueError(f"{path}: there is nothing to draw; it must hold JSON objects with a \"step\"")
    return rows


def _series(rows: list[dict[str, Any]], key: str, label: str) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """The values of ``key`` as (name, steps, values): one series, or one per element where it is a list."""
    logged = [row for row in rows if row.get(key) is not None]
    if not logged:
        return []
    steps = np.array([row["step"] for row in logged], dtype=np.float64)
    values = np.array([row[key] for row in logged], dtype=np.float64)
    if values.ndim == 1:
        return [(label, steps, values)]
    return [(f"{label} {column + 1}", steps, values[:, column]) for column in range(values.shape[1])]


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the ``window`` values around each value, of fewer at the two ends."""
    kernel = np.ones(window)
    return np.convolve(values, kernel, mode="same") / np.convolve(np.ones_like(values), kernel, mode="same")


def _grouped_bars(panel: Axes, heights: Mapping[str, Sequence[float | None]]) -> None:
    width = 0.8 / max(len(heights), 2)
    for place, (system, values) in enumerate(heights.items()):
        x = np.arange(len(values)) + (place - (len(heights) - 1) / 2) * width
        bars = panel.bar(x, [value or 0.0 for value in values], width * 0.92, label=system,
                         color=COLOURS[place % len(COLOURS)])
        panel.bar_label(bars, ["–" if value is None else f"{value:.3f}".removeprefix("0") for value in values],
                        fontsize=7, padding=1)
    panel.margins(y=0.1)


def _code_panel(panel: Axes, codes: Sequence[Mapping[str, Any]]) -> None:
    _grouped_bars(panel, {"codes used / K": [level["used"] for level in codes],
                          "perplexity / K": [level["perplexity"] / level["size"] for level in codes]})
    panel.set_xticks(range(len(codes)), [f"level {j + 1}\nK = {level['size']:,}" for j, level in enumerate(codes)],
                     fontsize=9)
    panel.set_ylim(0, 1.35)  # room for the legend above full bars
    panel.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)
    _dress(panel, "Use of the codebooks", "share of K")


def _dress(panel: Axes, title: str, y_label: str) -> None:
    panel.set_title(title, fontsize=11, loc="left")
    panel.set_ylabel(y_label)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
