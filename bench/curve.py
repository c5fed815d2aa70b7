"""Pictures of milliseconds over one number of a shape, such as the size of a catalog."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

from figure_texts import significant, value_text

Points = Mapping[str, Sequence[tuple[float, float]]]  # by system: (value, seconds)


WIDTH, HEIGHT = 5.0, 3.2  # inches; of these about 4.2 and 2.4 are the axes
LETTER, LINE = 0.075 / 4.2, 0.17 / 2.4  # of a label, as shares of the axes


def curve(title: str, over: str, points: Points, palette: Sequence[str]) -> Figure:
    """A line for each system with its name at its end, both axes logarithmic; the first colour is the floor's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    figure.suptitle(textwrap.fill(title, 66), x=0.01, ha="left", fontsize=9, fontweight="bold")
    values = sorted({value for line in points.values() for value, _ in line})
    spent = [1e3 * seconds for line in points.values() for _, seconds in line]
    low, high = min(spent) / 1.4, max(spent) * 1.4
    labels = {name: f"{name} {significant(1e3 * line[-1][1])}" for name, line in points.items()}
    ends = {name: 1e3 * line[-1][1] for name, line in points.items() if line[-1][0] == values[-1]}
    heights = _apart(ends, (high / low) ** LINE)
    for (name, line), colour in zip(points.items(), palette[1:], strict=False):
        x, seconds = zip(*line, strict=True)
        axes.plot(x, [1e3 * one for one in seconds], color=colour, marker="o", markersize=4, gid=f"line-{name}")
        place = {"xytext": (7, 0), "va": "center"}
        if name not in heights:  # a line that ends before others: below its end, where those go on above
            place = {"xytext": (5, -4), "va": "top"}
        end = (x[-1], heights.get(name, 1e3 * seconds[-1]))
        axes.annotate(labels[name], end, color=colour, textcoords="offset points", fontsize=8.5, **place)
    room = min(0.5, LETTER * max(map(len, labels.values())) + 0.03)  # for the labels of the lines that go furthest
    left = values[0] / 1.2
    axes.set(xscale="log", yscale="log", xlabel=f"{over}, logarithmic", ylabel="milliseconds, logarithmic")
    axes.set_xlim(left, left * (values[-1] / left) ** (1 / (1 - room)))
    axes.set_ylim(low, max(high, 1.2 * max(heights.values())))
    axes.set_xticks(values, [value_text(value) for value in values])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.grid(axis="y", color=palette[0], alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _apart(heights: Mapping[str, float], factor: float) -> dict[str, float]:
    """Heights of labels, from the lowest up each at least ``factor`` times the one below."""
    placed: dict[str, float] = {}
    below = 0.0
    for name in sorted(heights, key=heights.__getitem__):
        below = placed[name] = max(heights[name], below * factor)
    return placed


def curve_text(title: str, over: str, points: Points) -> str:
    """The picture in words: what each system took at each value."""
    lines = [
        f"{name} " + ", ".join(f"{significant(1e3 * seconds)} at {value_text(value)}" for value, seconds in line)
        for name, line in points.items()
    ]
    return f"Lines of milliseconds over {over}. {title}: {'; '.join(lines)}."
