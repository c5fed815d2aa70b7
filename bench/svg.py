"""Pictures of the docs: each one an SVG for light pages and one for dark."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "docs" / "assets"
MODES = ("light", "dark")
# Ink, then the floor's colour, ours, and the others'.
THEMES = {
    "light": ("#24292f", "#8c959f #1f6feb #bf8700 #1a7f37 #cf222e #8250df #0a7c86 #953800 #bf3989"),
    "dark": ("#e6edf3", "#6e7681 #58a6ff #e3b341 #3fb950 #ff7b72 #bc8cff #39c5cf #f0883e #f778ba"),
}


def files(stem: str) -> list[Path]:
    """Where the two files of a picture lie."""
    return [ASSETS / f"{stem}-{mode}.svg" for mode in MODES]


def links(page: Path, stem: str, alt: str) -> str:
    """Text of a page that shows a picture: on the site by its own switch, else by the reader's system."""
    if page.name == "README.md":
        return (
            f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="docs/assets/{stem}-dark.svg">\n'
            f'  <img alt="{alt}" src="docs/assets/{stem}-light.svg">\n</picture>'
        )
    up = "../" * (len(page.relative_to(ROOT / "docs").parts) - 1)
    return "\n".join(f"![{alt}]({up}assets/{stem}-{mode}.svg#only-{mode})" for mode in MODES)


def render(draw: Callable[[Sequence[str]], Figure], stem: str, salt: str) -> Iterator[tuple[Path, str]]:
    """(file, SVG) of both modes; ``draw`` gets the colours, and ``salt`` makes the SVG's identifiers."""
    import matplotlib

    for path, mode in zip(files(stem), MODES, strict=True):
        ink, palette = THEMES[mode]
        inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        with matplotlib.rc_context({"svg.hashsalt": salt, "font.size": 9, **dict.fromkeys(inked, ink)}):
            buffer = io.StringIO()
            metadata = {"Date": None, "Creator": None}
            draw(palette.split()).savefig(buffer, format="svg", transparent=True, metadata=metadata)
        yield path, "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
