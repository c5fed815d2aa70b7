"""Rows of a language model's vocabulary: log_normalizer, and the selection of beams whose codes are a slice of it.

The first table is the log-sum-exp of (rows, V) logits; the floor is one read of them, the largest of their words as
int64. The second is NVIDIA's shape (recsys-examples#442): 3 x 1,024 codes in a vocabulary of 151,936, 5e6 semantic IDs
at random, 256 beams, 4 requests, the step from level 1 to level 2. ``native`` is log_normalizer and beam_step; ``dict
trie`` is what sid-gr-inference does: a walk from the root for each beam, a mask of the vocabulary, log-softmax, top-k.

Run: python bench/bench_vocabulary.py [--rows N] [--items N] [--threads N] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from measure import Results, interleaved, title
from torch import Tensor

from dgi_kernels import Beams, Trie, beam_step, log_normalizer

VOCABULARY, CODES, LEVELS, OFFSET = 151_936, 1024, 3, 150_000
ROUNDS = 7


def read(logits: Tensor) -> Tensor:
    """One read of all bytes."""
    return logits.view(torch.int64).flatten().amax()


def show(name: str, times: dict[str, list[float]], results: Results, op: str, shape: dict[str, Any]) -> None:
    median = {system: statistics.median(values) for system, values in times.items()}
    print(f"\n{name}; {title()}, medians of {ROUNDS} rounds; floor: one read of the logits")
    for system, value in median.items():
        print(f"{system:24}{1e3 * value:12.3f} ms{value / median['floor']:10.2f} x floor", flush=True)
        results.add(op, shape, system, times[system])


def normalizer_systems(rows: int, vocabulary: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    logits = torch.empty(rows, vocabulary, dtype=dtype)
    for row in logits:
        row.copy_(3 * torch.randn(vocabulary))
    return {
        "native": functools.partial(log_normalizer, logits),
        "torch.logsumexp": functools.partial(torch.logsumexp, logits, -1),
        "floor": functools.partial(read, logits),
    }


def bench_log_normalizer(rows: int, results: Results) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        systems = normalizer_systems(rows, VOCABULARY, dtype)
        shape = {"N": rows, "V": VOCABULARY, "dtype": str(dtype).removeprefix("torch.")}
        show(f"log_normalizer {shape}", interleaved(systems, ROUNDS), results, "log_normalizer", shape)


def dict_trie_step(root: dict, logits: Tensor, prefixes: list[list[list[int]]], scores: Tensor, width: int) -> Tensor:
    """Token numbers (B, width) of the best continuations."""
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    for b, request in enumerate(prefixes):
        for m, prefix in enumerate(request):
            node = root
            for code in prefix:
                node = node[code]
            for code in node:
                mask[b, m, OFFSET + code] = True
    logp = logits.float().log_softmax(-1).masked_fill(~mask, -torch.inf)
    return (scores.unsqueeze(2) + logp).flatten(1).topk(width).indices


def bench_selection(items: int, batch: int, width: int, results: Results) -> None:
    codes = torch.randint(0, CODES, (items, LEVELS))
    trie = Trie.from_codes(codes, codebook_sizes=[CODES] * LEVELS)
    beams = beam_step(trie, torch.randn(batch, 1, CODES), trie.root(batch), num_beams=width)
    root: dict = {}
    wanted = set(beams.tokens.unique().tolist())  # the walk is the same in a part of the trie, which fits in memory
    for row in codes[torch.isin(codes[:, 0], beams.tokens)].tolist():
        root.setdefault(row[0], {}).setdefault(row[1], {})[row[2]] = None
    assert wanted == set(root)
    logits = torch.empty(batch, width, VOCABULARY)
    for request in logits:
        request.copy_(3 * torch.randn(width, VOCABULARY))
    prefixes = [[[token] for token in request] for request in beams.tokens.tolist()]

    def native() -> Beams:
        lse = log_normalizer(logits)
        level = logits[..., OFFSET : OFFSET + CODES]
        return beam_step(trie, level, beams, num_beams=width, log_normalizer=lse)

    def dictionary() -> Tensor:
        return dict_trie_step(root, logits, prefixes, beams.scores, width)

    tokens = dictionary() % VOCABULARY - OFFSET
    same = (native().tokens == tokens).double().mean().item()
    assert same > 0.999, same  # equal scores may change places
    systems = {"native": native, "dict trie": dictionary, "floor": functools.partial(read, logits)}
    shape = {"items": items, "V": VOCABULARY, "codes": CODES, "B": batch, "W": width}
    show(f"selection {shape}", interleaved(systems, ROUNDS), results, "vocabulary_selection", shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="of log_normalizer (default 1024)")
    parser.add_argument("--items", type=int, default=5 * 10**6, help="semantic IDs (default 5e6)")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = Results()
    bench_log_normalizer(options.rows, results)
    bench_selection(options.items, 4, 256, results)
    if options.json:
        results.write(options.json)


if __name__ == "__main__":
    main()
