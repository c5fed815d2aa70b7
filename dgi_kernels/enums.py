"""Options that are one of a few names: the tables of their numbers; :mod:`dgi_kernels.types` has their types.

The place of a name in its table is its number in C++ and in Triton, ``MODES.index("hard")``; a test compares the tables
with the enumerations in ``csrc``.
"""

from __future__ import annotations

from typing import get_args

from dgi_kernels.types import Metric, Mode, Normalize, Reduction

METRICS: tuple[str, ...] = get_args(Metric)
# Kernels have no "rotation": it is "hard", with a gradient that needs no kernel.
MODES: tuple[str, ...] = tuple(mode for mode in get_args(Mode) if mode != "rotation")
NORMALIZERS: tuple[str, ...] = get_args(Normalize)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)
