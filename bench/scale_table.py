"""The table of docs/scale.md from ``bench/results/cpu-scale.json``: what each step costs at each size of a catalog."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

STEPS = {
    "encode": "encode",
    "assign": "assign codes",
    "build": "build at once",
    "shards": "build and store shards",
    "merge": "merge shards",
}


def scale_table(path: Path) -> str:
    """Seconds of each step by size and the arithmetic of ten times the largest; memory; the time of a search."""
    if not path.exists():
        return "No results yet: `python bench/bench_scale.py --work FOLDER --json bench/results/cpu-scale.json`"
    document = json.loads(path.read_text())
    figures: dict[int, dict[str, Any]] = {}
    for one in document["benchmarks"]:
        figures.setdefault(one["params"]["N"], {})[one["params"]["system"]] = one
    sizes = sorted(figures)
    largest = figures[sizes[-1]]
    titles = [f"{size:,} items" for size in sizes]
    rows = [
        "| step | " + " | ".join(titles) + f" | µs an item | {10 * sizes[-1]:,} items, ten times |",
        "|---|" + "--:|" * (len(sizes) + 2),
    ]
    for step, name in STEPS.items():
        seconds = [figures[size][step]["stats"]["median"] for size in sizes]
        each = 1e6 * seconds[-1] / sizes[-1]
        rows.append(f"| {name} | {' | '.join(map(_seconds, seconds))} | {each:.3g} | {_seconds(10 * seconds[-1])} |")
    search = [f"{1e3 * figures[size]['search']['stats']['median']:.2g} ms" for size in sizes]
    rows.append(f"| search, 8 requests of 50 beams | {' | '.join(search)} | – | – |")
    memory = {
        "codes": lambda size: figures[size]["build"]["extra_info"]["codes"],
        "trie": lambda size: figures[size]["build"]["extra_info"]["nbytes"],
        "peak of building at once, with the trie": lambda size: figures[size]["build"]["extra_info"]["peak_bytes"],
        "peak of merging, with the trie": lambda size: figures[size]["merge"]["extra_info"]["peak_bytes"],
    }
    for name, of in memory.items():
        values = [_megabytes(of(size)) for size in sizes]
        rows.append(f"| {name} | {' | '.join(values)} | – | {_megabytes(10 * of(sizes[-1]))} |")
    machine, commit = document["machine_info"], document["commit_info"]["id"][:10]
    leaves = largest["build"]["extra_info"]["leaves"]
    where = (
        f"{machine['cpu']}, one thread, seconds of the processor; {leaves:,} semantic IDs at {sizes[-1]:,} items; "
        f"torch {machine['torch']}; {document['datetime'][:10]}, commit `{commit}`: `{document['command']}`"
    )
    return "\n".join([*rows, "", f"<sub>{where}</sub>"])


def _seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 100 else f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def _megabytes(value: int) -> str:
    return (
        f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.2g} MB" if value < 1e8 else f"{value / 1e6:.0f} MB"
    )
