"""One step of a trie-constrained beam search in plain PyTorch, with static shapes.

    score(m, k) = scores[m] + (logp[m, k] + strength node_score[k])   over all allowed children k of all live beams m
    result      = the num_beams best, ties to the lower parent, then the lower token

Every beam is given as many candidate slots as the widest node of its depth has children; the slots follow each other
by parent, then by token, so that a stable sort settles ties as required.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels.trie import Beams, Trie
from dgi_kernels.trie.arrays import END
from dgi_kernels.trie.filters import TrieFilter, allowed_nodes
from dgi_kernels.trie.node_scores import Bonus

DEAD = -torch.inf


def beam_step(
    trie: Trie,
    logits: Tensor,
    beams: Beams,
    num_beams: int,
    normalize: str,
    log_normalizer: Tensor | None,
    filters: TrieFilter | list[TrieFilter | None] | None,
    bonus: Bonus | None = None,
) -> Beams:
    """``logits`` (B, M, K) and ``log_normalizer`` (B, M) arrive in the compute dtype, float32 or float64."""
    depth, slots = beams.depth, trie.max_degree[beams.depth]
    batch, width = beams.nodes.shape
    if slots == 0 or width == 0:  # no item, or no beam to continue
        return _dead_beams(batch, num_beams, depth + 1, trie.device)
    scores = _finite_or_dead(beams.scores.to(logits.dtype))
    live = (beams.nodes >= 0) & (beams.nodes < trie.num_nodes_at(depth)) & (scores > DEAD)
    nodes = beams.nodes.long().masked_fill(~live, 0)

    children, tokens, exists = trie.parts.children(nodes, depth)  # (B, M, slots)
    allowed = live.unsqueeze(-1) & exists & allowed_nodes(filters, children.masked_fill(~exists, -1), depth + 1)

    logp = _log_probabilities(_finite_or_dead(logits), tokens, allowed, normalize, log_normalizer)
    if bonus is not None:
        of_nodes = bonus.scores.at(children.masked_fill(~exists, 0), depth + 1).to(logits.dtype)
        strength = bonus.strength
        if isinstance(strength, Tensor):
            strength = strength.to(logits.dtype)[:, None, None]
        logp = logp + strength * of_nodes
    candidates = torch.where(allowed, _finite_or_dead(scores.unsqueeze(-1) + logp), DEAD).flatten(1)
    candidates = F.pad(candidates, (0, max(0, num_beams - width * slots)), value=DEAD)
    best, place = candidates.sort(dim=-1, descending=True, stable=True)
    best, place = best[:, :num_beams], place[:, :num_beams].clamp(max=width * slots - 1)
    dead = best == DEAD
    return Beams(
        nodes=children.flatten(1).gather(1, place).masked_fill(dead, -1),
        tokens=tokens.flatten(1).gather(1, place).masked_fill(dead, -1),
        parents=(place // slots).masked_fill(dead, -1),
        scores=best.float(),
        depth=depth + 1,
    )


def _log_probabilities(
    logits: Tensor, tokens: Tensor, allowed: Tensor, normalize: str, log_normalizer: Tensor | None
) -> Tensor:
    """Log-probability (B, M, slots) of each child; 0 for the end of a sequence, which is no part of the normaliser."""
    ended = tokens == END
    if logits.shape[-1] == 0:
        return torch.zeros_like(tokens, dtype=logits.dtype)
    if normalize == "full" and log_normalizer is None:
        logits = logits.log_softmax(-1)
    children = logits.gather(-1, tokens.clamp(min=0))
    if log_normalizer is not None:
        children = children - log_normalizer.nan_to_num(torch.inf, torch.inf, torch.inf).unsqueeze(-1)
    elif normalize == "children":
        children = children.masked_fill(ended | ~allowed, DEAD).log_softmax(-1)
    return children.masked_fill(ended, 0)


def _finite_or_dead(values: Tensor) -> Tensor:
    """NaN counts as -inf, and +inf as the largest finite number, so that no sum or difference makes a NaN of it."""
    return values.nan_to_num(nan=DEAD, posinf=torch.finfo(values.dtype).max, neginf=DEAD)


def _dead_beams(batch: int, num_beams: int, depth: int, device: torch.device) -> Beams:
    none = torch.full((batch, num_beams), -1, dtype=torch.int64, device=device)
    return Beams(none, none, none, torch.full_like(none, DEAD, dtype=torch.float32), depth)


def beam_codes(history: list[Beams]) -> Tensor:
    """The codes (B, M, L) of the last of ``history``, the beams of all L steps, by their parents; -1 where dead."""
    place, columns = None, []
    for beams in reversed(history):
        columns.append(beams.tokens if place is None else beams.tokens.gather(1, place))
        if beams is not history[0]:
            parents = beams.parents if place is None else beams.parents.gather(1, place)
            place = parents.clamp(min=0)  # of a dead beam any will do
    return torch.stack(columns[::-1], dim=-1).masked_fill(history[-1].nodes.unsqueeze(-1) < 0, -1)
