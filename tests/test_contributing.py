"""What CONTRIBUTING.md and the tools around a commit say agrees with the code."""

from __future__ import annotations

import re
from pathlib import Path

from dgi_kernels.backend import KERNELS

ROOT = Path(__file__).resolve().parent.parent


def test_pre_commit_uses_the_pinned_versions() -> None:
    pinned = set((ROOT / "constraints.txt").read_text().split())
    hooks = re.findall(r"additional_dependencies: \[(.+?)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 3 and set(hooks) <= pinned


def test_every_path_of_the_contributing_guide_exists() -> None:
    """The table of ops is made by bench/report.py, whose --check tests that it is current."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text.partition("<!-- ops -->")[2].partition("<!-- /ops -->")[0]
    links = re.findall(r"\]\((.+?)\)", text)
    assert len(links) > 20 and all((ROOT / link).exists() for link in links)
    assert re.findall(r"^\| `(\w+)` ", table, re.MULTILINE) == list(KERNELS)
    named = re.findall(r"`((?:dgi_kernels|csrc|bench|tests|docs)/[^` <*]+)`", text)
    assert len(named) > 10 and [path for path in named if not (ROOT / path).exists()] == []


def test_the_bug_report_asks_what_runs_here() -> None:
    assert "python -m dgi_kernels.info" in (ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml").read_text()
