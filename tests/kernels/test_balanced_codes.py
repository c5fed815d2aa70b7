"""Balanced codes against the float64 loop of LETTER, LC-Rec and MiniOneRec over the whole matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dgi_kernels import assign_codes, balanced_codes, why_not

from .clustering_cases import METRICS, clustered, costs
from .shapes import name_of


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    problem = why_not("balanced_codes", request.param, "cpu", torch.float32)
    if problem is not None:
        pytest.skip(problem)
    return request.param


def letter(x: Tensor, codebook: Tensor, metric: str, epsilon: float, iterations: int) -> np.ndarray:
    """Q (N, K) of ``sinkhorn_algorithm`` after ``center_distance_for_constraint``, in extended precision where there
    is one: exp(2 / epsilon) need not fit float64."""
    d = costs(x, codebook, metric).astype(np.longdouble)
    middle = (d.max() + d.min()) / 2
    q = np.exp(-(d - middle) / (d.max() - middle + 1e-5) / epsilon)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True)
        q /= len(x)
        q /= q.sum(0, keepdims=True)
        q /= len(codebook)
    return q * len(x)


def assert_same_but_for_ties(codes: Tensor, q: np.ndarray, tolerance: float = 2e-3) -> None:
    """Each code is the row's best, or within ``tolerance`` of it in log q; nearly all are the best."""
    best, rows = q.argmax(1), np.arange(len(q))
    assert codes.shape == (len(q),) and codes.dtype == torch.int64
    gaps = np.log(q[rows, best]) - np.log(np.maximum(q[rows, codes.numpy()], 1e-4000))
    assert gaps.max() <= tolerance, f"a code is {gaps.max():.3g} worse than the best"
    assert (codes.numpy() == best).mean() > 0.99


@pytest.mark.parametrize("epsilon", [0.003, 0.05, 0.5])
@pytest.mark.parametrize("metric", METRICS)
def test_against_the_loop_over_the_whole_matrix(metric: str, epsilon: float, backend: str) -> None:
    x = clustered(1100, 12, 16)
    codebook = x[:37] + 0.1 * torch.randn(37, 16)
    for iterations in (1, 50):
        codes = balanced_codes(x, codebook, metric=metric, epsilon=epsilon, iterations=iterations, backend=backend)
        assert_same_but_for_ties(codes, letter(x, codebook, metric, epsilon, iterations))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=name_of)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    x, codebook = clustered(300, 5, 8).to(dtype), clustered(20, 5, 8).to(dtype)
    assert_same_but_for_ties(balanced_codes(x, codebook, backend=backend), letter(x, codebook, "euclidean", 0.003, 50))


def test_far_codes_and_vectors_far_from_the_origin(backend: str) -> None:
    """Columns that float32 loses: codes e^-600 away from all rows in the first rounds."""
    x = clustered(400, 6, 8, offset=300.0)
    codebook = torch.cat([x[:10], 300 + 50 * torch.randn(6, 8)])
    codes = balanced_codes(x, codebook, backend=backend)
    assert_same_but_for_ties(codes, letter(x, codebook, "euclidean", 0.003, 50), tolerance=0.05)
    assert len(codes.unique()) > len(assign_codes(x, [codebook], metric="euclidean").unique())


def test_codes_are_used_more_evenly() -> None:
    x = torch.randn(2000, 8) * torch.tensor([4.0] + [0.3] * 7)
    codebook = torch.randn(32, 8)
    plain = assign_codes(x, [codebook], metric="euclidean")[:, 0].bincount(minlength=32)
    balanced = balanced_codes(x, codebook, epsilon=0.02).bincount(minlength=32)
    assert balanced.max() < 0.5 * plain.max() and balanced.min() > 0


@pytest.mark.parametrize("metric", METRICS)
def test_without_a_round_the_codes_are_the_nearest(metric: str, backend: str) -> None:
    x, codebook = torch.randn(130, 9), torch.randn(300, 9)
    codes = balanced_codes(x, codebook, metric=metric, iterations=0, backend=backend)
    assert torch.equal(codes, assign_codes(x, [codebook], metric=metric)[:, 0])


def test_awkward_shapes_and_repeated_bits(backend: str) -> None:
    assert balanced_codes(torch.zeros(0, 3), torch.ones(2, 3), backend=backend).shape == (0,)
    assert balanced_codes(torch.ones(1, 3), torch.ones(1, 3), backend=backend).tolist() == [0]
    assert balanced_codes(torch.ones(5, 3), torch.ones(2, 3), backend=backend).tolist() == [0] * 5
    wide = torch.randn(26, 600).T
    x, codebook = wide[::2, ::2], wide[1::2, ::2][:17]
    codes = balanced_codes(x, codebook, backend=backend)
    assert torch.equal(codes, balanced_codes(x.contiguous(), codebook.contiguous(), backend=backend))
    big = torch.randn(5000, 20)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2):
            torch.set_num_threads(count)
            runs.append(balanced_codes(big, big[:64], iterations=5, backend=backend))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3)}, ValueError, "x must have 2 dimensions"),
        ({"x": torch.full((4, 2), float("nan"))}, ValueError, "x must be finite; 8 of 8"),
        ({"codebook": torch.zeros(3, 5)}, ValueError, "codebook must have shape"),
        ({"codebook": torch.zeros(0, 2)}, ValueError, "codebook must have at least one row"),
        ({"codebook": torch.zeros(3, 2, dtype=torch.float16)}, TypeError, "codebook must have the dtype of x"),
        ({"metric": "l2"}, ValueError, "metric must be one of"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be positive"),
        ({"iterations": -1}, ValueError, "iterations must be at least 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        balanced_codes(**({"x": torch.randn(4, 2), "codebook": torch.randn(3, 2)} | change))
