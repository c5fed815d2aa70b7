#!/usr/bin/env bash
# Everything that needs a GPU, without a network, from a bare copy of the tree, in stages that can be run alone:
#
#   bench/gpu.sh OUTDIR                       the first run: correctness, then figures of ours, floors and eager code
#   bench/gpu.sh --run second OUTDIR          the second: all tests, other sizes, torch.compile and other libraries
#   bench/gpu.sh --only cosine,beam OUTDIR    some stages; --plan lists them, with kernels and seconds
#   bench/gpu.sh --plan                       what a run would compile, and how long it should take; needs no GPU
#   bench/gpu.sh --rehearse OUTDIR            every stage on a GPU that is pretended, then each cut in its middle
#
# OUTDIR gets summary.txt, table.txt and results.tar.gz, the latter made anew every few seconds. The exit status is 0
# only if everything passed. Needs torch with CUDA, Triton, numpy, nvcc, ninja, pytest with its xdist and benchmark.
#   --budget SECONDS    for all of it; what is not reached is listed
#   --ptxas PATH        check the flash kernels with this assembler too (the toolkit's own is taken anyway)
#   PYTHON              the interpreter that has them (default python3)
#   COMMIT              the commit, where the copy has no repository
#   TRITON_CACHE_DIR    kernels compiled before; by default a folder that later runs on this machine find again
# An extension that was built before (dgi_kernels/_C.abi3.so) is taken if it loads. Other libraries are found by way of
# PYTHONPATH.
set -uo pipefail
if [[ ${1:-} == --help || $# == 0 ]]; then sed -n '2,20s/^# \{0,1\}//p' "$0"; exit $(($# == 0 ? 2 : 0)); fi

where=$PWD
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
# Thousands of small files: not where results are.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/dgi-gpu-cache/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-${TMPDIR:-/tmp}/dgi-gpu-cache/inductor}

# The nvcc on the PATH may be a wrapper; it knows itself where its toolkit is.
if [[ -z ${CUDA_HOME:-} ]] && command -v nvcc >/dev/null; then
    CUDA_HOME=$(realpath "$(nvcc --dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -1)")
    export CUDA_HOME
fi
if [[ " $* " == *" --rehearse "* || " $* " == *" --plan "* ]]; then
    export DGI_BUILD_CUDA=0
else
    # Machine code for the GPU that is here, and nothing else.
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') ||
        { echo "gpu.sh: no CUDA device that torch can use (--rehearse and --plan do without)" >&2; exit 1; }
    export DGI_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST
fi
exec "$python" -m gpu.run --from "$where" "$@"
