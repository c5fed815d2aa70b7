"""Argument checks: what passes comes back unchanged, what fails is named with what it was and what is needed."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import library

from dgi_kernels import checks

X = torch.zeros(2, 3)
INF = float("inf")


@pytest.mark.parametrize(
    ("check", "error", "message"),
    [
        (lambda: checks.tensor("x", [1]), TypeError, "x must be a torch.Tensor; got list"),
        (lambda: checks.tensor("x", X.to_sparse()), TypeError, "x must be a dense (strided) tensor; got layout"),
        (
            lambda: checks.tensor("x", torch.nested.nested_tensor([X, X[:1]])),
            TypeError,
            "x must be a dense (strided) tensor; got a nested tensor",
        ),
        (lambda: checks.tensor("x", X.to("meta")), TypeError, "x must hold data; it is on the meta device"),
        (lambda: checks.tensor("x", X, ndim=1), ValueError, "x must have 1 dimensions; got shape (2, 3)"),
        (lambda: checks.tensor("x", X, min_ndim=3), ValueError, "x must have at least 3 dimensions; got shape (2, 3)"),
        (
            lambda: checks.tensor("x", X, like=X.to("meta")),
            ValueError,
            "x must be on meta, as the other inputs; it is on",
        ),
        (
            lambda: checks.float_tensor("x", X.int()),
            TypeError,
            "x must have dtype float32 or bfloat16 or float16 or float64; got torch.int32",
        ),
        (
            lambda: checks.shape("x", X, (None, 4), "(N, D)"),
            ValueError,
            "x must have shape (N, D) = (*, 4); got (2, 3)",
        ),
        (lambda: checks.shape("x", X, (2,), "(N,)"), ValueError, "x must have shape (N,) = (2); got (2, 3)"),
        (
            lambda: checks.same_dtype("x", X.double(), "y", X),
            TypeError,
            "x must have the dtype of y, torch.float32; got torch.float64",
        ),
        (lambda: checks.integer("x", 1.0), TypeError, "x must be an integer; got float"),
        (lambda: checks.integer("x", True), TypeError, "x must be an integer; got bool"),
        (lambda: checks.integer("x", 3, low=4), ValueError, "x must be at least 4; got 3"),
        (lambda: checks.integer("x", 3, low=0, high=2), ValueError, "x must be at least 0 and at most 2; got 3"),
        (lambda: checks.number("x", "1"), TypeError, "x must be a float; got str"),
        (lambda: checks.number("x", False), TypeError, "x must be a float; got bool"),
        (lambda: checks.number("x", float("nan")), ValueError, "x must be finite in float32; got nan"),
        (lambda: checks.number("x", -INF), ValueError, "x must be finite in float32; got -inf"),
        (lambda: checks.number("x", -(10**400)), ValueError, "x must be finite in float32; got -inf"),
        (lambda: checks.number("x", 1e39), ValueError, "x must be finite in float32; got 1e+39"),
        (lambda: checks.number("x", 1e-50, positive=True), ValueError, "x must be positive in float32; got 1e-50"),
        (lambda: checks.number("x", 0, positive=True), ValueError, "x must be positive in float32; got 0"),
        (lambda: checks.number("x", 2, low=0, high=1), ValueError, "x must be within [0, 1]; got 2"),
        (
            lambda: checks.scalar("x", torch.ones(1), X),
            ValueError,
            "x must be a float or a 0-d tensor; got a tensor of",
        ),
        (lambda: checks.scalar("x", torch.tensor(1), X), TypeError, "x must have dtype float32"),
        (
            lambda: checks.scalar("x", torch.tensor(-1.0), X, positive=True),
            ValueError,
            "x must be positive in float32; got -1.0",
        ),
        (
            lambda: checks.scalar("x", torch.tensor(INF).bfloat16(), X),
            ValueError,
            "x must be finite in float32; got inf",
        ),
        (lambda: checks.choice("x", "c", ("a", "b")), ValueError, "x must be one of 'a', 'b'; got 'c'"),
        (lambda: checks.choice("x", np.zeros(2), ("a", "b")), ValueError, "x must be one of 'a', 'b'; got array"),
        (
            lambda: checks.index("x", torch.tensor([0, 9, -1, -2]), 0, 5, also=-1),
            ValueError,
            "x must be in [0, 5) or -1; got 9 (2 of 4 out of range)",
        ),
        (lambda: checks.index("x", torch.tensor([0]), 0, 0), ValueError, "x must be in [0, 0); got 0"),
        (
            lambda: checks.index("x", torch.tensor([156], dtype=torch.uint8), 0, 5, also=-100),
            ValueError,
            "x must be in [0, 5) or -100; got 156",
        ),
    ],
)
def test_what_fails_is_named(check: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + re.escape(message)):
        check()


def test_what_passes_comes_back() -> None:
    scale = torch.tensor(2.0, requires_grad=True)
    assert checks.tensor("x", X, ndim=2, like=X) is X
    assert checks.scalar("x", scale, X, positive=True) is scale
    assert checks.scalar("x", np.float32(2), X) == 2.0
    assert type(checks.integer("x", np.int16(-3), low=-3, high=-3)) is int
    assert checks.number("x", 1, low=0, high=1) == 1.0
    assert checks.choice("x", "a", ("a",)) == "a"
    for dtype in checks.INDEX_DTYPES:
        index = torch.tensor([0, 100], dtype=dtype)
        assert checks.index("x", index, 0, 1000) is index  # 1000 does not fit the narrow ones
    empty = torch.empty(0, dtype=torch.int64)
    assert checks.index("x", empty, 0, 0) is empty


def test_dtypes_mix_under_autocast_only() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        checks.same_dtype("x", X.bfloat16(), "y", X)
        assert checks.autocast_operand(X).dtype == torch.bfloat16
        assert checks.autocast_operand(X.double()).dtype == torch.float64
    assert checks.autocast_operand(X) is X
    assert checks.to_dtype(2.0, torch.float64) == 2.0
    assert checks.to_dtype(torch.tensor(2.0), torch.float64).dtype == torch.float64
    assert [checks.compute_dtype(dtype) for dtype in checks.FLOAT_DTYPES] == [torch.float32] * 3 + [torch.float64]


def test_values_are_not_read_where_that_would_cost_a_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "checks_values", lambda device: False)
    index, scale = torch.tensor([7]), torch.tensor(INF)
    assert checks.index("x", index, 0, 5) is index
    assert checks.scalar("x", scale, X) is scale


def test_the_operators_of_compiled_code_pass_torchs_own_checks() -> None:
    for requires_grad in (False, True):
        scale = torch.tensor(2.0, requires_grad=requires_grad)
        library.opcheck(torch.ops.dgi_kernels.checked_scalar.default, (scale, "x", True))
    library.opcheck(torch.ops.dgi_kernels.checked_index.default, (torch.tensor([1]), 0, 2, None, "x"))
