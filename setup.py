"""Builds the compiled extension ``dgi_kernels/_C.abi3.so``; everything else about the package is in pyproject.toml.

The extension uses only torch's stable ABI and none of Python's, so that one binary serves every torch from 2.10 on and
every Python from 3.10 on.  Without a C++ compiler the package installs as pure Python, with one warning.

Environment:
    DGI_BUILD_CUDA        ``auto`` (default): with CUDA kernels if torch has CUDA and there is a toolkit; ``1``: with
                          CUDA kernels, or fail; ``0``: without.  A GPU is not needed to build.
    TORCH_CUDA_ARCH_LIST  GPU architectures to build for (default ``8.0;9.0+PTX``).
    MAX_JOBS              how many files are compiled at once.
    CXX, CUDA_HOME        the compiler, and the folder of the CUDA toolkit.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"dgi-kernels is built against torch, which cannot be imported here ({error}). Either install it first "
        "(pip install -c constraints.txt torch ninja setuptools) or drop --no-build-isolation."
    ) from error

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
# Without the two -fno flags, which torch itself is built with, gcc does not vectorise the noise: 3.2 times slower.
# Without contraction into fused multiply-adds the noise has the same bits on every CPU: costs 20 % of it.
# -g0: Python's own flags ask for debug information: a library ten times as large, and a fifth slower to build.
# -fopenmp-simd obeys `#pragma omp simd`, which says which sums may be reordered; it needs and links no OpenMP.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fopenmp-simd",
    "-fvisibility=hidden",
    STABLE_ABI,
]
# The headers share constexpr functions of the C++ library, std::bit_cast and limits, with device code.
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", STABLE_ABI]


def why_no_compiler() -> str | None:
    """Why C++ cannot be compiled here; None where it can."""
    if os.name != "posix":
        return f"the extension cannot be built on {sys.platform} yet"
    command = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(command)[0]) is None:
        return (
            f"no C++ compiler was found ({command!r}): install one, e.g. `apt install g++`, "
            "or name it in the environment variable CXX"
        )
    return None


def why_no_cuda() -> str | None:
    """Why CUDA kernels cannot be built here; None where they can, with or without a GPU."""
    if why_no_compiler() is not None:
        return why_no_compiler()
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch"
    home = cpp_extension.CUDA_HOME
    if home is None or not Path(home, "bin", "nvcc").exists():
        return f"nvcc was not found: install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME to its folder"
    if not [*Path(home).glob("include/cuda_runtime.h"), *Path(home).glob("targets/*/include/cuda_runtime.h")]:
        return f"{home} holds nvcc but not CUDA's headers: set CUDA_HOME to the folder of the toolkit itself"
    return None


def with_cuda() -> bool:
    """Whether to build CUDA kernels, by ``DGI_BUILD_CUDA``."""
    wanted = os.environ.get("DGI_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"DGI_BUILD_CUDA must be auto, 0 or 1; got {wanted!r}")
    problem = why_no_cuda() if wanted != "0" else None
    if wanted == "1" and problem:
        raise SystemExit(f"DGI_BUILD_CUDA=1, but CUDA kernels cannot be built here: {problem}")
    return wanted != "0" and problem is None


def warn_pure_python(reason: str) -> None:
    print(
        f"WARNING: dgi-kernels is installed without its compiled kernels, as pure Python (slower): {reason}",
        file=sys.stderr,
        flush=True,
    )


class BuildPurePython(build_py):
    """Says why there is no extension, in the one command that wheels and editable installs both run once."""

    def run(self) -> None:
        warn_pure_python(str(why_no_compiler()))
        super().run()


class BuildExtension(cpp_extension.BuildExtension):
    """Falls back to pure Python where compilation fails, unless CUDA kernels were asked for by name."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except (BaseError, OSError, RuntimeError) as error:
            if os.environ.get("DGI_BUILD_CUDA") == "1":
                raise
            warn_pure_python(f"compiling the extension failed, see the messages above ({error})")
            self.extensions = []  # nothing to copy into the package


def extension(cuda: bool) -> Extension:
    sources = sorted(map(str, [*Path("csrc/register").glob("*.cpp"), *Path("csrc/cpu").rglob("*.cpp")]))
    macros, kind = [], cpp_extension.CppExtension
    if cuda:
        sources += sorted(map(str, [*Path("csrc/register/cuda").glob("*.cpp"), *Path("csrc/cuda").glob("*.cu")]))
        # USE_CUDA shows the stable ABI's CUDA functions.
        macros, kind = [("USE_CUDA", None)], cpp_extension.CUDAExtension
        # torch's own default is the GPUs that it sees here, and an error where there is none.
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    include = [str(Path(folder).absolute()) for folder in ("csrc", "csrc/include")]
    return kind(
        "dgi_kernels._C",
        sources,
        include_dirs=include,
        define_macros=macros,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
    )


build_cuda = with_cuda()
if why_no_compiler() is None:
    setup(
        ext_modules=[extension(build_cuda)],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    setup(cmdclass={"build_py": BuildPurePython})
