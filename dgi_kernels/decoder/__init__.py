"""A decoder with a cache: one step for all beams of a search, from what the positions before it have left.

A decoder that is given a whole prefix reads it again at every step, and the request's memory again for every beam. Here
the memory's keys and values are made once for a request, and those of a position once for a beam; a beam finds those of
its prefix by its ancestors, so that nothing is moved when beams are reordered. For M beams and L levels that is
O(B M L) memory beside the requests' own, whatever the length of a request.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dgi_kernels import checks
from dgi_kernels.backend import choose_without_gradient, tracing
from dgi_kernels.decoder import native, reference
from dgi_kernels.decoder.layer import DecoderLayer
from dgi_kernels.transformer import check_floats, check_layer, layer_parameters
from dgi_kernels.types import Backend

__all__ = ["DecoderLayer", "decoder_step"]


def decoder_step(
    states: Tensor,
    layers: Sequence[DecoderLayer],
    memory: Sequence[Tensor],
    mask: Tensor,
    past: Sequence[Tensor] = (),
    ancestors: Sequence[Tensor] = (),
    *,
    heads: int,
    eps: float = 1e-5,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Take one position of every beam through the layers of a pre-norm transformer decoder with GELU.

    For each layer, with ``norm`` the layer norm::

        x += A_o attention(A_i norm(x); prefix)
        x += C_o attention(C_q norm(x); memory)
        x += F_o gelu(F_i norm(x))

    Args:
        states: (B, M, D) the position's input in each of M beams of B requests.
        layers: the parameters of each layer.
        memory: for each layer (B, S, 2 D), the keys of a request's memory and the values, one after the other.
        mask: (B, S) bool, False where the memory is padding. An attention to nothing but padding gives 0.
        past: what this function returned second for each position before this one, (layers, B, M_p, 2 D).
        ancestors: for each of ``past`` (B, M) int64, the beam of that position which each beam of today continues.
        heads: attention heads.
        eps: of the layer norms.
        backend: ``"auto"``, ``"reference"`` or ``"native"`` (float32, no gradients; ``"auto"`` takes the reference
            where an input requires one).

    Returns:
        The states (B, M, D) that the last layer leaves, and keys and values (layers, B, M, 2 D) of this position.

    Raises:
        ValueError: a shape or device does not fit, ``heads`` does not divide D, or an ancestor is out of range.
        TypeError: an argument has the wrong type or dtype.
        BackendUnavailable: ``backend``, asked for by name, cannot run here.

    Examples:
        >>> def pair(*shape):
        ...     return torch.ones(shape), torch.zeros(shape[0])
        >>> norm = pair(8)
        >>> layer = dgi_kernels.DecoderLayer(
        ...     norm, pair(24, 8), pair(8, 8), norm, pair(8, 8), pair(8, 8), norm, pair(32, 8), pair(8, 32)
        ... )
        >>> memory, mask = [torch.randn(2, 5, 16)], torch.ones(2, 5, dtype=torch.bool)
        >>> first, left = dgi_kernels.decoder_step(torch.randn(2, 1, 8), [layer], memory, mask, heads=2)
        >>> beams, parents = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
        >>> dgi_kernels.decoder_step(beams, [layer], memory, mask, [left], [parents], heads=2)[0].shape
        torch.Size([2, 3, 8])
    """
    layers, memory, past, ancestors = list(layers), list(memory), list(past), list(ancestors)
    checks.float_tensor("states", states, ndim=3)
    eps = checks.number("eps", eps, positive=True)
    arguments = (states, layers, memory, mask, past, ancestors, heads, eps)
    chosen = choose_without_gradient(
        "decoder_step", backend, states, *memory, *past, *layer_parameters(layers, DecoderLayer)
    )
    if chosen == "reference" or tracing():
        _check(*arguments)
        with torch.autocast(states.device.type, enabled=False):
            return (native if chosen == "native" else reference).decoder_step(*arguments)
    try:  # it checks its arguments itself: here they are only named
        return native.decoder_step(*arguments)
    except (RuntimeError, TypeError, AttributeError):
        _check(*arguments)
        raise


def _check(
    states: Tensor,
    layers: list[DecoderLayer],
    memory: list[Tensor],
    mask: Tensor,
    past: list[Tensor],
    ancestors: list[Tensor],
    heads: int,
    _: float,
) -> None:
    batch, beams, dim = states.shape
    if dim % checks.integer("heads", heads, low=1):
        raise ValueError(f"heads must divide the width {dim} of the states; got {heads}")
    if not layers or len(memory) != len(layers):
        raise ValueError(f"memory must hold one tensor per layer; got {len(memory)} for {len(layers)} layers")
    if len(past) != len(ancestors):
        raise ValueError(f"ancestors must hold one tensor per position of past; got {len(ancestors)} for {len(past)}")
    for number, layer in enumerate(layers):
        check_layer(f"layers[{number}]", layer, states)
    checks.tensor("mask", mask, dtypes=(torch.bool,), ndim=2, like=states)
    checks.shape("mask", mask, (batch, None), "(B, S)")
    for number, slots in enumerate(memory):
        check_floats(f"memory[{number}]", slots, (batch, mask.shape[1], 2 * dim), "(B, S, 2 D)", states)
    for number, (before, of) in enumerate(zip(past, ancestors, strict=True)):
        check_floats(f"past[{number}]", before, (len(layers), batch, None, 2 * dim), "(layers, B, M, 2 D)", states)
        checks.tensor(f"ancestors[{number}]", of, dtypes=(torch.int64,), like=states)
        checks.shape(f"ancestors[{number}]", of, (batch, beams), "(B, M)")
        checks.index(f"ancestors[{number}]", of, 0, before.shape[2])
