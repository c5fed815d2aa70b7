"""Modules by the names that they had before they were sorted into rooms: ``import dgi.search`` still works.

An old name gives the very module that the new name gives, so that classes, settings and patches are the same ones.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

MOVED: dict[str, str] = {
    "dgi.ablations": "dgi.model.ablations",
    "dgi.baselines": "dgi.retrieval.baselines",
    "dgi.batches": "dgi.data.batches",
    "dgi.checkpoint": "dgi.training.checkpoint",
    "dgi.clustering": "dgi.model.clustering",
    "dgi.decoders": "dgi.model.decoders",
    "dgi.distributed": "dgi.training.distributed",
    "dgi.encoders": "dgi.model.encoders",
    "dgi.evaluate": "dgi.evaluation.evaluate",
    "dgi.heads": "dgi.model.heads",
    "dgi.index": "dgi.retrieval.index",
    "dgi.losses": "dgi.model.losses",
    "dgi.metrics": "dgi.evaluation.metrics",
    "dgi.plots": "dgi.evaluation.plots",
    "dgi.quantizer": "dgi.model.quantizer",
    "dgi.search": "dgi.retrieval.search",
    "dgi.t5": "dgi.model.t5",
    "dgi.train": "dgi.training.trainer",
}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and loads the modules of ``MOVED`` under their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        # The import system returns what it then finds in sys.modules.
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


def install() -> None:
    """Let old names be imported; once is enough."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
