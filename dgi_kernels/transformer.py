"""What ops over the layers of a transformer share: how parameters are given, and their checks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dgi_kernels import checks

Pair = tuple[Tensor, Tensor]


def check_layer(name: str, layer: object, kind: type[Any], states: Tensor) -> None:
    """Check the parameters of a layer, a tuple of pairs of the type ``kind``, for states (..., D)."""
    if not isinstance(layer, kind):
        raise TypeError(f"{name} must be of type {kind.__name__}; got {type(layer).__name__}")
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
