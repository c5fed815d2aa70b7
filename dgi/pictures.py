"""How pictures look, and how they are written: one PNG each, whole or not at all.

matplotlib is imported when a picture is drawn: it takes a second, and may be missing or broken where all else runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dgi.extras import require
from dgi_kernels.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger("dgi")

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def problem() -> str | None:
    """Why no picture can be drawn here; None where one can."""
    try:
        _matplotlib("matplotlib.figure")
    except Exception as error:  # whatever keeps a package from being imported
        return f"matplotlib cannot be imported ({error})"
    return None


def attempt(draw: Callable[[], None], path: str | os.PathLike[str]) -> bool:
    """Draw a picture of results that are safe already: what keeps it from being drawn is a warning, and no error.

    Returns:
        Whether there is a picture now.
    """
    try:
        draw()
    except Exception as error:
        logger.warning("%s was not drawn: %s", path, problem() or error)
        return False
    return True


def figure(**options: Any) -> Figure:
    """A matplotlib figure, not one of pyplot's."""
    return _matplotlib("matplotlib.figure").Figure(layout="constrained", **options)


def _matplotlib(module: str) -> Any:
    """A module of matplotlib, whose import fails where MPLBACKEND names a backend that is not here; we need none."""
    if "matplotlib" not in sys.modules and "MPLBACKEND" in os.environ:
        backend = os.environ.pop("MPLBACKEND")
        try:
            matplotlib = require("matplotlib")
        finally:
            os.environ["MPLBACKEND"] = backend
        with contextlib.suppress(ValueError):  # for who else draws in this process
            matplotlib.rcParams["backend"] = backend
    return require(module)


def dress(panel: Axes, title: str, y_label: str) -> None:
    """Title, label, grid and spines, the same in every picture."""
    panel.set_title(title, fontsize=11, loc="left")
    panel.set_ylabel(y_label)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write ``figure`` as a PNG."""
    _matplotlib("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)  # type: ignore[union-attr,call-arg]
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
