"""How near is near enough: one rule for every op, backend and dtype.

A result may be as far from the truth in float64 as the reference in the same dtype is, times ``FACTOR``, and by the
rounding of one pass through that dtype on top: the reference may be exact by luck.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR = 3.0
# Relative to the norm of a result, or of what it adds up: float32 sums in any order; a product of 16-bit weights.
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def assert_near(
    name: str,
    got: Tensor,
    want: Tensor,
    usual: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    size: float = 0.0,
    factor: float = FACTOR,
) -> None:
    """Fail where ``got`` is too far from ``want``; the message names the tensor, the error and the worst entry.

    Args:
        name: of the tensor.
        got: what a kernel made.
        want: the truth, in float64.
        usual: what the reference makes of the same inputs in the same dtype; None: rounding alone is allowed.
        dtype: that inputs and products have; by default that of ``got``.
        size: norm of what is summed, where the sum may cancel: it is still rounded as what it was summed from.
        factor: how many times the reference's error is allowed.
    """
    assert got.shape == want.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if not want.numel():
        return
    actual, truth = got.detach().double().cpu(), want.detach().double().cpu()
    own = (usual.detach().double().cpu() - truth).norm().item() if usual is not None else 0.0
    off = (actual - truth).abs()
    relative = ROUNDING[dtype or got.dtype]
    allowed = factor * own + relative * max(truth.norm().item(), size, 1e-30)
    if off.norm().item() <= allowed:  # False for NaN
        return
    worst = int(off.nan_to_num(nan=torch.inf).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), off.shape)) if off.ndim else ()
    raise AssertionError(
        f"{name} {tuple(got.shape)} is off by {off.norm():.3g}, {off.norm() / allowed:.3g} times what is allowed "
        f"(the reference is off by {own:.3g}, the truth's norm is {truth.norm():.3g}); worst at {where}: "
        f"{actual.flatten()[worst]:.9g}, not {truth.flatten()[worst]:.9g}"
    )


def assert_all_near(
    names: Sequence[str],
    got: Sequence[Tensor],
    want: Sequence[Tensor],
    usual: Sequence[Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    sizes: Sequence[float] | None = None,
    factor: float = FACTOR,
) -> None:
    """:func:`assert_near` for results that come together, such as the gradients of a call."""
    for i, (name, actual, truth) in enumerate(zip(names, got, want, strict=True)):
        assert_near(
            name,
            actual,
            truth,
            None if usual is None else usual[i],
            dtype=dtype,
            size=0.0 if sizes is None else sizes[i],
            factor=factor,
        )


def error(actual: Tensor, expected: Tensor, floor: float = 1e-30) -> float:
    """The norm of the difference, relative to the norm of what is expected."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=floor)).item()


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """d loss / d leaves in float64; zeros for a leaf that does not matter."""
    return [gradient.double() for gradient in torch.autograd.grad(loss, leaves, materialize_grads=True)]
