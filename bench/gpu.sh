#!/usr/bin/env bash
# Everything that needs a GPU, in under ten minutes and without a network, from a bare checkout:
#
#   bench/gpu.sh OUTDIR              build in place, test, measure, run under compute-sanitizer; JSON and logs in OUTDIR
#   bench/gpu.sh --rehearse OUTDIR   the same steps on a machine without a GPU, as far as they go there: tiny shapes,
#                                    CUDA not built, GPU tests skipped, figures without meaning (named rehearsal-*)
#
# Needs torch with CUDA, Triton, numpy, nvcc (CUDA_HOME, or on the PATH), ninja, pytest and pytest-benchmark.
#   PYTHON   the interpreter that has them (default python3)
#   BUDGET   seconds for all of it (default 580); each step has a limit of its own, and what is left at most
# The most important steps come first, and each writes as it goes: a run cut short leaves what it had.
# The exit status is 0 only if every step passed; summary.txt says which did not.
set -uo pipefail

rehearse=
if [[ ${1:-} == --rehearse ]]; then rehearse=--rehearse; shift; fi
if [[ $# != 1 ]]; then sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
mkdir -p "$1"
out=$(realpath "$1")
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
end=$((SECONDS + ${BUDGET:-580}))
build_limit=240 tests_limit=60 which=(-m gpu)
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
export TRITON_CACHE_DIR=$out/triton-cache TORCHINDUCTOR_CACHE_DIR=$out/inductor-cache
summary=$out/summary.txt
: >"$summary"
failed=0

say() { echo "$*" | tee -a "$summary"; }

# step NAME LIMIT COMMAND...: run within LIMIT seconds, all output to OUTDIR/NAME.log, and note the outcome
step() {
    local name=$1 limit=$2 left=$((end - SECONDS)) start=$SECONDS status
    shift 2
    if ((left < 5)); then
        say "SKIPPED  $name: no time left"
        failed=1
        return 1
    fi
    timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1
    status=$?
    if ((status == 0)); then
        say "ok       $name ($((SECONDS - start)) s)"
        return 0
    fi
    failed=1
    if ((status == 124 || status == 137)); then
        say "CUT      $name after $((SECONDS - start)) s; what it had is in its log"
    else
        say "FAILED   $name (status $status, $((SECONDS - start)) s):"
        tail -n 5 "$out/$name.log" | cut -c1-300 | sed 's/^/           /' | tee -a "$summary"
    fi
    return "$status"
}

# The nvcc on the PATH may be a wrapper; it knows itself where its toolkit is.
if [[ -z ${CUDA_HOME:-} ]] && command -v nvcc >/dev/null; then
    CUDA_HOME=$(realpath "$(nvcc --dryrun -x cu -c /dev/null 2>&1 | sed -n 's/^#\$ TOP=//p' | head -1)")
    export CUDA_HOME
fi
if [[ -n $rehearse ]]; then
    export DGI_BUILD_CUDA=0
    # On the CPU all that can run there does; cores are few and busy, and nobody pays for them by the minute.
    end=$((end + 1200)) build_limit=1200 tests_limit=240 which=()
    say "REHEARSAL: no GPU, no CUDA code, tiny shapes"
else
    # Machine code for the GPU that is here, and nothing else.
    TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') ||
        { say "FAILED   no CUDA device that torch can use (--rehearse does without)"; exit 1; }
    export DGI_BUILD_CUDA=1 TORCH_CUDA_ARCH_LIST
    nvidia-smi >"$out/nvidia-smi.log" 2>&1
fi
git rev-parse HEAD >"$out/commit.txt" 2>/dev/null || echo unknown >"$out/commit.txt"

step build "$build_limit" "$python" setup.py build_ext --inplace || say "         without the extension: its ops are left out"
step info 60 "$python" -m dgi_kernels.info && cat "$out/info.log"

# Tests first: figures of wrong kernels are worth nothing. bench_gpu.py writes a JSON file per section.
tests() { step "$1" "$2" "$python" -m pytest -q -rs -p no:cacheprovider --junitxml="$out/$1.xml" "${@:3}"; }
tests tests "$tests_limit" "${which[@]}" tests/kernels/test_every_backend.py
# Only the files that have such tests: others may import what is not installed here.
mapfile -t files < <(grep -rl 'mark\.gpu' tests --include='test_*.py' | grep -v test_every_backend)
tests tests-of-kernels 120 -m gpu "${files[@]}"
for section in ceilings cosine beam gumbel quantize; do
    step "bench-$section" 100 "$python" bench/bench_gpu.py "$section" --output "$out" ${rehearse:+"$rehearse"}
done

# The CUDA kernels under compute-sanitizer: without torch's cache of freed memory, which hides what is out of bounds.
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/nonexistent}/bin/compute-sanitizer")
if [[ -n $rehearse ]]; then
    say "left out sanitizer: needs a GPU"
elif [[ ! -x $sanitizer ]]; then
    say "SKIPPED  sanitizer: there is no compute-sanitizer in the CUDA toolkit"
    failed=1
else
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "sanitizer-$tool" 90 "$sanitizer" --tool "$tool" --error-exitcode 9 \
            --target-processes all "$python" -m pytest -q -x -p no:cacheprovider -m gpu -k native \
            tests/kernels/test_every_backend.py
    done
fi

say "$(grep -hE '[0-9]+ (passed|failed)' "$out"/tests*.log | tr '\n' ';')"
say "figures: $(cd "$out" && echo ./*.json)"
if ((failed)); then say "NOT everything passed"; else say "everything passed"; fi
exit "$failed"
