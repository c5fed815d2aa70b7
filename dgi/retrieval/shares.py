"""A catalog encoded by all processes of a ``torchrun``: each takes a share of the batches, rank 0 gets them all.

Shares are whole batches, and all ranks pad texts to one length, so that every batch is the one that a single process
would encode: with the same number of threads the vectors and codes have the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from dgi.data import Catalog
from dgi.model.dgi_model import DGIModel
from dgi.model.encoding import device_of, encode_items
from dgi.training.distributed import rank, world_size

MESSAGE_BYTES = 2**28


class EncodedItems(NamedTuple):
    """Items as the model sees them: ``vectors`` z (N, d) and ``codes`` (N, m) int64, before any made unique."""

    vectors: Tensor
    codes: Tensor


def share_of(items: int, batch_size: int, ranks: int, of_rank: int) -> range:
    """The rows of a rank: whole batches, about equally many, those of low ranks first."""
    batches = -(-items // batch_size)
    first, end = (min(items, -(-batches * number // ranks) * batch_size) for number in (of_rank, of_rank + 1))
    return range(first, end)


@torch.no_grad()
def encode_catalog(
    model: DGIModel, catalog: Catalog, *, batch_size: int = 1024, progress: bool = False
) -> EncodedItems | None:
    """Vectors and codes of all items, on the model's device; under ``torchrun`` on rank 0, elsewhere None.

    Every rank calls it, with the same model and catalog.

    Raises:
        ValueError: the catalog is empty.
    """
    if len(catalog) == 0:
        raise ValueError("the catalog must hold at least one item; got none")
    own = share_of(len(catalog), batch_size, world_size(), rank())
    features = _features(model, catalog, own)
    if features is None:
        share = None
    else:
        vectors = encode_items(model, features, batch_size=batch_size, progress=progress and rank() == 0)
        share = EncodedItems(vectors, codes_of(model, vectors, batch_size))
    return share if world_size() == 1 else _gathered(share, len(catalog), batch_size, device_of(model))


def codes_of(model: DGIModel, vectors: Tensor, batch_size: int) -> Tensor:
    """The codes (N, m) int64 of encoded items, batch by batch, so that no share has other codes than the whole."""
    return torch.cat([model.quantizer.assign(part) for part in vectors.split(batch_size)])


def _features(model: DGIModel, catalog: Catalog, rows: range) -> Tensor | None:
    """What the encoder reads of a share, as wide as all shares need; None of an empty one."""
    if world_size() == 1:
        return model.encoder.prepare_items(catalog)
    features, width = None, 0
    if len(rows):
        part = slice(rows.start, rows.stop)
        vectors = None if catalog.vectors is None else catalog.vectors[part]
        features = model.encoder.prepare_items(Catalog(catalog.ids[part], catalog.texts[part], vectors))
        width = features.shape[1] if features.ndim == 2 and not features.is_floating_point() else 0
    widest = torch.tensor(width)
    dist.all_reduce(widest, dist.ReduceOp.MAX)
    if features is None or width == 0:
        return features
    padding: Any = getattr(model.encoder, "pad", 0)
    return F.pad(features, (0, int(widest) - width), value=padding)


def _gathered(share: EncodedItems | None, items: int, batch_size: int, device: torch.device) -> EncodedItems | None:
    """All shares on rank 0, each received where it belongs; the messages are bytes, of any dtype."""
    if rank():
        for part in share or ():
            for piece in _bytes(part.cpu().contiguous()).split(MESSAGE_BYTES):
                dist.send(piece, 0)
        return None
    assert share is not None  # of low ranks first
    own = [part.cpu() for part in share]
    whole = [part.new_empty(items, *part.shape[1:]) for part in own]
    for all_rows, part in zip(whole, own, strict=True):
        all_rows[: len(part)] = part
    for other in range(1, world_size()):
        rows = share_of(items, batch_size, world_size(), other)
        for all_rows in whole if len(rows) else ():
            for piece in _bytes(all_rows[rows.start : rows.stop]).split(MESSAGE_BYTES):
                dist.recv(piece, other)
    return EncodedItems(*(part.to(device) for part in whole))


def _bytes(rows: Tensor) -> Tensor:
    return rows.view(torch.uint8).flatten()
