"""Gumbel-Softmax in C++ against the reference with the same noise."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, library

from dgi_kernels import _extension, gumbel_softmax

from .near import assert_all_near, assert_near
from .shapes import GUMBEL, name_of

pytestmark = pytest.mark.skipif(_extension.load_error is not None, reason=str(_extension.load_error))


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.5, 0.4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("shape", [*GUMBEL, (3, 700), (2, 0, 4)], ids=name_of)
def test_softmax_is_the_references(shape: tuple[int, ...], dtype: torch.dtype, tau: float, hard: bool) -> None:
    seed, logits = random.randrange(2**63), (torch.randn(shape) * 3).to(dtype).requires_grad_()
    upstream = torch.randn_like(logits)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for temperature in (tau, torch.tensor(tau).to(dtype).requires_grad_()):
        wide = [x.detach().double().requires_grad_() for x in (logits, torch.as_tensor(temperature, dtype=compute))]
        truth = gumbel_softmax(*wide, hard, seed=seed, backend="reference")
        actual, usual = (
            gumbel_softmax(logits, temperature, hard, seed=seed, backend=name) for name in ("native", "reference")
        )
        assert actual.dtype == dtype and actual.shape == shape
        assert_near("softmax", actual, truth, usual)
        leaves = [logits, temperature] if isinstance(temperature, Tensor) else [logits]
        theirs = torch.autograd.grad(truth, wide, upstream.double())[: len(leaves)]
        assert_all_near(
            ("gradient of logits", "gradient of tau")[: len(leaves)],
            torch.autograd.grad(actual, leaves, upstream),
            theirs,
            torch.autograd.grad(usual, leaves, upstream),
            dtype=dtype,
            sizes=[upstream.double().norm().item()] * len(leaves),
        )


def test_infinite_logits_have_no_gradient_to_tau() -> None:
    logits = torch.tensor([[0.5, -torch.inf, 1.0]])
    tau = torch.tensor(0.7, requires_grad=True)
    p = gumbel_softmax(logits, tau, seed=3, backend="native")
    assert p[0, 1] == 0
    (gradient,) = torch.autograd.grad(p[0, 0], tau)
    assert gradient.isfinite() and gradient != 0


def test_gradients_of_gradients_are_the_references() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda x: gumbel_softmax(x, 0.8, seed=1, backend="native"), (logits,), atol=1e-4
    )


@pytest.mark.parametrize("hard", [True, False])
def test_ops_are_well_registered(hard: bool) -> None:
    ops, tau, seed = torch.ops.dgi_kernels, torch.tensor(0.8), torch.tensor([3])
    logits = torch.randn(4, 6)
    library.opcheck(ops.gumbel_softmax.default, (logits, tau, seed, hard))
    library.opcheck(ops.gumbel_softmax_backward.default, (logits, logits, tau, seed, hard))
