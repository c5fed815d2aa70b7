"""The picture of a training run: losses, code usage, γ, τ and the learning rate over the steps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dgi.pictures import COLOURS, dress, figure, save

# Panel title -> (y label, {key of the metrics: label}).
PANELS = {
    "Retrieval losses": (
        "nats",
        {
            "loss": "total",
            "ntp": "next token",
            "infonce": "InfoNCE",
            "nll_hard": "NLL, hard inputs",
            "soft_hard_gap": "soft − hard inputs",
        },
    ),
    "Quantizer losses": ("loss", {"global": "global (1 − cos)", "local": "local", "diversity": "diversity"}),
    "Codes": (
        "share",
        {
            "usage": "used, level",
            "collisions": "items sharing a SID",
            "changed_codes": "SIDs changed",
            "off_trie": "probability off the trie",
        },
    ),
    "Logit scale γ": ("", {"gamma": "γ"}),
    "Temperature τ": ("", {"tau": "τ"}),
    "Learning rate": ("", {"lr": "learning rate"}),
}
ON_THE_RIGHT = {"diversity": "diversity, nats"}  # another scale: tens, where its neighbours are below 1
SCHEDULES = ("gamma", "tau", "lr")  # drawn as they are; other curves of many points as a running mean over their noise
SMOOTHED_FROM = 100


def training_curve(metrics_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draw losses, code usage, γ, τ and the learning rate over the steps of a run.

    Args:
        metrics_path: JSONL, one object per logged step with ``step`` and any of ``loss ntp global local infonce
            diversity gamma tau usage collisions lr nll_hard soft_hard_gap changed_codes off_trie``; ``usage`` and
            ``lr`` may be lists.  A half-written last line, left by a run that was killed, is passed over.
        png_path: where the PNG goes.

    Raises:
        ValueError: the file holds no such object, or a line before the last is not JSON.
    """
    rows = _read_metrics(Path(metrics_path))
    picture = figure(figsize=(13, 7))
    axes = picture.subplots(2, 3, sharex=True)
    for panel, (title, (y_label, labels)) in zip(axes.flat, PANELS.items(), strict=True):
        lines, handles = 0, []
        for key, label in labels.items():
            for name, steps, values in _series(rows, key, label):
                colour, axis = COLOURS[lines % len(COLOURS)], panel
                if key in ON_THE_RIGHT:
                    axis = panel.twinx()
                    axis.set_ylabel(ON_THE_RIGHT[key], color=colour)
                    axis.spines["top"].set_visible(False)
                if key not in SCHEDULES and len(values) >= SMOOTHED_FROM:
                    axis.plot(steps, values, color=colour, linewidth=0.6, alpha=0.25)
                    values = _running_mean(values, len(values) // 40)
                handles += axis.plot(
                    steps, values, color=colour, label=name, linewidth=1.6, marker="." if len(values) == 1 else None
                )
                lines += 1
        dress(panel, title, y_label)
        if lines > 1:
            panel.legend(handles=handles, fontsize=9, framealpha=0.7, edgecolor="none")
        if not lines:
            panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center", va="center", color="0.5")
    axes[0, 2].set_ylim(-0.03, 1.03)
    for panel in axes[1]:
        panel.set_xlabel("step")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for panel in axes[1, 1:]:
        panel.set_ylim(bottom=0)
    save(picture, png_path)


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
        raise ValueError(f'{path}: there is nothing to draw; it must hold JSON objects with a "step"')
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
