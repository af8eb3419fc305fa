#!/usr/bin/env bash
# All tests that need a GPU, on the GPU host, with that host's own Python (torch and triton are already there): kernels
# at sizes and in precisions that no interpreter reaches, then what is marked `gpu` elsewhere. Arguments go to pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels:plugins${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no GPU here"; exit 3; }

# Compiling takes most of the time, on one core for each worker.
workers=()
if "$python" -c 'import xdist' 2> /dev/null; then workers=(-n "${WORKERS:-8}"); fi
others=$(grep -rl --include='test_*.py' 'mark.gpu' tests | grep -v '^tests/kernels/')
"$python" -m pytest -q -p no:cacheprovider "${workers[@]}" tests/kernels/test_triton_*.py "$@"
kernels=$?
# shellcheck disable=SC2086
"$python" -m pytest -q -p no:cacheprovider -m gpu $others "$@"
elsewhere=$?
exit $((kernels ? kernels : elsewhere))
