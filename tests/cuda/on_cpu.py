"""The CUDA kernels as a library for the CPU: ``csrc/cuda/*.cu`` compiled as C++ against ``cuda_on_cpu.h``.

The files of ``csrc/register/cuda`` are compiled with them, so that the ops are called as torch would call them on a
GPU, argument checks included, but with CPU tensors: their kernels are registered for CUDA, and called from there.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch import library as torch_library

from dgi_kernels import _extension

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]


def why_not() -> str | None:
    """Why the kernels cannot be compiled here; None where they can."""
    if shutil.which(COMPILER[0]) is None:
        return "needs a C++ compiler"
    return None


def why_no_ops() -> str | None:
    """Why the ops cannot be put in place of those of a GPU; None where they can."""
    if _extension.load_error is not None:
        return "needs the compiled extension"
    if torch._C._dispatch_has_kernel_for_dispatch_key("dgi_kernels::gumbel_noise", "CUDA"):
        return "the extension holds the CUDA kernels themselves, which the tests marked gpu run"
    return why_not()


def compile_library(
    sources: Sequence[Path],
    target: Path,
    include: Sequence[Path] = (),
    flags: Sequence[str] = (),
    libraries: Sequence[str] = (),
) -> None:
    """Compile ``sources``, also ``.cu``, as C++ and link them to the shared library ``target``."""
    folders = [*include, CSRC, CSRC / "include", HERE]
    objects = [target.with_name(f"{target.stem}-{i}-{source.stem}.o") for i, source in enumerate(sources)]

    def compile_one(source: Path, output: Path) -> None:
        run(
            [
                *COMPILER,
                *FLAGS,
                *flags,
                *(f"-I{folder}" for folder in folders),
                "-x",
                "c++",
                "-c",
                str(source),
                "-o",
                str(output),
            ]
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    # Symbolic: the stand-ins for torch's CUDA functions are taken from the library itself.
    run([*COMPILER, "-shared", "-Wl,-Bsymbolic", *map(str, objects), *libraries, "-o", str(target)])


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")


def wide_product(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
    """``mm`` of half precision into float32, which torch has on GPUs only."""
    return torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)


class Ops:
    """The CUDA ops, compiled unless ``cache`` holds them as they are, and registered for CUDA."""

    def __init__(self, cache: Path) -> None:
        sources = [
            *sorted((CSRC / "cuda").glob("*.cu")),
            *sorted((CSRC / "register" / "cuda").glob("*.cpp")),
            HERE / "torch_on_cpu.cpp",
        ]
        everything = sorted(path for folder in (CSRC, HERE) for path in folder.rglob("*") if path.is_file())
        state = hashlib.sha256(repr((torch.__version__, COMPILER, FLAGS)).encode())
        for path in everything:
            state.update(path.read_bytes())
        library = cache / f"cuda-on-cpu-{state.hexdigest()[:16]}.so"
        with (cache / "lock").open("w") as lock:  # several workers may come here at once, each for a file of tests
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.exists():
                for old in cache.glob("cuda-on-cpu-*"):
                    old.unlink()
                home = Path(torch.__file__).parent
                part = library.with_suffix(".part.so")
                compile_library(
                    sources,
                    part,
                    [home / "include", home / "include/torch/csrc/api/include"],
                    ["-DUSE_CUDA", "-DDGI_PRODUCTS=300", "-DDGI_SLICE=64", "-DTORCH_TARGET_VERSION=0x020a000000000000"],
                    [f"-L{home / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"],
                )
                part.replace(library)
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))
        self._products = torch_library.Library("aten", "IMPL")
        if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm.dtype_out", "CPU"):
            self._products.impl("mm.dtype_out", wide_product, "CPU")

    def seed(self, seed: int) -> None:
        """Choose the order in which threads and blocks run from here on."""
        self._library.cuda_on_cpu_seed(ctypes.c_uint64(seed))

    @contextmanager
    def instead(self, *names: str) -> Iterator[None]:
        """While this lasts, the native ops ``names`` run their CUDA kernels, on CPU tensors."""
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        with ExitStack() as patches:
            for name in names:
                kernel = partial(getattr(torch.ops.dgi_kernels, name).default.redispatch, cuda)
                kernel.default = kernel  # type: ignore[attr-defined]
                patches.enter_context(mock.patch.object(torch.ops.dgi_kernels, name, kernel))
            yield
