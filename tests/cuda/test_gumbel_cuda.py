"""The CUDA noise and Gumbel-Softmax, run thread by thread on the CPU, against the references in float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from dgi_kernels import gumbel_noise, gumbel_softmax

from . import on_cpu

DTYPES = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # of values between 0 and 1
SOFTMAX = ("gumbel_softmax", "gumbel_softmax_backward")


@pytest.mark.parametrize("rows, codes", [(1, 1), (3, 7), (2, 1024), (5, 1030), (70, 33)])
def test_noise(cuda_ops: on_cpu.Ops, rows: int, codes: int) -> None:
    seed, level = random.randrange(-(2**63), 2**63), random.randrange(4)
    options = {"stream": random.randrange(2), "row_offset": random.randrange(1000)}
    with cuda_ops.instead("gumbel_noise"):
        noise = gumbel_noise(seed, level, rows, codes, backend="native", **options)
    exact = gumbel_noise(seed, level, rows, codes, backend="reference", **options)
    torch.testing.assert_close(noise, exact, rtol=0, atol=2e-5)
    with cuda_ops.instead("gumbel_noise"):  # rows that another rank draws
        assert torch.equal(
            gumbel_noise(
                seed,
                level,
                1,
                codes,
                backend="native",
                stream=options["stream"],
                row_offset=options["row_offset"] + rows - 1,
            ),
            noise[-1:],
        )


def test_no_noise(cuda_ops: on_cpu.Ops) -> None:
    with cuda_ops.instead("gumbel_noise"):
        assert gumbel_noise(1, 0, 0, 5, backend="native").shape == (0, 5)
        assert gumbel_noise(1, 0, 5, 0, backend="native").shape == (5, 0)


def sample(logits: Tensor, tau: Tensor, hard: bool, seed: int, upstream: Tensor, backend: str) -> list[Tensor]:
    logits, tau = logits.detach().requires_grad_(), tau.detach().requires_grad_()
    p = gumbel_softmax(logits, tau, hard, seed=seed, backend=backend)
    return [p.detach(), *torch.autograd.grad(p, (logits, tau), upstream.to(p.dtype))]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (2, 2, 1030), (3, 4096)], ids=str)
def test_gumbel_softmax(cuda_ops: on_cpu.Ops, shape: tuple[int, ...], dtype: torch.dtype, hard: bool) -> None:
    logits, tau = (torch.randn(shape) * 3).to(dtype), torch.tensor(random.uniform(0.3, 2))
    upstream, seed = torch.randn(shape).to(dtype), random.randrange(-(2**63), 2**63)
    with cuda_ops.instead(*SOFTMAX):
        p, dlogits, dtau = sample(logits, tau, hard, seed, upstream, "native")
    exact, exact_dlogits, exact_dtau = sample(logits.double(), tau.double(), hard, seed, upstream, "reference")
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(p.double(), exact, rtol=0, atol=tolerance)
    torch.testing.assert_close(dlogits.double(), exact_dlogits, rtol=tolerance, atol=5 * tolerance)
    terms = (upstream.double() - (exact * upstream).sum(-1, keepdim=True)).abs().sum().item()
    torch.testing.assert_close(dtau.double(), exact_dtau, rtol=1e-3, atol=1e-5 * terms + 1e-4)


def test_edge_values(cuda_ops: on_cpu.Ops) -> None:
    inf = torch.inf
    x = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, -inf], [0.0, torch.nan, 1.0], [2.0, -inf, -inf], [1, inf, 2]])
    for hard in (False, True):
        with cuda_ops.instead(*SOFTMAX):
            p, dlogits, _ = sample(x, torch.tensor(1.0), hard, 3, torch.randn_like(x), "native")
        assert p[0, 1] == 0 and p[0].sum().item() == pytest.approx(1)
        assert p[3].tolist() == [1, 0, 0]
        assert p[[1, 2, 4]].isnan().all()
        assert dlogits[0].isfinite().all() and dlogits[0, 1] == 0
        with cuda_ops.instead(*SOFTMAX):
            assert gumbel_softmax(x[:0], hard=hard, backend="native").shape == (0, 3)


def test_the_order_of_threads_does_not_matter(cuda_ops: on_cpu.Ops) -> None:
    x, tau, upstream = torch.randn(3, 700), torch.tensor(0.7), torch.randn(3, 700)
    with cuda_ops.instead(*SOFTMAX):
        first, second = (sample(x, tau, False, 5, upstream, "native") for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
