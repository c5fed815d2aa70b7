"""Differentiable Geometric Indexing: model, training, index, search, evaluation and command line.

After *Differentiable Geometric Indexing for End-to-End Generative Retrieval* (arXiv 2603.10409), on the ops of
:mod:`dgi_kernels`.  The names below are imported when first used: torch takes seconds, ``dgi --help`` should not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dgi import _moved

if TYPE_CHECKING:
    from dgi import data, integrations
    from dgi.config import ModelConfig, Stage, TrainConfig
    from dgi.data import (
        Catalog,
        DataError,
        Dataset,
        Interactions,
        Judgments,
        load_catalog,
        load_dataset,
        load_interactions,
        load_judgments,
        load_movielens,
    )
    from dgi.data.batches import Batch, make_batch
    from dgi.evaluation import metrics
    from dgi.model.dgi_model import DGIModel, DualEncoder
    from dgi.model.heads import CosineHead
    from dgi.model.losses import DGILoss
    from dgi.model.quantizer import ResidualQuantizer
    from dgi.retrieval.index import DGIIndex, IndexFormatError, SearchResult
    from dgi.retrieval.search import Searcher
    from dgi.training.checkpoint import CheckpointError, load_model, save_model
    from dgi.training.trainer import Trainer

_MODULES = {
    "data.batches": ("Batch", "make_batch"),
    "training.checkpoint": ("CheckpointError", "load_model", "save_model"),
    "config": ("ModelConfig", "Stage", "TrainConfig"),
    "data": (
        "Catalog",
        "DataError",
        "Dataset",
        "Interactions",
        "Judgments",
        "load_catalog",
        "load_dataset",
        "load_interactions",
        "load_judgments",
        "load_movielens",
    ),
    "model.heads": ("CosineHead",),
    "retrieval.index": ("DGIIndex", "IndexFormatError", "SearchResult"),
    "model.losses": ("DGILoss",),
    "model.dgi_model": ("DGIModel", "DualEncoder"),
    "model.quantizer": ("ResidualQuantizer",),
    "retrieval.search": ("Searcher",),
    "training.trainer": ("Trainer",),
}
_moved.install()
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Catalog",
    "CheckpointError",
    "CosineHead",
    "DGIIndex",
    "DGILoss",
    "DGIModel",
    "DataError",
    "Dataset",
    "DualEncoder",
    "IndexFormatError",
    "Interactions",
    "Judgments",
    "ModelConfig",
    "ResidualQuantizer",
    "SearchResult",
    "Searcher",
    "Stage",
    "TrainConfig",
    "Trainer",
    "data",
    "integrations",
    "load_catalog",
    "load_dataset",
    "load_interactions",
    "load_judgments",
    "load_model",
    "load_movielens",
    "make_batch",
    "metrics",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"dgi.{_MODULE_OF[name]}"), name)
    if name in __all__:
        return importlib.import_module(f"dgi.{name}")
    raise AttributeError(f"module 'dgi' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
