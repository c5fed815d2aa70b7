"""Random catalogs, as pure Python looks at them, and their tries.

A trie is made by one build, or by a chain of updates that arrives at the same items in the same order.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from dgi_kernels import Trie, TrieFilter

Code = tuple[int, ...]
STEPS = 3  # updates that make a trie


@dataclass
class Catalog:
    """Items as (codes, id) in the order given; ``sizes`` are the codebooks' sizes."""

    codes: list[Code]
    ids: list[int]
    sizes: list[int]

    @property
    def depth(self) -> int:
        return len(self.sizes)

    def padded(self) -> list[Code]:
        return [code + (-1,) * (self.depth - len(code)) for code in self.codes]

    def prefixes(self, depth: int) -> list[Code]:
        """All prefixes of one depth in order: the index of a prefix is its node."""
        return sorted({code[:depth] for code in self.padded()})

    def node(self, prefix: Code) -> int:
        prefixes = self.prefixes(len(prefix)) if prefix else [()]
        return prefixes.index(prefix) if prefix in prefixes else -1

    def children(self, prefix: Code) -> list[int]:
        return sorted({code[len(prefix)] for code in self.padded() if code[: len(prefix)] == prefix})

    def items(self, prefix: Code) -> list[int]:
        """Ids below a prefix, by code, equal codes in the order given."""
        below = [(code, row) for row, code in enumerate(self.padded()) if code[: len(prefix)] == prefix]
        return [self.ids[row] for _, row in sorted(below)]


def random_catalog(*, max_items: int = 12, max_depth: int = 4, max_size: int = 6) -> Catalog:
    """A small catalog in random order: often ragged, with duplicates, one item, one level or a codebook of one."""
    depth = random.randint(1, max_depth)
    sizes = [random.randint(1, max_size) for _ in range(depth)]
    ragged = random.random() < 0.5
    count = random.choice([1, random.randint(1, max_items)])
    lengths = [random.randint(1, depth) if ragged else depth for _ in range(count)]
    lengths[random.randrange(count)] = depth
    codes = [tuple(random.randrange(size) for size in sizes[:length]) for length in lengths]
    return Catalog(codes, random.sample(range(3 * count), count), sizes)


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


def random_filters(catalog: Catalog, trie: Trie, batch: int) -> tuple[object, list[set[int] | None]]:
    """No filter, one for all, or one per request, with the ids that each request may have."""

    def one() -> tuple[TrieFilter | None, set[int] | None]:
        if random.random() < 0.3:
            return None, None
        items = random.sample(catalog.ids, random.randint(0, len(catalog.ids)))
        return trie.filter(items=items), set(items)

    if random.random() < 0.5:
        chosen, items = one()
        return chosen, [items] * batch
    pairs = [one() for _ in range(batch)]
    return [chosen for chosen, _ in pairs], [items for _, items in pairs]
