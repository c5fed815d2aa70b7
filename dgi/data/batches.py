"""What one training or search step reads: features of the distinct items, and indices into them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

OF_ITEMS = ("item_rows", "item_features")  # the attributes of a batch that are as long as it has items


@dataclass(frozen=True)
class Batch:
    """A batch whose items, targets and histories alike, are encoded once each.

    Attributes:
        item_rows: (U,) int64 catalog rows of the distinct items, ascending.
        item_features: (U, ...) their features, as the encoder's ``prepare_items`` made them.
        targets: (B,) int64 index into ``item_rows`` of each row's clicked item, or None in search.
        histories: (B, H) int64 index into ``item_rows``, oldest first, -1 where there is none.
        query_features: (B, ...) features of the query texts, or None where no row has a query.
        candidates: (C,) int64 index into ``item_rows`` of items to rank beside the clicked ones in training, or None.
        places: None where each row is one request. Else (Q,) int64: request q is what row ``places[q] // H`` holds up
            to its item ``places[q] % H``, inclusive; ``targets`` is (Q,) then, and histories are padded on the right.
    """

    item_rows: Tensor
    item_features: Tensor
    targets: Tensor | None
    histories: Tensor
    query_features: Tensor | None
    candidates: Tensor | None = None
    places: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by the names of their attributes."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def to(self, device: torch.device | str) -> Batch:
        moved = {name: value.to(device, non_blocking=True) for name, value in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        return len(self.histories)


def make_batch(
    item_features: Tensor,
    histories: Tensor,
    targets: Tensor | None,
    query_features: Tensor | None,
    candidates: Tensor | None = None,
) -> Batch:
    """Collect the distinct items of ``histories`` (B, H) and ``targets`` (B,), catalog rows with -1 for none.

    Args:
        item_features: (num_items, ...) features of the whole catalog.
        histories: (B, H) int64.
        targets: (B,) int64, or None in search.
        query_features: (B, ...) or None.
        candidates: (C,) int64 catalog rows, or None.
    """
    read = [rows.flatten() for rows in (targets, histories, candidates) if rows is not None]
    rows = torch.unique(torch.cat(read))
    rows = rows[rows >= 0]
    return Batch(
        rows,
        item_features[rows],
        None if targets is None else torch.searchsorted(rows, targets),
        torch.where(histories < 0, -1, torch.searchsorted(rows, histories.contiguous())),
        query_features,
        None if candidates is None else torch.searchsorted(rows, candidates),
    )


def make_sequence_batch(
    item_features: Tensor, histories: Tensor, targets: Tensor, candidates: Tensor | None = None
) -> Batch:
    """A batch in which every item with a target is the end of a request: the items of its row up to it.

    Args:
        item_features: (num_items, ...) features of the whole catalog.
        histories: (B, H) int64 catalog rows, oldest first, padded with -1 on the right.
        targets: (B, H) int64 the item to follow each one, -1 where none is to be learnt.
        candidates: (C,) int64 catalog rows, or None.
    """
    flat = targets.flatten()
    places = (flat >= 0).nonzero().squeeze(1)
    batch = make_batch(item_features, histories, flat[places], None, candidates)
    return dataclasses.replace(batch, places=places)
