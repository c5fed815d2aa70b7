"""The header that runs CUDA kernels on the CPU runs right kernels right, and catches planted faults."""

from __future__ import annotations

import ctypes
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from . import on_cpu

THREADS = 96
REPETITIONS = 20  # orders of the threads

pytestmark = pytest.mark.skipif(on_cpu.why_not() is not None, reason=str(on_cpu.why_not()))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("faults") / "faults.so"
    on_cpu.compile_library([on_cpu.HERE / "planted_faults.cpp"], target)
    loaded = ctypes.CDLL(str(target))
    loaded.run.restype = ctypes.c_char_p
    return loaded


def run(library: ctypes.CDLL, kernel: str, values: Tensor) -> tuple[Tensor, str]:
    out = torch.full((THREADS,), -1, dtype=torch.int32)
    fault = library.run(
        kernel.encode(),
        ctypes.c_uint64(random.randrange(2**64)),
        ctypes.c_void_p(values.data_ptr()),
        ctypes.c_void_p(out.data_ptr()),
    )
    return out, fault.decode()


def expected(kernel: str, x: Tensor) -> Tensor:
    if kernel == "reverse":
        return x.flip(0)
    if kernel in ("sum", "count"):
        return x.sum().expand(THREADS)
    if kernel == "warp exchange":
        return x.view(-1, 2).flip(1).flatten()
    if kernel == "dynamic":
        return (x[0] + 1).expand(THREADS)
    odd = (x.view(-1, 16) % 2 != 0).sum(1).repeat_interleave(16)
    warps = x.view(-1, 32)
    equal = (warps.unsqueeze(1) // 8 == warps.unsqueeze(2) // 8).sum(2).flatten()
    up = torch.cat([warps[:, :1], warps[:, :-1]], 1).flatten()
    return odd * 10000 + equal * 100 + up % 100 + x.view(-1, 16).amax(1).repeat_interleave(16) * 1000000


@pytest.mark.parametrize("kernel", ["reverse", "sum", "count", "warp exchange", "dynamic", "votes"])
def test_right_kernels(library: ctypes.CDLL, kernel: str) -> None:
    for _ in range(REPETITIONS):
        x = torch.randint(1, 90, (THREADS,), dtype=torch.int32)
        out, fault = run(library, kernel, x)
        assert fault == ""
        assert out.tolist() == expected(kernel, x).tolist()


@pytest.mark.parametrize(
    "kernel, message",
    [
        ("missing barrier", "no barrier between|never written"),
        ("off by one", r"index 95 of row\[95\]"),
        ("wrong mask", "mask leaves out its caller"),
        ("half a vote", "lanes of the mask 0xffffffff that do not arrive|__syncthreads .* not every thread reaches"),
        ("vote after return", "names lane 5, which has returned"),
        ("shuffle outside mask", "a shuffle reads lane 0, outside its mask"),
        ("two masks", "which has returned|that do not arrive"),
        ("divergent barrier", "a thread has returned|not every thread reaches"),
        ("two barriers", "others at the one in"),
        ("return before barrier", "a thread has returned|not every thread reaches"),
        ("uninitialised", r"reads row\[\d+\], which was never written"),
        ("missing syncwarp", "no barrier between|never written"),
        ("overwrite", "which another thread reads, with no barrier between|has written, with no barrier between"),
        ("count without atomics", "no barrier between"),
        ("dynamic beyond the end", "ends at byte 772 of 768"),
        ("dynamic overlap", "overlap"),
    ],
)
def test_planted_faults(library: ctypes.CDLL, kernel: str, message: str) -> None:
    for _ in range(REPETITIONS):
        _, fault = run(library, kernel, torch.randint(-1, 1, (THREADS,), dtype=torch.int32))
        assert fault, "not caught"
        assert re.search(message, fault), fault


# In what the project's own kernels share: what is replaced, by what, and what is said of it.
MUTATIONS = {
    "no barrier before the parts are written": (
        "  __syncthreads();  // the last call's parts have been read\n",
        "",
        "no barrier between",
    ),
    "no barrier before the parts are read": (
        "/ kWarp] = own;\n  __syncthreads();\n",
        "/ kWarp] = own;\n",
        "no barrier between|never written",
    ),
    "a part too few": (
        "DGI_SHARED(Part, of_warp, kMaxWarps)",
        "DGI_SHARED(Part, of_warp, kMaxWarps / 4 - 1)",
        r"index 7 of of_warp\[7\]",
    ),
    "a part too many is read": (
        "of_warp[lane < warps ? lane : 0]",
        "of_warp[lane <= warps ? lane : 0]",
        r"reads of_warp\[8\], which was never written",
    ),
    "a lane outside the mask": (
        "__shfl_down_sync(kAllLanes",
        "__shfl_down_sync(0x7FFFFFFFu",
        "mask leaves out its caller",
    ),
}


@pytest.mark.parametrize("name", [None, *MUTATIONS])
def test_faults_planted_into_gumbel_softmax(tmp_path: Path, name: str | None) -> None:
    copies = tmp_path / "cuda"
    copies.mkdir()
    for file in ("gumbel.cu", "block.h"):  # found before the originals
        shutil.copy(on_cpu.CSRC / "cuda" / file, copies)
    if name is not None:
        before, after, _ = MUTATIONS[name]
        source = (copies / "block.h").read_text()
        assert source.count(before) == 1
        (copies / "block.h").write_text(source.replace(before, after))
    on_cpu.compile_library([on_cpu.HERE / "gumbel_driver.cpp"], tmp_path / "gumbel.so", [tmp_path], ["-DNDEBUG"])
    library = ctypes.CDLL(str(tmp_path / "gumbel.so"))
    library.run.restype = ctypes.c_char_p
    logits = torch.randn(3, 700)
    out = torch.empty_like(logits)
    for _ in range(5):
        fault = library.run(
            ctypes.c_uint64(random.randrange(2**64)),
            ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_int64(3),
            ctypes.c_int64(700),
        ).decode()
        if name is None:
            assert fault == ""
        else:
            assert re.search(MUTATIONS[name][2], fault), fault
