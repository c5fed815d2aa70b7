"""Semantic IDs that training in stages gives to the items: made by K-means, renumbered, refreshed, and measured."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dgi.extras import require
from dgi.model.dgi_model import DGIModel
from dgi.model.encoding import encode_items
from dgi_kernels import unique_codes


@torch.no_grad()
def cluster(model: DGIModel, item_features: Tensor, source: torch.Generator) -> float:
    """Set codebooks and ``model.item_codes`` by residual K-means of the item vectors.

    Where there are codes already, the new ones are renumbered by :func:`renumbering`.

    Returns:
        The share of the items whose ID changed; NaN where none had any.
    """
    assert model.item_codes is not None
    old = model.item_codes.clone()
    z = encode_items(model, item_features)
    model.initialize(z, generator=source)
    known = bool((old >= 0).all())
    if known:
        found = model.quantizer.assign(z)
        for level, codebook in enumerate(model.quantizer.codebooks):
            codebook.copy_(codebook[renumbering(old[:, level], found[:, level], len(codebook))])
    model.item_codes.copy_(_assigned(model, z))
    return _changed(old, model.item_codes) if known else math.nan


@torch.no_grad()
def refresh(model: DGIModel, item_features: Tensor) -> float:
    """Set ``model.item_codes`` to what today's codebooks make of today's vectors; the share of the items that changed.

    The numbers of the codes are those of the codebooks, and so need no renumbering.
    """
    assert model.item_codes is not None
    old = model.item_codes.clone()
    model.item_codes.copy_(_assigned(model, encode_items(model, item_features)))
    return _changed(old, model.item_codes)


def renumbering(old: Tensor, new: Tensor, size: int) -> Tensor:
    """Which new code each number should get, so that most items keep their number: an assignment problem.

    Args:
        old, new: (N,) int64 codes of the items by the old and the new clusters.
        size: number of codes.

    Returns:
        (size,) int64: number k goes to the new code ``result[k]``.
    """
    together = np.zeros((size, size), dtype=np.int64)
    np.add.at(together, (old.cpu().numpy(), new.cpu().numpy()), 1)
    _, columns = require("scipy.optimize").linear_sum_assignment(together, maximize=True)
    return torch.from_numpy(columns).to(old.device)


def _assigned(model: DGIModel, z: Tensor) -> Tensor:
    quantizer = model.quantizer
    codes, codebooks = quantizer.assign(z), list(quantizer.codebooks)
    if math.prod(len(codebook) for codebook in codebooks) < len(z):
        return codes
    return unique_codes(codes, z, codebooks, metric=quantizer.metric, eps=quantizer.eps)


def _changed(old: Tensor, new: Tensor) -> float:
    return float((old != new).any(1).double().mean())
