"""A plugin of pytest: writes each test's outcome as a line of JSON to the file EACH_TEST as soon as it is known.

``EACH_TEST_STALL`` names a file to make after the first test, before waiting forever: the rehearsal of a cut run.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

STALL_AFTER = 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of torch.compile last: each takes as long as a hundred others."""
    items.sort(key=lambda item: "compile" in item.name)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("EACH_TEST")
    if path is None or os.environ.get("PYTEST_XDIST_WORKER") or (report.when != "call" and report.outcome == "passed"):
        return
    with open(path, "a") as file:
        file.write(
            json.dumps(
                {
                    "test": report.nodeid,
                    "outcome": report.outcome,
                    "when": report.when,
                    "seconds": round(report.duration, 3),
                    "what": str(report.longrepr)[-2000:] if report.failed else "",
                }
            )
            + "\n"
        )
    stall = os.environ.get("EACH_TEST_STALL")
    if stall and len(Path(path).read_text().splitlines()) >= STALL_AFTER:
        Path(stall).touch()
        time.sleep(600)
