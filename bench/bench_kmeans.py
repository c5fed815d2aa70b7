"""K-means on the CPU against faiss and scikit-learn, where they are installed, from equal centroids.

Every system makes the same number of rounds from the same centroids over the same points: N points around 4 K places
of a normal distribution. The floor is the matrix product of points and centroids, once for each round (``torch.mm`` in
tiles of 4096 points, 2 N K D operations each). Ours and scikit-learn assign once more at the end, for the codes of the
centroids they return; faiss returns centroids alone. "MB" is the peak beyond the inputs of one call; each system's
inertia, in float64 by its centroids, is in the results.

Run: make bench; python bench/bench_kmeans.py prints the table; --items 1000000 takes more points.
     Peers: pip install faiss-cpu scikit-learn
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable

import torch
from measure import Results, interleaved, peak_bytes, title
from torch import Tensor

from dgi_kernels import assign_codes, kmeans

ROUNDS = 10
SHAPES = [(64, 1024), (64, 256)]  # D, K
QUICK = [(64, 1024)]  # what `make bench` runs
Cluster = Callable[[], Tensor]


def inputs(items: int, d: int, clusters: int) -> tuple[Tensor, Tensor]:
    """(N, D) points, (K, D) centroids to start from."""
    generator = torch.Generator().manual_seed(d + clusters)
    places = torch.randn(4 * clusters, d, generator=generator)
    x = places[torch.randint(len(places), (items,), generator=generator)]
    x += 0.5 * torch.randn(items, d, generator=generator)
    return x, x[torch.randperm(items, generator=generator)[:clusters]].clone()


def floor(x: Tensor, start: Tensor) -> Cluster:
    tile = torch.empty(4096, len(start))

    def run() -> Tensor:
        for _ in range(ROUNDS):
            for part in x.split(len(tile)):
                torch.mm(part, start.T, out=tile[: len(part)])
        return start

    return run


def with_faiss(x: Tensor, start: Tensor) -> Cluster:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def run() -> Tensor:
        # without the limit faiss would take 256 points for each centroid and leave the others out
        model = faiss.Kmeans(x.shape[1], len(start), niter=ROUNDS, max_points_per_centroid=len(x))
        model.train(x.numpy(), init_centroids=start.numpy())
        return torch.from_numpy(model.centroids)

    return run


def with_sklearn(x: Tensor, start: Tensor) -> Cluster:
    from sklearn.cluster import KMeans

    def run() -> Tensor:
        model = KMeans(len(start), init=start.numpy(), n_init=1, max_iter=ROUNDS, tol=0.0, algorithm="lloyd")
        return torch.from_numpy(model.fit(x.numpy()).cluster_centers_)

    return run


def systems(items: int, d: int, clusters: int) -> tuple[Tensor, dict[str, Cluster]]:
    x, start = inputs(items, d, clusters)
    found: dict[str, Cluster] = {"floor": floor(x, start)}
    if importlib.util.find_spec("faiss") is not None:
        found["faiss"] = with_faiss(x, start)
    if importlib.util.find_spec("sklearn") is not None:
        found["scikit-learn"] = with_sklearn(x, start)
    found["ours"] = lambda: kmeans(x, clusters, init=start, iterations=ROUNDS, tol=0.0).centroids
    return x, found


def inertia(x: Tensor, centroids: Tensor) -> float:
    codes = assign_codes(x, [centroids], metric="euclidean")[:, 0]
    return sum(
        float((part.double() - centroids.double()[code]).square().sum())
        for part, code in zip(x.split(65536), codes.split(65536), strict=True)
    )


def table(items: int, shapes: list[tuple[int, int]], rounds: int, results: Results) -> None:
    print(
        f"{title()}; N = {items:,}, {ROUNDS} rounds; s (ratio to the floor), MB, inertia ÷ ours; medians of {rounds}\n"
    )
    for row, (d, clusters) in enumerate(shapes):
        x, found = systems(items, d, clusters)
        if row == 0:
            print("| D | K | " + " | ".join(found) + " |\n" + "|---" * (2 + len(found)) + "|")
        sums = {name: inertia(x, run()) for name, run in found.items() if name != "floor"}
        times, cells = interleaved(found, rounds), []
        base = statistics.median(times["floor"])
        for name, run in found.items():
            median, memory = statistics.median(times[name]), peak_bytes(run) if name != "floor" else None
            extra = {} if name == "floor" else {"inertia": sums[name]}
            results.add("kmeans", {"N": items, "D": d, "K": clusters}, name, times[name], memory, **extra)
            cells.append(
                f"{median:.3g} ({median / base:.2f})"
                + ("" if name == "floor" else f", {(memory or 0) / 1e6:.0f} MB, {sums[name] / sums['ours']:.5f}")
            )
        print(f"| {d} | {clusters} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the shapes that make bench runs")
    parser.add_argument("--items", type=int, default=100_000, help="points N (default 100000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per shape (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, as pytest-benchmark writes them")
    options = parser.parse_args()
    measured = Results()
    table(options.items, QUICK if options.quick else SHAPES, options.rounds, measured)
    if options.json:
        measured.write(options.json)
        print(f"\nwrote {options.json}")
