"""What the calls into the compiled extension share: gradients of gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wants_gradients(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def create_graph() -> bool:
    """Whether backward runs with ``create_graph=True``; what is compiled cannot."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def gradients_of(
    outputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients that can be differentiated themselves; inputs that are None are not wanted."""
    pairs = [(output, g) for output, g in zip(outputs, upstream, strict=True) if g is not None and output.requires_grad]
    leaves = [x for x, want in zip(inputs, wanted, strict=True) if want and x is not None]
    gradients = iter(
        torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], create_graph=True, allow_unused=True)
        if pairs
        else [None] * len(leaves)
    )
    return [next(gradients) if want else None for want in wanted]
