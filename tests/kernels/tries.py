"""Tries of random catalogs, by one build or by a chain of updates that arrives at the same items in the same order."""

from __future__ import annotations

import random

import torch

from dgi_kernels import Trie

from .oracles import Catalog, Code

STEPS = 3


def make(catalog: Catalog, *, updates: bool | None = None) -> Trie:
    """The trie of a catalog; half of the time (or as ``updates`` says) made by updates, with items come and gone."""
    if updates is None:
        updates = random.random() < 0.5
    return updated(catalog) if updates else Trie.from_codes(catalog.codes, catalog.ids, codebook_sizes=catalog.sizes)


def updated(catalog: Catalog) -> Trie:
    """Some items first, the others by updates; strangers come with either, and leave before the end."""
    items = list(zip(catalog.codes, catalog.ids, strict=True))
    cuts = [0, *sorted(random.randint(0, len(items)) for _ in range(STEPS - 1)), len(items)]
    trie = Trie.from_codes(torch.empty(0, catalog.depth), codebook_sizes=catalog.sizes)
    strangers: set[int] = set()
    for step in range(STEPS):
        added = items[cuts[step] : cuts[step + 1]]
        leaving = {item for _, item in added} & strangers  # they have stood under the ids of items that come now
        leaving |= strangers if step == STEPS - 1 else set(random.sample(sorted(strangers), len(strangers) // 2))
        strangers -= leaving
        later = [item for _, item in items[cuts[step + 1] :]]
        ids = sorted({*later, *range(-3, 0)} - strangers)
        for item in random.sample(ids, random.randint(0, len(ids)) if step < STEPS - 1 else 0):
            added.insert(random.randint(0, len(added)), (random_code(catalog), item))
            strangers.add(item)
        codes, ids = [code for code, _ in added], [item for _, item in added]
        trie = trie.update(add=(codes, ids), remove=sorted(leaving))
        if step == 0 and random.random() < 0.8:
            trie = trie.compact()  # so that there is a base
    return trie


def random_code(catalog: Catalog) -> Code:
    """A code of the catalog or near one of them, or any; ragged ones too."""
    code = list(random.choice(catalog.codes))
    if random.random() < 0.7:
        code = code[: random.randint(1, len(code))]
    if random.random() < 0.7:
        code[-1] = random.randrange(catalog.sizes[len(code) - 1])
    return tuple(code)


def names(trie: Trie, catalog: Catalog, depth: int) -> dict[int, Code]:
    """The prefix of each node of a depth that has items."""
    prefixes = catalog.prefixes(depth) if depth else [()]
    nodes = trie.find(torch.tensor(prefixes).reshape(len(prefixes), depth)).tolist()
    assert -1 not in nodes and len(set(nodes)) == len(prefixes)
    return dict(zip(nodes, prefixes, strict=True))
