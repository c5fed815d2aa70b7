"""Options of the cosine cross-entropy by column: bias, repeated items and log normalizers, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import backend, cosine_cross_entropy

from .cosine_cases import (
    COLUMN_BOUND,
    assert_columns_near,
    exact_by_columns,
    native,
    peaked_inputs,
    random_case,
    random_inputs,
    results_by_columns,
    true_loss_by_columns,
)
from .shapes import name_of

BACKENDS = ("reference", "native")


def skip_without(name: str) -> None:
    problem = backend.why_not("cosine_cross_entropy", name, torch.device("cpu"), torch.float32)
    if problem is not None:
        pytest.skip(problem)


@pytest.mark.parametrize("dtype", COLUMN_BOUND, ids=name_of)
@pytest.mark.parametrize("name", BACKENDS)
def test_loss_log_normalizers_and_gradients(name: str, dtype: torch.dtype) -> None:
    skip_without(name)
    for _ in range(12):
        inputs, target, columns, upstream, options = random_case(dtype)
        expected = exact_by_columns(inputs, target, columns, upstream, **options)
        actual = results_by_columns(
            cosine_cross_entropy, inputs, target, columns, upstream, return_log_normalizer=True, backend=name, **options
        )
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        assert actual["loss"].dtype == actual["log_normalizer"].dtype == compute
        about = ([x.shape for x in inputs[:2]], inputs[2], list(columns), options)
        # What is summed from terms of either sign is rounded as they are.
        size = math.sqrt(len(target)) * (1 + upstream[0].abs().max().item() + upstream[1].abs().max().item())
        assert_columns_near(actual, expected, COLUMN_BOUND[dtype], size, about)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("only", ["loss", "log_normalizer"])
def test_either_output_may_go_unused(name: str, only: str) -> None:
    skip_without(name)
    h, weight, target = random_inputs(20, 6, 9)
    bias = torch.randn(9, requires_grad=True)
    pair = dict(
        zip(
            ("loss", "log_normalizer"),
            cosine_cross_entropy(h, weight, target, 5.0, bias=bias, return_log_normalizer=True, backend=name),
            strict=True,
        )
    )
    expected = dict(
        zip(
            ("loss", "log_normalizer"),
            true_loss_by_columns(h.double(), weight.double(), target, torch.tensor(5.0), bias=bias.double()),
            strict=True,
        )
    )
    torch.testing.assert_close(
        torch.autograd.grad(pair[only].sum(), bias),
        torch.autograd.grad(expected[only].sum(), bias),
        rtol=1e-5,
        atol=1e-6,
    )


@native
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_peaked_rows_with_everything(smoothing: float) -> None:
    """Rows that become lists: a bias, left-out columns inside and outside of the list, log normalizers."""
    h, weight, target = peaked_inputs(400, 128, 1500, 0.9)
    same_as = torch.arange(1500) // 2 * 2
    same_as[::7] = 3
    inputs, columns = (h, weight, torch.tensor(60.0)), {"bias": torch.randn(1500), "same_as": same_as}
    upstream = (torch.ones(400), torch.randn(400))
    expected = exact_by_columns(inputs, target, columns, upstream, reduction="none", label_smoothing=smoothing)
    actual = results_by_columns(
        cosine_cross_entropy,
        inputs,
        target,
        columns,
        upstream,
        reduction="none",
        label_smoothing=smoothing,
        return_log_normalizer=True,
        backend="native",
    )
    assert_columns_near(actual, expected, 2e-5, 1.0, smoothing)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_a_bias_of_minus_infinity_takes_a_class_out(name: str, scale: float) -> None:
    skip_without(name)
    h, weight, target = random_inputs(30, 16, 12)
    target = target % 6
    bias = torch.randn(12)
    bias[6:] = -torch.inf
    upstream = (torch.ones(()), torch.ones(30))
    full = results_by_columns(
        cosine_cross_entropy,
        (h, weight, torch.tensor(scale)),
        target,
        {"bias": bias},
        upstream,
        return_log_normalizer=True,
        backend=name,
    )
    part = results_by_columns(
        cosine_cross_entropy,
        (h, weight[:6], torch.tensor(scale)),
        target,
        {"bias": bias[:6]},
        upstream,
        return_log_normalizer=True,
        backend=name,
    )
    assert (full["dweight"][6:] == 0).all() and (full["dbias"][6:] == 0).all()
    full["dweight"], full["dbias"] = full["dweight"][:6], full["dbias"][:6]
    bound = 1e-6 * max(10.0, scale)  # both are rounded in float32, and a logit in proportion to the scale
    for key, value in part.items():
        torch.testing.assert_close(full[key], value, rtol=bound, atol=bound, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", BACKENDS)
def test_masked_targets_and_bad_biases(name: str) -> None:
    skip_without(name)
    h, weight, _ = random_inputs(4, 8, 5)
    target = torch.tensor([0, 1, 2, 3])
    for smoothing in (0.0, 0.1):
        masked = torch.tensor([0.0, -torch.inf, 0.0, 0.0, 0.0])
        loss = cosine_cross_entropy(
            h, weight, target, 9.0, bias=masked, reduction="none", label_smoothing=smoothing, backend=name
        )
        assert loss[1] == torch.inf and (loss[[0, 2, 3]].isfinite().all() if smoothing == 0 else loss.isinf().all())
        for bad in (torch.nan, torch.inf):
            bias = masked.clone()
            bias[4] = bad
            assert cosine_cross_entropy(h, weight, target, 9.0, bias=bias, backend=name).isnan()
        nothing = torch.full((5,), -torch.inf)
        assert cosine_cross_entropy(h, weight, target, 9.0, bias=nothing, reduction="none", backend=name).isnan().all()


@pytest.mark.parametrize("name", BACKENDS)
def test_large_biases_of_either_sign(name: str) -> None:
    """The maximum is taken where the bias asks for it, though the scale does not."""
    skip_without(name)
    h, weight, target = random_inputs(40, 8, 30)
    for bias in (torch.full((30,), 1000.0), torch.full((30,), -1000.0), 300 * torch.randn(30)):
        inputs, columns, upstream = (h, weight, torch.tensor(4.0)), {"bias": bias}, (torch.ones(()), torch.ones(40))
        expected = exact_by_columns(inputs, target, columns, upstream)
        actual = results_by_columns(
            cosine_cross_entropy, inputs, target, columns, upstream, return_log_normalizer=True, backend=name
        )
        assert_columns_near(actual, expected, 2e-4, 1.0, bias[:3])  # logits of 1000 are rounded to 6e-5


@pytest.mark.parametrize("name", BACKENDS)
def test_no_rows_no_targets_and_strides(name: str) -> None:
    skip_without(name)
    weight, bias, same_as = torch.randn(8, 4), torch.randn(16)[::2], torch.arange(16)[::2] % 5
    options = {"bias": bias, "same_as": same_as, "return_log_normalizer": True, "backend": name}
    loss, lse = cosine_cross_entropy(
        torch.randn(0, 4), weight, torch.zeros(0, dtype=torch.long), 3.0, reduction="sum", **options
    )
    assert loss == 0 and lse.shape == (0,)
    loss, lse = cosine_cross_entropy(torch.randn(3, 4), weight, torch.full((3,), -100), 3.0, **options)
    assert loss.isnan() and (lse == 0).all()
    h, target = torch.randn(2, 3, 4), torch.randint(8, (2, 3))
    loss, lse = cosine_cross_entropy(h, weight, target, 3.0, reduction="none", **options)
    flat = cosine_cross_entropy(
        h.flatten(0, 1),
        weight,
        target.flatten(),
        3.0,
        reduction="none",
        **options | {"bias": bias.contiguous(), "same_as": same_as.contiguous()},
    )
    assert loss.shape == lse.shape == (2, 3)
    assert torch.equal(loss.flatten(), flat[0]) and torch.equal(lse.flatten(), flat[1])


@native
def test_a_bias_of_zeros_changes_nothing_and_bits_repeat() -> None:
    h, weight, target = random_inputs(3000, 32, 700)
    bias = torch.randn(700, requires_grad=True)

    def run(bias: Tensor) -> list[Tensor]:
        leaves = [h.clone().requires_grad_(), weight.clone().requires_grad_(), bias]
        loss = cosine_cross_entropy(leaves[0], leaves[1], target, 20.0, bias=bias, backend="native")
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(bias), run(bias), strict=True))
    zero, plain = run(torch.zeros(700, requires_grad=True)), cosine_cross_entropy(h, weight, target, 20.0)
    torch.testing.assert_close(zero[0], plain, rtol=1e-6, atol=1e-6)


@native
def test_the_bias_gradient_is_the_same_for_any_number_of_threads() -> None:
    h, weight, target = random_inputs(500, 16, 300)
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        bias = torch.zeros(300, requires_grad=True)
        cosine_cross_entropy(h, weight, target, 9.0, bias=bias, backend="native").backward()
        torch.set_num_threads(before)
        found.append(bias.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


@pytest.fixture
def fresh_cache() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", BACKENDS)
def test_compile_keeps_it_whole(name: str, fresh_cache: None) -> None:
    skip_without(name)
    h, weight, target = random_inputs(9, 6, 7)
    bias, same_as = torch.randn(7, requires_grad=True), torch.tensor([0, 1, 0, 3, 1, 5, 6])

    def run(h: Tensor, bias: Tensor, reduction: str) -> Tensor:
        loss, lse = cosine_cross_entropy(
            h,
            weight,
            target,
            7.0,
            bias=bias,
            same_as=same_as,
            reduction=reduction,
            return_log_normalizer=True,
            backend=name,
        )
        plain = cosine_cross_entropy(h, weight, target, 7.0, bias=bias, backend=name)
        return loss.sum() + lse.square().mean() + plain

    whole = torch.compile(run, fullgraph=True, backend="aot_eager")
    for reduction in ("mean", "none"):
        expected, actual = run(h, bias, reduction), whole(h, bias, reduction)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            torch.autograd.grad(actual, bias), torch.autograd.grad(expected, bias), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_gradients_of_gradients(name: str, smoothing: float) -> None:
    skip_without(name)
    h, weight, target = random_inputs(5, 3, 6, torch.float64)
    target[1] = -100
    same_as = torch.tensor([0, 1, 0, 3, 1, 0])
    leaves = [
        x.requires_grad_()
        for x in (h, weight, torch.tensor(2.0, dtype=torch.float64), torch.randn(6, dtype=torch.float64))
    ]

    def loss(h: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return cosine_cross_entropy(
            h,
            weight,
            target,
            scale,
            bias=bias,
            same_as=same_as,
            return_log_normalizer=True,
            label_smoothing=smoothing,
            reduction="none",
            backend=name,
        )

    assert torch.autograd.gradcheck(loss, leaves) and torch.autograd.gradgradcheck(loss, leaves)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("bias", torch.zeros(4), ValueError),
        ("bias", torch.zeros(5, dtype=torch.long), TypeError),
        ("bias", 1.0, TypeError),
        ("same_as", torch.zeros(5), TypeError),
        ("same_as", torch.zeros(5, 1, dtype=torch.long), ValueError),
        ("return_log_normalizer", 1, TypeError),
    ],
)
def test_bad_arguments_are_named(name: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{name} must"):
        cosine_cross_entropy(torch.randn(2, 3), torch.randn(5, 3), torch.tensor([0, 1]), 3.0, **{name: value})


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("scale", [2.0**24, 5e9, 1e20, 1e30, LARGEST / 4, LARGEST, -LARGEST])
def test_scales_up_to_the_largest_float(name: str, scale: float) -> None:
    """Guards against exp of what rounding leaves of the largest logit, and against products beyond float32."""
    skip_without(name)
    h, weight, target = random_inputs(20, 16, 40)
    target[:10] = (h[:10] @ F.normalize(weight, dim=-1).T * math.copysign(1, scale)).argmax(-1)
    if name == "native":
        h, weight = 100 * h, 1e5 * weight
    for bias in (None, torch.randn(40)):
        inputs, columns = (h, weight, torch.tensor(scale)), {} if bias is None else {"bias": bias}
        upstream = (torch.ones(20), torch.zeros(20))
        expected = exact_by_columns(inputs, target, columns, upstream, reduction="none")
        loss = cosine_cross_entropy(h, weight, target, scale, bias=bias, reduction="none", backend=name)
        torch.testing.assert_close(
            loss.double().clamp(max=LARGEST), expected["loss"].clamp(max=LARGEST), rtol=1e-4, atol=abs(scale) * 1e-6
        )
        if name == "native":
            actual = results_by_columns(
                cosine_cross_entropy,
                inputs,
                target,
                columns,
                upstream,
                reduction="none",
                return_log_normalizer=True,
                backend=name,
            )
            assert not any(x.isnan().any() for x in actual.values())
            for key in ("dscale", "dbias")[: 1 + (bias is not None)]:
                torch.testing.assert_close(actual[key].double(), expected[key], rtol=1e-4, atol=1e-5)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("short_of_one", [1e-3, 1e-5, 1e-7])
def test_gradients_are_right_where_the_target_has_nearly_all(dtype: torch.dtype, short_of_one: float) -> None:
    """Guards against p - 1, of which float32 has nothing left at p = 1 - 1e-7."""
    k, d = 30, 64
    weight = F.normalize(torch.randn(k, d), dim=-1).to(dtype)
    target = torch.randint(k, (50,))
    h = (weight.float()[target] + 0.02 * torch.randn(50, d)).to(dtype)
    wide = F.normalize(h.double(), dim=-1) @ F.normalize(weight.double(), dim=-1).T
    scale = torch.tensor(40.0)  # then a bias brings the mean row to the p that is asked for
    logits = scale.double() * wide
    rest = logits.scatter(1, target[:, None], -torch.inf).logsumexp(1) - logits.gather(1, target[:, None])[:, 0]
    bias = torch.zeros(k)
    bias[target] = (rest.mean() - math.log(short_of_one)).float()
    inputs, columns = (h, weight, scale), {"bias": bias}
    # The upstream gradient: float16 holds nothing below 6e-8, and nothing beyond 65504.
    size = min(65536.0, 0.1 / short_of_one) if dtype == torch.float16 else 1.0
    upstream = (torch.full((50,), size), torch.zeros(50))
    expected = exact_by_columns(inputs, target, columns, upstream, reduction="none")
    actual = results_by_columns(
        cosine_cross_entropy,
        inputs,
        target,
        columns,
        upstream,
        reduction="none",
        return_log_normalizer=True,
        backend="native",
    )
    rounding = {torch.float32: 2e-5}.get(dtype, torch.finfo(dtype).eps / 2 + 2e-5)
    for key, bound in (("loss", 2e-5), ("dbias", 2e-5), ("dscale", 2e-5), ("dh", rounding), ("dweight", rounding)):
        floor = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * actual[key].numel() ** 0.5
        off = (actual[key].double() - expected[key]).norm().item()
        assert off <= bound * expected[key].norm().item() + floor, (key, off / expected[key].norm().item())
