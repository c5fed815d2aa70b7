"""Processes that tests start."""

from __future__ import annotations

import os


def outside_of_pytest() -> dict[str, str]:
    """The environment without pytest's own variables: by them another pytest takes itself for a worker of this one."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
