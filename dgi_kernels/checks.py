"""Argument checks shared by every op: a bad argument is named, with what it was and what is needed.

Checks of shape, dtype and device cost nothing and are always made.  Checks of values read the tensor: they are made
on the CPU, and elsewhere only inside :func:`dgi_kernels.debug`, since they cost a host sync.  While ``torch.compile``
or a FakeTensorMode traces, value checks become the small operators below and run when the compiled code runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, library

from dgi_kernels import _extension
from dgi_kernels.backend import checks_values, tracing

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_FLOAT32 = torch.finfo(torch.float32)
INDEX_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def tensor(
    name: str,
    value: object,
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    ndim: int | None = None,
    min_ndim: int | None = None,
    like: Tensor | None = None,
) -> Tensor:
    """Check that ``value`` is a dense tensor with one of ``dtypes``, ``ndim`` dimensions, on the device of ``like``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor; got {kind}")
    if value.is_meta:
        raise TypeError(f"{name} must hold data; it is on the meta device")
    if dtypes is not None and value.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {_one_of(dtypes)}; got {value.dtype}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions; got shape {tuple(value.shape)}")
    if min_ndim is not None and value.ndim < min_ndim:
        raise ValueError(f"{name} must have at least {min_ndim} dimensions; got shape {tuple(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as the other inputs; it is on {value.device}")
    return value


def float_tensor(
    name: str, value: object, *, ndim: int | None = None, min_ndim: int | None = None, like: Tensor | None = None
) -> Tensor:
    """Check a floating-point input: float32, bfloat16, float16 or float64."""
    return tensor(name, value, dtypes=FLOAT_DTYPES, ndim=ndim, min_ndim=min_ndim, like=like)


def shape(name: str, value: Tensor, expected: tuple[int | None, ...], meaning: str) -> None:
    """Check ``value.shape`` against ``expected``, where None means any size; ``meaning`` is e.g. "(N, D)"."""
    actual = value.shape
    if actual == expected:  # where there is no None; as fast as can be
        return
    if len(actual) != len(expected) or any(e is not None and e != a for e, a in zip(expected, actual, strict=True)):
        wanted = ", ".join("*" if e is None else str(e) for e in expected)
        raise ValueError(f"{name} must have shape {meaning} = ({wanted}); got {tuple(actual)}")


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype an op computes in, and that its losses and scores have: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_dtype(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Check that two inputs agree in dtype; under ``torch.autocast``, as for PyTorch's own ops, they may differ."""
    if value.dtype != like.dtype and not torch.is_autocast_enabled(like.device.type):
        raise TypeError(
            f"{name} must have the dtype of {like_name}, {like.dtype}; got {value.dtype} (outside of "
            f"torch.autocast dtypes are not mixed: convert one of the two)"
        )


def autocast_operand(value: Tensor) -> Tensor:
    """An operand of a matrix product as ``F.linear`` takes it: in the autocast dtype where autocast is on."""
    device = value.device.type
    if torch.is_autocast_enabled(device) and value.dtype != torch.float64:
        return value.to(torch.get_autocast_dtype(device))
    return value


def integer(name: str, value: object, *, low: int | None = None, high: int | None = None) -> int:
    """Check a Python integer with ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, torch.SymInt)):
        raise TypeError(f"{name} must be an integer; got {type(value).__name__}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = " and ".join(
            ([f"at least {low}"] if low is not None else []) + ([f"at most {high}"] if high is not None else [])
        )
        raise ValueError(f"{name} must be {bounds}; got {value}")
    return int(value) if isinstance(value, np.integer) else value  # type: ignore[return-value]


def number(
    name: str, value: object, *, positive: bool = False, low: float | None = None, high: float | None = None
) -> float:
    """Check a finite Python number, positive or within ``[low, high]`` where asked."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a float; got {type(value).__name__}")
    try:
        value = float(value)
    except OverflowError:  # an int beyond float64
        value = math.inf if value > 0 else -math.inf
    _check_finite(name, value, positive)
    if (low is not None and value < low) or (high is not None and value > high):
        raise ValueError(f"{name} must be within [{low}, {high}]; got {value}")
    return value


def choice(name: str, value: object, allowed: Sequence[str]) -> str:
    """Check that ``value`` is one of the ``allowed`` strings."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
    return value


def scalar(name: str, value: object, like: Tensor, *, positive: bool = False) -> float | Tensor:
    """Check a finite scalar given as a number or as a 0-d tensor (which may receive a gradient).

    A tensor keeps its autograd history; it must be floating-point, hold one element and be on the device of ``like``.
    """
    if not isinstance(value, Tensor):
        return number(name, value, positive=positive)
    tensor(name, value, dtypes=FLOAT_DTYPES, like=like)
    if value.ndim != 0:
        raise ValueError(f"{name} must be a float or a 0-d tensor; got a tensor of shape {tuple(value.shape)}")
    if checks_values(value.device):
        if tracing():
            return torch.ops.dgi_kernels.checked_scalar(value, name, positive)
        for element in _untransformed(value).detach().flatten().tolist():
            _check_finite(name, element, positive)
    return value


def scalar_tensor(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A scalar as a 0-d tensor of ``dtype`` on ``device``, without a copy from the host, which no CUDA graph takes."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    if torch.compiler.is_compiling():  # a factor may differ from call to call; one that is written makes a new graph
        return torch.ones((), dtype=dtype, device=device) * value
    if device.type == "cpu":
        return torch.tensor(value, dtype=dtype) if tracing() else _constant(value, dtype)
    return torch.full((), value, dtype=dtype, device=device)


@functools.lru_cache(maxsize=64)
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-d tensor that nobody writes to: making one takes longer than a small op's checks."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype)


def to_dtype(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A scalar for the maths of an op: a tensor is converted, so that it cannot promote the result; a float stays."""
    return value.to(dtype) if isinstance(value, Tensor) else value


def index(name: str, value: Tensor, low: int, high: int, *, also: int | None = None) -> Tensor:
    """Check that every element of an integer tensor is in ``[low, high)`` or equals ``also``; return the tensor."""
    if checks_values(value.device):
        if tracing():
            return torch.ops.dgi_kernels.checked_index(value, low, high, also, name)
        _check_index(name, value, low, high, also)
    return value


def _check_finite(name: str, value: float, positive: bool) -> None:
    if not -_FLOAT32.max <= value <= _FLOAT32.max:  # what ops compute in; also rejects NaN
        raise ValueError(f"{name} must be finite in float32; got {value}")
    if positive and value < _FLOAT32.tiny:
        raise ValueError(f"{name} must be positive in float32; got {value}")


def _check_index(name: str, value: Tensor, low: int, high: int, also: int | None) -> None:
    # A narrow dtype may not hold the bounds, and compares with them modulo its range.
    value = _untransformed(value).long()
    if (
        _extension.load_error is None
        and value.device.type == "cpu"
        and value.is_contiguous()
        and torch.ops.dgi_kernels.count_outside(value, low, high, also) == 0
    ):
        return
    bad = (value < low) | (value >= high)
    if also is not None:
        bad &= value != also
    if bad.any():
        first = value[bad][0].item()
        allowed = f"in [{low}, {high})" + (f" or {also}" if also is not None else "")
        raise ValueError(f"{name} must be {allowed}; got {first} ({int(bad.sum())} of {value.numel()} out of range)")


def _untransformed(value: Tensor) -> Tensor:
    """The plain tensor, of all examples, behind one that a transform of ``torch.func`` shows as a single example."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def _one_of(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@library.custom_op("dgi_kernels::checked_scalar", mutates_args=())
def _checked_scalar(value: Tensor, name: str, positive: bool) -> Tensor:
    _check_finite(name, float(value), positive)
    return value.clone()


@_checked_scalar.register_fake
def _(value: Tensor, name: str, positive: bool) -> Tensor:
    return torch.empty_like(value)


_checked_scalar.register_autograd(lambda ctx, grad: (grad, None, None))


@library.custom_op("dgi_kernels::checked_index", mutates_args=())
def _checked_index(value: Tensor, low: int, high: int, also: int | None, name: str) -> Tensor:
    _check_index(name, value, low, high, also)
    return value.clone()


@_checked_index.register_fake
def _(value: Tensor, low: int, high: int, also: int | None, name: str) -> Tensor:
    return torch.empty_like(value)
