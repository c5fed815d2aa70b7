"""What a retriever has to beat: the most popular items for everyone."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi.retrieval.index import first_allowed


def rank_by_popularity(train_counts: np.ndarray, n: int, k: int, *, exclude: Tensor | None = None) -> Tensor:
    """The k items chosen most often in training, for each of n requests.

    Args:
        train_counts: (num_items,) how often each item was chosen in training.
        exclude: (n, E) int64 rows to leave out of each ranking, -1 for none.

    Returns:
        (n, k) int64 rows, best first, ties to the lower row; -1 where there are fewer than k.
    """
    if exclude is None:
        exclude = torch.full((n, 1), -1)
    wanted = k + exclude.shape[1]
    order = torch.from_numpy(np.argsort(-train_counts, kind="stable")[:wanted].copy())
    items = F.pad(order, (0, wanted - len(order)), value=-1).expand(n, -1)
    places, exist = first_allowed(items, exclude, k)
    return items.gather(1, places).masked_fill(~exist, -1)
