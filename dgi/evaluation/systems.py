"""The systems of a comparison by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dgi.retrieval.baselines import (
    BM25,
    Dense,
    Generative,
    GivenVectors,
    Plan,
    Popularity,
    RandomVectors,
    Retriever,
    StagedDGI,
)
from dgi.retrieval.baselines.codes import CodeKind


@dataclass(frozen=True)
class System:
    """One row of a comparison.

    Attributes:
        make: builds the system, not yet fitted.
        generative: whether it searches by semantic IDs; the others are what it is compared with.
        seeded: whether its results depend on the seed.
    """

    make: Callable[[Plan], Retriever]
    generative: bool = False
    seeded: bool = True


def _staged(name: str, **settings: Any) -> System:
    return System(lambda plan: StagedDGI(plan, name=name, **settings), generative=True)


def _generative(name: str, codes: CodeKind | None = None, **settings: Any) -> System:
    return System(lambda plan: Generative(plan, codes, name=name, **settings), generative=True)


SYSTEMS: dict[str, System] = {
    "random": System(lambda plan: RandomVectors(seed=plan.training.seed)),
    "popularity": System(lambda plan: Popularity(), seeded=False),
    "bm25": System(lambda plan: BM25(), seeded=False),
    "bm25_expanded": System(lambda plan: BM25(expand=True), seeded=False),
    "given_vectors": System(lambda plan: GivenVectors(), seeded=False),
    "dense_in_batch": System(lambda plan: Dense(plan, "in_batch", name="dense_in_batch")),
    "dense": System(lambda plan: Dense(plan)),
    "dense_bias": System(lambda plan: Dense(plan, item_bias=True, name="dense_bias")),
    "sasrec": System(lambda plan: Dense(plan, ids=True, name="sasrec")),
    "two_stage": _generative("two_stage", "residual"),
    "dsi_atomic": _generative("dsi_atomic", "atomic"),
    "dsi_hierarchical": _generative("dsi_hierarchical", "hierarchical"),
    "straight_through": _generative("straight_through", gradient="straight_through"),
    "dgi": _staged("dgi"),
    "dgi_moving_codes": _generative("dgi_moving_codes"),
    "dgi_one_stage": _generative("dgi_one_stage", from_encoder=False),
    "dgi_straight_through": _staged("dgi_straight_through", gradient="straight_through"),
    "dgi_detached": _staged("dgi_detached", gradient="detached"),
    "dgi_separate_heads": _staged("dgi_separate_heads", heads="separate"),
    "dgi_detached_separate": _staged("dgi_detached_separate", gradient="detached", heads="separate"),
    "dgi_inner_product": _staged("dgi_inner_product", similarity="inner_product"),
    "dgi_none": _staged("dgi_none", gradient="detached", heads="separate", similarity="inner_product"),
}
