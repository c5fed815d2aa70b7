"""Progress of long work: a bar where someone looks at a terminal, a plain line now and then in a pipe or a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

QUIET = 10.0  # seconds between two lines, and before the first: shorter work writes none
LONGEST = 60.0  # seconds without a line, where a tenth of the work takes longer


class Progress:
    """What has been done of ``total``; written to ``file``, by default standard error.

    On a terminal it is tqdm's bar, where tqdm is installed.  Elsewhere a bar that is drawn over itself becomes
    thousands of lines, so there is a line for each further tenth of the work, at least one a minute, and no two within
    ten seconds.

    Args:
        total: how much there is to do.
        title: what is being done.
        unit: what is counted, in the plural.
        done: how much was done before.
        shown: False writes nothing.
        delay: seconds before a bar appears: shorter work shows none.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        total: int,
        title: str,
        *,
        unit: str = "items",
        done: int = 0,
        shown: bool = True,
        delay: float = 0.0,
        file: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.title, self.unit, self.done, self.shown = total, title, unit, done, shown
        self.file = sys.stderr if file is None else file
        self._clock, self._before, self._note = clock, done, ""
        self._started = self._last = clock()
        self._tenth = self._tenths()
        self._written = done
        self._bar = _bar(self, delay) if shown and self.file.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None and self._written > self._before and self._written != self.done:
            self._write()

    def update(self, count: int = 1) -> None:
        """``count`` more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = self._clock()
        since, tenth = now - self._last, self._tenths()
        if self.shown and since >= QUIET and (tenth > self._tenth or since >= LONGEST):
            self._last, self._tenth = now, tenth
            self._write()

    def note(self, text: str) -> None:
        """Say ``text`` beside the progress from now on."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def _tenths(self) -> int:
        return 10 * self.done // max(self.total, 1)

    def _write(self) -> None:
        self._written = self.done
        seconds = self._clock() - self._started
        rate = (self.done - self._before) / max(seconds, 1e-9)
        line = (
            f"{self.title}: {self.done:,} of {self.total:,} {self.unit} ({self.done / max(self.total, 1):.0%}), "
            f"{seconds:,.0f} s, {rate:,.3g} a second"
        )
        print("; ".join(filter(None, (line, self._note))), file=self.file, flush=True)


def _bar(progress: Progress, delay: float) -> Any:
    """tqdm's bar, None without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:  # dgi_kernels needs torch and numpy alone
        return None
    return tqdm(
        total=progress.total,
        desc=progress.title,
        initial=progress.done,
        unit=f" {progress.unit}",
        file=progress.file,
        dynamic_ncols=True,
        delay=delay,
    )
