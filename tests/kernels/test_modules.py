"""Module forms against F.linear and F.cross_entropy of normalised vectors in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgi_kernels import CosineCrossEntropyLoss, CosineLinear

from .cosine_cases import all_columns, true_loss_by_columns


def true_logits(h: Tensor, weight: Tensor, scale: float | Tensor) -> Tensor:
    return scale * F.normalize(h.double(), dim=-1) @ F.normalize(weight.double(), dim=-1).T


def test_linear_gives_cosine_logits_and_trains_weight_and_scale() -> None:
    head = CosineLinear(6, 9, scale=12.0)
    h = torch.randn(2, 5, 6)
    expected = true_logits(h, head.weight, head.log_scale.double().exp().squeeze())
    torch.testing.assert_close(head(h).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(head.scale.item(), 12.0, rtol=1e-6, atol=0)

    target = torch.randint(9, (2, 5))
    target[0, 1] = 7
    options = {"ignore_index": 7, "reduction": "sum", "label_smoothing": 0.2}
    loss, truth = head.loss(h, target, **options), F.cross_entropy(expected.flatten(0, 1), target.flatten(), **options)
    leaves = (head.weight, head.log_scale)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    for actual, true in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-4, atol=1e-4)


def test_linear_shares_a_weight_and_a_scale() -> None:
    embedding, first = nn.Embedding(9, 6), CosineLinear(6, 9)
    second = CosineLinear(6, 9, weight=embedding.weight, log_scale=first.log_scale)
    assert second.weight is embedding.weight and second.log_scale is first.log_scale
    h = torch.randn(4, 6)
    loss = second.loss(h + embedding(torch.tensor([0, 1, 1, 2])), torch.tensor([0, 1, 8, 3]))
    every = embedding.weight.detach().double().requires_grad_()
    logits = true_logits(h + every[[0, 1, 1, 2]], every, first.scale.item())
    (truth,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([0, 1, 8, 3])), every)
    torch.testing.assert_close(torch.autograd.grad(loss, embedding.weight)[0].double(), truth, rtol=1e-4, atol=1e-5)


def test_state_goes_from_one_module_to_another() -> None:
    one, other = CosineLinear(4, 3, scale=5.0), CosineLinear(4, 3, learnable_scale=False)
    assert set(one.state_dict()) == {"weight", "log_scale"}
    other.load_state_dict(one.state_dict())
    h = torch.randn(2, 4)
    assert torch.equal(one(h), other(h)) and torch.equal(copy.deepcopy(one)(h), one(h))


def test_a_scale_of_an_older_file_is_read() -> None:
    """Guards against files written while log_scale was 0-d; also where the head is part of something larger."""
    model = nn.Sequential(nn.Linear(4, 4), CosineLinear(4, 3))
    old = model.state_dict() | {"1.log_scale": torch.tensor(2.5)}
    model.load_state_dict(old)
    assert model[1].log_scale.shape == (1,) and model[1].log_scale.item() == 2.5 and old["1.log_scale"].ndim == 0


def test_the_scale_is_bounded_and_not_stuck_there() -> None:
    head = CosineLinear(4, 3, scale=90.0, max_scale=60.0)
    assert head.scale.item() == pytest.approx(60.0)
    for sign, passes in ((1.0, True), (-1.0, False)):
        (gradient,) = torch.autograd.grad(sign * head.scale, head.log_scale)
        assert bool(gradient != 0) == passes
    below = CosineLinear(4, 3, scale=30.0, max_scale=60.0)
    assert torch.equal(below.scale, CosineLinear(4, 3, scale=30.0).scale)


def test_columns_options_reach_the_op() -> None:
    head, criterion = CosineLinear(6, 9), CosineCrossEntropyLoss(30.0)
    h, target, columns = torch.randn(5, 6), torch.randint(9, (5,)), all_columns(9)
    pair = head.loss(h, target, return_log_normalizer=True, **columns)
    other = criterion(h, head.weight, target, return_log_normalizer=True, **columns)
    torch.testing.assert_close(pair, other)
    truth = true_loss_by_columns(h.double(), head.weight.double(), target, head.scale.double(), **columns)
    for actual, expected in zip(pair, truth, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match=r"cosine_cross_entropy\(\) got an unexpected keyword argument 'biass'"):
        head.loss(h, target, biass=columns["bias"])


def test_a_fixed_scale_is_not_trained() -> None:
    fixed = CosineLinear(4, 3, learnable_scale=False)
    assert [name for name, parameter in fixed.named_parameters() if parameter.requires_grad] == ["weight"]
    assert not any(parameter.requires_grad for parameter in CosineCrossEntropyLoss(20.0).parameters())


def test_fresh_vectors_have_norms_of_about_one() -> None:
    assert CosineLinear(64, 512).weight.norm(dim=-1).mean().item() == pytest.approx(1.0, abs=0.05)


def test_loss_is_infonce_of_vectors_given_with_the_call() -> None:
    queries, items = torch.randn(5, 6, requires_grad=True), torch.randn(8, 6, requires_grad=True)
    target = torch.tensor([0, 3, 5, 3, -1])
    criterion = CosineCrossEntropyLoss(20.0, learnable_scale=True, ignore_index=-1, label_smoothing=0.1)
    loss = criterion(queries, items, target)
    scale = criterion.log_scale.double().exp().squeeze()
    truth = F.cross_entropy(true_logits(queries, items, scale), target, ignore_index=-1, label_smoothing=0.1)
    leaves = (queries, items, criterion.log_scale)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    for actual, true in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(truth, leaves), strict=True):
        torch.testing.assert_close(actual, true, rtol=1e-4, atol=1e-5)


def test_modules_say_what_they_are() -> None:
    assert repr(CosineLinear(4, 3)) == "CosineLinear(in_features=4, out_features=3, scale=30)"
    assert repr(CosineCrossEntropyLoss(20.0, reduction="sum")) == (
        "CosineCrossEntropyLoss(scale=20 (fixed), ignore_index=-100, reduction='sum', label_smoothing=0.0)"
    )
    assert "scale=?" in repr(CosineLinear(4, 3, device="meta"))


def test_dtype_and_autocast() -> None:
    head = CosineLinear(4, 3, dtype=torch.float64)
    assert head(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert CosineLinear(4, 3)(torch.randn(2, 4)).dtype == torch.bfloat16


def test_compile_keeps_both_whole() -> None:
    torch._dynamo.reset()
    head, criterion = CosineLinear(4, 7), CosineCrossEntropyLoss(20.0)
    h, target = torch.randn(5, 4), torch.randint(7, (5,))

    def run(h: Tensor) -> Tensor:
        return head(h).logsumexp(-1).sum() + head.loss(h, target) + criterion(h, head.weight, target)

    expected, actual = run(h), torch.compile(run, fullgraph=True, backend="aot_eager")(h)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, tuple(head.parameters())),
        torch.autograd.grad(expected, tuple(head.parameters())),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("in_features", 0, ValueError),
        ("out_features", 2.0, TypeError),
        ("scale", 0.0, ValueError),
        ("scale", float("inf"), ValueError),
        ("eps", 0.0, ValueError),
        ("weight", torch.randn(3, 4), TypeError),
        ("weight", nn.Parameter(torch.randn(4, 3)), ValueError),
        ("log_scale", nn.Parameter(torch.zeros(())), ValueError),
        ("max_scale", -1.0, ValueError),
    ],
)
def test_bad_arguments_of_linear_are_named(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must"):
        CosineLinear(**{"in_features": 4, "out_features": 3, name: value})


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("scale", -1.0, ValueError),
        ("ignore_index", None, TypeError),
        ("reduction", "batchmean", ValueError),
        ("label_smoothing", 2.0, ValueError),
    ],
)
def test_bad_arguments_of_the_loss_are_named(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{name} must"):
        CosineCrossEntropyLoss(**{name: value})
