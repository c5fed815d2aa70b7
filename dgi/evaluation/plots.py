"""Pictures of an evaluation: quality by popularity of the target, use of the codes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dgi.pictures import COLOURS, dress, figure, save
from dgi.training.curve import training_curve as training_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def bucket_picture(
    results: Mapping[str, Mapping[str, Any]],
    png_path: str | os.PathLike[str],
    *,
    k: int = 10,
    codes: Sequence[Mapping[str, Any]] | None = None,
) -> None:
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
    picture = figure(figsize=(9, 7.5 if codes is None else 10.5))
    panels = picture.subplots(2 if codes is None else 3, 1)
    measures = ((f"hit_rate@{k}", f"HitRate@{k}"), (f"ndcg@{k}", f"NDCG@{k}"))
    for panel, (key, title) in zip(panels[:2], measures, strict=True):
        _grouped_bars(panel, {system: [group[key] for group in of_system] for system, of_system in groups.items()})
        labels = [f"{group['name']}\n{group['queries']:,} queries" for group in next(iter(groups.values()))]
        panel.set_xticks(range(len(labels)), labels, fontsize=9)
        panel.axvline(0.5, color="0.6", linewidth=1, linestyle=":")
        dress(panel, f"{title} by popularity of the target", title)
    panels[1].set_xlabel("popularity bucket of the target in training, head to tail")
    if len(results) > 1:
        panels[0].legend(frameon=False, fontsize=9)
    if codes is not None:
        _code_panel(panels[2], codes)
    save(picture, png_path)


def _grouped_bars(panel: Axes, heights: Mapping[str, Sequence[float | None]]) -> None:
    width = 0.8 / max(len(heights), 2)
    for place, (system, values) in enumerate(heights.items()):
        x = np.arange(len(values)) + (place - (len(heights) - 1) / 2) * width
        bars = panel.bar(
            x, [value or 0.0 for value in values], width * 0.92, label=system, color=COLOURS[place % len(COLOURS)]
        )
        panel.bar_label(
            bars,
            ["–" if value is None else f"{value:.3f}".removeprefix("0") for value in values],
            fontsize=7,
            padding=1,
        )
    panel.margins(y=0.1)


def _code_panel(panel: Axes, codes: Sequence[Mapping[str, Any]]) -> None:
    _grouped_bars(
        panel,
        {
            "codes used / K": [level["used"] for level in codes],
            "perplexity / K": [level["perplexity"] / level["size"] for level in codes],
        },
    )
    panel.set_xticks(
        range(len(codes)), [f"level {j + 1}\nK = {level['size']:,}" for j, level in enumerate(codes)], fontsize=9
    )
    panel.set_ylim(0, 1.35)  # room for the legend above full bars
    panel.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)
    dress(panel, "Use of the codebooks", "share of K")
