"""Scaled cosine logits and their cross-entropy against F.normalize and F.cross_entropy in float64."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dgi_kernels import BackendUnavailable, backends, cosine_cross_entropy, cosine_logits
from dgi_kernels.cosine import reference
from dgi_kernels.cosine.options import Columns, LossOptions

from .cosine_cases import GRADIENTS, true_loss
from .near import ROUNDING, assert_all_near, assert_near, gradients
from .shapes import COSINE, Cosine, name_of

LOW_PRECISION = (torch.bfloat16, torch.float16)


def true_logits(h: Tensor, weight: Tensor, scale: float | Tensor, eps: float = 1e-12) -> Tensor:
    """In numbers that no backend touches: float64 sums over an explicit product."""
    h, weight = h.double(), weight.double()
    h = h / h.square().sum(-1, keepdim=True).sqrt().clamp(min=eps)
    weight = weight / weight.square().sum(-1, keepdim=True).sqrt().clamp(min=eps)
    return scale * (h.unsqueeze(-2) * weight).sum(-1)


def inputs(shape: Cosine, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, weight = (
        F.normalize(torch.randn(rows, shape.d), dim=-1) * torch.empty(rows, 1).uniform_(0.5, 4)
        for rows in (shape.n, shape.k)
    )
    h, weight = h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    scale = torch.tensor(random.uniform(1, 40)).to(dtype).requires_grad_()
    return h, weight, torch.randint(shape.k, (shape.n,)), scale


@pytest.mark.parametrize("dtype", ROUNDING, ids=name_of)
@pytest.mark.parametrize("shape", COSINE, ids=name_of)
def test_logits_and_gradients(shape: Cosine, dtype: torch.dtype) -> None:
    h, weight, _, scale = inputs(shape, dtype)
    logits = cosine_logits(h, weight, scale)
    expected = true_logits(h, weight, scale.double())
    assert logits.dtype == dtype
    assert_near("logits", logits, expected)

    upstream = torch.randn_like(logits)
    leaves = (h, weight, scale)
    assert_all_near(
        GRADIENTS,
        gradients((logits * upstream).sum(), leaves),
        gradients((expected * upstream.double()).sum(), leaves),
        dtype=dtype,
        sizes=[upstream.double().norm().item()] * 3,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", COSINE, ids=name_of)
def test_loss_and_gradients(shape: Cosine, smoothing: float, reduction: str) -> None:
    h, weight, target, scale = inputs(shape)
    target[torch.rand(shape.n) < 0.3] = ignore_index = random.choice([-100, -1, 10**12])
    target[0] = 0
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index}
    loss = cosine_cross_entropy(h, weight, target, scale, **options)
    expected = true_loss(h, weight, target, scale.double(), **options)
    assert loss.dtype == torch.float32
    assert_near("loss", loss, expected, size=1.0)

    upstream = torch.randn_like(loss)
    leaves = (h, weight, scale)
    assert_all_near(
        GRADIENTS,
        gradients((loss * upstream).sum(), leaves),
        gradients((expected * upstream.double()).sum(), leaves),
        dtype=h.dtype,
        sizes=[upstream.double().norm().item()] * 3,
    )


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name_of)
def test_low_precision_loss_is_computed_in_float32(dtype: torch.dtype) -> None:
    h, weight, target, scale = inputs(Cosine(n=33, d=17, k=65), dtype)
    loss = cosine_cross_entropy(h, weight, target, scale)
    expected = true_loss(h, weight, target, scale.double())
    assert loss.dtype == torch.float32
    assert_near("loss", loss, expected)
    assert_all_near(
        GRADIENTS, gradients(loss, (h, weight, scale)), gradients(expected, (h, weight, scale)), dtype=dtype
    )


def test_gradcheck() -> None:
    h, weight, target, scale = inputs(Cosine(n=4, d=3, k=5), torch.float64)
    target[1] = -100
    assert torch.autograd.gradcheck(cosine_logits, (h, weight, scale))
    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "label_smoothing": 0.2}):
        assert torch.autograd.gradcheck(
            lambda h, w, s, o=options: cosine_cross_entropy(h, w, target, s, **o), (h, weight, scale)
        )
    assert torch.autograd.gradgradcheck(lambda h, w, s: cosine_cross_entropy(h, w, target, s), (h, weight, scale))


def test_gradients_have_no_radial_part_and_scale_gets_its_own() -> None:
    """docs/method.md, eq. 15, 22: w . dL/dw = 0 row by row, the same for h, and dscale = sum_n h . dL/dh^ / scale."""
    h, weight, target, scale = inputs(Cosine(n=9, d=6, k=11), torch.float64)
    dh, dweight, dscale = gradients(cosine_cross_entropy(h, weight, target, scale), (h, weight, scale))
    torch.testing.assert_close((h * dh).sum(-1), torch.zeros(9, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close((weight * dweight).sum(-1), torch.zeros(11, dtype=torch.float64), rtol=0, atol=1e-12)

    unit = F.normalize(h.detach(), dim=-1).requires_grad_()
    loss = F.cross_entropy(scale.detach() * unit @ F.normalize(weight.detach(), dim=-1).T, target)
    (dunit,) = torch.autograd.grad(loss, unit)
    torch.testing.assert_close(dscale, (unit * dunit).sum() / scale)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (4,), (2, 3), (2, 0, 3)], ids=name_of)
def test_any_number_of_leading_dimensions(leading: tuple[int, ...]) -> None:
    h, weight = torch.randn(*leading, 5), torch.randn(7, 5)
    target = torch.randint(7, leading)
    torch.testing.assert_close(cosine_logits(h, weight, 3.0), true_logits(h, weight, 3.0).float())
    for reduction in ("mean", "sum", "none"):
        loss = cosine_cross_entropy(h, weight, target, 3.0, reduction=reduction)
        expected = true_loss(h, weight, target, 3.0, reduction=reduction).float()
        torch.testing.assert_close(loss, expected, equal_nan=True)  # NaN: the mean of no targets


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.T.contiguous().T,
    "every second": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], 1)[:, 0],
    "inner slice": lambda x: F.pad(x, (3, 2), value=torch.nan)[:, 3:-2],
    "flipped copy of a flip": lambda x: x.flip(0).contiguous().flip(0),
}


@pytest.mark.parametrize("view", STRIDES.values(), ids=STRIDES)
def test_strides_do_not_matter(view: Callable[[Tensor], Tensor]) -> None:
    h, weight, target, scale = inputs(Cosine(n=6, d=5, k=9))
    strided = cosine_cross_entropy(view(h), view(weight), target, scale)
    plain = cosine_cross_entropy(h, weight, target, scale)
    torch.testing.assert_close(strided, plain)
    assert_all_near(
        GRADIENTS, gradients(strided, (h, weight, scale)), gradients(plain, (h, weight, scale)), dtype=h.dtype
    )
    torch.testing.assert_close(cosine_logits(view(h), view(weight), scale), cosine_logits(h, weight, scale))


def test_expanded_inputs() -> None:
    h, weight = torch.randn(1, 5).requires_grad_(), torch.randn(1, 5).requires_grad_()
    target = torch.tensor(2).expand(4)
    loss = cosine_cross_entropy(h.expand(4, 5), weight.expand(3, 5), target, 20.0)
    torch.testing.assert_close(loss, torch.tensor(3.0).log())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=name_of)
def test_target_takes_any_integer_dtype(dtype: torch.dtype) -> None:
    """Guards against comparing in the narrow dtype: 300 rows do not fit int8, nor does -100 fit uint8 (it is 156)."""
    h, weight, _, scale = inputs(Cosine(n=4, d=3, k=300))
    target = torch.tensor([0, 7, 127, 100]).to(dtype)
    torch.testing.assert_close(
        cosine_cross_entropy(h, weight, target, scale), true_loss(h, weight, target, scale).float()
    )
    if dtype == torch.uint8:
        target[0] = 156
        torch.testing.assert_close(
            cosine_cross_entropy(h, weight, target, scale), true_loss(h, weight, target, scale).float()
        )


def test_all_targets_ignored() -> None:
    h, weight, target, scale = inputs(Cosine(n=3, d=4, k=5))
    target[:] = -100
    assert cosine_cross_entropy(h, weight, target, scale).isnan()
    assert cosine_cross_entropy(h, weight, target, scale, reduction="sum").item() == 0
    loss = cosine_cross_entropy(h, weight, target, scale, reduction="none")
    assert loss.tolist() == [0, 0, 0]
    for gradient in torch.autograd.grad(loss.sum(), (h, weight, scale)):
        assert not gradient.any()


def test_ignore_index_may_be_a_valid_row() -> None:
    h, weight, target, scale = inputs(Cosine(n=12, d=4, k=3))
    target = torch.arange(12) % 3
    torch.testing.assert_close(
        cosine_cross_entropy(h, weight, target, scale, ignore_index=1),
        true_loss(h, weight, target, scale, ignore_index=1).float(),
    )


def test_infonce_of_an_empty_batch() -> None:
    """The batch is both h and weight: N = K = 0, not a bad shape."""
    batch, target = torch.empty(0, 4, requires_grad=True), torch.empty(0, dtype=torch.int64)
    assert cosine_logits(batch, batch, 20.0).shape == (0, 0)
    assert cosine_cross_entropy(batch, batch, target, 20.0).isnan()
    loss = cosine_cross_entropy(batch, batch, target, 20.0, reduction="sum")
    loss.backward()
    assert loss.item() == 0 and batch.grad.shape == (0, 4)


def test_zero_vectors_have_cosine_zero() -> None:
    h, weight, target, scale = inputs(Cosine(n=4, d=3, k=5))
    h, weight = h.detach(), weight.detach()
    h[1], weight[2] = 0, 0
    logits = cosine_logits(h, weight, scale)
    assert not logits[1].any() and not logits[:, 2].any()
    loss = cosine_cross_entropy(h, weight, target, scale, reduction="none")
    torch.testing.assert_close(loss[1], torch.tensor(5.0).log())


def test_eps_bounds_the_norms() -> None:
    h, weight, *_ = inputs(Cosine(n=4, d=3, k=5))
    torch.testing.assert_close(cosine_logits(h, weight, 2.0, eps=10.0), true_logits(h, weight, 2.0, eps=10.0).float())


def test_one_tensor_as_both_inputs_and_a_weight_in_two_ops() -> None:
    _, x, _, scale = inputs(Cosine(n=6, d=4, k=6), torch.float64)
    h, target = torch.randn(3, 4, dtype=torch.float64), torch.randint(6, (6,))
    ours = (
        cosine_cross_entropy(x, x, target, scale)
        + cosine_cross_entropy(h, x, target[:3], scale)
        + cosine_logits(h, x, scale).square().mean()
    )
    truth = (
        true_loss(x, x, target, scale) + true_loss(h, x, target[:3], scale) + true_logits(h, x, scale).square().mean()
    )
    assert_all_near(("gradient of x", "gradient of scale"), gradients(ours, (x, scale)), gradients(truth, (x, scale)))


def test_nan_and_inf_stay_in_their_row() -> None:
    h, weight, target, scale = inputs(Cosine(n=5, d=4, k=6))
    clean = cosine_cross_entropy(h, weight, target, scale, reduction="none")
    h = h.detach().clone()
    h[1, 2], h[3, 0] = torch.nan, torch.inf
    dirty = cosine_cross_entropy(h, weight, target, scale, reduction="none")
    assert dirty.isnan().tolist() == [False, True, False, True, False]
    torch.testing.assert_close(dirty[[0, 2, 4]], clean[[0, 2, 4]])


def test_bits_repeat() -> None:
    h, weight, target, scale = inputs(COSINE[-1])
    runs = [
        (loss := cosine_cross_entropy(h, weight, target, scale), *torch.autograd.grad(loss, (h, weight, scale)))
        for _ in range(2)
    ]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_wild_target_gives_nan_for_its_row_where_values_are_not_checked() -> None:
    """What CUDA does outside of debug(): the public op checks on the CPU, so the reference is asked directly."""
    h, weight, target, scale = inputs(Cosine(n=5, d=4, k=6))
    target[1], target[3], target[4] = 6, -1, -100
    operands = (h, weight, target, scale, Columns())
    loss, lse = reference.cosine_cross_entropy(*operands, LossOptions(reduction="none", return_log_normalizer=True))
    assert loss.isnan().tolist() == [False, True, False, True, False]
    assert lse is not None and lse.isnan().tolist() == loss.isnan().tolist()
    assert reference.cosine_cross_entropy(*operands, LossOptions())[0].isnan()


def test_autocast_takes_operands_as_linear_does() -> None:
    h, weight, target, scale = inputs(Cosine(n=5, d=4, k=6))
    rounded = [x.detach().bfloat16() for x in (h, weight)]
    with torch.autocast("cpu", torch.bfloat16):
        for mixed in ((h, weight), (h.bfloat16(), weight), (h, weight.half())):
            assert cosine_logits(*mixed, scale).dtype == torch.bfloat16
            assert cosine_cross_entropy(*mixed, target, scale).dtype == torch.float32
        assert torch.equal(cosine_logits(h, weight, scale), cosine_logits(*rounded, scale))
        loss = cosine_cross_entropy(h, weight, target, scale)
        assert cosine_logits(h.double(), weight.double(), scale).dtype == torch.float64
    assert torch.equal(loss, cosine_cross_entropy(*rounded, target, scale))
    assert [gradient.dtype for gradient in torch.autograd.grad(loss, (h, weight, scale))] == [torch.float32] * 3


def test_no_grad_and_float_scale() -> None:
    h, weight, target, scale = inputs(Cosine(n=5, d=4, k=6))
    with torch.no_grad():
        loss = cosine_cross_entropy(h, weight, target, scale)
    assert not loss.requires_grad
    torch.testing.assert_close(cosine_cross_entropy(h, weight, target, scale.item()), loss)


def good_arguments() -> dict[str, object]:
    return {"h": torch.randn(4, 3), "weight": torch.randn(5, 3), "target": torch.tensor([0, 1, 4, -100]), "scale": 30.0}


BAD_SHARED = (
    ("h", [[1.0, 2.0]], TypeError),
    ("h", torch.randn(4, 3).to_sparse(), TypeError),
    ("h", torch.ones(4, 3, dtype=torch.int64), TypeError),
    ("h", torch.ones(4, 3, dtype=torch.complex64), TypeError),
    ("h", torch.tensor(1.0), ValueError),
    ("weight", None, TypeError),
    ("weight", torch.randn(5, 2), ValueError),
    ("weight", torch.randn(3), ValueError),
    ("weight", torch.randn(5, 3, 1), ValueError),
    ("weight", torch.randn(5, 3).double(), TypeError),
    ("weight", torch.randn(5, 3, device="meta"), TypeError),
    ("scale", float("nan"), ValueError),
    ("scale", float("inf"), ValueError),
    ("scale", torch.tensor(float("inf")), ValueError),
    ("scale", torch.tensor([30.0]), ValueError),
    ("scale", torch.tensor(30), TypeError),
    ("scale", torch.tensor(30.0, device="meta"), TypeError),
    ("scale", 10**400, ValueError),
    ("scale", "30", TypeError),
    ("scale", True, TypeError),
    ("eps", 0.0, ValueError),
    ("eps", float("nan"), ValueError),
    ("eps", torch.tensor(1e-12), TypeError),
    ("backend", "numpy", ValueError),
)
BAD_LOSS = (
    ("target", [0, 1, 2, 3], TypeError),
    ("target", torch.zeros(4), TypeError),
    ("target", torch.zeros(4, dtype=torch.bool), TypeError),
    ("target", torch.zeros(3, dtype=torch.int64), ValueError),
    ("target", torch.zeros(4, 1, dtype=torch.int64), ValueError),
    ("target", torch.tensor([0, 1, 2, 5]), ValueError),
    ("target", torch.tensor([0, 1, 2, -1]), ValueError),
    ("target", torch.zeros(4, dtype=torch.int64, device="meta"), TypeError),
    ("ignore_index", None, TypeError),
    ("ignore_index", 2**63, ValueError),
    ("reduction", "batchmean", ValueError),
    ("reduction", None, ValueError),
    ("reduction", torch.zeros(2), ValueError),
    ("label_smoothing", 1.5, ValueError),
    ("label_smoothing", -0.1, ValueError),
    ("label_smoothing", float("nan"), ValueError),
    ("label_smoothing", "0", TypeError),
)


@pytest.mark.parametrize(("name", "value", "error"), [*BAD_SHARED, *BAD_LOSS])
def test_bad_arguments_are_named(name: str, value: object, error: type[Exception]) -> None:
    arguments = {**good_arguments(), name: value}
    with pytest.raises(error, match=rf"^{name} must"):
        cosine_cross_entropy(**arguments)
    if name not in {bad[0] for bad in BAD_LOSS}:
        del arguments["target"]
        with pytest.raises(error, match=rf"^{name} must"):
            cosine_logits(**arguments)


def test_a_backend_asked_for_by_name_says_why_it_cannot_run() -> None:
    for op, arguments in (
        (cosine_logits, ("h", "weight", "scale")),
        (cosine_cross_entropy, ("h", "weight", "target", "scale")),
    ):
        values = [good_arguments()[name] for name in arguments]
        torch.testing.assert_close(op(*values, backend="reference"), op(*values))
        with pytest.raises(BackendUnavailable, match=f"cannot run {op.__name__} here: "):
            op(*values, backend="triton")


LARGEST = torch.finfo(torch.float32).max
BACKENDS = ["reference", *(["native"] if backends()["native"].available else [])]


@pytest.mark.parametrize("kind", ["float", "tensor"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ROUNDING, ids=name_of)
@pytest.mark.parametrize("value", [2.0**30, 5e9, -1e10, 1e20, 1e30, -1e36])
def test_scales_far_beyond_float32s_exponentials(value: float, dtype: torch.dtype, backend: str, kind: str) -> None:
    """Guards against NaN from the rounding of a maximum, and from products and sums that leave float32's range."""
    h, weight, target, scale = inputs(Cosine(n=33, d=17, k=65), dtype)
    scale: Tensor | float = torch.tensor(value, requires_grad=True) if kind == "tensor" else value
    leaves = (h, weight) if kind == "float" else (h, weight, scale)
    truth = torch.as_tensor(scale, dtype=torch.float64).detach().requires_grad_()
    for options in ({}, {"label_smoothing": 0.1}, {"reduction": "none"}):
        loss = cosine_cross_entropy(h, weight, target, scale, backend=backend, **options)
        expected = true_loss(h, weight, target, truth, **options)
        torch.testing.assert_close(loss.double(), expected, rtol=0, atol=ROUNDING[dtype] * abs(value))
        if dtype in LOW_PRECISION:
            continue  # whose gradients such scales take out of range
        given = gradients(loss.sum(), leaves)
        for a, e in zip(given, gradients(expected.sum(), (h, weight, truth)), strict=False):
            torch.testing.assert_close(a / e.abs().max(), e / e.abs().max(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [1e-2, 1.0, 1e3])
def test_the_largest_finite_scale_gives_no_nan(norm: float, backend: str) -> None:
    h, weight = (norm * F.normalize(torch.randn(rows, 17), dim=-1) for rows in (33, 65))
    target = torch.randint(65, (33,))
    h[0], h[1] = weight[target[0]], -weight[target[1]]  # cosines whose rounding may leave [-1, 1]
    for value in (LARGEST, -LARGEST):
        for scale in (value, torch.tensor(value)):
            for smoothing in (0.0, 0.1):
                loss = cosine_cross_entropy(
                    h, weight, target, scale, label_smoothing=smoothing, reduction="none", backend=backend
                )
                assert not loss.isnan().any() and loss.isfinite().any()
            assert not cosine_logits(h, weight, scale, backend=backend).isnan().any()
