"""One table of shapes per op family, for its tests and its benchmark: awkward before large."""

from __future__ import annotations

from typing import NamedTuple


class Cosine(NamedTuple):
    """h (n, d), weight (k, d)."""

    n: int
    d: int
    k: int


class Quantize(NamedTuple):
    """z (n, d), one codebook (k, d) for each k of ``sizes``."""

    n: int
    d: int
    sizes: tuple[int, ...]


COSINE = (
    Cosine(n=1, d=1, k=1),
    Cosine(n=1, d=8, k=5),
    Cosine(n=7, d=1, k=3),
    Cosine(n=5, d=3, k=1),
    Cosine(n=16, d=8, k=32),
    Cosine(n=33, d=17, k=65),
    Cosine(n=130, d=19, k=257),
)

QUANTIZE = (
    Quantize(n=1, d=1, sizes=(1,)),
    Quantize(n=1, d=4, sizes=(3, 2)),
    Quantize(n=6, d=1, sizes=(4, 1, 3)),
    Quantize(n=16, d=8, sizes=(16, 8, 4)),
    Quantize(n=33, d=7, sizes=(9, 33, 5)),
)

GUMBEL = ((1,), (5,), (1, 1), (7, 3), (2, 3, 9), (33, 65))  # logits
