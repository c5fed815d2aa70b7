"""Pictures of ``dgi compare`` for the docs: head against tail, quality by popularity, gradient norms in training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Systems = Mapping[str, Mapping[str, Any]]
SIZE = (5.0, 3.3)  # inches, so that letters can still be read where it is made as narrow as a phone


def load(path: Path, names: Sequence[str]) -> Systems:
    """The systems of these names in the one data set of a comparison; all of them where none are named.

    Raises:
        ValueError: a name that is not there, or several data sets.
    """
    datasets = list(json.loads(path.read_text())["data"].values())
    if len(datasets) != 1:
        raise ValueError(f"{path.name} must hold one data set; it has {len(datasets)}")
    systems: Systems = datasets[0]["systems"]
    missing = [name for name in names if name not in systems]
    if missing:
        raise ValueError(f"{path.name} has no system {missing[0]!r}; it has {', '.join(systems)}")
    return {name: systems[name] for name in names or systems}


def _knob(systems: Systems, panel: Axes, colours: Sequence[str]) -> None:
    for place, ((name, system), colour) in enumerate(zip(systems.items(), colours, strict=False)):
        rows = system.get("tail") or []
        # Weights that cost head and tail alike are of no use to anyone.
        rows = [row for row in rows if row["recall@10"] > 0.8 * max(row["recall@10"] for row in rows)]
        points = [(sum(row["buckets"][bucket] or 0.0 for bucket in "45"), row["recall@10"]) for row in rows]
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3.5, color=colour, label=name)
        for row, point in zip(rows, points, strict=True):
            panel.annotate(
                f"{row['popularity_weight']:.2g}",
                point,
                xytext=(0, 5 if place % 2 == 0 else -12),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color=colour,
            )
    panel.margins(y=0.15)
    panel.set(xlabel="hit rate at 10, tail buckets 4 and 5, summed", ylabel="hit rate at 10, all requests")


def _buckets(systems: Systems, panel: Axes, colours: Sequence[str]) -> None:
    width = 0.8 / len(systems)
    for place, ((name, system), colour) in enumerate(zip(systems.items(), colours, strict=False)):
        rates = {bucket: rate for bucket, rate in system["buckets"].items() if rate is not None}
        at = [i + (place - (len(systems) - 1) / 2) * width for i in range(len(rates))]
        panel.bar(at, list(rates.values()), 0.92 * width, color=colour, label=name)
        panel.set_xticks(range(len(rates)), list(rates))
    panel.set(xlabel="popularity of the target in training, head to tail", ylabel="hit rate at 10")


def _gradients(systems: Systems, panel: Axes, colours: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator

    for (name, system), colour in zip(systems.items(), colours, strict=False):
        points = [(row["step"], row["grad_norm"]) for row in system["curve"] if "grad_norm" in row]
        panel.plot(*zip(*points, strict=True), color=colour, linewidth=1.2, label=name)
    panel.set_yscale("log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    panel.set(xlabel="step", ylabel="norm of the gradient")


WORDS = {
    "knob": "Lines of the hit rate of all requests over that of the tail, for several weights of popularity",
    "buckets": "Bars of the hit rate at 10 by the popularity of the target in training, head to tail",
    "gradients": "Lines of the norm of the gradient over the steps of training, on a logarithmic axis",
}
KINDS: Mapping[str, Callable[[Systems, Axes, Sequence[str]], None]] = {
    "knob": _knob,
    "buckets": _buckets,
    "gradients": _gradients,
}


def words(name: str, systems: Systems, kind: str) -> str:
    """What the picture of the comparison ``name`` shows."""
    return f"{WORDS[kind]}: {', '.join(systems)}, in {name}."


def draw(systems: Systems, kind: str, palette: Sequence[str]) -> Figure:
    """The picture of a kind of :data:`KINDS`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.subplots()
    KINDS[kind](systems, axes, palette[1:])
    axes.spines[["top", "right"]].set_visible(False)
    # above the panel, where no bar or line is
    axes.legend(
        frameon=False,
        labelcolor="linecolor" if kind != "buckets" else None,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=2,
    )
    return figure
