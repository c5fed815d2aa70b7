"""What node scores cost: the steps of a search that prefers clicked items, of the same beams with scores and without.

A search with node scores visits other nodes than one without, and popular ones have many children: whole searches of
both are the systems ``weighted`` and ``native`` of bench_beam.py. Here each step has the beams that the search with
scores has found, so that both do the same but for the scores. One thread; clicks follow Zipf's law.

Run: python bench/bench_node_scores.py [CASE ...] [--strength S] [--json FILE]      (CASE of bench_beam.py)
"""

from __future__ import annotations

import argparse
import functools
import statistics
from dataclasses import asdict

import torch
from bench_beam import CASES, Case, Model, measured, trie_of
from measure import Results, title

from dgi_kernels import beam_step

DEFAULT = ("V256", "V256-B64", "B8-M50", "B64-M50", "uniform-V256")


def bench(name: str, case: Case, strength: float, results: Results) -> None:
    torch.manual_seed(0)
    trie, model = trie_of(case.sids(), case), Model(case)
    scores = trie.node_scores(1 / (1 + torch.randperm(case.items)))
    beams, total = trie.root(case.batch), {"without": 0.0, "with": 0.0}
    for level, logits in enumerate(model.logits):
        without = functools.partial(beam_step, trie, logits, beams, num_beams=case.beams)
        scored = functools.partial(without, node_scores=scores, strength=strength)
        times = measured({"without": without, "with": scored})
        for system, seconds in times.items():
            total[system] += statistics.median(seconds)
            results.add("node_scores", asdict(case) | {"level": level}, system, seconds)
        median = {system: 1e3 * statistics.median(seconds) for system, seconds in times.items()}
        ratio = median["with"] / median["without"]
        print(
            f"{name:14} level {level}: {median['without']:.3f} ms, with node scores {median['with']:.3f}, {ratio:.2f}"
        )
        beams = scored()
    print(f"{name:14} all: {1e3 * total['without']:.3f} ms, with {1e3 * total['with']:.3f}, ", end="")
    print(f"{total['with'] / total['without']:.2f} times as long", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: {' '.join(DEFAULT)}")
    parser.add_argument("--strength", type=float, default=0.5, help="of the scores (default 0.5)")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {sorted(unknown)}; there are {', '.join(CASES)}")
    torch.set_num_threads(1)
    print(title())
    results = Results()
    for name in options.cases or DEFAULT:
        bench(name, CASES[name], options.strength, results)
    if options.json:
        results.write(options.json)


if __name__ == "__main__":
    main()
