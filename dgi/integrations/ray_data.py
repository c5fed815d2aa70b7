"""Encoding and assigning a catalog with Ray Data: what ``map_batches`` calls on every machine.

Nothing here imports Ray, so that the class serves any engine that maps batches of columns.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dgi.data import Catalog
from dgi.model.encoding import device_of, encode_items
from dgi.training.checkpoint import load_model


class CodesOfItems:
    """Batches of items to their codes and vectors: ``dataset.map_batches(CodesOfItems, ...)``.

    A batch has the columns ``id`` and ``text``, or ``id`` and ``vector`` (n, vector_dim) where the model reads vectors.
    The result has ``id``, ``codes`` (n, m) int32, those of :func:`dgi_kernels.assign_codes`, and ``vector`` (n, d)
    float32, the model's z: all that an index is made of.

    Args:
        model: the folder that ``dgi train`` left, or a model's file; every worker loads it once.
        device: of the model; default the worker's GPU if it has one, else its CPU.
        batch_size: items encoded at once.

    Raises:
        ValueError: an item has a vector that is not finite.
    """

    def __init__(
        self, model: str | os.PathLike[str], *, device: torch.device | str | None = None, batch_size: int = 1024
    ) -> None:
        path = Path(model)
        place = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model: Any = load_model(path / "model.safetensors" if path.is_dir() else path).to(place)
        self.batch_size = batch_size

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Columns of n items to columns of n items."""
        ids = tuple(map(str, batch["id"]))
        texts = tuple(map(str, batch["text"])) if "text" in batch else ("",) * len(ids)
        vectors = np.stack([*batch["vector"]]) if "vector" in batch else None
        features = self.model.encoder.prepare_items(Catalog(ids, texts, vectors))
        z = encode_items(self.model, features.to(device_of(self.model)), batch_size=self.batch_size)
        if not bool(z.isfinite().all()):
            row = int((~z.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"the model gives item {ids[row]!r} a vector that is not finite")
        codes = self.model.quantizer.assign(z)
        return {
            "id": np.asarray(ids),
            "codes": codes.int().cpu().numpy(),
            "vector": z.float().cpu().numpy(),
        }
