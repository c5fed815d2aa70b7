"""The parameters of a decoder's layer."""

from __future__ import annotations

from typing import NamedTuple

from dgi_kernels.transformer import Pair


class DecoderLayer(NamedTuple):
    """One pre-norm layer of :func:`dgi_kernels.decoder_step`: pairs of weight and bias.

    Attributes:
        self_norm, cross_norm, feed_norm: (D,) and (D,), the norm before each block.
        self_in: (3 D, D) and (3 D,), to queries, keys and values.
        self_out: (D, D) and (D,).
        query: (D, D) and (D,), of the attention to the memory.
        cross_out: (D, D) and (D,).
        feed_in: (F, D) and (F,), before the GELU.
        feed_out: (D, F) and (D,).
    """

    self_norm: Pair
    self_in: Pair
    self_out: Pair
    cross_norm: Pair
    query: Pair
    cross_out: Pair
    feed_norm: Pair
    feed_in: Pair
    feed_out: Pair
