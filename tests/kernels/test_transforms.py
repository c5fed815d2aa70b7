"""torch.func's transforms over the ops: the reference runs, and a kernel asked for by name says why it cannot."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from dgi_kernels import (
    BackendUnavailable,
    backends,
    cosine_cross_entropy,
    cosine_logits,
    gumbel_softmax,
    residual_quantize,
)


def test_vmap_gives_what_a_loop_gives() -> None:
    """Guards against value checks that look at one example of many, and kernels that do not know of the others."""
    h, weight, target, scale = torch.randn(3, 4, 5), torch.randn(3, 6, 5), torch.randint(6, (3, 4)), torch.rand(3) * 20

    def looped(function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
        return torch.stack([function(*example) for example in zip(*arguments, strict=True)])

    for function, arguments in (
        (cosine_logits, (h, weight, scale)),
        (cosine_cross_entropy, (h, weight, target, scale)),
        (lambda x: gumbel_softmax(x, seed=3), (h,)),
    ):
        torch.testing.assert_close(vmap(function)(*arguments), looped(function, *arguments))
    per_example = vmap(grad(cosine_cross_entropy), in_dims=(0, None, 0, None))(h, weight[0], target, scale[0])
    expected = looped(lambda x, y: grad(cosine_cross_entropy)(x, weight[0], y, scale[0]), h, target)
    torch.testing.assert_close(per_example, expected)


def test_grad_and_jvp_agree_with_autograd() -> None:
    h, weight, target = torch.randn(4, 5, requires_grad=True), torch.randn(6, 5), torch.randint(6, (4,))
    (expected,) = torch.autograd.grad(cosine_cross_entropy(h, weight, target, 9.0), h)
    actual = grad(lambda x: cosine_cross_entropy(x, weight, target, 9.0))(h.detach())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    tangent = torch.randn_like(h)
    _, along = jvp(lambda x: cosine_cross_entropy(x, weight, target, 9.0), (h.detach(),), (tangent,))
    torch.testing.assert_close(along, (expected * tangent).sum(), rtol=1e-4, atol=1e-5)


def test_values_of_every_example_are_checked() -> None:
    h, weight, target = torch.randn(3, 4, 5), torch.randn(6, 5), torch.zeros(3, 4, dtype=torch.int64)
    wild = target.clone()
    wild[2, 1] = 6
    with pytest.raises(ValueError, match="^target must be in"):
        vmap(cosine_cross_entropy, in_dims=(0, None, 0, None))(h, weight, wild, 9.0)
    with pytest.raises(ValueError, match="^scale must be finite"):
        vmap(cosine_cross_entropy, in_dims=(0, None, 0, 0))(h, weight, target, torch.tensor([1.0, torch.nan, 2.0]))


@pytest.mark.skipif(not backends()["native"].available, reason="the extension is not built")
def test_a_kernel_asked_for_by_name_says_why_it_cannot_run() -> None:
    h, weight, target = torch.randn(3, 4, 5), torch.randn(6, 5), torch.zeros(4, dtype=torch.int64)
    for transformed in (
        vmap(lambda x: cosine_logits(x, weight, 9.0, backend="native")),
        vmap(lambda x: cosine_cross_entropy(x, weight, target, 9.0, backend="native")),
        vmap(grad(lambda x: cosine_cross_entropy(x, weight, target, 9.0, backend="native"))),
    ):
        with pytest.raises(BackendUnavailable, match=r"cannot run cosine_.*torch.func's transforms"):
            transformed(h)


DIFFERENTIABLE: dict[str, Callable[..., Tensor]] = {
    "cosine_logits": lambda h, weight, scale: cosine_logits(h, weight, scale),
    "cosine_cross_entropy": lambda h, weight, scale: cosine_cross_entropy(h, weight, torch.tensor([0, 1, 2, 3]), scale),
    "gumbel_softmax": lambda h, weight, tau: gumbel_softmax(h, tau, seed=3),
    "residual_quantize": lambda h, weight, scale: residual_quantize(h, [weight], scale, seed=3).quantized,
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_forward_mode_differentiates(name: str) -> None:
    """Guards against kernels that drop the tangents of their inputs."""
    function, inputs = DIFFERENTIABLE[name], (torch.randn(4, 5), torch.randn(6, 5), torch.tensor(3.0))
    tangents = [torch.randn_like(x) for x in inputs]
    with forward_ad.dual_level():
        dual = function(*map(forward_ad.make_dual, inputs, tangents))
        value, tangent = forward_ad.unpack_dual(dual)
    leaves = [x.clone().requires_grad_() for x in inputs]
    output, upstream = function(*leaves), torch.randn_like(value)
    gradients = torch.autograd.grad(output, leaves, upstream, allow_unused=True)
    expected = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True) if g is not None)
    torch.testing.assert_close(value, output.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((tangent * upstream).sum(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not backends()["native"].available, reason="the extension is not built")
def test_a_kernel_asked_for_by_name_refuses_forward_mode() -> None:
    with forward_ad.dual_level(), pytest.raises(BackendUnavailable, match="forward-mode differentiation"):
        cosine_logits(
            forward_ad.make_dual(torch.randn(4, 5), torch.randn(4, 5)), torch.randn(6, 5), 2.0, backend="native"
        )
