"""The rotation trick: a gradient for hard codes (Fifty et al. 2024, arXiv 2410.06424).

A level emits e, a row of its codebook, for the residual r. Backward takes it for a rotation and rescaling of r, both
constant:

    e = c R r,    c = ||e|| / ||r||,    R = I - 2 w w^T + 2 e^ r^^T,    w = (r^ + e^) / ||r^ + e^||

where x^ = x / ||x||. So the gradient of r is c R^T times that of e, and codebooks have none.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-12  # lower bound of the norms: of a code of 0 there is no direction to turn to


def rotate(z: Tensor, quantized: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D), and hard mode's (N, m, D) twice -> copies of the latter with the gradient of z."""
    # torch.compile takes no function that has a jvp.
    function = _Rotate if torch.compiler.is_compiling() else _RotateWithTangents
    return function.apply(z, quantized.detach(), residuals.detach())


class _Rotate(torch.autograd.Function):
    """Linear in z: it can be differentiated any number of times, forward and backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, quantized: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        return quantized.clone(), residuals.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, dquantized: Tensor, dresiduals: Tensor) -> tuple[Tensor, None, None]:
        factor, w, r, e = _rotations(*ctx.saved_tensors)
        flow = torch.zeros_like(dquantized[:, 0])  # the gradient of r_j, then of r_{j-1}
        for level in reversed(range(r.shape[1])):
            turned = _reflect_twice(dquantized[:, level] - flow, w[:, level], e[:, level], r[:, level])
            flow = factor[:, level] * turned + flow + dresiduals[:, level]
        return flow, None, None


class _RotateWithTangents(_Rotate):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, change: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        factor, w, r, e = _rotations(*ctx.saved_tensors)
        changes, rotated = [], []
        for level in range(r.shape[1]):
            changes.append(change)
            turned = factor[:, level] * _reflect_twice(change, w[:, level], r[:, level], e[:, level])
            rotated.append(turned)
            change = change - turned
        return torch.stack(rotated, dim=1), torch.stack(changes, dim=1)


def _rotations(quantized: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c (N, m, 1), and w, r^ and e^ (N, m, D)."""
    e_norm, r_norm = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (quantized, residuals))
    r, e = residuals / r_norm.clamp(min=EPS), quantized / e_norm.clamp(min=EPS)
    # A residual of 0 has no direction either, and c has no bound near it: nothing goes through what it emits.
    factor = torch.where(r_norm > EPS, e_norm / r_norm.clamp(min=EPS), 0.0)
    return factor, F.normalize(r + e, dim=-1, eps=EPS), r, e


def _reflect_twice(x: Tensor, w: Tensor, along: Tensor, to: Tensor) -> Tensor:
    """(I - 2 w w^T + 2 to along^T) x: R x along r^ to e^, R^T x along e^ to r^."""
    at_w, at_along = ((x * axis).sum(dim=-1, keepdim=True) for axis in (w, along))
    return x - 2 * at_w * w + 2 * at_along * to
