"""Global time-based split: train on the past, test on what came after, for all users at one point in time."""

from __future__ import annotations

import numpy as np

from dgi.data.interactions import Interactions
from dgi.data.readers import DataError


def time_split(interactions: Interactions, test_fraction: float = 0.2) -> tuple[Interactions, Interactions]:
    """Split into (train, test), each sorted by time: the test set is the last ``test_fraction`` by timestamp.

    Interactions of one timestamp are never torn apart: those at the border all go to the side that keeps the test set
    closest to ``test_fraction`` (to the test set where that is even).

    Raises:
        ValueError: ``test_fraction`` is not strictly between 0 and 1.
        DataError: all interactions have one timestamp.
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be strictly between 0 and 1; got {test_fraction}")
    order = np.argsort(interactions.timestamps, kind="stable")
    times = interactions.timestamps[order]
    starts = np.flatnonzero(times[1:] != times[:-1]) + 1  # where a new timestamp begins: the places a split may fall
    if not len(starts):
        raise DataError(
            "cannot split by time: all interactions have the same timestamp; give each its time, or split "
            "them yourself into interactions.train.* and interactions.test.*"
        )
    wanted = len(times) * (1 - test_fraction)
    border = starts[np.argmin(np.abs(starts - wanted))]
    return interactions.take(order[:border]), interactions.take(order[border:])
