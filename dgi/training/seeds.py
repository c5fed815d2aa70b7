"""Seeds of everything random in training: functions of the run's seed and the step, not states."""

from __future__ import annotations

import numpy as np
import torch

# What a derived seed is for: two purposes never share a stream of random numbers.
ORDER, DROPOUT, NOISE, CLUSTERING, REVIVAL, CANDIDATES, PATHS = range(7)


def derived_seed(*words: int) -> int:
    """A 64-bit seed that depends on every one of ``words``, all at least 0."""
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def generator(*words: int) -> torch.Generator:
    """A CPU generator seeded with :func:`derived_seed`."""
    return torch.Generator().manual_seed(derived_seed(*words))
