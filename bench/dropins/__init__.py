"""What a drop-in is: code of others at a fixed commit, the few lines that change, and steps that both versions run.

One module here per codebase and use, found by its name; each defines ``DROPIN``.  ``python bench/dropin.py`` runs them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

MOST_LINES = 3  # changed at most, imports included

# What a step is made of; a search alone is constrained decoding without the model.
KINDS = ("quantizer step", "assignment", "constrained decoding", "search alone", "loss")

Outputs = Mapping[str, Tensor]
Steps = Mapping[str, Callable[[], Outputs]]


@dataclass(frozen=True)
class Change:
    """``before``, which is in the file once, becomes ``after``; both are whole lines."""

    path: str
    before: str
    after: str


@dataclass(frozen=True)
class DropIn:
    """One use of our ops in code of others.

    Attributes:
        title: what is replaced, in a few words.
        kind: of :data:`KINDS`; the medians of a kind are taken together.
        source: where the code comes from, for a reader; a package of PyPI is ``pypi:NAME==VERSION``.
        commit: the full commit of a git repository; empty for a package.
        data: the file below ``--data`` that the steps read, or "" for none.
        packages: what the code imports besides torch, numpy and transformers.
        changes: at most three lines in all.
        steps: called once in each version's process, with its root first on ``sys.path`` and as the working directory;
            returns what is measured, by name. Each step returns the tensors that must be equal, from a fixed seed.
        paths: the files and folders of the repository that are needed; () for all.
        tolerance: by name of an output, how far its elements may differ, relative to its largest; others: not at all.
        differs: by name of a step, why theirs is another result; it is an error if both are equal after all.
    """

    title: str
    kind: str
    source: str
    commit: str
    data: str
    packages: tuple[str, ...]
    changes: tuple[Change, ...]
    steps: Callable[[Path | None], Steps]
    paths: tuple[str, ...] = ()
    tolerance: Mapping[str, float] = field(default_factory=dict)
    differs: Mapping[str, str] = field(default_factory=dict)


def names() -> list[str]:
    """The modules of this folder that define a drop-in, as the command line names them."""
    return sorted(
        module.name.replace("_", "-")
        for module in pkgutil.iter_modules(__path__)
        if module.name not in {"common", "worker"}
    )


def load(name: str) -> DropIn:
    """The drop-in of a name."""
    return importlib.import_module(f"dropins.{name.replace('-', '_')}").DROPIN
