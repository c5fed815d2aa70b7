"""NVIDIA recsys-examples, examples/sid_gr: ``BeamSearch``, whose ``prefix_valid_check`` is accepted and not done."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from dropins import Change, DropIn, Outputs, Steps, common

REQUESTS, BEAMS = 16, 128


def steps(data: Path | None) -> Steps:
    from examples.sid_gr.beam_search.beam_search import BeamSearch

    every = torch.cartesian_prod(*[torch.arange(32)] * 3)
    real = common.semantic_ids(data)
    return {
        "every semantic ID exists": lambda: search(BeamSearch, every, 32),
        "the catalog of Beauty": lambda: search(BeamSearch, real, 256),
    }


def search(kind: type, codebooks: Tensor, size: int) -> Outputs:
    """A search as their ``generate`` has it, of log-probabilities from a fixed seed."""
    random, levels = torch.Generator().manual_seed(0), codebooks.shape[1]
    beams = kind(BEAMS, levels, [size] * levels, codebooks=codebooks, prefix_valid_check=True, record_history=True)
    width = 1
    for _ in range(levels):
        logits = torch.randn(REQUESTS, width, size, generator=random)
        codes, _ = beams.propagate(logits.log_softmax(-1))
        width = codes.shape[1]
    scores = beams.get_log_probs()
    return {"codes": codes.masked_fill((scores == -math.inf).unsqueeze(2), -1), "scores": scores}


DROPIN = DropIn(
    title=f"the whole beam search of {REQUESTS} requests with {BEAMS} beams, from log-probabilities",
    kind="search alone",
    source="https://github.com/NVIDIA/recsys-examples",
    commit="43465aeabf61515e28d74cbb5234ff7c627dcc19",
    data=common.SEMANTIC_IDS,
    packages=(),
    paths=("examples/sid_gr/beam_search",),
    changes=(
        Change(
            "examples/sid_gr/beam_search/beam_search.py",
            "    def get_log_probs(self) -> torch.Tensor:\n        return self.accumulated_log_probs\n",
            "    def get_log_probs(self) -> torch.Tensor:\n        return self.accumulated_log_probs\n"
            "from dgi.integrations.beam_adapters import SidGrBeamSearch as BeamSearch\n",
        ),
    ),
    steps=steps,
    tolerance={"scores": 1e-6},
    differs={"the catalog of Beauty": "theirs keeps prefixes that no item has"},
)
