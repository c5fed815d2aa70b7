"""The trie: build, filters, updates, files; clustered semantic IDs in random order, three codes of 2048.

    python bench/bench_trie.py                    # 1e6 and 1e7 items
    python bench/bench_trie.py --items 100000000 --spread uniform --rounds 1   # in 8 GB
    python bench/bench_trie.py --json FILE

Memory: "kept" is what a trie takes, "peak" the most that a call took beyond what was there before.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import measure
import numpy as np
import torch
from bench_beam import Case

from dgi_kernels import Trie, beam_search

CHANGED = 1000  # items of an update
Figure = tuple[str, str, Callable[[], object], str]  # what, system, how, note


def packed_sort(sids: np.ndarray) -> object:
    """Sorting alone, by numpy: the codes of an item as one number."""
    keys = np.zeros(len(sids), dtype=np.int64)
    for column in sids.T:
        keys = keys << 11 | column
    return np.sort(keys)


def search(trie: Trie) -> Callable[[], object]:
    logits = torch.randn(3, 8, 50, 2048)
    return lambda: beam_search(
        trie, lambda depth, tokens, parents: logits[depth][:, : 1 if depth == 0 else 50], batch_size=8, num_beams=50
    )


def figures(case: Case, folder: Path, references: bool = True) -> Iterator[Figure]:
    """What is measured, each with what it needs made before; ``references``: builds that are not ours too."""
    sids = case.sids()
    sizes, items = [case.codes] * case.levels, case.items
    trie = Trie.from_codes(sids, codebook_sizes=sizes)
    levels = sum(array.nbytes for name, array in trie.arrays.items() if not name.startswith("item"))
    kept = f"kept {levels / 1e6:.1f} MB and {(trie.nbytes - levels) / 1e6:.1f} of items' places, {trie.num_nodes} nodes"
    yield "build", "native", lambda: Trie.from_codes(sids, codebook_sizes=sizes), kept
    if references and items <= 10**7:
        yield "build", "numpy's sort of packed keys alone", lambda: packed_sort(sids), ""
    if references and items <= 10**6:
        yield "build", "reference", lambda: Trie.from_codes(sids, codebook_sizes=sizes, backend="reference"), kept

    mask = torch.rand(items) < 0.1
    ids = mask.nonzero().squeeze(1)
    some, others = trie.filter(mask=mask), trie.filter(mask=torch.rand(items) < 0.5)
    yield "filter", "of a mask", lambda: trie.filter(mask=mask), f"{some.base.words.nbytes / 1e6:.2f} MB"
    yield "filter", "of a mask, and its nodes", lambda: trie.filter(mask=mask).nodes, ""
    yield "filter", "of the ids of a tenth", lambda: trie.filter(items=ids), ""
    yield "filter", "a & b", lambda: some & others, ""

    random = np.random.default_rng(1)
    new = torch.from_numpy(random.integers(0, case.codes, (CHANGED, case.levels)))
    gone = torch.randperm(items)[: 2 * CHANGED]
    first = trie.update(add=(new, torch.arange(items, items + CHANGED)), remove=gone[:CHANGED])
    yield (
        "update",
        f"{CHANGED} come, {CHANGED} go",
        lambda: trie.update(add=(new, torch.arange(items, items + CHANGED)), remove=gone[:CHANGED]),
        "",
    )
    yield (
        "update",
        "the same again",
        lambda: first.update(add=(new, torch.arange(items + CHANGED, items + 2 * CHANGED)), remove=gone[CHANGED:]),
        "",
    )
    if items <= 10**7:
        yield "update", "compact", first.compact, ""

    path = folder / "trie"
    yield "file", "save", lambda: trie.save(path), ""
    trie.save(path)
    yield "file", "load", lambda: Trie.load(path), f"{path.stat().st_size / 1e6:.1f} MB"
    yield "file", "load, mapped", lambda: Trie.load(path, mmap=True), ""
    yield "file", "load, mapped, not verified", lambda: Trie.load(path, mmap=True, verify=False), ""
    mapped = Trie.load(path, mmap=True, verify=False)
    yield "search, B=8 M=50", "built", search(trie), ""
    yield "search, B=8 M=50", "mapped", search(mapped), ""
    yield "search, B=8 M=50", "updated", search(first), ""
    yield "search, B=8 M=50", "filtered to a tenth", filtered(trie, some), ""


def filtered(trie: Trie, chosen: object) -> Callable[[], object]:
    logits = torch.randn(3, 8, 50, 2048)
    return lambda: beam_search(
        trie,
        lambda depth, tokens, parents: logits[depth][:, : 1 if depth == 0 else 50],
        batch_size=8,
        num_beams=50,
        filters=chosen,
    )


def run(case: Case, wanted: str, rounds: int, results: measure.Results) -> None:
    with tempfile.TemporaryDirectory() as folder:
        groups: dict[str, list[Figure]] = {}
        for figure in figures(case, Path(folder)):
            if wanted in figure[0]:
                groups.setdefault(figure[0], []).append(figure)
        for what, group in groups.items():
            systems = {system: how for _, system, how, _ in group}
            times = measure.interleaved(systems, rounds)
            for _, system, how, note in group:
                memory = measure.peak_bytes(how) if what in ("build", "update") else None
                results.add(
                    f"trie_{what.split(',')[0]}",
                    {"N": case.items, "L": case.levels, "V": case.codes, "SIDs": case.spread},
                    system,
                    times[system],
                    memory,
                )
                median = sorted(times[system])[rounds // 2]
                peak = "" if memory is None else f"peak {memory / 1e6:.0f} MB  "
                print(f"{case.items:>10} {what:<17} {system:<34} {1e3 * median:>10.3f} ms  {peak}{note}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, nargs="+", default=[10**6, 10**7])
    parser.add_argument("--filter", default="", help="only figures whose group has this in its name")
    parser.add_argument("--spread", choices=["clustered", "uniform"], default="clustered")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(measure.title())
    found = measure.Results()
    for count in options.items:
        run(Case(items=count, spread=options.spread), options.filter, options.rounds, found)
        print(f"{count:>10} the whole process: peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    if options.json:
        found.write(options.json)
