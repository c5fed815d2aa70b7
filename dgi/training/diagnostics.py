"""What the losses of training hide: likelihood as search sees it, the gap to soft inputs, probability off the trie."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from dgi.data.batches import Batch
from dgi.model.dgi_model import DGIModel
from dgi.model.encoders import QueryEncoding
from dgi.model.encoding import evaluating
from dgi.model.heads import CosineHead
from dgi.training.distributed import global_mean, rank, world_size


@torch.no_grad()
def diagnose(model: DGIModel, table: Tensor | None, batch: Batch, tau: float, seed: int) -> dict[str, float]:
    """Values of a batch, in evaluation mode, without noise.

    Args:
        model: the model.
        table: (N, m) semantic IDs of all items; None where they are those of the vectors, and no trie is made.
        batch: this process's rows, with targets.
        tau: Gumbel-Softmax temperature of the soft inputs.
        seed: of the sampled paths.

    Returns:
        Means over the global batch. ``nll_hard``: −log P of the items' semantic IDs, the decoder reading the vectors of
        their codes, as in search. ``soft_hard_gap``: the same with soft inputs z̃, minus ``nll_hard``. ``off_trie``:
        probability of semantic IDs that no item has, an unbiased estimate.
    """
    with evaluating(model):
        output, query = model.encode_clicks(batch)
        codes = model.quantizer.assign(output.z) if table is None else table[output.item_rows]
        vectors = torch.stack([model.quantizer.embed(codes[:, j], j) for j in range(model.depth)], 1)
        hard = _nll(model, query, codes, vectors)
        soft = _nll(model, query, codes, model.quantizer(output.z, tau, noise=False).quantized)
        values = {"nll_hard": hard, "soft_hard_gap": soft - hard}
        if table is not None:
            values["off_trie"] = 1 - _on_trie(model, query, table, seed)
        means = global_mean(torch.stack([*values.values()]))
        return dict(zip(values, means.tolist(), strict=True))


def _heads(model: DGIModel) -> list[CosineHead]:
    return [cast(CosineHead, head) for head in model.heads]


def _nll(model: DGIModel, query: QueryEncoding, codes: Tensor, inputs: Tensor) -> Tensor:
    hidden = model.hidden_states(inputs[:, :-1], query)
    return torch.stack([head.loss(hidden[:, j], codes[:, j]) for j, head in enumerate(_heads(model))]).sum()


def _on_trie(model: DGIModel, query: QueryEncoding, table: Tensor, seed: int) -> Tensor:
    """E Π_j m_j: m_j is the probability of the children that exist, of which the path takes one by chance.

    A path has the probability Π_j p_j / m_j of being taken, so that the mean of Π_j m_j over paths is the sum of
    Π_j p_j over all IDs that exist.
    """
    rows = len(query.vector)
    source = torch.Generator().manual_seed(seed)
    chance = torch.rand(world_size(), rows, model.depth, generator=source)[rank()].to(table.device)
    below = torch.ones(rows, len(table), dtype=torch.bool, device=table.device)
    inputs = query.vector.new_zeros(rows, 0, model.config.dim)
    kept = torch.ones(rows, device=table.device)
    for level, head in enumerate(_heads(model)):
        hidden = model.hidden_states(inputs, query)[:, -1]
        probabilities = head(hidden).float().softmax(-1)
        exists = torch.zeros_like(probabilities).index_add_(1, table[:, level], below.to(probabilities.dtype)) > 0
        allowed = probabilities * exists
        kept = kept * allowed.sum(1).clamp(max=1)  # a sum of all that exists may round beyond it
        # Where every child that exists has underflowed, any of them will do: kept is 0 from here on.
        summed = (allowed + 1e-30 * exists).cumsum(1)
        place = torch.searchsorted(summed, chance[:, level : level + 1] * summed[:, -1:], right=True)[:, 0]
        last = summed.shape[1] - 1 - exists.flip(1).to(torch.int8).argmax(1)
        chosen = torch.minimum(place, last)  # rounding can lead past the last one
        below &= table[:, level] == chosen[:, None]
        inputs = torch.cat([inputs, model.quantizer.embed(chosen, level).unsqueeze(1).to(inputs.dtype)], 1)
    return kept.mean()
