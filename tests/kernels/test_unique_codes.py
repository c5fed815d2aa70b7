"""Unique semantic IDs against a brute-force oracle, and what the moves must leave alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from dgi_kernels import assign_codes, unique_codes, why_not

from .clustering_cases import METRICS, clustered, costs
from .shapes import name_of


@pytest.fixture(params=["reference", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    problem = why_not("unique_codes", request.param, "cpu", torch.float32)
    if problem is not None:
        pytest.skip(problem)
    return request.param


def brute_force(codes: Tensor, z: Tensor, codebooks: list[Tensor], metric: str) -> np.ndarray:
    """By trying every ID: the set of free IDs is a list, and each move looks through all of it."""
    ids = [tuple(row) for row in codes.tolist()]
    levels = len(codebooks)
    free = set(itertools.product(*(range(len(codebook)) for codebook in codebooks)))

    def cost(row: int, own: tuple[int, ...], level: int) -> float:
        residual = z[row].clone()
        for j in range(level):
            residual = residual - codebooks[j][own[j]]
        return float(costs(residual[None], codebooks[level][own[level]][None], metric)[0, 0])

    waiting = []
    for own in sorted(set(ids)):
        rows = sorted((cost(row, own, levels - 1), row) for row in range(len(ids)) if ids[row] == own)
        free.remove(own)
        waiting += [row for _, row in rows[1:]]
    for depth in reversed(range(levels)):
        while True:
            moves = [
                (cost(row, own, depth), row, own[depth])
                for row in waiting
                for own in free
                if own[:depth] == ids[row][:depth]
            ]
            if not moves:
                break
            # prefixes do not disturb each other: the nearest move of all is the nearest of its prefix
            _, row, code = min(moves)
            own = (*ids[row][:depth], code)
            for level in range(depth + 1, levels):
                below = {it[: level + 1] for it in free if it[:level] == own}
                own = min((cost(row, it, level), it) for it in below)[1]
            free.remove(own)
            waiting.remove(row)
            ids[row] = own
    assert not waiting
    return np.array(ids, dtype=np.int64).reshape(-1, levels)


@pytest.mark.parametrize("sizes", [(3, 4), (2, 3, 3), (12,), (4, 1, 4)], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_against_brute_force(metric: str, sizes: tuple[int, ...], backend: str) -> None:
    for rows in (1, 7, 12):
        z = clustered(rows, 2, 3, spread=0.5)
        codebooks = [torch.randn(size, 3) for size in sizes]
        codes = assign_codes(z, codebooks, metric=metric)
        unique = unique_codes(codes, z, codebooks, metric=metric, backend=backend)
        assert unique.tolist() == brute_force(codes, z, codebooks, metric).tolist()


def test_all_items_under_one_id_fill_every_level(backend: str) -> None:
    """As many items as IDs, all of them alike: ties by row, and moves in the last level, the last two and all three."""
    z, codebooks = torch.ones(12, 2), [torch.randn(2, 2), torch.randn(3, 2), torch.randn(2, 2)]
    codes = torch.zeros(12, 3, dtype=torch.int64)
    unique = unique_codes(codes, z, codebooks, metric="euclidean", backend=backend)
    assert unique[0].tolist() == [0, 0, 0] and unique[1].tolist() == [0, 0, 1]
    assert len(unique.unique(dim=0)) == 12
    assert unique.tolist() == brute_force(codes, z, codebooks, "euclidean").tolist()


def test_only_those_that_must_move_do(backend: str) -> None:
    z, codebooks = clustered(500, 20, 6), [torch.randn(4, 6), torch.randn(8, 6), 0.3 * torch.randn(64, 6)]
    codes = assign_codes(z, codebooks, metric="euclidean")
    unique = unique_codes(codes, z, codebooks, metric="euclidean", backend=backend)
    moved = (unique != codes).any(1)
    assert len(unique.unique(dim=0)) == 500
    assert int(moved.sum()) == 500 - len(codes.unique(dim=0))
    assert torch.equal(unique, unique_codes(unique, z, codebooks, metric="euclidean", backend=backend))


def test_more_items_of_a_prefix_than_a_row_remembers(backend: str) -> None:
    """Rows whose nearest codes are all taken look again."""
    z, codebooks = 0.01 * torch.randn(60, 2), [torch.zeros(1, 2), torch.randn(64, 2)]
    codes = assign_codes(z, codebooks, metric="euclidean")
    unique = unique_codes(codes, z, codebooks, metric="euclidean", backend=backend)
    plain = unique_codes(codes, z, codebooks, metric="euclidean", backend="reference")
    assert torch.equal(unique, plain) and len(unique.unique(dim=0)) == 60


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=name_of)
def test_dtypes_of_vectors_and_codes(dtype: torch.dtype, backend: str) -> None:
    z, codebooks = torch.randn(9, 3).to(dtype), [torch.randn(4, 3).to(dtype), torch.randn(3, 3).to(dtype)]
    codes = assign_codes(z, codebooks)
    expected = brute_force(
        codes,
        z.double() if dtype == torch.float64 else z.float(),
        [c.float() for c in codebooks] if dtype != torch.float64 else codebooks,
        "cosine",
    )
    for index in (torch.int64, torch.int32, torch.uint8):
        assert unique_codes(codes.to(index), z, codebooks, backend=backend).tolist() == expected.tolist()


def test_no_items_and_strides(backend: str) -> None:
    codebooks = [torch.randn(5, 4)]
    assert unique_codes(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 4), codebooks, backend=backend).shape == (
        0,
        1,
    )
    z = torch.randn(4, 10).T[::2]
    codes = torch.zeros(1, 5, dtype=torch.int64).T
    packed = unique_codes(codes.contiguous(), z.contiguous(), codebooks, backend=backend)
    assert torch.equal(unique_codes(codes, z, codebooks, backend=backend), packed)


def test_a_million_ids_beyond_int64(backend: str) -> None:
    """The product of the sizes overflows 64 bits; room is still room."""
    z, codebooks = torch.ones(3, 2), [torch.randn(4096, 2) for _ in range(6)]
    codes = torch.zeros(3, 6, dtype=torch.int64)
    assert len(unique_codes(codes, z, codebooks, backend=backend).unique(dim=0)) == 3


def test_too_few_ids_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"codebooks must have at least as many .* sizes \[2, 2\] give 4, for 5 items"):
        unique_codes(torch.zeros(5, 2, dtype=torch.int64), torch.ones(5, 3), [torch.randn(2, 3)] * 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"codes": torch.zeros(4, 2)}, TypeError, "codes must have dtype"),
        ({"codes": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, "codes must have shape"),
        ({"codes": torch.tensor([[0, 3]] * 4)}, ValueError, r"codes\[:, 1\] must be in \[0, 3\)"),
        ({"codes": torch.tensor([[-1, 0]] * 4)}, ValueError, r"codes\[:, 0\] must be in \[0, 2\)"),
        ({"z": torch.full((4, 3), float("inf"))}, ValueError, "z must be finite"),
        ({"codebooks": []}, ValueError, "codebooks must hold"),
        ({"metric": "l2"}, ValueError, "metric must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {
        "codes": torch.zeros(4, 2, dtype=torch.int64),
        "z": torch.randn(4, 3),
        "codebooks": [torch.randn(2, 3), torch.randn(3, 3)],
    } | change
    with pytest.raises(error, match=message):
        unique_codes(**arguments)
