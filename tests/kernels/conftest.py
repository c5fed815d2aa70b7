"""Uninitialised memory is NaN (integers: the largest) in these tests: what a kernel reads before it writes shows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What torch allocates, for Python, Triton and the results of C++; C++'s own buffers follow DGI_POISON."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fill_uninitialized_memory counts within it only
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* does not have a deterministic implementation")
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
