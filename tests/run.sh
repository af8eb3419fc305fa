#!/usr/bin/env bash
# What `make test` and CI run: the wheel builds, a plugin installs from its own wheel, and every test passes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=true HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore::DeprecationWarning

"$python" -m ruff check .
"$python" -m mypy

# A plugin is what its wheel holds, not what lies in the folder.
wheels=$(mktemp -d)
trap 'rm -rf "$wheels"' EXIT
"$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$wheels" plugins/dense-lab-gla
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$wheels/site" "$wheels"/dense_lab_gla-*.whl
PYTHONPATH="$wheels/site" "$python" -m pytest -q plugins/dense-lab-gla/tests -p no:cacheprovider

# Triton's interpreter must be chosen before triton is imported, so its tests have a process of their own.
TRITON_INTERPRET=1 "$python" -m pytest -q -n 2 tests/kernels/test_triton_*.py -p no:cacheprovider
exec "$python" -m pytest -q -n 2 --dist loadfile tests "$@"
