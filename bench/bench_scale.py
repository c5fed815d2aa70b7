"""How encoding, assigning, building and searching grow with the catalog: 1e5 to 1e8 items of three codes out of 2048.

    python bench/bench_scale.py --work FOLDER                      # 1e5 to 1e7 items
    python bench/bench_scale.py --work FOLDER --items 100000000    # 1e8: 4 GB of memory, 2 GB in FOLDER
    python bench/bench_scale.py --work FOLDER --json FILE

Item vectors (64 floats) are made block by block, encoded by a model's tower and assigned to codes; only the codes are
kept, in files of a million items, so that a run that was stopped goes on where it was. Then the trie is built, once
from all codes and once by merging shards that are built and stored one at a time, and searched. Seconds are those of
the processor, on one thread, so that a machine that does other things too gives the same; they do not have the making
of the vectors.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import measure
import numpy as np
import torch
from torch import Tensor

from dgi.config import ModelConfig, from_dict
from dgi.model.dgi_model import DGIModel
from dgi_kernels import Trie, beam_search, residual_kmeans

SIZES = [10**5, 10**6, 10**7]
VECTOR, DIM, CODES, LEVELS = 64, 32, 2048, 3
BLOCK, FILE_ITEMS, SHARD_ITEMS = 50_000, 10**6, 10**7
CLUSTERS = 4096
REQUESTS, BEAMS = 8, 50


def item_vectors(block: int) -> Tensor:
    """(BLOCK, VECTOR) of one block: clusters of unequal sizes; the same block gives the same vectors."""
    random = torch.Generator().manual_seed(0)
    centres = torch.randn(CLUSTERS, VECTOR, generator=random)
    random.manual_seed(1 + block)
    cluster = (CLUSTERS * torch.rand(BLOCK, generator=random) ** 3).long()
    return centres[cluster] + torch.randn(BLOCK, VECTOR, generator=random)


@torch.no_grad()
def model_of(path: Path) -> DGIModel:
    """A model with random weights and codebooks that K-means learnt from 100,000 items; from a file on later runs."""
    torch.manual_seed(0)
    config = {"encoder": "vectors", "vector_dim": VECTOR, "dim": DIM, "codebook_sizes": [CODES] * LEVELS}
    model = DGIModel(from_dict(ModelConfig, {**config, "metric": "euclidean"})).eval()
    if not path.exists():
        z = torch.cat([model.encoder.encode_items(item_vectors(block)) for block in range(2)])
        books, _ = residual_kmeans(z, [CODES] * LEVELS, iterations=5, seed=0)
        np.save(path, torch.stack(list(books)).numpy())
    for codebook, learnt in zip(model.quantizer.codebooks, torch.from_numpy(np.load(path)), strict=True):
        codebook.copy_(learnt)
    return model


@torch.no_grad()
def assign_file(model: DGIModel, number: int, path: Path) -> None:
    """Codes of the million items of one file, and the seconds of each block."""
    codes = np.empty((FILE_ITEMS, LEVELS), dtype=np.int16)
    spent: dict[str, list[float]] = {"encode": [], "assign": []}
    blocks = FILE_ITEMS // BLOCK
    for place in range(blocks):
        vectors, found = item_vectors(number * blocks + place), []
        spent["encode"].append(
            measure.processor_seconds(lambda v=vectors, f=found: f.append(model.encoder.encode_items(v)))
        )
        spent["assign"].append(measure.processor_seconds(lambda f=found: f.append(model.quantizer.assign(f[0]))))
        codes[place * BLOCK : (place + 1) * BLOCK] = found[1]
    temporary = path.with_suffix(".part.npz")
    np.savez(temporary, codes=codes, **{name: np.array(values) for name, values in spent.items()})
    temporary.replace(path)


def codes_of(work: Path, items: int) -> Tensor:
    """(items, LEVELS) int16, from the files."""
    codes = torch.empty(items, LEVELS, dtype=torch.int16)
    for number, part in enumerate(codes.split(FILE_ITEMS)):
        part.copy_(torch.from_numpy(np.load(work / f"codes-{number:03}.npz")["codes"][: len(part)]))
    return codes


def search(trie: Trie) -> Callable[[], object]:
    logits = torch.randn(LEVELS, REQUESTS, BEAMS, CODES, generator=torch.Generator().manual_seed(0))
    return lambda: beam_search(
        trie,
        lambda depth, tokens, parents: logits[depth][:, : BEAMS if depth else 1],
        batch_size=REQUESTS,
        num_beams=BEAMS,
    )


def measured(run: Callable[[], object]) -> dict[str, object]:
    """Seconds of the processor and of the clock, and the peak of memory beyond what was there before, of one call."""
    figures: dict[str, object] = {}

    def timed() -> None:
        start, cpu = time.perf_counter(), time.process_time()
        run()
        figures.update(seconds=[time.process_time() - cpu], wall=time.perf_counter() - start)

    figures["peak"] = measure.peak_bytes(timed)
    return figures


def built(work: Path, items: int, steps: dict[str, dict]) -> tuple[Trie, list[Path]]:
    """The trie of all codes at once, and files of shards; when this returns, no codes are held."""
    codes, sizes, kept = codes_of(work, items), [CODES] * LEVELS, []
    steps["build"] = measured(lambda: kept.append(Trie.from_codes(codes, codebook_sizes=sizes)))
    trie = kept[0]
    steps["build"] |= {"nbytes": trie.nbytes, "leaves": trie.num_nodes_at(LEVELS), "codes": codes.nbytes}
    paths, spent = [], []
    for number, part in enumerate(codes.split(SHARD_ITEMS if items > SHARD_ITEMS else items // 4)):
        paths.append(work / f"shard-{number:02}.trie")
        spent.append(measure.processor_seconds(lambda p=part: Trie.from_codes(p, codebook_sizes=sizes).save(paths[-1])))
    steps["shards"] = {"seconds": [sum(spent)], "count": len(paths)}
    return trie, paths


def run_size(work: Path, items: int) -> dict[str, dict]:
    """All figures of one size by step."""
    steps: dict[str, dict] = {}
    files = [np.load(work / f"codes-{number:03}.npz") for number in range(-(-items // FILE_ITEMS))]
    for step in ("encode", "assign"):
        steps[step] = {"seconds": [float(np.concatenate([file[step] for file in files])[: items // BLOCK].sum())]}
    trie, paths = built(work, items, steps)
    shards, kept = [Trie.load(path, mmap=True, verify=False) for path in paths], []
    steps["merge"] = measured(lambda: kept.append(Trie.merge(shards, renumber=True)))
    if kept[0].arrays.keys() != trie.arrays.keys() or not all(
        torch.equal(array, trie.arrays[name]) for name, array in kept[0].arrays.items()
    ):
        raise SystemExit("the merged trie is not the one that was built of all codes")
    for path in paths:
        path.unlink()
    find = search(trie)
    find()
    steps["search"] = {"seconds": [measure.processor_seconds(find) for _ in range(20)]}
    return steps


def table(figures: dict[int, dict[str, dict]]) -> None:
    print(f"{'items':>12} {'step':>8} {'seconds':>10} {'µs an item':>11} {'MB at the peak':>15}")
    for items, steps in figures.items():
        for step, one in steps.items():
            spent = float(np.median(one["seconds"]))
            each = "-" if step == "search" else f"{1e6 * spent / items:.3f}"
            peak = "-" if one.get("peak") is None else f"{one['peak'] / 1e6:.0f}"
            print(f"{items:>12,} {step:>8} {spent:>10.4g} {each:>11} {peak:>15}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", metavar="FOLDER", type=Path, required=True, help="for codes, shards and figures")
    parser.add_argument("--items", metavar="N", type=int, nargs="+", default=SIZES, help="sizes: 100000 or millions")
    parser.add_argument("--json", metavar="FILE", help="write the figures of all sizes in FOLDER there")
    options = parser.parse_args()
    if any(items != SIZES[0] and (items <= 0 or items % FILE_ITEMS) for items in options.items):
        parser.error("--items must be 100000 or whole millions")
    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    model = model_of(options.work / "codebooks.npy")
    for number in range(-(-max(options.items) // FILE_ITEMS)):
        if not (path := options.work / f"codes-{number:03}.npz").exists():
            assign_file(model, number, path)
    for items in options.items:
        if not (path := options.work / f"figures-{items}.json").exists():
            path.write_text(json.dumps(run_size(options.work, items)))
    paths = sorted(options.work.glob("figures-*.json"), key=lambda path: int(path.stem.split("-")[1]))
    figures = {int(path.stem.split("-")[1]): json.loads(path.read_text()) for path in paths}
    table(figures)
    if options.json:
        results = measure.Results(f"python bench/bench_scale.py --work FOLDER --items {' '.join(map(str, figures))}")
        for items, steps in figures.items():
            for step, one in steps.items():
                extra = {name: one[name] for name in ("nbytes", "leaves", "codes", "count") if name in one}
                results.add("scale", {"N": items}, step, one["seconds"], one.get("peak"), clock="processor", **extra)
        results.write(options.json)


if __name__ == "__main__":
    main()
