"""cosine_logits in Triton: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgi_kernels import cosine_logits

from .interpreter import DEVICE, DTYPES, launcher, run_in_the_interpreter, runs
from .shapes import name_of

HALF = [dtype for dtype in DTYPES if dtype != torch.float32]


@launcher
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


def results(dtype: torch.dtype, backend: str, h: Tensor, weight: Tensor, upstream: Tensor, eps: float) -> list[Tensor]:
    """Logits and the gradients of h, weight and scale, in float64."""
    scale = torch.tensor(20.0, device=DEVICE, dtype=torch.promote_types(dtype, torch.float32))
    leaves = [x.to(dtype).detach().requires_grad_() for x in (h, weight)] + [scale.requires_grad_()]
    logits = cosine_logits(*leaves, eps=eps, backend=backend)
    return [x.detach().double() for x in (logits, *torch.autograd.grad(logits, leaves, upstream.to(dtype)))]


@runs
@pytest.mark.parametrize("dtype", HALF, ids=name_of)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 17), (130, 300, 64), (40, 33, 200), (0, 5, 8), (5, 0, 8)])
def test_values_and_gradients(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Zero and short vectors, whose norms are constants, are among them; strides are no multiples of anything."""
    n, k, d = shape
    h, weight = torch.randn(n, d + 1, device=DEVICE)[:, 1:], torch.randn(k, d + 1, device=DEVICE)[:, 1:]
    h[2:3], weight[3:4] = 0, weight[3:4] * 1e-3
    upstream = torch.randn(n, k, device=DEVICE).to(dtype)
    given = (h.to(dtype), weight.to(dtype))
    exact = results(torch.float64, "reference", *given, upstream, 0.1)
    usual = results(dtype, "reference", *given, upstream, 0.1)
    for found, want, other in zip(results(dtype, "triton", *given, upstream, 0.1), exact, usual, strict=True):
        assert found.shape == want.shape
        allowed = 2 * (other - want).norm() + 4 * torch.finfo(dtype).eps * want.norm()
        assert (found - want).norm() <= allowed


@runs
def test_leading_dimensions_and_what_needs_no_gradient() -> None:
    h, weight = torch.randn(2, 3, 16, device=DEVICE).half(), torch.randn(9, 16, device=DEVICE).half()
    logits = cosine_logits(h, weight, 5.0, backend="triton")
    assert logits.shape == (2, 3, 9) and not logits.requires_grad
    torch.testing.assert_close(logits, cosine_logits(h, weight, 5.0, backend="reference"), rtol=2e-3, atol=2e-3)
    for i in range(2):
        leaves = [x.detach().requires_grad_(i == j) for j, x in enumerate((h, weight))]
        cosine_logits(*leaves, 5.0, backend="triton").sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [i == 0, i == 1]
