"""Pictures of milliseconds over one number of a shape, such as the size of a catalog."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from figure_texts import significant, value_text

Points = Mapping[str, Sequence[tuple[float, float]]]  # by system: (value, seconds)


def curve(title: str, over: str, points: Points, palette: Sequence[str]) -> Figure:
    """A line for each system with its name at its end, both axes logarithmic; the first colour is the floor's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(5.0, 3.2), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(textwrap.fill(title, 66), x=0.01, ha="left", fontsize=9, fontweight="bold")
    values = sorted({value for line in points.values() for value, _ in line})
    for (name, line), colour in zip(points.items(), palette[1:], strict=False):
        x, seconds = zip(*line, strict=True)
        axes.plot(x, [1e3 * one for one in seconds], color=colour, marker="o", markersize=4, gid=f"line-{name}")
        axes.annotate(
            f"{name} {significant(1e3 * seconds[-1])}",
            (x[-1], 1e3 * seconds[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=8.5,
        )
    axes.set(xscale="log", yscale="log", xlabel=f"{over}, logarithmic", ylabel="milliseconds, logarithmic")
    axes.set_xlim(values[0] / 1.5, values[-1] * (values[-1] / values[0]) ** 0.35)
    axes.set_xticks(values, [value_text(value) for value in values])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=palette[0], alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curve_text(title: str, over: str, points: Points) -> str:
    """The picture in words: what each system took at each value."""
    lines = [
        f"{name} " + ", ".join(f"{significant(1e3 * seconds)} at {value_text(value)}" for value, seconds in line)
        for name, line in points.items()
    ]
    return f"Lines of milliseconds over {over}. {title}: {'; '.join(lines)}."
