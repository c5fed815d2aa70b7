"""dropout and attention against masks made of Philox words by hand and the formula in float64."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgi_kernels import attention, dropout, noise, why_not

from .near import assert_all_near, assert_near
from .sanitizers import assert_clean

BACKENDS = ("reference", "native")
# B, T, S or None for self-attention, D, heads, causal
ATTENTIONS = (
    (3, 5, None, 24, 2, True),
    (2, 11, None, 64, 4, False),
    (4, 3, 12, 64, 4, False),
    (2, 1, 40, 20, 5, False),
    (1, 70, None, 36, 6, True),
    (5, 2, 1, 3, 3, True),
)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    problem = why_not("dropout", request.param, "cpu", torch.float32)
    if problem is not None:
        pytest.skip(problem)
    return request.param


def kept(rows: int, columns: int, p: float, seed: int, stream: int) -> Tensor:
    """Word by word, as the docstring of dropout says."""
    key = torch.tensor([seed & 0xFFFFFFFF, seed >> 32])
    blocks = -(-columns // 4)
    counters = torch.tensor([[block, row, 0, stream] for row in range(rows) for block in range(blocks)]).long()
    words = noise.philox4x32(counters.reshape(-1, 4), key).view(rows, 4 * blocks)[:, :columns]
    return words.double() >= p * 2**32


def gradients(run: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


@pytest.mark.parametrize("shape", [(37, 64), (5, 7), (130, 1), (3, 2, 256), (4, 1000), (9,), (0, 5), (3, 0)], ids=str)
@pytest.mark.parametrize("adds", [False, True])
def test_dropout(backend: str, shape: tuple[int, ...], adds: bool) -> None:
    p, seed = random.choice([0.1, 0.5, 0.9]), random.randrange(2**62)
    inputs = [torch.randn(shape) for _ in range(1 + adds)]
    upstream = torch.randn(shape)
    rows = torch.Size(shape[:-1]).numel()
    keep = kept(rows, shape[-1], p, seed, 3).view(shape)

    def run(x: Tensor, *residual: Tensor) -> Tensor:
        return dropout(x, p, seed=seed, residual=residual[0] if adds else None, backend=backend)

    def truth(x: Tensor, *residual: Tensor) -> Tensor:
        return torch.where(keep, x / (1 - p), 0) + (residual[0] if adds else 0)

    got = gradients(run, inputs, upstream)
    want = gradients(truth, [x.double() for x in inputs], upstream)
    assert_all_near(["out", "dx", "dresidual"][: len(got)], got, want)
    strided = torch.stack(inputs, -1)
    again = dropout(strided[..., 0], p, seed=seed, residual=strided[..., 1] if adds else None, backend=backend)
    assert torch.equal(again, got[0])


def attention_truth(
    queries: Tensor, keys_values: Tensor | None, heads: int, mask: Tensor, causal: bool, p: float, seed: int
) -> Tensor:
    """One query of one head at a time."""
    q, k, v = queries.chunk(3, -1) if keys_values is None else (queries, *keys_values.chunk(2, -1))
    (batch, length, dim), slots = q.shape, k.shape[1]
    width = dim // heads
    keep = kept(batch * heads * length, slots, p, seed, 4).view(batch, heads, length, slots)
    rows = []
    for b in range(batch):
        for t in range(length):
            mixed = []
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                seen = mask[b] & (torch.arange(slots) <= (t if causal else slots))
                if seen.any():
                    weights = (k[b, seen, part] @ q[b, t, part] / width**0.5).softmax(0)
                    mixed.append((weights * keep[b, h, t, seen] / (1 - p)) @ v[b, seen, part])
                else:
                    mixed.append(0 * q[b, t, part])
            rows.append(torch.cat(mixed))
    return torch.stack(rows).view(batch, length, dim)


@pytest.mark.parametrize("case", ATTENTIONS, ids=str)
def test_attention(backend: str, case: tuple[Any, ...]) -> None:
    batch, length, slots, dim, heads, causal = case
    p, seed = random.choice([0.0, 0.1, 0.6]), random.randrange(2**62)
    mask = torch.rand(batch, slots or length) < 0.7
    mask[0] = False  # a sequence of nothing but padding
    if batch > 1:
        mask[1, 0] = True
    inputs = [torch.randn(batch, length, dim if slots else 3 * dim)]
    if slots:
        inputs.append(torch.randn(batch, slots, 2 * dim))
    upstream = torch.randn(batch, length, dim)

    def run(queries: Tensor, keys_values: Tensor | None = None) -> Tensor:
        return attention(queries, keys_values, heads=heads, mask=mask, causal=causal, p=p, seed=seed, backend=backend)

    def truth(queries: Tensor, keys_values: Tensor | None = None) -> Tensor:
        return attention_truth(queries, keys_values, heads, mask, causal, p, seed)

    got = gradients(run, inputs, upstream)
    want = gradients(truth, [x.double() for x in inputs], upstream)
    assert_all_near(["out", "dqueries", "dkeys_values"][: len(got)], got, want)
    assert not got[0][0].any() and not got[1][0].any()


def test_attention_without_a_mask_is_torchs(backend: str) -> None:
    q, k, v = torch.randn(3, 2, 9, 16).unbind()
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.unflatten(-1, (2, 8)).transpose(1, 2).double() for x in (q, k, v)), is_causal=True
    )
    packed = torch.cat([q, k, v], -1)
    strided = torch.stack([packed, packed], -1)[..., 0]
    for queries in (packed, strided):
        got = attention(queries, heads=2, causal=True, backend=backend)
        assert_near("out", got, want.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("shape", [(0, 3, 12), (2, 0, 12)], ids=str)
def test_attention_of_nothing(backend: str, shape: tuple[int, ...]) -> None:
    packed = torch.randn(shape, requires_grad=True)
    out = attention(packed, heads=2, p=0.1, seed=1, backend=backend)
    assert out.shape == (*shape[:2], 4)
    assert torch.autograd.grad(out.sum(), packed)[0].shape == shape
    none = attention(torch.randn(2, 3, 4), torch.randn(2, 0, 8), heads=2, p=0.1, seed=1, backend=backend)
    assert torch.equal(none, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_repeat_and_do_not_depend_on_threads(backend: str, threads: int) -> None:
    x, packed = torch.randn(700, 64), torch.randn(90, 11, 96, requires_grad=True)
    first = dropout(x, 0.3, seed=4, backend=backend)
    out = attention(packed, heads=4, p=0.3, seed=4, backend=backend)
    (gradient,) = torch.autograd.grad(out.square().sum(), packed)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(dropout(x, 0.3, seed=4, backend=backend), first)
        again = attention(packed, heads=4, p=0.3, seed=4, backend=backend)
        assert torch.equal(again, out)
        if backend == "native":  # torch's products of the reference may split sums by threads
            assert torch.equal(torch.autograd.grad(again.square().sum(), packed)[0], gradient)
    finally:
        torch.set_num_threads(before)


def test_the_default_seed_is_torchs_generators() -> None:
    def drawn() -> Tensor:
        torch.manual_seed(5)
        return torch.stack([dropout(torch.ones(50, 8), 0.5), dropout(torch.ones(50, 8), 0.5)])

    first = drawn()
    assert torch.equal(first, drawn()) and not torch.equal(first[0], first[1])


def test_shares_are_those_of_p() -> None:
    for p in (0.0, 1e-3, 0.1, 0.75):
        out = dropout(torch.ones(2000, 500), p, seed=random.randrange(2**62))
        dropped = (out == 0).double().mean().item()
        assert abs(dropped - p) <= 5 * (p * (1 - p) / out.numel()) ** 0.5
        torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (1 - p)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_have_the_same_masks(dtype: torch.dtype) -> None:
    x = torch.rand(20, 33).to(dtype) + 1
    out = dropout(x, 0.4, seed=8)
    assert out.dtype == dtype
    assert torch.equal(out == 0, dropout(x.float(), 0.4, seed=8) == 0)
    packed = torch.randn(2, 5, 24)
    got, want = attention(packed.to(dtype), heads=2, p=0.4, seed=8), attention(packed, heads=2, p=0.4, seed=8)
    assert_near("out", got, want.double(), dtype=torch.float32 if dtype == torch.float64 else dtype)


def test_gradients_of_gradients(backend: str) -> None:
    x, packed = (torch.randn(*shape, requires_grad=True) for shape in ((3, 5), (1, 3, 12)))

    def twice(name: str) -> list[Tensor]:
        out = dropout(x, 0.4, seed=2, backend=name).square().sum()
        out = out + attention(packed, heads=2, p=0.2, seed=2, backend=name).square().sum()
        first = torch.autograd.grad(out, (x, packed), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), (x, packed)))

    torch.testing.assert_close(twice(backend), twice("reference"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), "0.1"])
def test_a_probability_out_of_range_is_named(p: Any) -> None:
    for run in (lambda: dropout(torch.ones(2, 2), p), lambda: attention(torch.ones(1, 2, 6), heads=1, p=p)):
        with pytest.raises((ValueError, TypeError), match="p must be"):
            run()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"queries": torch.ones(2, 6)}, ValueError, "queries must have 3 dimensions"),
        ({"queries": torch.ones(1, 2, 7)}, ValueError, "heads must divide"),
        ({"heads": 4}, ValueError, "heads must divide"),
        ({"keys_values": torch.ones(1, 2, 5)}, ValueError, "keys_values must have shape"),
        ({"keys_values": torch.ones(1, 2, 12).double()}, TypeError, "keys_values must have"),
        ({"mask": torch.ones(1, 3, dtype=torch.bool)}, ValueError, "mask must have shape"),
        ({"mask": torch.ones(1, 2)}, TypeError, "mask must have dtype"),
    ],
)
def test_errors_name_the_argument(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        attention(**{"queries": torch.ones(1, 2, 6), "heads": 2} | changed)
    with pytest.raises(ValueError, match="residual must have shape"):
        dropout(torch.ones(2, 2), residual=torch.ones(2, 3))


def test_compiled() -> None:
    torch._dynamo.reset()

    def both(x: Tensor, packed: Tensor, seed: Tensor) -> Tensor:
        return dropout(x, 0.3, seed=seed).sum() + attention(packed, heads=2, p=0.3, seed=seed).square().sum()

    inputs = torch.randn(4, 8, requires_grad=True), torch.randn(2, 3, 12, requires_grad=True)
    seed = torch.tensor([7])
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    want, got = both(*inputs, seed), compiled(*inputs, seed)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_kernels_are_clean_under_sanitizers(tmp_path: Path, seed: int) -> None:
    """Random shapes through the same C++ with AddressSanitizer and UBSan, against the formula."""
    sources = ("cpu/dropout/dropout.cpp", "cpu/dropout/attention.cpp", "cpu/shared/philox.cpp")
    assert_clean("dropout_driver.cpp", sources, tmp_path, seed, 150)
