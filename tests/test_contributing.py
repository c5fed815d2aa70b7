"""What CONTRIBUTING.md and the tools around a commit say agrees with the code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_pre_commit_uses_the_pinned_versions() -> None:
    pinned = set((ROOT / "constraints.txt").read_text().split())
    hooks = re.findall(r"additional_dependencies: \[(.+?)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 3 and set(hooks) <= pinned
