"""A causal transformer over histories: one pass over a sequence gives the state after each of its items.

SASRec's way of training: a row holds a user's whole sequence, and the state after item p is the request whose history
are the items up to p. It is the state that this history alone would have, since no item sees a later one, and places
are counted from the oldest item.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgi.data.batches import Batch
from dgi_kernels import dropout

GROUPS = 4  # of rows of like length, each as long as its longest row: users' sequences differ by far


def request_ends(batch: Batch) -> tuple[Tensor, Tensor]:
    """Row of each request (Q,), and place of its state (Q,): 0 the summary's, of an empty history, p that of item p."""
    if batch.places is not None:
        history = batch.histories.shape[1]
        return batch.places // history, batch.places % history + 1
    return torch.arange(len(batch), device=batch.histories.device), (batch.histories >= 0).sum(1)


def causal_states(
    histories: Tensor, item_vectors: Tensor, summary: Tensor, positions: Tensor, layers: nn.TransformerEncoder, p: float
) -> Tensor:
    """States (B, 1 + H, D) of [summary, items oldest to newest, padding]; what stands at padding is not to be read.

    Args:
        histories: (B, H) int64 index into ``item_vectors``, oldest first, -1 for padding, at either end.
        item_vectors: (U, D).
        summary: (D,) what a sequence begins with.
        positions: (>= 1 + H, D).
        p: of the dropout of the inputs, in training.
    """
    known = histories >= 0
    lengths = known.sum(1)
    # Items first, in their order, padding behind them: a causal transformer then needs no mask of padding.
    left = histories.gather(1, (~known).to(torch.uint8).argsort(dim=1, stable=True))
    order = lengths.argsort(stable=True)
    length = int(lengths.max()) if len(lengths) else 0
    parts = []
    for rows in order.chunk(min(GROUPS, max(1, len(order) // 32))):
        longest = int(lengths[rows].max()) if len(rows) else 0
        items = left[rows, :longest].clamp(min=0)
        vectors = (
            F.embedding(items, item_vectors)
            if len(item_vectors)
            else item_vectors.new_zeros(len(rows), 0, len(summary))
        )
        states = torch.cat([summary.expand(len(rows), 1, -1), vectors], 1) + positions[: 1 + longest]
        if p and layers.training:
            states = dropout(states, p)
        mask = nn.Transformer.generate_square_subsequent_mask(1 + longest, device=states.device, dtype=states.dtype)
        parts.append(F.pad(layers(states, mask=mask, is_causal=True), (0, 0, 0, length - longest)))
    return torch.cat(parts)[order.argsort()]
