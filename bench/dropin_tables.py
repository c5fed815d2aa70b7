"""The tables of docs/integration.md from ``bench/results/dropin-*.json``: others' code as it is and with our lines."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from dropins import KINDS, load
from figure_texts import megabytes, significant


def dropin_tables(results: Path) -> str:
    """Each step, and the medians of each kind of step."""
    lines = ["| code | step | lines | theirs ÷ ours | MB: theirs / ours | result |", "|---|---|--:|--:|--:|---|"]
    where: set[str] = set()
    ratios: dict[str, dict[tuple[str, str], float]] = {}
    for path in sorted(results.glob("dropin-*.json")):
        document = json.loads(path.read_text())
        steps: dict[str, dict[str, dict[str, Any]]] = {}
        for one in document["benchmarks"]:
            steps.setdefault(one["params"]["step"], {})[one["params"]["system"]] = one
        for step, pair in steps.items():
            theirs, ours = pair["theirs"], pair["ours"]
            memory = " / ".join(megabytes(one["extra_info"]["peak_bytes"] or 0) for one in (theirs, ours))
            ratio = theirs["stats"]["median"] / ours["stats"]["median"]
            name, same = ours["params"]["codebase"], ours["extra_info"]["equal"]
            equal = "equal" if same else f"differs: {load(name).differs[step]}"
            changed = ours["extra_info"]["lines"]
            lines.append(f"| `{name}` | {step} | {changed} | {significant(ratio)} | {memory} | {equal} |")
            if same:
                ratios.setdefault(load(name).kind, {})[name, step] = ratio
        machine, clock = document["machine_info"], document["benchmarks"][0]["extra_info"].get("clock")
        where.add(
            f"{machine['cpu']}, {machine['threads']} thread{'s'[: machine['threads'] > 1]}"
            + (", seconds of the processor" if clock == "processor" else "")
            + f", torch {machine['torch']}"
        )
    source = f"<sub>{'; '.join(sorted(where))}: `bench/results/dropin-*.json`</sub>"
    return "\n".join([*lines, "", *_medians(ratios), "", source])


def _medians(ratios: dict[str, dict[tuple[str, str], float]]) -> list[str]:
    """The steps of each kind together, those whose results are equal: of ratios by kind, codebase and step."""
    lines = ["| steps with equal results | codebases | steps | median of theirs ÷ ours | least | most |"]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    for kind in KINDS:
        if found := ratios.get(kind):
            figures = (statistics.median(found.values()), min(found.values()), max(found.values()))
            codebases = len({name for name, _ in found})
            lines.append(f"| {kind} | {codebases} | {len(found)} | {' | '.join(map(significant, figures))} |")
    return lines
