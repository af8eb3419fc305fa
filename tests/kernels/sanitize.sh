#!/usr/bin/env bash
# Every Triton kernel, forward and backward, under NVIDIA's checkers, on a GPU host: bash tests/kernels/sanitize.sh [TOOL...]
#   memcheck   reads and writes beyond an allocation, misaligned ones
#   racecheck  threads of a program that meet in shared memory without a barrier
#   initcheck  reads of memory that nobody has written
# Tensors get allocations of their own, so that a step beyond one of them shows. Kernels are compiled before, unwatched;
# the tools run side by side. Exit code 1 for an error found, 3 where the checker cannot work here.
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=".:kernels:plugins${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
checker=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
python=${PYTHON:-python3}
limit=${SANITIZE_SECONDS:-75}
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
[[ -x $checker ]] || { echo "compute-sanitizer is not installed (CUDA toolkit)"; exit 3; }

"$python" tests/kernels/every_kernel.py > "$logs/unwatched" 2>&1 || { cat "$logs/unwatched"; exit 1; }
echo "unwatched: $(tail -n 1 "$logs/unwatched") after $SECONDS s"
tools=${*:-memcheck racecheck initcheck}
for tool in $tools; do
    (
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$limit" "$checker" --tool "$tool" --error-exitcode 9 \
            "$python" tests/kernels/every_kernel.py > "$logs/$tool" 2>&1
        echo $? > "$logs/$tool.code"
    ) &
done
wait
worst=0
for tool in $tools; do
    code=$(cat "$logs/$tool.code")
    if grep -q "Device not supported" "$logs/$tool"; then
        echo "$tool: the checker refuses this machine's device (Device not supported)"
        code=3
    elif ((code)); then
        grep -m 30 "^=========" "$logs/$tool"
        echo "$tool: exit code $code$( ((code == 124)) && echo ", still running after $limit s")"
        tail -n 3 "$logs/$tool"
        code=1
    else
        echo "$tool: $(grep -c ' s  ' "$logs/$tool") cases; $(grep 'SUMMARY' "$logs/$tool" | tail -n 1)"
    fi
    ((code > worst)) && worst=$code
done
echo "$SECONDS s in all"
exit "$worst"
