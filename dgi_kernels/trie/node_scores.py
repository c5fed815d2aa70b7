"""Scores of the nodes of a trie by the weights of the items below them: popularity or business weights in a search.

Node n has the weight W(n), the sum of the weights of the items below it; a child adds ``log W(child) - log W(parent)``
to its score, times a strength. Along a path that sums up to ``log (W(leaf) / W(root))``: no level counts twice, and a
prefix is worth what is below it. Nothing is added to the arrays of a trie; there is one float32 per node beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.backend import checks_values, tracing
from dgi_kernels.trie.arrays import TrieArrays
from dgi_kernels.trie.parts import TrieParts
from dgi_kernels.trie.rows import plain_rows
from dgi_kernels.trie.starts import plain_starts

if TYPE_CHECKING:
    from dgi_kernels.trie import Trie


class NodeScores:
    """What the children of each node add to their scores, made by :meth:`Trie.node_scores`.

    They serve the very trie object that made them: after ``to``, ``update`` or ``load``, make them again.

    Attributes:
        trie: the trie that they belong to.
        base: per depth t from 0, float32 of the trie's base: log W(child) - log W(node) of all children of the n_t
            nodes of this depth, (n_{t + 1},), 0 for a child without an item that is left; behind them the least of each
            node's children, (n_t,), and the largest, (n_t,).
        delta: the same of what an updated trie holds besides, None where that is nothing.
    """

    def __init__(self, trie: Trie, base: tuple[Tensor, ...], delta: tuple[Tensor, ...] | None) -> None:
        self.trie = trie
        self.base = base
        self.delta = delta

    def at(self, nodes: Tensor, depth: int) -> Tensor:
        """Those of ``nodes`` (...) of ``depth``, from 1 to L; (...) float32."""
        parts = self.trie.parts
        own = self.base[depth - 1][: parts.base.num_nodes_at(depth)]
        if self.delta is not None and parts.added is not None:
            own = torch.cat([own, self.delta[depth - 1][: parts.added.num_nodes_at(depth)]])
        return own[nodes]

    def __repr__(self) -> str:
        return f"NodeScores of {self.trie!r}"


class Bonus(NamedTuple):
    """Node scores as steps take them.

    Attributes:
        scores: those of the trie that is searched.
        strength: what they are multiplied with, a number or (B,) floats of any dtype, one per request.
    """

    scores: NodeScores
    strength: float | Tensor


def make(trie: Trie, item_weights: Tensor | np.ndarray | Sequence[float]) -> NodeScores:
    """:meth:`Trie.node_scores`."""
    parts = trie.parts
    weights = _checked("item_weights", item_weights, trie)
    of_base = weights
    if parts.delta is not None:
        kept = parts.kept_rows()
        of_base = weights.new_zeros(parts.base.num_items)
        of_base[kept], weights = weights[: int(kept.sum())], weights[int(kept.sum()) :]
    base = _sums_below(parts.base, of_base)
    if parts.added is None:
        return NodeScores(trie, _log_ratios(parts.base, base), None)
    added = _sums_below(parts.added, weights)
    _join_twins(parts, base, added)
    return NodeScores(trie, _log_ratios(parts.base, base), _log_ratios(parts.added, added))


def _checked(name: str, given: object, trie: Trie) -> Tensor:
    try:
        weights = torch.as_tensor(given if isinstance(given, Tensor) else np.asarray(given), device=trie.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{name} must be a tensor, array or list of numbers; got {type(given).__name__} ({error})"
        ) from None
    if weights.dtype == torch.bool or weights.is_complex():
        raise TypeError(f"{name} must hold numbers; got {weights.dtype}")
    checks.tensor(name, weights)
    checks.shape(name, weights, (trie.num_items,), "(num_items,)")
    weights = weights.double()
    wrong = ~((weights > 0) & (weights < torch.inf))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(f"{name} must be positive and finite; that of row {row} is {weights[row].item()}")
    if not bool(weights.sum() < torch.inf):
        raise ValueError(f"{name} must have a finite sum in float64")
    return weights


def _sums_below(arrays: TrieArrays, weights: Tensor) -> list[Tensor]:
    """W of the nodes of depth 0, 1, ... L, in float64, of ``weights`` (N,) by row.

    Runs are summed up, not differences taken of running sums, which would lose a small weight behind large ones.
    """
    sums = weights if arrays.item_order is None else weights[plain_rows(arrays.item_order).long()]
    if arrays.item_start is not None:
        sums = _sum_runs(sums, plain_starts(arrays.item_start, arrays.num_items, torch.int64))
    levels = [sums]
    for starts in reversed(arrays.child_start):
        levels.append(_sum_runs(levels[-1], starts))
    return levels[::-1]


def _sum_runs(values: Tensor, starts: Tensor) -> Tensor:
    return torch.segment_reduce(values, "sum", lengths=starts.diff().long(), unsafe=True)


def _join_twins(parts: TrieParts, base: list[Tensor], added: list[Tensor]) -> None:
    """Twins are one node, with the weight of both."""
    assert parts.delta is not None
    for of_base, of_added, anchors in zip(base, added, parts.delta.anchors, strict=True):
        twins = (anchors & 1).bool()
        nodes = anchors[twins] >> 1
        both = of_base[nodes] + of_added[twins]
        of_base[nodes], of_added[twins] = both, both


def _log_ratios(arrays: TrieArrays, sums: list[Tensor]) -> tuple[Tensor, ...]:
    """:attr:`NodeScores.base`: log W(child) - log W(parent), never more than 0, and the bounds of each parent."""
    found = []
    for starts, parents, children in zip(arrays.child_start, sums, sums[1:], strict=False):
        degrees = starts.diff().long()
        ratios = children.log() - parents.log().repeat_interleave(degrees, output_size=len(children))
        own = ratios.clamp_(max=0).masked_fill_(children == 0, 0).float()
        bounds = (torch.segment_reduce(own, kind, lengths=degrees, unsafe=True) for kind in ("min", "max"))
        found.append(torch.cat([own, *bounds]))
    return tuple(found)


def check_node_scores(node_scores: NodeScores | None, strength: float | Tensor, trie: Trie, batch: int) -> Bonus | None:
    """Check the arguments ``node_scores`` and ``strength``, a finite float or (batch,) floats."""
    if node_scores is None:
        if isinstance(strength, Tensor) or strength != 1:
            raise ValueError("strength needs node_scores, which it multiplies; got none")
        return None
    if not isinstance(node_scores, NodeScores):
        raise TypeError(f"node_scores must be NodeScores or None; got {type(node_scores).__name__}")
    if node_scores.trie is not trie:
        raise ValueError("node_scores belong to another trie; make them with the node_scores() of the one searched")
    like = trie.parts.base.tokens[0]
    if isinstance(strength, Tensor) and strength.ndim == 1:
        checks.float_tensor("strength", strength, like=like)
        checks.shape("strength", strength, (batch,), "(B,)")
        if checks_values(strength.device) and not tracing() and not strength.isfinite().all():
            raise ValueError(f"strength must be finite; got {strength[~strength.isfinite()][0].item()}")
        return Bonus(node_scores, strength)
    number = checks.scalar("strength", strength, like)
    return Bonus(node_scores, number.expand(batch) if isinstance(number, Tensor) else number)
