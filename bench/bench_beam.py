"""Whole constrained beam searches: ours against STATIC, a dict trie with the Hugging Face processor, and a dense mask.

The model's side is left out: all get the same logits, one (B, M, V) tensor per level. The systems take turns within
each round; the table has medians. The floor is torch's log-sum-exp over the same logits alone. A second table has the
last step from hidden states: the fused one, and the head's product, then the step; its floor is the raw product.

Run: python bench/bench_beam.py [--items N] [--codes V] [--levels L] [--batch B] [--beams M] [--dim D]
                                [--spread clustered|uniform]
     STATIC_SRC=<checkout of github.com/youtube/static-constraint-decoding> adds that system.
     make bench, or pytest bench/bench_beam.py, runs the target case.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from measure import medians, seconds
from torch import Tensor

from dgi_kernels import Trie, backends, beam_search, beam_step, cosine_beam_step, cosine_logits

Search = Callable[[], Tensor]  # -> (B, M, L) codes


@dataclass(frozen=True)
class Case:
    """N items with L codes of V each; B requests of M beams."""

    items: int = 10**6
    codes: int = 2048
    levels: int = 3
    batch: int = 8
    beams: int = 50
    dim: int = 256
    spread: str = "clustered"

    def sids(self) -> np.ndarray:
        """(N, L) codes. Clustered: each level's codes follow Zipf's law, in an order that the prefix decides."""
        random = np.random.default_rng(0)
        if self.spread == "uniform":
            return random.integers(0, self.codes, (self.items, self.levels))
        weights = 1 / np.arange(1, self.codes + 1)
        ranks = random.choice(self.codes, (self.items, self.levels), p=weights / weights.sum())
        order = random.permutation(self.codes)
        prefix = np.zeros(self.items, dtype=np.int64)
        for level in range(self.levels):
            ranks[:, level] = order[(ranks[:, level] + prefix) % self.codes]
            prefix = (prefix * 31 + ranks[:, level] + 1) % 1_000_003
        return ranks

    def logits(self) -> list[Tensor]:
        return [torch.randn(self.batch, self.beams if level else 1, self.codes) for level in range(self.levels)]


def ours(sids: np.ndarray, logits: list[Tensor], case: Case, backend: str) -> Search:
    trie = Trie.from_codes(sids, codebook_sizes=[case.codes] * case.levels)
    return lambda: beam_search(trie, lambda depth, tokens, parents: logits[depth], batch_size=case.batch,
                               num_beams=case.beams, backend=backend).codes


def static(sids: np.ndarray, logits: list[Tensor], case: Case) -> Search:
    sys.path.insert(0, os.environ["STATIC_SRC"])
    from static_decoding.csr_utils import build_static_index
    from static_decoding.decoding_pt import sparse_transition_torch

    index = build_static_index(sids[np.lexsort(sids.T[::-1])].astype(np.int32), case.codes)
    packed, starts, branches, *dense = index
    arrays = [torch.as_tensor(array) for array in (packed, starts, *dense)]

    def search() -> Tensor:
        steps = iter(logits)
        return sparse_transition_torch(lambda ids: next(steps).view(-1, 1, case.codes), case.batch, case.beams,
                                       case.beams, 0, case.levels, case.codes, branches, *arrays, torch.device("cpu"))
    return search


def unconstrained_step(logprobs: Tensor, scores: Tensor, codes: Tensor, beams: int) -> tuple[Tensor, Tensor]:
    """The step of a search whose (B, M, V) log-probabilities are masked already."""
    size = logprobs.shape[2]
    scores, place = (scores.unsqueeze(2) + logprobs).flatten(1).topk(beams)
    parents = (place // size).unsqueeze(2).expand(-1, -1, codes.shape[2])
    return scores, torch.cat([codes.gather(1, parents), (place % size).unsqueeze(2)], dim=2)


def masked_search(logits: list[Tensor], case: Case, mask: Callable[[Tensor], Tensor]) -> Search:
    """``mask(codes (B, M, t))`` -> (B, M, V), 0 where a code may follow and -inf elsewhere."""
    def search() -> Tensor:
        scores, codes = torch.zeros(case.batch, 1), torch.empty(case.batch, 1, 0, dtype=torch.int64)
        for level in logits:
            scores, codes = unconstrained_step(F.log_softmax(level, -1) + mask(codes), scores, codes, case.beams)
        return codes
    return search


def dict_trie(sids: np.ndarray, logits: list[Tensor], case: Case) -> Search:
    """Nested dicts, and what Hugging Face's PrefixConstrainedLogitsProcessor does with them for each beam."""
    root: dict = {}
    for row in sids.tolist():
        node = root
        for code in row:
            node = node.setdefault(code, {})

    def mask(codes: Tensor) -> Tensor:
        result = torch.full((*codes.shape[:2], case.codes), -torch.inf)
        for b, request in enumerate(codes.tolist()):
            for m, prefix in enumerate(request):
                node = root
                for code in prefix:
                    node = node.get(code, {})
                result[b, m, list(node)] = 0
        return result
    return masked_search(logits, case, mask)


def dense_mask(sids: np.ndarray, logits: list[Tensor], case: Case) -> Search:
    """A (nodes, V) table of what may follow, per level."""
    tables, keys = [], [torch.zeros(1, dtype=torch.int64)]
    prefix = torch.zeros(len(sids), dtype=torch.int64)
    for level in range(case.levels):
        table = torch.full((len(keys[-1]), case.codes), -torch.inf)
        code = torch.from_numpy(sids[:, level]).long()
        table[torch.searchsorted(keys[-1], prefix), code] = 0
        tables.append(table)
        prefix = prefix * case.codes + code
        keys.append(prefix.unique())

    def mask(codes: Tensor) -> Tensor:
        key = torch.zeros(codes.shape[:2], dtype=torch.int64)
        for code in codes.unbind(2):
            key = key * case.codes + code
        depth = codes.shape[2]
        return tables[depth][torch.searchsorted(keys[depth], key).clamp(max=len(keys[depth]) - 1)]
    return masked_search(logits, case, mask)


def systems(case: Case) -> dict[str, Callable[[np.ndarray, list[Tensor], Case], Search]]:
    """What can run this case, by name."""
    found = {backend: lambda *given, backend=backend: ours(*given, backend)
             for backend in ("native", "reference") if backends()[backend].available}
    if "STATIC_SRC" in os.environ:
        found["STATIC"] = static
    if case.items <= 10**6:
        found["dict trie"] = dict_trie
    if min(case.items, case.codes**(case.levels - 1)) * case.codes <= 10**8:
        found["dense mask"] = dense_mask
    return found


def heads(sids: np.ndarray, case: Case) -> dict[str, Callable[[], object]]:
    """The last step of a search from hidden states, by name."""
    trie = Trie.from_codes(sids, codebook_sizes=[case.codes] * case.levels)
    codebook = torch.randn(case.codes, case.dim)
    beams = trie.root(case.batch)
    for _ in range(case.levels):
        h = torch.randn(case.batch, beams.nodes.shape[1], case.dim)
        last, beams = beams, cosine_beam_step(trie, h, codebook, 30.0, beams, num_beams=case.beams)

    def fused(normalize: str) -> object:
        return cosine_beam_step(trie, h, codebook, 30.0, last, num_beams=case.beams, normalize=normalize)

    def separate(normalize: str) -> object:
        return beam_step(trie, cosine_logits(h, codebook, 30.0), last, num_beams=case.beams, normalize=normalize)

    found: dict[str, Callable[[], object]] = {"matrix product alone": lambda: h.flatten(0, 1) @ codebook.T}
    for normalize in ("full", "children"):
        found[f"head, then step: {normalize}"] = lambda normalize=normalize: separate(normalize)
        found[f"fused: {normalize}"] = lambda normalize=normalize: fused(normalize)
    return found


def milliseconds(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    return {name: 1e3 * value for name, value in medians(functions, rounds).items()}


def measure(case: Case, rounds: int, only: list[str] | None = None) -> dict[str, float]:
    """Print the table of a case; return the median milliseconds of a whole search by system, and of the floor."""
    sids, logits = case.sids(), case.logits()
    searches: dict[str, Callable[[], object]] = {}
    built: dict[str, float] = {}
    for name, make in systems(case).items():
        if only is None or name in only:
            built[name] = seconds(lambda name=name, make=make: searches.update({name: make(sids, logits, case)}))
    answers = {name: search() for name, search in searches.items()}
    searches["log-sum-exp alone"] = lambda: [torch.logsumexp(level, -1) for level in logits]
    median = milliseconds(searches, rounds)
    print(f"\n{case}, {torch.get_num_threads()} thread(s), medians of {rounds} rounds")
    print(f"{'':28}{'search ms':>12}{'x native':>10}{'build s':>10}{'  same codes as native':>12}")
    for name, value in median.items():
        same = ""
        if name in answers and "native" in answers:
            same = f"{100 * (answers[name] == answers['native']).float().mean():10.1f} %"
        print(f"{name:28}{value:12.3f}{value / median.get('native', value):10.2f}"
              f"{built.get(name, 0):10.2f}{same}")
    if only is None or "heads" in only:
        for name, value in milliseconds(heads(sids, case), rounds).items():
            print(f"{name:28}{value:12.3f}")
    return median


def test_beam_search() -> None:
    measure(Case(), rounds=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in vars(Case()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="names of systems, and heads")
    arguments = vars(parser.parse_args())
    torch.set_num_threads(arguments.pop("threads"))
    rounds, only = arguments.pop("rounds"), arguments.pop("only")
    measure(Case(**arguments), rounds, only)


if __name__ == "__main__":
    main()
