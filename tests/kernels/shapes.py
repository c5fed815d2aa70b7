"""One table of shapes per op family: awkward before large; and names of parameters that can be typed after ``-k``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch


def name_of(value: object) -> str:
    """The id of a parameter: ``float32``, ``n33-d7-k9.33.5``, ``7x3``."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Iterable) and type(value) is tuple:
        return "x".join(map(str, value)) or "scalar"
    return str(value)


class Cosine(NamedTuple):
    """h (n, d), weight (k, d)."""

    n: int
    d: int
    k: int

    def __str__(self) -> str:
        return f"n{self.n}-d{self.d}-k{self.k}"


class Quantize(NamedTuple):
    """z (n, d), one codebook (k, d) for each k of ``sizes``."""

    n: int
    d: int
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"n{self.n}-d{self.d}-k{'.'.join(map(str, self.sizes))}"


COSINE = (
    Cosine(n=1, d=1, k=1),  # the least there is
    Cosine(n=1, d=8, k=5),  # one row
    Cosine(n=7, d=1, k=3),  # one dimension: cosines are -1 or 1
    Cosine(n=5, d=3, k=1),  # one code: every loss is 0
    Cosine(n=16, d=8, k=32),  # powers of two: full vectors and tiles
    Cosine(n=33, d=17, k=65),  # one more than those
    Cosine(n=130, d=19, k=257),  # several blocks of rows, and of Triton's tiles, the last with little in it
)

QUANTIZE = (
    Quantize(n=1, d=1, sizes=(1,)),  # the least there is
    Quantize(n=1, d=4, sizes=(3, 2)),  # one row
    Quantize(n=6, d=1, sizes=(4, 1, 3)),  # one dimension, and a level of one code between others
    Quantize(n=16, d=8, sizes=(16, 8, 4)),  # powers of two
    Quantize(n=33, d=7, sizes=(9, 33, 5)),  # none, and a level wider than the one before it
)

GUMBEL = ((1,), (5,), (1, 1), (7, 3), (2, 3, 9), (33, 65))  # logits
