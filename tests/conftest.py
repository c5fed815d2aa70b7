"""Random inputs for every test, from a seed of its own that is the same in every run, or fresh ones."""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Generator

# Threads that spin while they wait stall when another process has one of the cores.  OpenMP reads this as it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The buffers of the C++ kernels begin as NaN: what is read before it is written shows.
os.environ.setdefault("DGI_POISON", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from pytest import TestReport  # noqa: E402

from tests.skips import is_expected  # noqa: E402

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed every generator: from the test's name, so that runs repeat; or from ``DGI_TEST_SEED``, a number for every
    test alike or ``fresh`` for new inputs.  Shown with a failing test's output."""
    wanted = os.environ.get("DGI_TEST_SEED")
    if wanted is None:
        value = zlib.crc32(request.node.nodeid.encode())
    else:
        value = random.SystemRandom().randrange(2**31) if wanted == "fresh" else int(wanted)
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    request.node.add_report_section("call", "seed", f"repeat with DGI_TEST_SEED={value}")
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: started last, one of them would keep a single worker busy at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, TestReport, TestReport]:
    """A skip that is not on the list fails: a test that says nothing reads as one that passed."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not is_expected(reason):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} was skipped, which tests/skips.py does not expect here: {reason}"
    return report
