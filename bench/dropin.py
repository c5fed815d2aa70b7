"""Our ops in code of others: run theirs as it is and with at most three changed lines; compare results, time, memory.

    python bench/dropin.py --list
    python bench/dropin.py NAME --source DIR --data FOLDER [--rounds N] [--json FILE]

DIR is a git repository of the code that has the pinned commit (a clone, or a bare one); a package of PyPI is taken from
this environment. FOLDER holds real semantic IDs or vectors, see docs/integration.md. The code is copied twice to
a temporary folder; the second copy gets the changed lines, which are printed. Then both run in turns, each in a process
with the same seeds. It fails if outputs differ by more than the drop-in allows. Nothing of DIR is changed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

import dropins
from dropins import MOST_LINES, Change, DropIn
from measure import Results, title
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent


def copy_source(dropin: DropIn, source: Path | None, folder: Path) -> None:
    """The pinned code in ``folder``."""
    if dropin.source.startswith("pypi:"):
        name, _, version = dropin.source.removeprefix("pypi:").partition("==")
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise SystemExit(f"{name} is not installed; run: pip install {name}=={version}") from None
        if found.version != version:
            raise SystemExit(
                f"{name} {found.version} is installed, {version} is compared; run: pip install {name}=={version}"
            )
        for package in (found.read_text("top_level.txt") or name.replace("-", "_")).split():
            shutil.copytree(str(found.locate_file(package)), folder / package)
        return
    if source is None:
        raise SystemExit(f"--source DIR is needed: a clone of {dropin.source}")
    archive = subprocess.run(["git", "-C", source, "archive", dropin.commit, *dropin.paths], capture_output=True)
    if archive.returncode:
        raise SystemExit(
            f"{source} does not have commit {dropin.commit} ({archive.stderr.decode().strip()}); "
            f"run: git clone {dropin.source} DIR"
        )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")


def apply(changes: Iterable[Change], folder: Path) -> str:
    """Make the changes and return them as a diff."""
    texts: dict[str, tuple[str, str]] = {}
    for change in changes:
        original, text = texts.get(change.path) or [(folder / change.path).read_text()] * 2
        if text.count(change.before) != 1:
            raise SystemExit(f"{change.path} has the lines to change {text.count(change.before)} times, not once")
        texts[change.path] = original, text.replace(change.before, change.after)
    lines: list[str] = []
    for path, (original, text) in texts.items():
        (folder / path).write_text(text)
        lines += difflib.unified_diff(
            original.splitlines(), text.splitlines(), f"a/{path}", f"b/{path}", n=0, lineterm=""
        )
    return "\n".join(lines)


def changed_lines(diff: str) -> int:
    """How many lines differ: those added, or those removed where these are more."""
    body = [line for line in diff.splitlines() if not line.startswith(("+++", "---", "@@"))]
    return max(sum(line[0] == sign for line in body) for sign in "+-")


def run(name: str, folder: Path, output: Path, rounds: int, data: Path | None) -> dict:
    """One process on one version: its figures."""
    output.mkdir()
    worker = ROOT / "bench" / "dropins" / "worker.py"
    command = [sys.executable, worker, name, output, str(rounds), *([data] if data else [])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed in {folder.name}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads((output / "figures.json").read_text())


def difference(dropin: DropIn, theirs: Path, ours: Path) -> tuple[list[str], float]:
    """What differs by more than is allowed, in words; and the largest difference relative to its output's largest."""
    faults, largest = [], 0.0
    before, after = load_file(theirs), load_file(ours)
    if before.keys() != after.keys():
        return [f"outputs {sorted(before)} and {sorted(after)}"], float("inf")
    for key in before:
        allowed, one, other = dropin.tolerance.get(key, 0.0), before[key], after[key]
        if one.shape != other.shape or one.dtype != other.dtype:
            faults.append(f"{key}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}")
            continue
        if not one.is_floating_point():
            if (count := int((one != other).sum())) > allowed * one.numel():
                faults.append(f"{key}: {count} of {one.numel()} differ")
            continue
        finite = one.isfinite()
        if not bool((finite == other.isfinite()).all()) or not bool((one[~finite] == other[~finite]).all()):
            faults.append(f"{key}: not finite in other places")
            continue
        size = float(one[finite].abs().max()) if bool(finite.any()) else 1.0
        gap = float((one[finite].double() - other[finite].double()).abs().max() / max(size, 1e-30)) if size else 0.0
        largest = max(largest, gap)
        if gap > allowed:
            faults.append(f"{key}: differs by {gap:.2g} of its largest element, {allowed:.2g} allowed")
    return faults, largest


def compare(name: str, source: Path | None, data: Path | None, rounds: int, results: Results) -> bool:
    """Run one drop-in, print what it shows; whether all outputs are equal."""
    dropin = dropins.load(name)
    missing = [package for package in dropin.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise SystemExit(f"{name} needs packages that are missing here; run: pip install {' '.join(missing)}")
    file = None
    if dropin.data:
        if data is None or not (data / dropin.data).exists():
            raise SystemExit(f"{name} reads {dropin.data}; --data FOLDER must hold it")
        file = data / dropin.data
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        versions = {"theirs": work / "theirs", "ours": work / "ours"}
        for folder in versions.values():
            folder.mkdir()
            copy_source(dropin, source, folder)
        diff = apply(dropin.changes, versions["ours"])
        lines = changed_lines(diff)
        if lines > MOST_LINES:
            raise SystemExit(f"{name} changes {lines} lines, more than {MOST_LINES}")
        print(f"{name}: {dropin.title}\n{dropin.source} {dropin.commit[:10]}, {lines} lines\n\n{diff}\n")
        runs: dict[str, list[dict]] = {version: [] for version in versions}
        for turn in range(rounds):
            for version in sorted(versions, reverse=turn % 2 == 0):
                output = work / f"{version}-{turn}"
                runs[version].append(run(name, versions[version], output, 3, file))
        equal = True
        for step in runs["theirs"][0]["steps"]:
            paths = [work / f"{version}-0" / f"{step}.safetensors" for version in ("theirs", "ours")]
            faults, largest = difference(dropin, *paths)
            expected = dropin.differs.get(step)
            equal &= bool(faults) == (expected is not None)
            times, memory = {}, {}
            for version, figures in runs.items():
                times[version] = [time for one in figures for time in one["steps"][step]["seconds"]]
                peaks = [one["steps"][step]["peak_bytes"] for one in figures]
                memory[version] = None if None in peaks else int(statistics.median(peaks))
                results.add(
                    "drop-in",
                    {"codebase": name, "step": step},
                    version,
                    times[version],
                    memory[version],
                    lines=lines,
                    equal=not faults,
                    largest_difference=largest,
                    **({"clock": "processor"} if runs[version][0]["clock"] == "processor_seconds" else {}),
                )
            medians = {version: statistics.median(times[version]) for version in versions}
            megabytes = "/".join("-" if value is None else f"{value / 1e6:.0f}" for value in memory.values())
            print(
                f"{step}: theirs {1e3 * medians['theirs']:.2f} ms, ours {1e3 * medians['ours']:.2f} ms, "
                f"{medians['theirs'] / medians['ours']:.2f} times as fast; MB {megabytes}; "
                + ("; ".join(faults) if faults else f"equal (floats within {largest:.1g})")
                + (f" ({expected})" if expected else "")
            )
    return equal


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=dropins.names(), help="of the drop-in; --list shows what each is")
    parser.add_argument("--list", action="store_true", help="list the drop-ins and where their code comes from")
    parser.add_argument("--source", type=Path, metavar="DIR", help="a git repository of the code")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the data")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each version, in turns (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    arguments = parser.parse_args(argv)
    if arguments.list or arguments.name is None:
        for name in dropins.names():
            dropin = dropins.load(name)
            print(f"{name:24} {dropin.title}\n{'':24} {dropin.source} {dropin.commit[:10]}")
        return 0
    print(title())
    source = "" if arguments.source is None else " --source DIR"
    results = Results(f"python bench/dropin.py {arguments.name}{source} --data FOLDER --rounds {arguments.rounds}")
    equal = compare(arguments.name, arguments.source, arguments.data, arguments.rounds, results)
    if arguments.json:
        results.write(arguments.json)
        print(f"written to {arguments.json}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
