"""Skips that nobody expects fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .skips import is_expected

ROOT = Path(__file__).parent.parent


def test_an_unexpected_skip_fails(tmp_path: Path) -> None:
    """Guards against pytest.skip on a near-tie: a kernel with a wrong argmax passed that way."""
    (tmp_path / "conftest.py").write_text("from tests.conftest import *\n")
    (tmp_path / "test_it.py").write_text("import pytest\n\ndef test_it():\n    pytest.skip('a near-tie')\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stdout
    assert "was skipped, which tests/skips.py does not expect here: a near-tie" in run.stdout


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("beam_step has no triton kernel in this version", True),
        ("could not import 'no_such_package': No module named 'no_such_package'", True),
        ("could not import 'torch': broken", False),
        ("flaky", False),
    ],
)
def test_reasons(reason: str, expected: bool) -> None:
    assert is_expected(reason) == expected
