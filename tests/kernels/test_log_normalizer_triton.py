"""log_normalizer in Triton: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import math

import pytest
import torch

from dgi_kernels import log_normalizer

from .interpreter import DEVICE, DTYPES, launcher, run_in_the_interpreter, runs
from .shapes import name_of
from .test_log_normalizer import assert_right


@launcher
def test_in_the_interpreter() -> None:
    run_in_the_interpreter(__file__)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_rows_of_one_part_and_of_several(dtype: torch.dtype) -> None:
    for shape in ((40, 100), (2, 3, 5000), (1, 40_000), (9000,)):
        logits = (5 * torch.randn(shape, device=DEVICE)).to(dtype)
        assert_right(log_normalizer(logits, backend="triton").cpu(), logits.cpu())


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_strides_and_numbers_that_are_none(dtype: torch.dtype) -> None:
    whole = (4 * torch.randn(4, 5, 3, 70, device=DEVICE)).to(dtype)
    whole[torch.rand(whole.shape) < 0.2] = math.nan
    whole[torch.rand(whole.shape) < 0.2] = -math.inf
    whole[0], whole[1, 0, 0, 3] = math.nan, math.inf
    for logits in (
        whole,
        whole[::2, 1:, :, 7:],
        whole.transpose(0, 2),
        whole.transpose(1, 3),
        whole[:, :, 0].transpose(0, 1),
        whole[..., :0],
        whole[:0],
    ):
        assert_right(log_normalizer(logits, backend="triton").cpu(), logits.cpu())
