"""Gumbel-Softmax against F.gumbel_softmax's formula in float64."""

from __future__ import annotations

import random

import pytest
import torch

from dgi_kernels import BackendUnavailable, gumbel_softmax

from .gumbel_cases import noisy_logits, one_hot_argmax
from .near import ROUNDING, assert_all_near, assert_near, gradients
from .shapes import GUMBEL, name_of


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING, ids=name_of)
@pytest.mark.parametrize("shape", GUMBEL, ids=name_of)
def test_softmax_of_noisy_logits(shape: tuple[int, ...], dtype: torch.dtype, hard: bool) -> None:
    seed, logits = random.randrange(2**63), (torch.randn(shape) * 3).to(dtype).requires_grad_()
    tau = torch.tensor(random.uniform(0.3, 2)).to(dtype).requires_grad_()
    actual = gumbel_softmax(logits, tau, hard, seed=seed, backend="reference")
    noisy = noisy_logits(logits, seed)
    soft = (noisy / tau.double()).softmax(-1)
    assert actual.dtype == dtype
    if hard:
        assert torch.equal(actual.double(), one_hot_argmax(noisy))
    else:
        assert_near("softmax", actual, soft)

    upstream = torch.randn_like(actual)
    leaves = (logits, tau)
    assert_all_near(
        ("gradient of logits", "gradient of tau"),
        gradients((actual * upstream).sum(), leaves),
        gradients((soft * upstream.double()).sum(), leaves),
        dtype=dtype,
        sizes=[upstream.double().norm().item()] * 2,
    )


def test_softmax_gradcheck() -> None:
    logits, tau = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor(0.7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, t: gumbel_softmax(x, t, seed=5), (logits, tau.requires_grad_()))


def test_hard_samples_follow_the_softmax() -> None:
    """The Gumbel-max trick: frequencies of the argmax are softmax(logits), whatever tau. The seed is fixed."""
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0])
    frequencies = gumbel_softmax(logits.expand(100_000, 4), 0.1, True, seed=1).mean(0)
    torch.testing.assert_close(frequencies, logits.softmax(0), rtol=0, atol=0.008)


def test_softmax_edge_values() -> None:
    inf = torch.inf
    logits = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, -inf], [0.0, torch.nan, 1.0], [2.0, -inf, -inf]])
    p = gumbel_softmax(logits, seed=3)
    assert p[0, 1] == 0 and p[0].sum() == pytest.approx(1)
    assert p[3].tolist() == [1, 0, 0]
    assert p[1].isnan().all() and p[2].isnan().all()
    logits = logits[[0, 3]].requires_grad_()
    (gradient,) = torch.autograd.grad(gumbel_softmax(logits, hard=True, seed=3).square().sum(), logits)
    assert gradient.isfinite().all() and gradient[0, 1] == 0


def test_softmax_of_views_and_empty_batches() -> None:
    base = torch.randn(5, 6)
    for view in (base.T, base[::2, 1:4], base[:1].expand(4, 6), base[:0], base[:0].reshape(2, 0, 6)):
        assert torch.equal(gumbel_softmax(view, seed=9), gumbel_softmax(view.contiguous(), seed=9))


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("logits", [1.0, 2.0], TypeError),
        ("logits", torch.ones(2, 3, dtype=torch.int64), TypeError),
        ("logits", torch.tensor(1.0), ValueError),
        ("logits", torch.ones(2, 0), ValueError),
        ("tau", 0.0, ValueError),
        ("tau", -1, ValueError),
        ("tau", float("nan"), ValueError),
        ("tau", torch.tensor(0.0), ValueError),
        ("tau", torch.ones(1), ValueError),
        ("tau", None, TypeError),
        ("hard", 1, TypeError),
        ("seed", 1.0, TypeError),
        ("seed", torch.tensor([1, 2]), ValueError),
        ("backend", "gpu", ValueError),
    ],
)
def test_bad_softmax_arguments_are_named(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must"):
        gumbel_softmax(**{"logits": torch.randn(2, 3), name: value})


def test_a_backend_asked_for_by_name_says_why_it_cannot_run() -> None:
    with pytest.raises(BackendUnavailable, match="cannot run gumbel_softmax here: "):
        gumbel_softmax(torch.randn(2, 3), backend="triton")
