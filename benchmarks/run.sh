#!/usr/bin/env bash
# What `make bench` runs, on a GPU host with that host's own Python: for each operation its GPU tests, then its times.
# An operation whose tests fail is not timed. Tables go to $OUT (default runs/bench), one file a benchmark.
#
#     bash benchmarks/run.sh                                # all
#     bash benchmarks/run.sh decay_attention dense_fuse     # some of: the operations, models, decode
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels:plugins${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
out=${OUT:-runs/bench}
mkdir -p "$out"
failed=()

tests() { # TABLE FILE...: whether the tests pass
    "$python" -m pytest -q -p no:cacheprovider "${@:2}" > "$out/$1.tests.txt" 2>&1 && return
    tail -n 20 "$out/$1.tests.txt"
    echo "$1: tests fail, so nothing is timed (all of it in $out/$1.tests.txt)"
    failed+=("$1")
    return 1
}

table() { # TABLE SCRIPT ARGUMENT...: append what the script prints
    echo "== ${*:2}" | tee -a "$out/$1.txt"
    "$python" "benchmarks/$2.py" "${@:3}" 2>&1 | tee -a "$out/$1.txt" || failed+=("$1")
}

measure() { # one name of the list above
    : > "$out/$1.txt"
    case $1 in
        decay_attention)
            tests "$1" tests/kernels/test_triton_decay_attention*.py || return
            table "$1" ops_decay_attention
            for mode in kernels token first lengths; do table "$1" ops_decay_attention "--$mode"; done
            ;;
        models)
            tests "$1" tests/gpu/test_graph.py || return
            table "$1" models
            ;;
        decode)
            tests "$1" tests/test_generation.py || return
            table "$1" decode
            ;;
        selective_scan | dense_fuse | causal_conv1d)
            tests "$1" "tests/kernels/test_triton_$1.py" || return
            table "$1" "ops_$1"
            ;;
        *)
            echo "$1: no such benchmark"
            failed+=("$1")
            ;;
    esac
}

for name in ${@:-decay_attention selective_scan dense_fuse causal_conv1d models decode}; do
    measure "$name"
done
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
