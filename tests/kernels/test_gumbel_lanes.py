"""The Gumbel-Softmax of the CUDA kernel, thread by thread, in C++: lanes run one after the other and are merged."""

from __future__ import annotations

import ctypes
import os
import random
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dgi_kernels import gumbel_softmax

from .shapes import name_of

INCLUDE = Path(__file__).resolve().parents[2] / "csrc" / "include"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
SOURCE = r"""
#include "dgi/gumbel_lanes.h"

extern "C" void run(const float* x, const float* u, int64_t rows, int64_t codes, int64_t seed, float tau, bool hard,
                    int64_t lanes, float* out, float* dx, float* dtau) {
  *dtau = 0;
  for (int64_t n = 0; n < rows; ++n) {
    const dgi::GumbelRow<float> row{x + n * codes, {0, 1, 0, rows, codes}, n, dgi::philox_key(seed), 1 / tau};
    dgi::SoftmaxPart whole;
    for (int64_t lane = 0; lane < lanes; ++lane) whole = dgi::merge(whole, row.part(lane, lanes));
    float mean = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) row.emit(lane, lanes, whole, hard, out + n * codes);
    for (int64_t lane = 0; lane < lanes; ++lane) mean += row.mean(lane, lanes, whole, u + n * codes);
    for (int64_t lane = 0; lane < lanes; ++lane) *dtau += row.gradient(lane, lanes, whole, u + n * codes, mean, dx + n *
    codes);
  }
}
"""

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    folder = tmp_path_factory.mktemp("lanes")
    (folder / "lanes.cpp").write_text(SOURCE)
    command = [*COMPILER, "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{INCLUDE}", "lanes.cpp", "-o", "lanes.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "lanes.so"))

    def call(x: Tensor, u: Tensor, seed: int, tau: float, hard: bool, lanes: int) -> tuple[Tensor, Tensor, Tensor]:
        out, dx, dtau = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan), torch.zeros(())

        def pointer(t: Tensor) -> ctypes.c_void_p:
            return ctypes.c_void_p(t.data_ptr())

        library.run(
            pointer(x),
            pointer(u),
            ctypes.c_int64(x.shape[0]),
            ctypes.c_int64(x.shape[1]),
            ctypes.c_int64(seed),
            ctypes.c_float(tau),
            ctypes.c_bool(hard),
            ctypes.c_int64(lanes),
            pointer(out),
            pointer(dx),
            pointer(dtau),
        )
        return out, dx, dtau

    return call


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("lanes", [1, 3, 256])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5, 1030)], ids=name_of)
def test_lanes(
    run: Callable[..., tuple[Tensor, Tensor, Tensor]], shape: tuple[int, int], lanes: int, hard: bool
) -> None:
    seed, tau = random.randrange(-(2**63), 2**63), random.uniform(0.3, 2)
    x, u = torch.randn(shape) * 3, torch.randn(shape)
    out, dx, dtau = run(x, u, seed, tau, hard, lanes)
    exact, exact_tau = x.double().requires_grad_(), torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    expected = gumbel_softmax(exact, exact_tau, hard, seed=seed, backend="reference")
    torch.testing.assert_close(out.double(), expected.detach(), rtol=0, atol=2e-5)
    truth, truth_tau = torch.autograd.grad((expected * u.double()).sum(), (exact, exact_tau))
    torch.testing.assert_close(dx.double(), truth, rtol=0, atol=1e-4)
    torch.testing.assert_close(dtau.double(), truth_tau, rtol=1e-3, atol=1e-4)


def test_edge_values(run: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
    inf = torch.inf
    x = torch.tensor([[0.0, -inf, 1.0], [-inf, -inf, -inf], [0.0, torch.nan, 1.0], [2.0, -inf, -inf]])
    for hard in (False, True):
        p, dx, _ = run(x, torch.randn_like(x), 3, 1.0, hard, 2)
        assert p[0, 1] == 0 and p[0].sum().item() == pytest.approx(1)
        assert p[3].tolist() == [1, 0, 0]
        assert p[1].isnan().all() and p[2].isnan().all()
        assert dx[0].isfinite().all() and dx[0, 1] == 0
