"""Training steps of a whole model on the GPU: with our kernels, in a CUDA graph, with references; the same weights."""

from __future__ import annotations

from collections.abc import Mapping

import bench_train
import numpy as np

from dgi.config import ModelConfig, TrainConfig
from dgi.data import Catalog, Interactions

from .session import Session

STEPS = 20
CLOSE = 2e-2  # of losses over the first steps, relative: float32 products of a GPU are summed in another order


def tiny() -> tuple[ModelConfig, TrainConfig, Catalog, Interactions]:
    """For a rehearsal on a CPU."""
    items, rows, random = 200, 400, np.random.default_rng(0)
    vectors = random.standard_normal((items, 16), dtype=np.float32)
    catalog = Catalog(tuple(map(str, range(items))), ("",) * items, vectors)
    interactions = Interactions(
        ("",) * rows,
        random.integers(items, size=(rows, 4)),
        random.integers(items, size=rows),
        np.arange(rows, dtype=np.float64),
    )
    model = ModelConfig(
        encoder="vectors",
        vector_dim=16,
        dim=16,
        codebook_sizes=(8, 4),
        history_layers=1,
        decoder_layers=1,
        attention_heads=2,
        dropout=0.0,
    )
    return model, TrainConfig(batch_size=16, epochs=1), catalog, interactions


class Figures:
    """Takes what bench_train measures, and keeps the losses."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.losses: dict[str, list[float]] = {}

    def add(
        self, op: str, shape: Mapping[str, object], system: str, times: list[float], *, losses: list[float]
    ) -> None:
        self.losses[system] = losses
        self.session.add(op, shape, system, times, losses=losses)
        self.session.say(
            f"training step, {system}: {1e3 * sorted(times)[len(times) // 2]:.4g} ms, "
            f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        )


def run(session: Session) -> None:
    bench_train.CASES["tiny"] = tiny
    figures = Figures(session)
    bench_train.run("tiny" if session.options.get("rehearse") else "large", STEPS, figures)
    expected = figures.losses["reference"][: bench_train.FIRST]
    for system in set(figures.losses) - {"reference"}:
        pairs = zip(figures.losses[system], expected, strict=False)
        off = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
        if not off < CLOSE:
            session.fail(f"losses of {system} and of the references differ by {off:.1e} within {len(expected)} steps")
