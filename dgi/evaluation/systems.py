"""The systems of a comparison by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dgi.retrieval.baselines import (
    BM25,
    Cooccurrence,
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
from dgi.training import recipes


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


def _soft(name: str, **model: Any) -> System:
    """The next-token loss reaches items and codes through soft assignments; what the paper's ablations take away."""
    return _staged(name, training=recipes.staged(inputs="mixed", ntp=1.0, decoder_rate=0), **model)


def _generative(name: str, codes: CodeKind | None = None, **settings: Any) -> System:
    return System(lambda plan: Generative(plan, codes, name=name, **settings), generative=True)


SYSTEMS: dict[str, System] = {
    "random": System(lambda plan: RandomVectors(seed=plan.training.seed)),
    "popularity": System(lambda plan: Popularity(), seeded=False),
    "cooccurrence": System(lambda plan: Cooccurrence(), seeded=False),
    "bm25": System(lambda plan: BM25(), seeded=False),
    "bm25_expanded": System(lambda plan: BM25(expand=True), seeded=False),
    "given_vectors": System(lambda plan: GivenVectors(), seeded=False),
    "dense_in_batch": System(lambda plan: Dense(plan, "in_batch", name="dense_in_batch")),
    "dense": System(lambda plan: Dense(plan)),
    "dense_bias": System(lambda plan: Dense(plan, item_bias=True, name="dense_bias")),
    "sasrec": System(lambda plan: Dense(plan, items="random", name="sasrec")),
    "dense_ids": System(lambda plan: Dense(plan, items="given", item_bias=True, name="dense_ids")),
    "two_stage": _generative("two_stage", "residual"),
    "two_stage_ids": _generative("two_stage_ids", "residual", items="given"),
    "tiger": _generative("tiger", "given", from_encoder=False),
    "dsi_atomic": _generative("dsi_atomic", "atomic"),
    "dsi_hierarchical": _generative("dsi_hierarchical", "hierarchical"),
    "straight_through": _generative("straight_through", gradient="straight_through"),
    "dgi": _staged("dgi"),
    # A vector of its own for every item overfits; the next-token loss keeps the encoder from it.
    "dgi_ids": _staged(
        "dgi_ids",
        items="given",
        training=recipes.staged(first=0.5, distillation=0.0, ntp=1.0, decoder_rate=0),
    ),
    "dgi_equal_weights": _staged("dgi_equal_weights", training=recipes.staged(ntp=1.0, decoder_rate=0)),
    "dgi_soft": _soft("dgi_soft"),
    "dgi_moving_codes": _generative("dgi_moving_codes"),
    "dgi_one_stage": _generative("dgi_one_stage", from_encoder=False),
    "dgi_straight_through": _soft("dgi_straight_through", gradient="straight_through"),
    "dgi_detached": _soft("dgi_detached", gradient="detached"),
    "dgi_separate_heads": _soft("dgi_separate_heads", heads="separate"),
    "dgi_detached_separate": _soft("dgi_detached_separate", gradient="detached", heads="separate"),
    "dgi_inner_product": _soft("dgi_inner_product", similarity="inner_product"),
    "dgi_none": _soft("dgi_none", gradient="detached", heads="separate", similarity="inner_product"),
}
