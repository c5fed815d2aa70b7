"""Semantic IDs of a catalog's vectors: residual K-means, then unique codes; beside semantic-id's RQKMeans.

    python bench/unique_ids.py VECTORS.npy [--sizes 256 256 256] [--json FILE]

prints, for codebooks of both where semantic-id is installed: seconds, the reconstruction error (mean squared distance
to the sum of the codes ÷ mean squared distance to the mean), distinct IDs and colliding items before, and after
`unique_codes` the distinct IDs, the items that moved, how many of them changed more than the last code, and the
reconstruction error. Both train with `n_init` of 1, tol 1e-4 and at most `--iterations` rounds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import torch
from measure import json_text, machine
from torch import Tensor

from dgi_kernels import assign_codes, residual_kmeans, unique_codes


def reconstruction(x: Tensor, codebooks: list[Tensor], codes: Tensor) -> float:
    """The mean squared distance to the sum of the codes, relative to that to the mean vector."""
    left = x.double() - sum(codebook.double()[codes[:, level]] for level, codebook in enumerate(codebooks))
    return float(left.square().sum() / (x.double() - x.double().mean(0)).square().sum())


def ours(x: Tensor, sizes: list[int], iterations: int, seed: int) -> list[Tensor]:
    return residual_kmeans(x, sizes, iterations=iterations, seed=seed)[0]


def semantic_id(x: Tensor, sizes: list[int], iterations: int, seed: int) -> list[Tensor]:
    from semantic_id import RQKMeans

    model = RQKMeans(len(sizes), sizes, max_iter=iterations, n_init=1, random_state=seed).fit(x.numpy())
    return [torch.from_numpy(np.asarray(codebook, dtype=np.float32)) for codebook in model.codebooks_]


def describe(name: str, x: Tensor, codebooks: list[Tensor], seconds: float) -> dict[str, object]:
    codes = assign_codes(x, codebooks, metric="euclidean")
    _, inverse, counts = codes.unique(dim=0, return_inverse=True, return_counts=True)
    start = time.perf_counter()
    unique = unique_codes(codes, x, codebooks, metric="euclidean")
    spent = time.perf_counter() - start
    moved = (unique != codes).any(1)
    row: dict[str, object] = {
        "codebooks": name,
        "training_seconds": seconds,
        "reconstruction": reconstruction(x, codebooks, codes),
        "distinct_before": len(counts),
        "colliding_before": int((counts[inverse] > 1).sum()),
        "distinct_after": len(unique.unique(dim=0)),
        "moved": int(moved.sum()),
        "moved_beyond_the_last_code": int((unique[:, :-1] != codes[:, :-1]).any(1).sum()),
        "reconstruction_after": reconstruction(x, codebooks, unique),
        "unique_seconds": spent,
    }
    print(
        "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
    )
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vectors", type=Path, help="a .npy file (N, D)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 256, 256])
    parser.add_argument("--iterations", type=int, default=100, help="at most so many rounds a level (default 100)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    x = torch.from_numpy(np.load(options.vectors).astype(np.float32))
    print(f"{options.vectors.name}: {len(x):,} items, D = {x.shape[1]}, K = {options.sizes}")
    trainers = {"ours": ours}
    if importlib.util.find_spec("semantic_id") is not None:
        trainers["semantic-id"] = semantic_id
    rows = []
    for seed in range(options.seeds):
        for name, train in trainers.items():
            start = time.perf_counter()
            codebooks = train(x, options.sizes, options.iterations, seed)
            rows.append({"seed": seed} | describe(name, x, codebooks, time.perf_counter() - start))
    if options.json:
        settings = {"items": len(x), "dim": x.shape[1], "sizes": options.sizes, "iterations": options.iterations}
        document = {"machine_info": machine(), "data": options.vectors.name} | settings | {"runs": rows}
        options.json.write_text(json_text(json.loads(json.dumps(document))))
