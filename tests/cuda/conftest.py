"""The CUDA ops, compiled once and run on the CPU in an order of threads that differs from test to test."""

from __future__ import annotations

import pytest

from . import on_cpu


@pytest.fixture(scope="session")
def cuda_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> on_cpu.Ops:
    """Kept between runs in pytest's cache, where that is on."""
    reason = on_cpu.why_no_ops()
    if reason is not None:
        pytest.skip(reason)
    cache = getattr(request.config, "cache", None)
    return on_cpu.Ops(cache.mkdir("cuda-on-cpu") if cache is not None else tmp_path_factory.mktemp("cuda-on-cpu"))


@pytest.fixture
def cuda_ops(cuda_library: on_cpu.Ops, seed: int) -> on_cpu.Ops:
    cuda_library.seed(seed)
    return cuda_library
