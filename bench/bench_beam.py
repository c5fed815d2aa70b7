"""Whole constrained beam searches: ours against STATIC, a dict trie with the Hugging Face processor, and a dense mask.

The model's side is left out: all get the same logits, one (B, M, V) tensor per level. The systems take turns within
each round; the tables have medians, of the whole search and of its steps, and how many of the codes are those that ours
finds. The floor is a copy of the same logits. A second table has the last step from hidden states: the fused one, and
the head's product, then the step; its floor is the raw product. A third has the ranking of the items that were found.
``filtered`` is our search of half of the items, taken at random, ``updated`` that of a trie from which 1,000 items were
taken and to which 1,000 others were added, ``weighted`` one that prefers items by clicks, which follow Zipf's law.

Run: python bench/bench_beam.py [CASE ...] [--only SYSTEM ...] [--json FILE]
     CASE is one of CASES below (default: those of DEFAULT), or --items, --codes, --levels, --batch, --beams, --dim,
     --spread make one. STATIC_SRC=<checkout of github.com/youtube/static-constraint-decoding> adds that system, and on
     a GPU `pip install flashrec` adds FlashRec's kernel. SIDs are kept in the directory for temporary files.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import Results, Step, interleaved, seconds, title
from torch import Tensor

from dgi_kernels import (
    Beams,
    Trie,
    backends,
    beam_search,
    beam_step,
    cosine_beam_step,
    cosine_logits,
    rank_candidates,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 5, 50  # at least and at most
BUDGET = 5.0  # seconds for all rounds of a table

SYSTEMS = (
    "native",
    "filtered",
    "updated",
    "weighted",
    "reference",
    "STATIC",
    "STATIC compiled",
    "dict trie",
    "dense mask",
    "FlashRec",
    "heads",
    "ranking",
)
OTHER_ITEMS = "filtered", "updated", "weighted"  # what they find need not be what the others do


@dataclass(frozen=True)
class Case:
    """N items with L codes of V each; B requests of M beams; hidden states of D elements."""

    items: int = 10**6
    codes: int = 2048
    levels: int = 3
    batch: int = 8
    beams: int = 50
    dim: int = 256
    spread: str = "clustered"

    def sids(self) -> np.ndarray:
        """(N, L) codes, from a file where this ran before."""
        path = Path(tempfile.gettempdir()) / f"dgi-sids-{self.items}-{self.codes}-{self.levels}-{self.spread}.npy"
        if not path.exists():
            temporary = path.with_suffix(f".{os.getpid()}.part.npy")
            np.save(temporary, self._new_sids())
            temporary.replace(path)
        return np.load(path)

    def _new_sids(self) -> np.ndarray:
        """Clustered: each level's codes follow Zipf's law, in an order that the prefix decides."""
        random, chunk = np.random.default_rng(0), 10**6
        sids = np.empty((self.items, self.levels), dtype=np.int16 if self.codes <= 2**15 else np.int32)
        if self.spread == "uniform":
            for first in range(0, self.items, chunk):
                part = sids[first : first + chunk]
                part[:] = random.integers(0, self.codes, part.shape)
            return sids
        cumulated = np.cumsum(1 / np.arange(1, self.codes + 1))
        order = random.permutation(self.codes)
        for first in range(0, self.items, chunk):
            part = sids[first : first + chunk]
            ranks = np.searchsorted(cumulated[:-1], random.random(part.shape) * cumulated[-1])
            prefix = np.zeros(len(part), dtype=np.int64)
            for level in range(self.levels):
                part[:, level] = order[(ranks[:, level] + prefix) % self.codes]
                prefix = (prefix * 31 + part[:, level] + 1) % 1_000_003
        return sids


CASES = {
    "B1-M10": Case(batch=1, beams=10),
    "B1-M50": Case(batch=1),
    "B8-M10": Case(beams=10),
    "B8-M50": Case(),
    "B64-M10": Case(batch=64, beams=10),
    "B64-M50": Case(batch=64),
    "B64-M100": Case(batch=64, beams=100),
    "M512": Case(beams=512),
    "V256": Case(codes=256),
    "V256-B64": Case(codes=256, batch=64),
    "V256-N1e5": Case(items=10**5, codes=256),
    "V4096": Case(codes=4096, batch=64),
    "L4": Case(levels=4),
    "L5": Case(levels=5),
    "L8": Case(levels=8),
    "uniform": Case(spread="uniform"),
    "uniform-V256": Case(codes=256, spread="uniform"),
    "uniform-N1e5": Case(items=10**5, spread="uniform"),
    "uniform-N1e7": Case(items=10**7, batch=64, spread="uniform"),
    "N1e5": Case(items=10**5),
    "N1e7": Case(items=10**7, batch=64),
    "N1e8": Case(items=10**8, batch=64),  # 8 GB
}
DEFAULT = [name for name in CASES if name != "N1e8"]


class Model:
    """The model's side of a search: hands out the logits of each level, and notes when it was asked for them."""

    def __init__(self, case: Case) -> None:
        self.case, self.asked = case, []
        self.logits = [
            torch.randn(case.batch, case.beams if level else 1, case.codes, device=DEVICE)
            for level in range(case.levels)
        ]

    def __call__(self, level: int) -> Tensor:
        self.asked.append(time.perf_counter())
        return self.logits[level]


Search = Callable[[], Tensor]  # -> (B, M, L) codes


def trie_of(sids: np.ndarray, case: Case) -> Trie:
    return Trie.from_codes(sids, codebook_sizes=[case.codes] * case.levels).to(DEVICE)


def ours(sids: np.ndarray, model: Model, case: Case, backend: str) -> Search:
    trie = trie_of(sids, case)
    return lambda: (
        beam_search(
            trie,
            lambda depth, tokens, parents: model(depth),
            batch_size=case.batch,
            num_beams=case.beams,
            backend=backend,
        ).codes
    )


def filtered(sids: np.ndarray, model: Model, case: Case) -> Search:
    trie = trie_of(sids, case)
    half = trie.filter(mask=torch.rand(case.items, device=DEVICE) < 0.5)
    return lambda: (
        beam_search(
            trie, lambda depth, tokens, parents: model(depth), batch_size=case.batch, num_beams=case.beams, filters=half
        ).codes
    )


def updated(sids: np.ndarray, model: Model, case: Case, changes: int = 1000) -> Search:
    gone = torch.randperm(case.items, device=DEVICE)[:changes]
    added = torch.as_tensor(sids[np.random.default_rng(0).integers(0, case.items, changes)]).to(DEVICE)
    added[:, -1] = torch.randint(0, case.codes, (changes,), device=DEVICE)  # prefixes as popular as those of the others
    ids = torch.arange(case.items, case.items + changes, device=DEVICE)
    trie = trie_of(sids, case).update(add=(added, ids), remove=gone)
    return lambda: (
        beam_search(
            trie, lambda depth, tokens, parents: model(depth), batch_size=case.batch, num_beams=case.beams
        ).codes
    )


def weighted(sids: np.ndarray, model: Model, case: Case) -> Search:
    trie = trie_of(sids, case)
    scores = trie.node_scores(1 / (1 + torch.randperm(case.items, device=DEVICE)))
    return lambda: (
        beam_search(
            trie,
            lambda depth, tokens, parents: model(depth),
            batch_size=case.batch,
            num_beams=case.beams,
            node_scores=scores,
            strength=0.5,
        ).codes
    )


def static_search(sids: np.ndarray, case: Case) -> Callable[[list[Tensor], Callable[[int], object]], Tensor]:
    if os.environ["STATIC_SRC"] not in sys.path:
        sys.path.insert(0, os.environ["STATIC_SRC"])
    from static_decoding import decoding_pt
    from static_decoding.csr_utils import build_static_index

    packed, starts, branches, *dense = build_static_index(sids[np.lexsort(sids.T[::-1])].astype(np.int32), case.codes)
    arrays = [torch.as_tensor(array).to(DEVICE) for array in (packed, starts, *dense)]

    def search(logits: list[Tensor], ask: Callable[[int], object]) -> Tensor:
        steps = iter(range(case.levels))

        def step(ids: Tensor) -> Tensor:
            level = next(steps)
            ask(level)
            return logits[level].view(-1, 1, case.codes)

        return decoding_pt.sparse_transition_torch(
            step,
            case.batch,
            case.beams,
            case.beams,
            0,
            case.levels,
            case.codes,
            branches,
            *arrays,
            torch.device(DEVICE),
        )

    return search


def static(sids: np.ndarray, model: Model, case: Case) -> Search:
    search = static_search(sids, case)
    return lambda: search(model.logits, model)


def static_compiled(sids: np.ndarray, model: Model, case: Case) -> Search:
    """The whole search as one graph. Its functions without torch.inference_mode, which torch.compile cannot do."""
    torch._dynamo.reset()
    search = static_search(sids, case)
    decorated = sys.modules["static_decoding.decoding_pt"]
    names = "generate_and_apply_logprobs_mask", "sparse_transition_torch"
    plain = {name: getattr(decorated, name).__wrapped__ for name in names}

    @torch.no_grad()
    def run() -> Tensor:
        with unittest.mock.patch.multiple(decorated, **plain):
            return compiled(model.logits)

    compiled = torch.compile(lambda logits: search(logits, lambda level: None), dynamic=False)
    run()
    return run


def masked_search(model: Model, case: Case, mask: Callable[[Tensor], Tensor]) -> Search:
    """``mask(codes (B, M, t))`` -> (B, M, V), 0 where a code may follow and -inf elsewhere."""

    def search() -> Tensor:
        scores = torch.zeros(case.batch, 1, device=DEVICE)
        codes = torch.empty(case.batch, 1, 0, dtype=torch.int64, device=DEVICE)
        for level in range(case.levels):
            logprobs = F.log_softmax(model(level), -1) + mask(codes)
            scores, place = (scores.unsqueeze(2) + logprobs).flatten(1).topk(case.beams)
            parents = (place // case.codes).unsqueeze(2).expand(-1, -1, level)
            codes = torch.cat([codes.gather(1, parents), (place % case.codes).unsqueeze(2)], dim=2)
        return codes

    return search


def dict_trie(sids: np.ndarray, model: Model, case: Case) -> Search:
    """Nested dicts, and what Hugging Face's PrefixConstrainedLogitsProcessor does with them for each beam."""
    root: dict = {}
    for row in sids.tolist():
        node = root
        for code in row:
            node = node.setdefault(code, {})

    def mask(codes: Tensor) -> Tensor:
        result = torch.full((*codes.shape[:2], case.codes), -torch.inf, device=DEVICE)
        for b, request in enumerate(codes.tolist()):
            for m, prefix in enumerate(request):
                node = root
                for code in prefix:
                    node = node.get(code, {})
                result[b, m, list(node)] = 0
        return result

    return masked_search(model, case, mask)


def dense_mask(sids: np.ndarray, model: Model, case: Case) -> Search:
    """A (nodes, V) table of what may follow, per level."""
    tables, keys = [], [torch.zeros(1, dtype=torch.int64)]
    prefix = torch.zeros(len(sids), dtype=torch.int64)
    for level in range(case.levels):
        table = torch.full((len(keys[-1]), case.codes), -torch.inf)
        code = torch.from_numpy(sids[:, level]).long()
        table[torch.searchsorted(keys[-1], prefix), code] = 0
        tables.append(table.to(DEVICE))
        prefix = prefix * case.codes + code
        keys.append(prefix.unique())
    keys = [key.to(DEVICE) for key in keys]

    def mask(codes: Tensor) -> Tensor:
        key = torch.zeros(codes.shape[:2], dtype=torch.int64, device=DEVICE)
        for code in codes.unbind(2):
            key = key * case.codes + code
        depth = codes.shape[2]
        return tables[depth][torch.searchsorted(keys[depth], key).clamp(max=len(keys[depth]) - 1)]

    return masked_search(model, case, mask)


def flashrec(sids: np.ndarray, model: Model, case: Case) -> Search:
    """Its kernel over dense tables of (nodes, V): the best M tokens of each beam are selected before the mask."""
    from flashrec.kernel.beam_trie import GenrecFusedWorkspace, genrec_mask_topk_expand

    trie = trie_of(sids, case)
    offsets = np.cumsum([0, *(trie.num_nodes_at(depth) for depth in range(case.levels))])  # node numbers by depth
    dead = int(offsets[-1])
    allowed = torch.zeros(dead + 1, case.codes, dtype=torch.bool, device=DEVICE)
    following = torch.full((dead + 1, case.codes), dead, dtype=torch.int64, device=DEVICE)
    prefix, node = np.zeros(len(sids), dtype=np.int64), np.zeros(len(sids), dtype=np.int64)
    for level in range(case.levels):
        prefix = prefix * case.codes + sids[:, level]
        at = torch.from_numpy(offsets[level] + node).to(DEVICE), torch.from_numpy(sids[:, level]).long().to(DEVICE)
        allowed[at] = True
        if level + 1 < case.levels:
            node = np.unique(prefix, return_inverse=True)[1]
            following[at] = torch.from_numpy(offsets[level + 1] + node).to(DEVICE)
    workspace = GenrecFusedWorkspace()

    def search() -> Tensor:
        scores = torch.full((case.batch, case.beams), -torch.inf, device=DEVICE)
        scores[:, 0] = 0
        codes = torch.zeros(case.batch, case.beams, case.levels, dtype=torch.int64, device=DEVICE)
        nodes = torch.zeros(case.batch, case.beams, dtype=torch.int64, device=DEVICE)
        for level in range(case.levels):
            logprobs, tokens = F.log_softmax(model(level), -1).topk(case.beams, dim=-1)
            if level == 0:
                logprobs, tokens = (x.expand(-1, case.beams, -1).contiguous() for x in (logprobs, tokens))
            result = genrec_mask_topk_expand(
                scores,
                logprobs,
                tokens,
                select_k=case.beams,
                node_ids=nodes,
                allow_table=allowed,
                token_ids=codes,
                col=level,
                next_node=following,
                invalid_node=dead,
                workspace=workspace,
            )
            scores, codes, nodes = result.vals.clone(), result.token_ids, result.node_ids
        return codes.clone()

    return search


def systems(case: Case) -> dict[str, Callable[[np.ndarray, Model, Case], Search]]:
    """What can run this case, by name."""
    found = {
        backend: lambda *given, backend=backend: ours(*given, backend)
        for backend in ("native", "reference")
        if backends()[backend].available
    }
    if case.items > 10**7:
        print(f"{case.items} items: ours alone, since the others take too long to build")
        return {"native": found["native"]}
    if case.batch * case.beams * case.codes > 10**7:
        found.pop("reference")  # seconds a search
    if "native" in found:
        found |= {"filtered": filtered, "updated": updated, "weighted": weighted}
    if "STATIC_SRC" in os.environ and case.beams <= case.codes:
        found |= {"STATIC": static, "STATIC compiled": static_compiled}
    if case.items <= 10**6 and case.levels <= 4:
        found["dict trie"] = dict_trie
    nodes = min(case.items, case.codes ** (case.levels - 1))
    if nodes * case.codes <= 10**8:
        found["dense mask"] = dense_mask
    fits_flashrec = case.beams <= 512 and nodes * case.codes <= 4 * 10**9
    if DEVICE == "cuda" and importlib.util.find_spec("flashrec") and fits_flashrec:
        found["FlashRec"] = flashrec
    return found


def measured(functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Seconds by name, in as many rounds as the budget allows."""
    round_seconds = sum(seconds(function) for function in functions.values())
    return interleaved(functions, int(min(max(BUDGET / round_seconds, ROUNDS[0]), ROUNDS[1])))


def bench_searches(case: Case, results: Results, only: list[str] | None) -> dict[str, float]:
    """Print and add the whole searches of a case; return the median seconds by system, and of the floor."""
    sids, model = case.sids(), Model(case)
    searches, built = {}, {}
    for name, make in systems(case).items():
        if only is None or name in only:
            built[name] = seconds(lambda name=name, make=make: searches.update({name: make(sids, model, case)}))
    answers = {name: search() for name, search in searches.items()}
    steps: dict[str, list[list[float]]] = {name: [] for name in searches}

    def timed(name: str) -> None:
        model.asked = []
        searches[name]()
        times = [*model.asked, time.perf_counter()]
        steps[name].append([after - before for before, after in zip(times, times[1:], strict=False)])

    copies = [torch.empty_like(level) for level in model.logits]
    functions = {name: lambda name=name: timed(name) for name in searches}
    functions["floor"] = lambda: [copy.copy_(level) for copy, level in zip(copies, model.logits, strict=True)]
    times = measured(functions)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"\n{case}\n{title()}, medians of {len(times['floor'])} rounds; floor: a copy of the logits")
    print(f"{'':16}{'search ms':>12}{'x native':>10}{'build s':>10}{'same codes':>12}   steps ms")
    for name, value in median.items():
        taken = steps.get(name, []) if DEVICE == "cpu" else []
        by_step = [statistics.median(step) for step in zip(*taken, strict=True)]
        same = (
            (answers[name] == answers["native"]).double().mean().item()
            if name in answers and "native" in answers and name not in OTHER_ITEMS
            else None
        )
        print(
            f"{name:16}{1e3 * value:12.3f}{value / median.get('native', value):10.2f}{built.get(name, 0):10.2f}"
            + (f"{100 * same:10.1f} %" if same is not None else f"{'':12}")
            + "   "
            + " ".join(f"{1e3 * step:.3f}" for step in by_step),
            flush=True,
        )
        results.add(
            "beam_search", asdict(case), name, times[name], build_s=built.get(name), same_codes=same, steps_s=by_step
        )
    return median


def head_then_step(trie: Trie, h: Tensor, codebook: Tensor, beams: Beams, **options: Any) -> Beams:
    return beam_step(trie, cosine_logits(h, codebook, 30.0), beams, **options)


def head_steps(case: Case, normalize: str) -> dict[str, Step]:
    """The last step of a search, from hidden states."""
    trie = trie_of(case.sids(), case)
    codebook = torch.randn(case.codes, case.dim, device=DEVICE)
    beams = trie.root(case.batch)
    for _ in range(case.levels):
        h = torch.randn(case.batch, beams.nodes.shape[1], case.dim, device=DEVICE)
        last, beams = beams, cosine_beam_step(trie, h, codebook, 30.0, beams, num_beams=case.beams)
    options = {"num_beams": case.beams, "normalize": normalize}
    return {
        "head, then step": functools.partial(head_then_step, trie, h, codebook, last, **options),
        "fused": functools.partial(cosine_beam_step, trie, h, codebook, 30.0, last, **options),
        "floor": lambda: h.flatten(0, 1) @ codebook.T,
    }


def bench_heads(case: Case, results: Results) -> None:
    """Print and add the last step of a search, from hidden states."""
    for normalize in ("full", "children"):
        times = measured(head_steps(case, normalize))
        median = {name: statistics.median(values) for name, values in times.items()}
        print(
            f"last step, D={case.dim}, normalize={normalize}: "
            + ", ".join(f"{name} {1e3 * value:.3f} ms" for name, value in median.items())
            + f"; fused is {median['head, then step'] / median['fused']:.2f} times as fast"
        )
        for name in times:
            results.add("cosine_beam_step", asdict(case) | {"normalize": normalize}, name, times[name])


def ranking_steps(case: Case, k: int, dim: int) -> dict[str, Step]:
    """The ranking of what a search found."""
    trie, model = trie_of(case.sids(), case), Model(case)
    found = beam_search(trie, lambda depth, tokens, parents: model(depth), batch_size=case.batch, num_beams=case.beams)
    query, vectors = torch.randn(case.batch, dim, device=DEVICE), torch.randn(case.items, dim, device=DEVICE)
    return {
        backend: lambda backend=backend: rank_candidates(query, vectors, trie, found, k, backend=backend)
        for backend in ("native", "reference")
        if backends()[backend].available
    }


def bench_ranking(case: Case, results: Results, k: int = 100, dim: int = 64) -> None:
    """Print and add the ranking of what a search found."""
    times = measured(ranking_steps(case, k, dim))
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"ranking, k={k}, D={dim}: " + ", ".join(f"{name} {1e3 * value:.3f} ms" for name, value in median.items()))
    for name in times:
        results.add("rank_candidates", asdict(case) | {"k": k, "dim": dim}, name, times[name])


def run(case: Case, results: Results, only: list[str] | None = None) -> None:
    torch.manual_seed(0)
    if only is None or set(only) - {"heads", "ranking"}:
        bench_searches(case, results, only)
    if case.items <= 10**7 and (only is None or "heads" in only):
        bench_heads(case, results)
    if case.items <= 10**6 and (only is None or "ranking" in only):
        bench_ranking(case, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; default: all but N1e8")
    for field in fields(Case):
        parser.add_argument(f"--{field.name}", type=type(field.default), help=f"in place of {field.default}")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--only", nargs="*", choices=SYSTEMS, help="systems and tables (default: all)")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {sorted(unknown)}; there are {', '.join(CASES)}")
    torch.set_num_threads(options.threads)
    changes = {field.name: value for field in fields(Case) if (value := getattr(options, field.name)) is not None}
    chosen = [Case(**changes)] if changes else [CASES[name] for name in options.cases or DEFAULT]
    results = Results()
    for case in chosen:
        run(case, results, options.only)
    if options.json:
        results.write(options.json)


if __name__ == "__main__":
    main()
