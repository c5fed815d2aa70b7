"""Compare a benchmark between two versions of the code, which take turns.

    python bench/compare.py cosine                            the working tree against main
    python bench/compare.py cosine --base HEAD~3 -- --quick   against another version; after -- the benchmark's options
    python bench/compare.py beam --base v1 --head v2 --rounds 5 -- B8-M50 --only native

Each version named by a git ref is checked out in a separate worktree under build/compare/ and built there once; the
working tree is built in place.  Then ``bench/bench_NAME.py`` runs in one after the other, ``--rounds`` times, and every
system's median over all rounds is shown: base, head, and their ratio.  Systems that are not
ours (eager, peers, the floor) should not differ; by how much they do is the noise of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "compare"


def checkout(ref: str | None) -> Path:
    """A folder with that version, built: a worktree for a git ref, the working tree itself for None."""
    folder = ROOT
    if ref is not None:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "--verify", f"{ref}^{{commit}}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        if found.returncode:
            raise SystemExit(f"git knows no commit {ref!r}; in a fresh clone try --base origin/{ref}")
        commit = found.stdout.strip()
        folder = FOLDER / commit
        if not folder.exists():
            subprocess.run(["git", "worktree", "add", "--detach", folder, commit], cwd=ROOT, check=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # ninja of this environment
    log = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        text=True,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if log.returncode or not (folder / "dgi_kernels" / "_C.abi3.so").exists():
        raise SystemExit(f"building {folder} failed:\n{log.stdout}")
    return folder


def measure(folder: Path, name: str, options: list[str], output: Path) -> dict[str, float]:
    """One run of the benchmark in that folder: seconds by the name of the figure."""
    script = folder / "bench" / f"bench_{name}.py"
    if not script.exists():
        raise SystemExit(f"{script} does not exist")
    subprocess.run(
        [sys.executable, script, *options, "--json", output],
        cwd=folder,
        check=True,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(folder)},
    )
    figures = json.loads(output.read_text())["benchmarks"]
    return {figure["name"]: figure["stats"]["median"] for figure in figures}


def table(base: list[dict[str, float]], head: list[dict[str, float]]) -> str:
    """A line for each figure that both versions have: milliseconds of base and head, and head ÷ base."""
    lines = [("figure", "base, ms", "head, ms", "head ÷ base")]
    for name in (name for name in base[0] if name in head[0]):
        before, after = (statistics.median(run[name] for run in runs) for runs in (base, head))
        lines.append((name, f"{1e3 * before:.4g}", f"{1e3 * after:.4g}", f"{after / before:.3f}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    own, options = arguments, []
    if "--" in arguments:
        own, options = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the benchmark: cosine, quantize, gumbel, beam, trie, train, integrations")
    parser.add_argument("--base", default="main", metavar="REF", help="default: main")
    parser.add_argument("--head", metavar="REF", help="default: the working tree as it is")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each version (default 3)")
    chosen = parser.parse_args(own)
    folders = {"base": checkout(chosen.base), "head": checkout(chosen.head)}
    runs: dict[str, list[dict[str, float]]] = {"base": [], "head": []}
    for round_ in range(chosen.rounds):
        for version in sorted(runs, reverse=bool(round_ % 2)):  # the second of a round goes first in the next
            output = FOLDER / f"{version}-{round_}.json"
            output.parent.mkdir(parents=True, exist_ok=True)
            runs[version].append(measure(folders[version], chosen.name, options, output))
    print(table(runs["base"], runs["head"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
