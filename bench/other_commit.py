"""The code of another commit, in a process of its own that takes turns with this one: its own imports, its own build.

``DGI_BASE=<checkout of that commit, built in place>`` names it. A benchmark that takes part runs itself there with
``--serve`` and what it needs, says "ready", and then answers each line on its standard input with "done".
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def is_given() -> bool:
    return "DGI_BASE" in os.environ


def name() -> str:
    """What the other commit is called in tables."""
    command = ["git", "-C", os.environ["DGI_BASE"], "rev-parse", "--short=7", "HEAD"]
    return "commit " + subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def process(script: str, *arguments: object) -> Iterator[Callable[[object], None]]:
    """``script --serve arguments`` with that commit's packages: a function that sends a line and waits for its end."""
    source, here = Path(os.environ["DGI_BASE"]).resolve(), Path(__file__).resolve().parent
    running = subprocess.Popen(
        [sys.executable, Path(script).resolve(), "--serve", *map(str, arguments)],
        cwd=source,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(source), str(here)])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdin is not None and running.stdout is not None
    into, out = running.stdin, running.stdout

    def wait(word: str) -> None:
        if out.readline().strip() != word:
            raise RuntimeError(f"{script} failed with the code of {source}, see above")

    def ask(line: object) -> None:
        print(line, file=into, flush=True)
        wait("done")

    try:
        wait("ready")
        yield ask
    finally:
        into.close()
        running.wait()


def serve(answer: Callable[[str], object], lines: Iterable[str] = sys.stdin) -> None:
    """The side of that process."""
    print("ready", flush=True)
    for line in lines:
        answer(line)
        print("done", flush=True)
