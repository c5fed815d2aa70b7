"""Calls into the compiled extension: beam steps in C++ and CUDA, given logits or the head that would make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels._extension import fake_kernel
from dgi_kernels.backend import tracing
from dgi_kernels.enums import NORMALIZERS
from dgi_kernels.trie import Beams, Trie
from dgi_kernels.trie.filters import TrieFilter, filter_arguments
from dgi_kernels.trie.node_scores import Bonus


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
    """``logits`` (B, M, K) of any float dtype and strides; ``log_normalizer`` (B, M) float64 for float64 logits, else
    float32.

    Raises:
        RuntimeError: a node is out of range (on CUDA it is dead).
    """
    masks = None
    if logits.device.type == "cpu" and not tracing():
        masks = trie.parts.base.child_masks(beams.depth, trie.codebook_sizes[beams.depth])
    return _step(
        torch.ops.dgi_kernels.beam_step.default,
        trie,
        beams,
        filters,
        bonus,
        (logits,),
        num_beams,
        normalize,
        log_normalizer,
        masks,
        trie.parts.max_degree[beams.depth],
    )


def cosine_beam_step(
    trie: Trie,
    h: Tensor,
    codebook: Tensor,
    scale: float | Tensor,
    eps: float,
    beams: Beams,
    num_beams: int,
    normalize: str,
    log_normalizer: Tensor | None,
    filters: TrieFilter | list[TrieFilter | None] | None,
    bonus: Bonus | None = None,
) -> Beams:
    """``h`` (B, M, D) and ``codebook`` (K, D) of one float dtype; the rest as in :func:`beam_step`."""
    compute = _compute_dtype(h)
    scale = checks.scalar_tensor(scale, compute, h.device).detach()
    return _step(
        torch.ops.dgi_kernels.cosine_beam_step.default,
        trie,
        beams,
        filters,
        bonus,
        (h.contiguous(), codebook.contiguous(), scale, eps),
        num_beams,
        normalize,
        log_normalizer,
        trie.parts.max_degree[beams.depth],
    )


def beam_codes(history: list[Beams]) -> Tensor:
    """As :func:`reference.beam_codes`."""
    return torch.ops.dgi_kernels.beam_codes.default(
        [beams.tokens for beams in history], [beams.parents for beams in history]
    )


def all_ended(tokens: Tensor) -> bool:
    """Whether every token is -1; ``tokens`` int64, contiguous, on the CPU."""
    return torch.ops.dgi_kernels.count_outside.default(tokens, -1, 0, None) == 0


def _step(
    op: Callable[..., tuple[Tensor, ...]],
    trie: Trie,
    beams: Beams,
    filters: TrieFilter | list[TrieFilter | None] | None,
    bonus: Bonus | None,
    source: tuple[Any, ...],
    num_beams: int,
    normalize: str,
    log_normalizer: Tensor | None,
    *more: Tensor | int | None,
) -> Beams:
    depth, base, delta, added = beams.depth, trie.parts.base, trie.parts.delta, trie.parts.added
    sets, set_of = filter_arguments(filters, beams.nodes.shape[0], depth + 1)
    of_delta: list[Tensor] = []
    anchors: list[Tensor] = []
    if added is not None and delta is not None:
        of_delta = [added.tokens[depth], added.child_start[depth]]
        anchors = [delta.anchors[depth], delta.anchors[depth + 1]]
    if tracing():  # AOTInductor's programs pass None for an empty list: give one that changes nothing
        none = base.tokens[depth].new_empty(0)
        words = none.long()
        of_delta, anchors = of_delta or [none, none.new_zeros(1, dtype=torch.int32)], anchors or [words, words]
        sets, set_of = (sets, set_of) if sets else ([words] * 4, [-1])
    nodes, scores, compute = beams.nodes, beams.scores, _compute_dtype(source[0])
    if nodes.dtype is not torch.int64 or scores.dtype is not compute:
        nodes, scores = nodes.long(), scores.to(compute)
    scored: tuple[Tensor | float | None, ...] = ()
    if bonus is not None:
        own, strength = bonus
        of_added = None if own.delta is None else own.delta[depth]
        scored = (
            own.base[depth],
            of_added,
            *((strength.to(compute),) if isinstance(strength, Tensor) else (None, strength)),
        )
    nodes, tokens, parents, scores = op(
        base.tokens[depth],
        base.child_start[depth],
        of_delta,
        anchors,
        sets,
        set_of,
        *source,
        nodes,
        scores,
        log_normalizer,
        num_beams,
        NORMALIZERS.index(normalize),
        *more,
        *scored,
    )
    return Beams(nodes, tokens, parents, scores, depth + 1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fake_beams(like: Tensor, num_beams: int) -> tuple[Tensor, ...]:
    integers = [like.new_empty((like.shape[0], num_beams), dtype=torch.int64) for _ in range(3)]
    return *integers, like.new_empty((like.shape[0], num_beams), dtype=torch.float32)


@fake_kernel("beam_codes")
def _(tokens: list[Tensor], parents: list[Tensor]) -> Tensor:
    return tokens[-1].new_empty((*tokens[-1].shape, len(tokens)))


@fake_kernel("beam_step")
def _(
    tokens: Tensor,
    child_start: Tensor,
    delta: list[Tensor],
    anchors: list[Tensor],
    sets: list[Tensor],
    set_of: list[int],
    logits: Tensor,
    nodes: Tensor,
    scores: Tensor,
    log_normalizer: Tensor | None,
    num_beams: int,
    normalize: int,
    child_masks: Tensor | None = None,
    max_degree: int = -1,
    base_scores: Tensor | None = None,
    delta_scores: Tensor | None = None,
    strengths: Tensor | None = None,
    strength: float = 1.0,
) -> tuple[Tensor, ...]:
    return _fake_beams(logits, num_beams)


@fake_kernel("cosine_beam_step")
def _(
    tokens: Tensor,
    child_start: Tensor,
    delta: list[Tensor],
    anchors: list[Tensor],
    sets: list[Tensor],
    set_of: list[int],
    h: Tensor,
    codebook: Tensor,
    scale: Tensor,
    eps: float,
    nodes: Tensor,
    scores: Tensor,
    log_normalizer: Tensor | None,
    num_beams: int,
    normalize: int,
    max_degree: int = -1,
    base_scores: Tensor | None = None,
    delta_scores: Tensor | None = None,
    strengths: Tensor | None = None,
    strength: float = 1.0,
) -> tuple[Tensor, ...]:
    return _fake_beams(h, num_beams)
