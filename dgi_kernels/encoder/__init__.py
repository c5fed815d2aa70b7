"""A transformer encoder in inference: all layers over the sequences of some requests, in one call.

A request alone is a dozen places: torch's layers spend more on calls than on products, and read every weight for few
rows. Here all layers are one call, whose intermediate results stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.backend import choose_without_gradient, tracing
from dgi_kernels.encoder import native, reference
from dgi_kernels.encoder.layer import EncoderLayer
from dgi_kernels.transformer import check_layer, layer_parameters
from dgi_kernels.types import Backend

__all__ = ["EncoderLayer", "encoder_layers"]


def encoder_layers(
    states: Tensor,
    layers: Sequence[EncoderLayer],
    mask: Tensor,
    *,
    heads: int,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> Tensor:
    """Take sequences through the layers of a pre-norm transformer encoder with GELU, without dropout.

    For each layer, with ``norm`` the layer norm::

        x += A_o attention(A_i norm(x))
        x += F_o gelu(F_i norm(x))

    Args:
        states: (B, S, D) the input of each of S places in B sequences.
        layers: the parameters of each layer.
        mask: (B, S) bool, False where a place is padding, which no place attends to; its own states are made all the
            same. Attention to nothing but padding gives 0.
        heads: attention heads.
        eps: of the layer norms.
        backend: ``"auto"``, ``"reference"`` or ``"native"`` (float32, no gradients; ``"auto"`` takes the reference
            where an input requires one).

    Returns:
        The states (B, S, D) that the last layer leaves; a norm behind it is the caller's.

    Raises:
        ValueError: a shape or device does not fit, or ``heads`` does not divide D.
        TypeError: an argument has the wrong type or dtype.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> def pair(*shape):
        ...     return torch.ones(shape), torch.zeros(shape[0])
        >>> norm = pair(8)
        >>> layer = dgi_kernels.EncoderLayer(norm, pair(24, 8), pair(8, 8), norm, pair(32, 8), pair(8, 32))
        >>> mask = torch.tensor([[True, True, False], [True, True, True]])
        >>> dgi_kernels.encoder_layers(torch.randn(2, 3, 8), [layer], mask, heads=2).shape
        torch.Size([2, 3, 8])
    """
    layers = list(layers)
    checks.float_tensor("states", states, ndim=3)
    eps = checks.number("eps", eps, positive=True)
    parameters = layer_parameters(layers, EncoderLayer)
    chosen = choose_without_gradient("encoder_layers", backend, states, *parameters)
    if chosen == "reference" or tracing():
        _check(states, layers, mask, heads)
        with torch.autocast(states.device.type, enabled=False):
            return (native if chosen == "native" else reference).encoder_layers(states, layers, mask, heads, eps)
    try:  # it checks its arguments itself: here they are only named
        return native.encoder_layers(states, layers, mask, heads, eps)
    except (RuntimeError, TypeError, AttributeError):
        _check(states, layers, mask, heads)
        raise


def _check(states: Tensor, layers: list[EncoderLayer], mask: Tensor, heads: int) -> None:
    dim = states.shape[2]
    if dim % checks.integer("heads", heads, low=1):
        raise ValueError(f"heads must divide the width {dim} of the states; got {heads}")
    if not layers:
        raise ValueError("layers must not be empty")
    for number, layer in enumerate(layers):
        check_layer(f"layers[{number}]", layer, states)
    checks.tensor("mask", mask, dtypes=(torch.bool,), ndim=2, like=states)
    checks.shape("mask", mask, tuple(states.shape[:2]), "(B, S)")
