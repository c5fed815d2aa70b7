"""Options that are one of a few names: the types, and the tables of their numbers.

The place of a name in its table is its number in C++ and in Triton, ``MODES.index("hard")``; a test compares the tables
with the enumerations in ``csrc``.
"""

from __future__ import annotations

from typing import Literal, get_args

Mode = Literal["soft", "straight_through", "hard"]
Normalize = Literal["full", "children", "none"]
Reduction = Literal["none", "mean", "sum"]

MODES: tuple[str, ...] = get_args(Mode)
NORMALIZERS: tuple[str, ...] = get_args(Normalize)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
