"""What ops over the layers of a transformer share: how parameters are given, their checks, and blocks of references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import checks

Pair = tuple[Tensor, Tensor]


def layer_parameters(layers: Sequence[object], kind: type[Any]) -> list[Tensor]:
    """All parameters of layers, tuples of pairs of the type ``kind``, which is checked."""
    found: list[Tensor] = []
    for number, layer in enumerate(layers):
        if not isinstance(layer, kind):
            raise TypeError(f"layers[{number}] must be of type {kind.__name__}; got {type(layer).__name__}")
        found += [part for pair in layer for part in pair]
    return found


def check_layer(name: str, layer: Any, states: Tensor) -> None:
    """Check the parameters of a layer for states (..., D)."""
    dim, pairs = states.shape[-1], layer._asdict()
    hidden = len(pairs["feed_in"][0])
    maps = {"self_in": (3 * dim, dim), "feed_in": (hidden, dim), "feed_out": (dim, hidden)}
    for field, (weight, bias) in pairs.items():
        shape = (dim,) if field.endswith("norm") else maps.get(field, (dim, dim))
        check_floats(f"{name}.{field}[0]", weight, shape, "of a weight", states)
        check_floats(f"{name}.{field}[1]", bias, shape[:1], "of a bias", states)


def check_floats(name: str, value: Tensor, shape: tuple[int | None, ...], meaning: str, states: Tensor) -> None:
    """Check a tensor of the dtype and on the device of ``states``."""
    checks.float_tensor(name, value, like=states)
    checks.shape(name, value, shape, meaning)
    checks.same_dtype(name, value, "states", states)


def norm(x: Tensor, parameters: Pair, eps: float) -> Tensor:
    """The layer norm of a reference."""
    return F.layer_norm(x, x.shape[-1:], *parameters, eps)


def attention(queries: Tensor, keys_values: Tensor, mask: Tensor | None, heads: int) -> Tensor:
    """(n, a, D) queries to keys and values (n, b, 2 D) with a mask (n, b) -> (n, a, D).

    0 where there is nothing but padding, which some of torch's kernels make NaN.
    """
    queries, keys, values = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (queries, *keys_values.chunk(2, -1)))
    seen = None if mask is None else mask[:, None, None]
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen).transpose(1, 2).flatten(2)
    return mixed if mask is None else mixed.masked_fill(~mask.any(1)[:, None, None], 0)
