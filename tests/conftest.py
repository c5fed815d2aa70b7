"""Fresh random inputs for every test, from a seed that is printed when the test fails."""

from __future__ import annotations

import os
import random

# Threads that spin while they wait stall when another process has one of the cores.  OpenMP reads this as it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed every generator from ``DGI_TEST_SEED`` or afresh; shown with a failing test's output."""
    value = int(os.environ.get("DGI_TEST_SEED", random.SystemRandom().randrange(2**31)))
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    request.node.add_report_section("call", "seed", f"repeat with DGI_TEST_SEED={value}")
    return value
