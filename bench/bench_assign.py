"""Codes of a catalog: nearest, balanced and unique, on the CPU against other libraries, where they are installed.

`assign_codes` by squared distance, three residual levels; the floor is torch's matrix product for each level (ours is
faster where MKL takes no AVX-512). In the second shape most items are codes of the first level, so that what later
levels hold is long or next to nothing; in the third all lengths differ. Peers: `torch.cdist` and argmin, faiss
(`IndexFlatL2`, k = 1), semantic-id's loop (scikit-learn's distances and argmin), each with the residuals between.
`balanced_codes`: Sinkhorn, 50 rounds; the peer is the float64 loop of LETTER, LC-Rec and MiniOneRec over the N x K
matrix; the floor is a float32 matrix product for each round.
`unique_codes`: after `assign_codes`, by codebooks of random items; `torch.unique` of the same codes only finds what
is shared.
"MB" is the peak beyond the inputs of one call.

Run: make bench; python bench/bench_assign.py prints the tables; --items 1000000 takes more items in the first.
     Peers: pip install faiss-cpu scikit-learn
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics

import numpy as np
import torch
from measure import Results, Step, interleaved, peak_bytes, title
from torch import Tensor

from dgi_kernels import assign_codes, balanced_codes, unique_codes

BATCH = 16384  # of what would otherwise form N x K
# D, K, items relative to --items, whether codes' lengths are spread over three powers of ten
ASSIGN = [(64, (256,) * 3, 1.0, False), (768, (4096,) * 3, 0.02, False), (768, (4096,) * 3, 0.02, True)]
BALANCED = (12_101, 32, 256)  # N, D, K: Beauty's items in LETTER
ROUNDS = 50


def catalog(items: int, d: int, sizes: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """(N, d) items around 1000 places, and codebooks that are residuals of some of them."""
    generator = torch.Generator().manual_seed(d)
    places = torch.randn(1000, d, generator=generator)
    z = places[torch.randint(1000, (items,), generator=generator)] + 0.5 * torch.randn(items, d, generator=generator)
    books: list[Tensor] = []
    for size in sizes:
        rows = z[torch.randint(items, (size,), generator=generator)]
        for book in books:
            rows = rows - book[torch.cdist(rows, book).argmin(1)]
        books.append(rows + 1e-3 * torch.randn(size, d, generator=generator))
    return z, books


def floor(z: Tensor, books: list[Tensor]) -> Step:
    tile = torch.empty(4096, max(len(book) for book in books))

    def run() -> object:
        for book in books:
            for part in z.split(len(tile)):
                out = tile.view(-1)[: len(part) * len(book)].view(len(part), len(book))
                torch.mm(part, book.T, out=out)
        return tile

    return run


def with_cdist(z: Tensor, books: list[Tensor]) -> Tensor:
    codes = []
    for part in z.split(BATCH):
        levels = []
        for book in books:
            levels.append(torch.cdist(part, book).argmin(1))
            part = part - book[levels[-1]]
        codes.append(torch.stack(levels, 1))
    return torch.cat(codes)


def with_faiss(z: Tensor, books: list[Tensor]) -> Step:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())

    def run() -> object:
        residual, codes = z.numpy(), []
        for book in books:
            index = faiss.IndexFlatL2(z.shape[1])
            index.add(book.numpy())
            codes.append(index.search(residual, 1)[1][:, 0])
            residual = residual - book.numpy()[codes[-1]]
        return np.stack(codes, 1)

    return run


def with_sklearn(z: Tensor, books: list[Tensor]) -> Step:
    from sklearn.metrics.pairwise import euclidean_distances

    def run() -> object:  # RQKMeans._encode_numpy of semantic-id 0.2.5, which forms N x K, in batches
        codes = []
        for part in z.split(BATCH):
            residual, levels = part.numpy(), []
            for book in books:
                levels.append(np.argmin(euclidean_distances(residual, book.numpy()), axis=1))
                residual = residual - book.numpy()[levels[-1]]
            codes.append(np.stack(levels, 1))
        return np.concatenate(codes)

    return run


def assignments(items: int, d: int, sizes: tuple[int, ...], unequal: bool) -> dict[str, Step]:
    z, books = catalog(items, d, sizes)
    if unequal:
        generator = torch.Generator().manual_seed(2)
        books = [book * 10 ** (-3 * torch.rand(len(book), 1, generator=generator)) for book in books]
    found: dict[str, Step] = {"floor": floor(z, books), "cdist + argmin": lambda: with_cdist(z, books)}
    if importlib.util.find_spec("faiss") is not None:
        found["faiss"] = with_faiss(z, books)
    if importlib.util.find_spec("sklearn") is not None:
        found["semantic-id's loop"] = with_sklearn(z, books)
    found["ours"] = lambda: assign_codes(z, books, metric="euclidean")
    return found


def sinkhorn_loop(x: Tensor, codebook: Tensor, epsilon: float = 0.003) -> Tensor:
    """``center_distance_for_constraint`` and ``sinkhorn_algorithm`` of LETTER and LC-Rec."""
    d = (x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * x @ codebook.T).double()
    middle = (d.max() + d.min()) / 2
    q = torch.exp(-(d - middle) / (d.max() - middle + 1e-5) / epsilon)
    rows, codes = q.shape
    q /= q.sum()
    for _ in range(ROUNDS):
        q /= q.sum(1, keepdim=True)
        q /= rows
        q /= q.sum(0, keepdim=True)
        q /= codes
    return (q * rows).argmax(1)


def balances(items: int, d: int, codes: int) -> dict[str, Step]:
    generator = torch.Generator().manual_seed(1)
    places = torch.randn(100, d, generator=generator)
    x = places[torch.randint(100, (items,), generator=generator)] + 0.5 * torch.randn(items, d, generator=generator)
    codebook = x[torch.randperm(items, generator=generator)[:codes]].clone()
    one = floor(x, [codebook])
    return {
        "floor": lambda: [one() for _ in range(ROUNDS)],
        "float64 loop": lambda: sinkhorn_loop(x, codebook),
        "ours": lambda: balanced_codes(x, codebook, iterations=ROUNDS),
    }


def unique(items: int, d: int, sizes: tuple[int, ...]) -> dict[str, Step]:
    z, books = catalog(items, d, sizes)
    codes = assign_codes(z, books, metric="euclidean")
    return {
        "torch.unique": lambda: codes.unique(dim=0),
        "ours": lambda: unique_codes(codes, z, books, metric="euclidean"),
    }


def add_row(op: str, shape: dict[str, object], systems: dict[str, Step], rounds: int, results: Results) -> None:
    times, cells = interleaved(systems, rounds), []
    base = statistics.median(times[next(iter(systems))])
    for name, run in systems.items():
        memory = peak_bytes(run) if name != "floor" else None
        results.add(op, shape, name, times[name], memory)
        median = statistics.median(times[name])
        cells.append(
            f"{name} {1e3 * median:.4g} ms ({median / base:.2f})" + (f", {memory / 1e6:.0f} MB" if memory else "")
        )
    print(f"{op} {' '.join(f'{k}={v}' for k, v in shape.items())}: {'; '.join(cells)}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the items")
    parser.add_argument("--items", type=int, default=500_000, help="items N of the first shape (default 500000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds per shape (default 3)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, as pytest-benchmark writes them")
    options = parser.parse_args()
    measured = Results()
    items = options.items // 10 if options.quick else options.items
    print(f"{title()}; ms (ratio to the first), MB at the peak; medians of {options.rounds} interleaved rounds\n")
    n, d, k = BALANCED
    add_row("balanced_codes", {"N": n, "D": d, "K": k}, balances(n, d, k), options.rounds, measured)
    for d, sizes, part, unequal in ASSIGN:
        n = int(items * part)
        shape = {"N": n, "D": d, "K": f"{len(sizes)} x {sizes[0]}"}
        if unequal:
            shape["lengths"] = "1 to 1000"
        add_row("assign_codes", shape, assignments(n, d, sizes, unequal), options.rounds, measured)
    shape = {"N": items, "D": 64, "K": "3 x 256"}
    add_row("unique_codes", shape, unique(items, 64, (256, 256, 256)), options.rounds, measured)
    if options.json:
        measured.write(options.json)
        print(f"\nwrote {options.json}")
