#!/usr/bin/env bash
# Reads and writes of every Triton kernel under NVIDIA's memory checker, on a GPU host: bash tests/kernels/sanitize.sh
# Tensors get allocations of their own, so that a step beyond one of them shows. Kernels are compiled before, unwatched.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTORCH_NO_CUDA_MEMORY_CACHING=1
checker=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
python=${PYTHON:-python3}
"$python" tests/kernels/every_kernel.py > /dev/null
timeout 300 "$checker" --tool "${1:-memcheck}" --error-exitcode 1 "$python" tests/kernels/every_kernel.py
