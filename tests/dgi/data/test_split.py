"""The split by time: nothing of the test set lies before anything of the training set, and no moment is torn."""

from __future__ import annotations

import numpy as np
import pytest

from dgi.data import DataError, Interactions, time_split


def at_times(times: np.ndarray) -> Interactions:
    n = len(times)
    return Interactions(tuple(map(str, range(n))), np.full((n, 10), -1), np.arange(n), np.asarray(times, np.float64))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5, 0.93])
def test_past_and_future(fraction: float) -> None:
    for _ in range(50):
        n = np.random.randint(2, 200)
        times = np.random.randint(0, max(2, np.random.randint(2 * n)), size=n)
        times[:2] = 0, 1  # at least two moments
        train, test = time_split(at_times(times), fraction)
        assert len(train) and len(test)
        assert train.timestamps.max() < test.timestamps.min()
        assert sorted([*train.items, *test.items]) == list(range(n))
        expected = np.argsort(times, kind="stable").tolist()
        assert [*train.items, *test.items] == expected  # each part in order of time, ties in the given order
        # No other border between two moments is closer to the fraction asked for.
        possible = [np.sum(times >= moment) for moment in np.unique(times)[1:]]
        assert abs(len(test) - fraction * n) <= min(abs(size - fraction * n) for size in possible) + 1e-9


def test_exact_share_without_ties() -> None:
    train, test = time_split(at_times(np.random.permutation(1000)))
    assert (len(train), len(test)) == (800, 200)


def test_ties_at_the_border_stay_together() -> None:
    train, test = time_split(at_times(np.array([0, 1, 2, 3, 4, 5, 6, 7, 7, 7])))
    assert test.timestamps.tolist() == [7, 7, 7]
    train, test = time_split(at_times(np.array([0, 1, 1, 1, 1, 1, 1, 1, 1, 2])))
    assert test.timestamps.tolist() == [2]


def test_it_is_deterministic() -> None:
    times = np.random.randint(0, 20, size=300)
    first, again = time_split(at_times(times)), time_split(at_times(times))
    assert [part.queries for part in first] == [part.queries for part in again]


def test_what_cannot_be_split() -> None:
    with pytest.raises(DataError, match="all interactions have the same timestamp; give each its time, or split"):
        time_split(at_times(np.zeros(10)))
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="test_fraction must be strictly between 0 and 1; got"):
            time_split(at_times(np.arange(10)), fraction)
