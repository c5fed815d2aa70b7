#!/usr/bin/env bash
# One kernel under Nsight Compute, with the counters that say what it waits for:
#
#   bench/profile.sh KERNEL [OUTFILE]     e.g. bench/profile.sh flash_forward_kernel; OUTFILE gets ncu's table as text
#   bench/profile.sh --list               the kernels that can be named
#   bench/profile.sh KERNEL [OUTFILE] --rehearse    prints the command, and runs it without ncu where there is no GPU
#
#   PYTHON   the interpreter that has torch, Triton and the extension (default python3)
#   NCU      Nsight Compute (default: ncu on the PATH, or the CUDA toolkit's)
#   SKIP     launches of the kernel to let pass before the one that is measured (default 2: compiled and warm)
#
# Read first: Speed Of Light says which unit is busiest, Scheduler Statistics whether issue slots bind, Warp State what
# warps wait for. A flash kernel should show its tensor pipe busy (Compute Workload) while ALU and FMA pipes are too: where
# the shares of both add up to less than 100 %, products and element work take turns. Clocks are left as they are.
set -uo pipefail
usage() { sed -n '2,16s/^# \{0,1\}//p' "$0"; }
rehearse= arguments=()
for argument in "$@"; do
    if [[ $argument == --rehearse ]]; then rehearse=--rehearse; else arguments+=("$argument"); fi
done
if ((${#arguments[@]} == 0)); then usage >&2; exit 2; fi
kernel=${arguments[0]} out=${arguments[1]:-}
if [[ -n $out ]]; then out=$(realpath -m "$out"); fi
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}
if [[ $kernel == --list ]]; then exec "$python" -m gpu.kernel --list; fi
if [[ $kernel == -* ]]; then usage; exit 0; fi
# Sections, not metrics by name: each knows the counters of the GPU that is there.
sections=(SpeedOfLight ComputeWorkloadAnalysis MemoryWorkloadAnalysis SchedulerStats WarpStateStats LaunchStats Occupancy)
ncu=${NCU:-$(command -v ncu || echo "${CUDA_HOME:-/usr/local/cuda}/bin/ncu")}
command=("$ncu" --clock-control none --kernel-name "regex:$kernel" --launch-skip "${SKIP:-2}" --launch-count 1
    "${sections[@]/#/--section=}" "$python" -m gpu.kernel "$kernel")
if [[ -n $rehearse ]]; then
    printf '%q ' "${command[@]}"
    echo
    command=("$python" -m gpu.kernel "$kernel" --rehearse)
elif [[ ! -x $ncu ]]; then
    echo "profile.sh: no Nsight Compute: put ncu on the PATH, or name it in NCU" >&2
    exit 1
fi
if [[ -n $out ]]; then "${command[@]}" >"$out" 2>&1; else "${command[@]}"; fi
