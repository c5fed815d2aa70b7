"""Gumbel noise against PyTorch on the CPU.

The noise is compared with ``exponential_``, which ``F.gumbel_softmax`` makes its noise from, both in memory that
the process has already: to fetch new pages from the system may cost more than the noise, and is no part of it.

Run: make bench; python bench/bench_gumbel.py prints a table, pytest bench -k gumbel times the target case.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics

import torch
from measure import Results, interleaved, title
from torch import Tensor

from dgi_kernels.gumbel import native

NOISE_SHAPES = [(2048, codes) for codes in (4096, 1024, 256)]
SEED = torch.tensor([42])


def exponential(rows: int, codes: int) -> Tensor:
    return torch.empty(rows, codes).exponential_()


def in_cpp(rows: int, codes: int) -> Tensor:
    return native.gumbel_noise(SEED, 0, 0, 0, rows, codes)


def keep_freed_memory() -> None:
    """Tell glibc to take large tensors from its heap, and to keep it, rather than map and unmap each of them."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_max = -1, -4
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def noise_table(rounds: int, results: Results) -> None:
    keep_freed_memory()
    print(f"{title()}; medians of {3 * rounds} interleaved rounds\n")
    print("| noise | exponential_ ns | gumbel_noise ns | ratio |\n|---|---|---|---|")
    for rows, codes in NOISE_SHAPES:
        systems = {
            "exponential_": lambda n=rows, k=codes: exponential(n, k),
            "ours": lambda n=rows, k=codes: in_cpp(n, k),
        }
        times = interleaved(systems, 3 * rounds)
        theirs, mine = (1e9 * statistics.median(times[name]) / (rows * codes) for name in systems)
        print(f"| ({rows}, {codes}) | {theirs:.2f} | {mine:.2f} | {theirs / mine:.1f} |")
        for name in systems:
            results.add("gumbel_noise", {"N": rows, "K": codes}, name, times[name])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="a third of the rounds per shape (default 7)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, as pytest-benchmark writes them")
    options = parser.parse_args()
    measured = Results()
    noise_table(options.rounds, measured)
    if options.json:
        measured.write(options.json)
        print(f"\nwrote {options.json}")
