"""Progress: a bar on a terminal, few plain lines in a log, nothing for short work, and no other bar in the project."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from dgi.progress import Progress

ROOT = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(seconds_each: float, total: int, *, done: int = 0, stop: int | None = None) -> list[str]:
    """What a log gets of ``total`` steps of so many seconds each."""
    log, now = io.StringIO(), [0.0]
    with Progress(total, "training", unit="steps", done=done, file=log, clock=lambda: now[0]) as progress:
        for step in range(done, total if stop is None else stop):
            now[0] += seconds_each
            progress.note(f"loss {step}")
            progress.update()
    return log.getvalue().splitlines()


def test_a_log_gets_a_line_for_each_tenth() -> None:
    lines = lines_of(0.5, 1000)
    assert [int(re.search(r"(\d+)%", line)[1]) for line in lines] == list(range(10, 101, 10))
    assert lines[0] == "training: 100 of 1,000 steps (10%), 50 s, 2 a second; loss 99"


def test_short_work_writes_nothing_and_long_work_a_line_a_minute() -> None:
    assert lines_of(0.009, 1000) == []
    assert len(lines_of(0.02, 1000)) == 2  # 20 seconds: after 10, and at the end
    slow = lines_of(30.0, 100)
    assert len(slow) == 50 and slow[0].startswith("training: 2 of 100 steps (2%), 60 s")
    assert slow[-1].startswith("training: 100 of 100 steps (100%)")


def test_resumed_work_counts_its_own_speed() -> None:
    first = lines_of(1.0, 100, done=50)[0]
    assert first.startswith("training: 60 of 100 steps (60%), 10 s, 1 a second")


def test_a_terminal_gets_a_bar() -> None:
    terminal = Terminal()
    with Progress(10, "searching", unit="requests", file=terminal) as progress:
        progress.note("loss 3")
        progress.update(10)
    assert all(part in terminal.getvalue() for part in ("searching: 100%", "10/10", "loss 3"))


def test_short_work_shows_no_bar_where_it_may_wait() -> None:
    terminal = Terminal()
    with Progress(10, "clustering", delay=60.0, file=terminal) as progress:
        progress.update(10)
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("file", [io.StringIO(), Terminal()], ids=["log", "terminal"])
def test_nothing_where_it_is_not_to_be_shown(file: io.StringIO) -> None:
    now = iter(range(0, 10_000, 100))
    with Progress(10, "searching", file=file, shown=False, clock=lambda: next(now)) as progress:
        for _ in range(10):
            progress.update()
    assert file.getvalue() == ""


def test_a_failure_adds_no_line() -> None:
    log, now = io.StringIO(), iter(range(0, 10_000, 20))
    with pytest.raises(KeyError), Progress(100, "work", file=log, clock=lambda: next(now)) as progress:
        progress.update(30)
        progress.update(1)
        raise KeyError
    assert log.getvalue().count("\n") == 1


def test_no_work_at_all() -> None:
    log = io.StringIO()
    with Progress(0, "work", file=log):
        pass
    assert log.getvalue() == ""


def test_every_bar_of_the_project_is_this_one() -> None:
    sources = [*(ROOT / "dgi").rglob("*.py"), *(ROOT / "dgi_kernels").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert [
        path.name for path in sources if re.search(r"^\s*(from|import) tqdm|require\(.tqdm", path.read_text(), re.M)
    ] == ["progress.py"]
