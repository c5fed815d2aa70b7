"""Whole searches: from histories to the ids of the items found, with an untrained model over random catalogs.

"ours" is ``DGIIndex.search``. ``DGI_BASE=<checkout of another commit, built in place>`` adds the same search by that
commit's code, in a process that takes turns with this one, on the same weights, catalog and requests; both must find
the same items. ``pip install faiss-cpu`` adds dense retrieval over the vectors that the index holds: the same encoder,
then ``IndexFlatIP``, which compares a request with every item, and HNSW with the least ``efSearch`` that finds .95 of
the exact ten.

Run: python bench/bench_search.py [CASE ...] [--rounds N] [--processor] [--json FILE]
     python bench/bench_search.py [CASE ...] --profile      where the time of a search goes, by torch's profiler
     CASE is one of CASES below, "model" (the searches of two models over a small catalog) or "catalog" (one model over
     catalogs of 1e5, 1e6 and 1e7 items); default: all but 1e7. HNSW graphs are kept in the directory for temporary
     files; there is none of 1e7 items, which would take hours to build. "--processor" takes one thread and its own
     clock, for a machine that does other things too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import other_commit
import torch
import torch.nn.functional as F
from dgi.batches import Batch, make_batch  # by the names that older commits have too
from dgi.index import encode_items

from dgi import DGIIndex, DGIModel
from dgi.config import ModelConfig
from dgi.demo import DEMO_MODEL
from dgi_kernels import Trie

HISTORY, WORDS, K, RECALL = 10, 8, 10, 0.95
WARM = 0.03  # seconds of searches before each that is timed: until then the threads of the system before it sleep
LARGE_MODEL = dataclasses.replace(DEMO_MODEL, dim=128, history_layers=4, decoder_layers=4)
CATALOG_MODEL = dataclasses.replace(DEMO_MODEL, codebook_sizes=ModelConfig().codebook_sizes)
LEARNT_FROM = 20_000  # items that the codebooks are set by


@dataclass(frozen=True)
class Case:
    model: ModelConfig
    items: int
    batch: int
    beams: int

    def shape(self) -> dict[str, object]:
        config = self.model
        return {
            "items": self.items,
            "D": config.dim,
            "layers": f"{config.history_layers}+{config.decoder_layers}",
            "batch": self.batch,
            "beams": self.beams,
        }


MODEL_CASES = {
    f"{name}-B{batch}-M{beams}": Case(config, 1682, batch, beams)
    for name, config in (("demo", DEMO_MODEL), ("large", LARGE_MODEL))
    for batch in (64, 1)
    for beams in (50, 200)
}
CATALOG_CASES = {
    f"N{items}-B{batch}-M{beams}": Case(CATALOG_MODEL, items, batch, beams)
    for items in (10**5, 10**6, 10**7)
    for batch, beams in ((1, 50), (64, 50), (1, 200))
}
CASES = {**MODEL_CASES, **CATALOG_CASES}


@dataclass
class Searches:
    """What all systems search: weights, semantic IDs, vectors and words of the items, made once for a catalog."""

    model: DGIModel
    index: DGIIndex
    words: torch.Tensor

    @classmethod
    def make(cls, config: ModelConfig, items: int, folder: Path) -> Searches:
        """Set up, and leave in ``folder`` what :meth:`load` reads."""
        torch.manual_seed(0)
        model = DGIModel(config).eval()
        words = random_words(items, config)
        z = encode_items(model, words, batch_size=65536)
        model.quantizer.initialize(z[:LEARNT_FROM], generator=torch.Generator().manual_seed(0))
        codes = model.quantizer.assign(z)
        np.save(folder / "codes.npy", codes.to(torch.int32).numpy())
        np.save(folder / "vectors.npy", F.normalize(z, dim=1).numpy())
        torch.save(model.state_dict(), folder / "weights.pt")
        (folder / "case.json").write_text(json.dumps(dataclasses.asdict(config) | {"items": items}))
        del z, codes
        return cls.load(folder)

    @classmethod
    def load(cls, folder: Path) -> Searches:
        given = json.loads((folder / "case.json").read_text())
        items = given.pop("items")
        given["codebook_sizes"] = tuple(given["codebook_sizes"])
        known = {field.name for field in dataclasses.fields(ModelConfig)}  # an older commit's has fewer fields
        config = ModelConfig(**{name: value for name, value in given.items() if name in known})
        model = DGIModel(config).eval()
        weights = torch.load(folder / "weights.pt", weights_only=True)
        # and log_scale had no dimension
        model.load_state_dict({name: weights[name].view_as(value) for name, value in model.state_dict().items()})
        codes = torch.from_numpy(np.load(folder / "codes.npy")).long()
        trie = Trie.from_codes(codes, codebook_sizes=config.codebook_sizes)
        vectors = torch.from_numpy(np.load(folder / "vectors.npy"))
        index = DGIIndex(trie, vectors, tuple(map(str, range(items))))
        return cls(model, index, random_words(items, config))

    def batch(self, size: int) -> Batch:
        histories = np.random.default_rng(size).integers(len(self.index), size=(size, HISTORY))
        return make_batch(self.words, torch.from_numpy(histories), None, None)

    def run(self, size: int, beams: int) -> torch.Tensor:
        return self.index.search(self.model, self.batch(size), K, num_beams=beams).items

    @torch.no_grad()
    def queries(self, size: int) -> np.ndarray:
        return F.normalize(self.model.encode_queries(self.batch(size)).vector, dim=1).numpy()


def random_words(items: int, config: ModelConfig) -> torch.Tensor:
    """(items, WORDS) hashed words: two that many items share, as names of series and makers are, and others."""
    random = np.random.default_rng(1)
    words = random.integers(1, config.vocabulary_size, size=(items, WORDS), dtype=np.int64)
    words[:, :2] = random.integers(1, 200, size=(items, 2))
    return torch.from_numpy(words)


def serve(folder: Path) -> None:
    """In the process of another commit: for each line "size beams" one search; what "found" asks for is in a file."""
    searches, found = Searches.load(folder), torch.empty(0)

    def answer(line: str) -> None:
        nonlocal found
        if line.strip() == "found":
            np.save(folder / "found.npy", found.numpy())
        else:
            found = searches.run(*map(int, line.split()))

    other_commit.serve(answer)


class Dense:
    """faiss over the vectors of the index."""

    def __init__(self, searches: Searches, graph: bool) -> None:
        import faiss

        self.searches = searches
        vectors = searches.index.vectors.numpy()
        self.exact = faiss.IndexFlatIP(vectors.shape[1])
        self.exact.add(vectors)
        self.graph = None
        if graph:
            mark = zlib.crc32(vectors[:100].tobytes())
            path = Path(tempfile.gettempdir()) / f"hnsw-{len(vectors)}-{mark:08x}.faiss"
            if not path.exists():
                made = faiss.IndexHNSWFlat(vectors.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
                made.hnsw.efConstruction = 100
                faiss.omp_set_num_threads(os.cpu_count() or 1)
                made.add(vectors)
                faiss.write_index(made, str(path))
            self.graph = faiss.read_index(str(path))
        faiss.omp_set_num_threads(torch.get_num_threads())
        if self.graph is not None:
            self._set_effort()

    def _set_effort(self) -> None:
        queries = self.searches.queries(256)
        _, truth = self.exact.search(queries, K)
        for effort in (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024):
            self.graph.hnsw.efSearch = effort
            _, found = self.graph.search(queries, K)
            self.recall = float(np.mean([len({*a} & {*b}) / K for a, b in zip(truth, found, strict=True)]))
            if self.recall >= RECALL:
                return

    def run(self, index: object, size: int) -> object:
        return index.search(self.searches.queries(size), K)


def systems(
    searches: Searches, case: Case, folder: Path, base: Callable | None, dense: Dense | None
) -> dict[str, Callable]:
    found: dict[str, Callable] = {"ours": lambda: searches.run(case.batch, case.beams)}
    if base is not None:
        line = f"{case.batch} {case.beams}"
        base(line)
        base("found")
        same = (found["ours"]() == torch.from_numpy(np.load(folder / "found.npy"))).float().mean().item()
        assert same > 0.99, f"only {same:.1%} of the items are those that the other commit finds"
        found[other_commit.name()] = lambda: base(line)
    if dense is not None:
        found["IndexFlatIP"] = lambda: dense.run(dense.exact, case.batch)
        if dense.graph is not None:
            found["HNSW"] = lambda: dense.run(dense.graph, case.batch)
    return found


def measure_group(cases: dict[str, Case], rounds: int, results: Results, processor: bool) -> None:
    """Cases of one model and one catalog."""
    how = {"clock": processor_seconds} if processor else {"warm": WARM}
    first = next(iter(cases.values()))
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        searches = Searches.make(first.model, first.items, Path(folder))
        base = stack.enter_context(other_commit.process(__file__, folder)) if other_commit.is_given() else None
        dense = None
        if first.model is CATALOG_MODEL and importlib.util.find_spec("faiss") is not None:
            dense = Dense(searches, graph=first.items <= 10**6)
        for name, case in cases.items():
            given = systems(searches, case, Path(folder), base, dense)
            times = interleaved(given, rounds, **how)
            parts = []
            for system, seconds in times.items():
                extra = {"requests_per_second": round(case.batch / statistics.median(seconds), 1)}
                extra |= {"clock": "processor"} if processor else {}
                if system == "HNSW":
                    extra |= {"efSearch": dense.graph.hnsw.efSearch, "recall": round(dense.recall, 4)}
                results.add("dgi_search", case.shape(), system, seconds, **extra)
                parts.append(f"{system} {1e3 * statistics.median(seconds):.2f} ms ({extra['requests_per_second']}/s)")
            print(f"{name}: " + ", ".join(parts), flush=True)


def profile_group(cases: dict[str, Case], rounds: int) -> None:
    """Where the time of our searches goes: torch's ops and ours by their own time, the rest is Python's."""
    first = next(iter(cases.values()))
    with tempfile.TemporaryDirectory() as folder:
        searches = Searches.make(first.model, first.items, Path(folder))
    for name, case in cases.items():
        searches.run(case.batch, case.beams)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(rounds):
                searches.run(case.batch, case.beams)
        print(f"{name}, {rounds} searches\n{profile.key_averages().table(sort_by='self_cpu_time_total', row_limit=12)}")


def grouped(names: list[str]) -> Iterator[dict[str, Case]]:
    """The cases by model and catalog."""
    groups: dict[tuple[ModelConfig, int], dict[str, Case]] = {}
    for name in names:
        groups.setdefault((CASES[name].model, CASES[name].items), {})[name] = CASES[name]
    yield from groups.values()


if __name__ == "__main__" and sys.argv[1:2] == ["--serve"]:
    serve(Path(sys.argv[2]))
elif __name__ == "__main__":
    import statistics

    from measure import Results, interleaved, processor_seconds, title

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"model, catalog, or of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processor", action="store_true", help="on one thread, by the time that it computes")
    parser.add_argument("--profile", action="store_true", help="profile our searches in place of timing all")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    options = parser.parse_args()
    sets = {"model": list(MODEL_CASES), "catalog": list(CATALOG_CASES)}
    default = [name for name, case in CASES.items() if case.items < 10**7]
    chosen = [name for given in options.cases for name in sets.get(given, [given])] or default
    if unknown := set(chosen) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are model, catalog, {', '.join(CASES)}")
    if options.processor:
        if other_commit.is_given() and not options.profile:
            parser.error("--processor sees the time of this process alone; unset DGI_BASE")
        torch.set_num_threads(1)
    print(title())
    measured = Results()
    for group in grouped(chosen):
        if options.profile:
            profile_group(group, options.rounds)
            continue
        measure_group(group, options.rounds, measured, options.processor)
        if options.json:
            measured.write(options.json)
            print(f"wrote {options.json}", flush=True)
