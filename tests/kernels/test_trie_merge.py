"""Tries merged from shards, against the trie that all codes together give."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgi_kernels import Trie

from .test_trie import BUILDERS, assert_same

CASES = 60


def cut(rows: int) -> list[int]:
    """Sizes of one to six shards, some of them empty."""
    bounds = sorted(random.randint(0, rows) for _ in range(random.randint(0, 5)))
    return [end - first for first, end in zip([0, *bounds], [*bounds, rows], strict=True)]


def random_codes(rows: int, depth: int) -> Tensor:
    """Ragged or not, with repetitions, sorted at times so that no order of items need be kept."""
    codes = torch.stack([torch.randint(random.choice([1, 3, 40, 2048]), (rows,)) for _ in range(depth)], 1)
    if random.random() < 0.5:
        ends = torch.randint(1, depth + 1, (rows, 1))
        codes = codes.masked_fill(torch.arange(depth) >= ends, -1)
    if random.random() < 0.3:
        codes = codes[Trie.from_codes(codes).items([0], 0).item_ids]
    return codes


@pytest.mark.parametrize("backend", BUILDERS)
def test_shards_give_the_trie_of_the_whole(backend: str) -> None:
    """Guards duplicates within and across shards, empty shards, the order of items, ids, and every array's dtype."""
    for _ in range(CASES):
        rows, depth = random.choice([0, 1, 5, 300]), random.randint(1, 4)
        codes, ids = random_codes(rows, depth), torch.randperm(2 * rows + 1)[:rows] - rows
        sizes = [2048] * depth if random.random() < 0.5 else None
        whole = Trie.from_codes(codes, codebook_sizes=sizes)
        parts = cut(rows)
        shards = [Trie.from_codes(part, codebook_sizes=sizes) for part in codes.split(parts)]
        assert_same(Trie.merge(shards, renumber=True, backend=backend), whole)
        numbered = torch.arange(rows).split(parts)
        shards = [
            Trie.from_codes(part, numbers, codebook_sizes=sizes)
            for part, numbers in zip(codes.split(parts), numbered, strict=True)
        ]
        assert_same(Trie.merge(shards, backend=backend), whole)
        shards = [
            Trie.from_codes(part, own, codebook_sizes=sizes)
            for part, own in zip(codes.split(parts), ids.split(parts), strict=True)
        ]
        assert_same(Trie.merge(shards, backend=backend), Trie.from_codes(codes, ids, codebook_sizes=sizes))


@pytest.mark.parametrize("largest", [300, 40_000])
def test_large_shards_from_files_in_parts(tmp_path: Path, largest: int) -> None:
    """Guards the ranges of first codes that threads share, starts kept as marks, and tokens of two widths."""
    codes = torch.randint(300, (70_000, 3))
    codes[-1, 2] = largest - 1  # tokens of the last shard alone are int32 where they have to be
    paths = []
    for part in codes.split([50_000, 1, 19_999]):
        paths.append(tmp_path / f"shard-{len(paths)}")
        Trie.from_codes(part).save(paths[-1])
    merged = Trie.merge([Trie.load(path, mmap=True) for path in paths], renumber=True)
    assert_same(merged, Trie.from_codes(codes))
    merged.save(tmp_path / "whole")
    assert_same(Trie.load(tmp_path / "whole"), merged)


def test_updates_are_part_of_a_shard() -> None:
    codes = torch.randint(5, (40, 3))
    first = Trie.from_codes(codes[:20], codebook_sizes=[5] * 3).update(
        add=(codes[20:30], torch.arange(20, 30)), remove=[3, 5]
    )
    second = Trie.from_codes(codes[30:], torch.arange(30, 40), codebook_sizes=[5] * 3)
    kept = [row for row in range(40) if row not in (3, 5)]
    assert_same(Trie.merge([first, second]), Trie.from_codes(codes[kept], kept, codebook_sizes=[5] * 3))


def test_what_does_not_fit_is_named() -> None:
    two, three = Trie.from_codes([[0, 1]]), Trie.from_codes([[0, 1, 2]])
    with pytest.raises(ValueError, match="shards must hold at least one trie; got none"):
        Trie.merge([])
    with pytest.raises(TypeError, match=r"shards\[1\] must be a Trie; got Tensor"):
        Trie.merge([two, torch.zeros(1, 2)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"shards must have one depth; got \[2, 3\]"):
        Trie.merge([two, three])
    with pytest.raises(ValueError, match="distinct ids; 0 is in two of them"):
        Trie.merge([two, two])
    sized = [Trie.from_codes([[0, 1]], codebook_sizes=sizes) for sizes in ([4, 4], [4, 5])]
    with pytest.raises(ValueError, match=r"agree in their codebook sizes; got \(4, 4\) and \(4, 5\)"):
        Trie.merge(sized, renumber=True)
    with pytest.raises(ValueError, match=r"codes below the codebook sizes \(4, 4\); those of one need \(9, 4\)"):
        Trie.merge([sized[0], Trie.from_codes([[8, 1]])], renumber=True)
    assert Trie.merge([sized[0], two], renumber=True).codebook_sizes == (4, 4)


@pytest.mark.skipif("native" not in BUILDERS, reason="the extension is not built")
def test_a_direct_caller_cannot_give_arrays_of_other_tries() -> None:
    trie = Trie.from_codes([[0, 1], [0, 2], [1, 1], [1, 1]]).parts.base
    nothing = torch.empty(0, dtype=torch.int32)
    tokens, starts = list(trie.tokens), list(trie.child_start)
    good = [tokens, starts, [trie.item_start], [nothing], [4], True]
    assert [len(array) for array in torch.ops.dgi_kernels.trie_merge(*good)] == [2, 3, 2, 3, 4, 0]
    for place, wrong in ((0, tokens[:1]), (1, starts[::-1]), (2, [nothing]), (3, [nothing.new_zeros(3)]), (4, [5])):
        with pytest.raises(RuntimeError, match="trie_merge: "):
            torch.ops.dgi_kernels.trie_merge(*good[:place], wrong, *good[place + 1 :])
