#!/usr/bin/env bash
# All tests that need a GPU, on the GPU host, with that host's own Python (torch and triton are already there).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels:plugins${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m pytest -q -p no:cacheprovider -m gpu tests "$@"
