"""How pictures look, and how they are written: one PNG each, whole or not at all."""

from __future__ import annotations

import os

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dgi_kernels.files import atomic_write

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def dress(panel: Axes, title: str, y_label: str) -> None:
    """Title, label, grid and spines, the same in every picture."""
    panel.set_title(title, fontsize=11, loc="left")
    panel.set_ylabel(y_label)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write ``figure`` as a PNG."""
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
