"""What the tests of the Triton cosine cross-entropy share: inputs, calls, and the comparison with float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from .cosine_cases import GRADIENTS, eager
from .interpreter import DEVICE, GPU, INTERPRETED, TRITON, choose_form
from .near import assert_all_near, assert_near

if TRITON and (GPU or INTERPRETED):
    from dgi_kernels.cosine import triton
    from dgi_kernels.cosine.options import Columns, LossOptions

# Of tests with a loss that is reduced: gradients made with it are a form of their own.
every_form = pytest.mark.parametrize("form", ["flash", "chunked", "reduced"], indirect=True)


@pytest.fixture(name="form", params=["flash", "chunked"])
def chosen_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The form that the launchers take, in every test that has an argument ``form``."""
    choose_form(monkeypatch, triton, request.param, step=16)
    return request.param


def inputs(n: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    h, weight = (torch.randn(rows, d) * torch.empty(rows, 1).uniform_(0.1, 5) for rows in (n, k))
    return h.to(DEVICE, dtype), weight.to(DEVICE, dtype), torch.randint(k, (n,), device=DEVICE)


def ours(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    eps: float = 1e-12,
) -> Tensor:
    """Below the public op, which would check the values of CPU tensors."""
    options = LossOptions(ignore_index, reduction, label_smoothing, eps)
    return triton.cosine_cross_entropy(h, weight, target, scale, Columns(), options)[0]


def loss_and_gradients(
    function,
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
    **options: object,
) -> list[Tensor]:
    """With an upstream gradient of its own for every loss, the same for every call."""
    h, weight = (x.detach().to(dtype or x.dtype).requires_grad_() for x in (h, weight))
    gamma = torch.tensor(scale, device=DEVICE, dtype=dtype or torch.float32, requires_grad=True)
    loss = function(h, weight, target, gamma, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), device=DEVICE).reshape(loss.shape).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad((loss * upstream).sum(), (h, weight, gamma))]


def assert_exact(h: Tensor, weight: Tensor, target: Tensor, scale: float, **options: object) -> None:
    actual = loss_and_gradients(ours, h, weight, target, scale, **options)
    expected = loss_and_gradients(eager, h, weight, target, scale, torch.float64, **options)
    assert_near("loss", actual[0], expected[0], size=0.01 + abs(scale) / 20)  # near 0 it is a difference of logits
    sums = magnitudes(h, weight, target, scale, **options)
    assert_all_near(GRADIENTS, actual[1:], expected[1:], dtype=h.dtype, sizes=[0.2 * size for size in sums])


def magnitudes(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    scale: float,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    eps: float = 1e-12,
) -> tuple[float, float, float]:
    """Norms of what the gradients of h, weight and scale add up, without its signs: a sum that cancels to nothing is
    still rounded as what it was summed from, softmax and target distribution apart."""
    h, weight = h.double(), weight.double()
    softmax = (scale * F.normalize(h, dim=-1, eps=eps) @ F.normalize(weight, dim=-1, eps=eps).T).softmax(-1)
    kept = (target != ignore_index).double()
    wanted = torch.full_like(softmax, label_smoothing / len(weight))
    wanted.scatter_add_(1, (target * kept.long())[:, None], torch.full_like(softmax[:, :1], 1 - label_smoothing))
    upstream = {
        "mean": torch.full_like(kept, 1 / max(1.0, kept.sum().item())),
        "sum": torch.ones_like(kept),
        "none": torch.linspace(-1, 2, len(h), device=DEVICE, dtype=torch.float64).abs(),
    }[reduction]
    shares = (softmax + wanted) * (kept * upstream)[:, None]
    of_h, of_weight = (
        abs(scale) * shares.sum(1 - dim) / x.norm(dim=-1).clamp(min=eps) for dim, x in enumerate((h, weight))
    )
    return of_h.norm().item(), of_weight.norm().item(), shares.sum().item()
