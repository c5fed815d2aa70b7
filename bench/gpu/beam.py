"""Constrained search: steps and whole searches, with and without a CUDA graph, and the ranking of what is found.

The floor of a step is a copy of its logits, of a head its product. A step is too short to time alone: it is the average
of many without a pause between them; "graph" leaves the host's share out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bench_beam
import numpy as np
import torch
from torch import Tensor

from dgi_kernels import (
    BeamResult,
    Beams,
    Trie,
    beam_search,
    beam_step,
    cosine_beam_step,
    cosine_logits,
    rank_candidates,
)

from .device import Gpu, Step
from .session import Session, lazily

FIRST = [bench_beam.Case(batch=64, beams=50), bench_beam.Case(batch=1, beams=10)]
MORE = [
    bench_beam.Case(batch=8, beams=50),
    bench_beam.Case(batch=64, beams=500),
    bench_beam.Case(codes=256, batch=64, beams=50),
]
PEERS = ("STATIC", "STATIC compiled", "FlashRec")
WITH_PEERS = [bench_beam.Case(batch=64, beams=50)]


@dataclass
class Search:
    """A trie on the GPU, logits of every level, and what beams there are before each."""

    trie: Trie
    logits: list[Tensor]
    states: list[Beams]


def search_of(gpu: Gpu, sids: np.ndarray, case: bench_beam.Case, dtype: torch.dtype = torch.bfloat16) -> Search:
    trie = gpu.to(Trie.from_codes(sids, codebook_sizes=[case.codes] * case.levels))
    logits = [
        torch.randn(case.batch, case.beams if level else 1, case.codes, device=gpu.device).to(dtype)
        for level in range(case.levels)
    ]
    states = [trie.root(case.batch)]
    for level in logits[:-1]:
        states.append(beam_step(trie, level, states[-1], num_beams=case.beams))
    return Search(trie, logits, states)


def whole_search(search: Search, case: bench_beam.Case, **options: Any) -> BeamResult:
    return beam_search(
        search.trie,
        lambda depth, tokens, parents: search.logits[depth],
        batch_size=case.batch,
        num_beams=case.beams,
        **options,
    )


def shape(case: bench_beam.Case, **more: object) -> dict[str, object]:
    return {"items": case.items, "V": case.codes, "B": case.batch, "M": case.beams, "dtype": "bfloat16", **more}


def graphed(session: Session, call: Step) -> Step:
    return lazily(functools.partial(session.gpu.graphed, call))


def figures(session: Session, case: bench_beam.Case) -> None:
    search, beams = search_of(session.gpu, case.sids(), case), case.beams
    trie, logits, dim = search.trie, search.logits, case.dim
    copies = [level.clone() for level in logits]
    h = torch.randn(case.batch, beams, dim, device=session.gpu.device, dtype=torch.bfloat16)
    codebook = torch.randn(case.codes, dim, device=session.gpu.device, dtype=torch.bfloat16)

    for depth in (len(logits) - 1, 1):  # the last depth has few children a beam, one in the middle many

        def step(backend: str = "auto", depth: int = depth) -> Beams:
            return beam_step(trie, logits[depth], search.states[depth], num_beams=beams, backend=backend)

        session.measure(
            "beam_step",
            shape(case, depth=depth),
            {
                "ours": step,
                "floor": lambda depth=depth: copies[depth].copy_(logits[depth]),
                "ours, graph": graphed(session, step),
            },
            calls=50,
            budget=1.5,
        )
    with session.guarded("launches"):
        session.say(f"    beam_step: {session.gpu.launches(step)} launches")

    def head() -> Beams:
        return cosine_beam_step(trie, h, codebook, 30.0, search.states[-1], num_beams=beams)

    session.measure(
        "cosine_beam_step",
        shape(case, D=dim),
        {
            "ours": head,
            "floor": lambda: h @ codebook.T,
            "ours, graph": graphed(session, head),
            "head, then step": lambda: beam_step(
                trie, cosine_logits(h, codebook, 30.0), search.states[-1], num_beams=beams
            ),
        },
        calls=50,
        budget=1.5,
    )

    whole = functools.partial(whole_search, search, case)
    session.measure(
        "beam_search",
        shape(case, L=case.levels),
        {
            "ours": whole,
            "floor": lambda: [a.copy_(b) for a, b in zip(copies, logits, strict=True)],
            "ours, graph": graphed(session, whole),
        },
        calls=20,
        budget=1.5,
    )
    half = trie.filter(mask=torch.arange(case.items, device=session.gpu.device) % 2 == 0)
    session.measure(
        "beam_search",
        shape(case, L=case.levels, filtered=True),
        {"ours": functools.partial(whole_search, search, case, filters=half)},
        calls=20,
        budget=1.0,
    )
    found, query = whole(), torch.randn(case.batch, dim, device=session.gpu.device, dtype=torch.bfloat16)
    vectors = torch.randn(case.items, dim, device=session.gpu.device, dtype=torch.bfloat16)
    session.measure(
        "rank_candidates",
        shape(case, D=dim, k=20),
        {"ours": lambda: rank_candidates(query, vectors, trie, found, 20)},
        calls=10,
        budget=1.0,
    )


def language_model(
    session: Session, batch: int = 4, beams: int = 256, codes: int = 151_936, degree: int = 1024
) -> None:
    """The vocabulary of a language model, with 1,024 children at every node that the beams have reached."""
    first = np.repeat(np.arange(beams), degree)
    sids = np.stack([first, np.tile(np.arange(degree) * (codes // degree), beams)], 1)
    trie = session.gpu.to(Trie.from_codes(sids, codebook_sizes=[codes] * 2))
    logits = torch.randn(batch, beams, codes, device=session.gpu.device, dtype=torch.bfloat16)
    copy, state = logits.clone(), beam_step(trie, logits[:, :1], trie.root(batch), num_beams=beams)

    def step() -> Beams:
        return beam_step(trie, logits, state, num_beams=beams)

    session.measure(
        "beam_step",
        {"items": len(sids), "V": codes, "B": batch, "M": beams, "dtype": "bfloat16", "children": degree},
        {"ours": step, "floor": lambda: copy.copy_(logits), "ours, graph": graphed(session, step)},
        calls=10,
        budget=2.0,
    )


def run(session: Session) -> None:
    for case in FIRST:
        with session.guarded(f"search {case}"):
            figures(session, case)
    with session.guarded("a language model's vocabulary"):
        language_model(session)


def more(session: Session) -> None:
    for case in MORE:
        with session.guarded(f"search {case}"):
            figures(session, case)


def with_peers(session: Session) -> None:
    """Others' searches beside ours. A reference that sorts everything is called once a round, within its budget."""
    for case in WITH_PEERS:
        sids = case.sids()
        search, model = search_of(session.gpu, sids, case), bench_beam.Model(case)
        model.logits = search.logits
        ours = functools.partial(whole_search, search, case)
        session.measure(
            "beam_search",
            shape(case, L=case.levels),
            {"ours": ours, "reference": functools.partial(ours, backend="reference")},
            rounds=3,
        )
        for name, make in bench_beam.systems(case).items():
            if name in PEERS:

                def theirs(make: Callable[..., bench_beam.Search] = make) -> bench_beam.Search:
                    return make(sids, model, case)  # noqa: B023  called before the next case

                session.measure(
                    "beam_search",
                    shape(case, L=case.levels),
                    {"ours": ours, name: lazily(theirs)},
                    calls=20,
                    budget=2.0,
                )
