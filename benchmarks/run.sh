#!/usr/bin/env bash
# What `make bench` runs, on a GPU host with that host's own Python: for each operation its GPU tests, then its times,
# then those of other libraries on the same shapes in the same run. An operation whose tests fail is not timed.
# Tables go to $OUT (default runs/bench), one file a benchmark.
#
#     bash benchmarks/run.sh                                # all, about twenty minutes
#     bash benchmarks/run.sh decay_attention dense_fuse     # some of: the operations, lengths, models, decode
#     bash benchmarks/run.sh --quick                        # two minutes: operations are judged by `dense-lab verify`
#                                                           # instead of their tests, few shapes, one peer each
#     PEER_SECONDS=60 bash benchmarks/run.sh                # how long a peer may take to be ready (300; quick 100)
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=".:kernels:plugins${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "no GPU here"; exit 3; }
out=${OUT:-runs/bench}
mkdir -p "$out"
failed=()
quick=
if [[ ${1:-} == --quick ]]; then
    quick=--quick
    shift
fi
limit=${PEER_SECONDS:-$([[ $quick ]] && echo 100 || echo 300)}
names=${*:-decay_attention selective_scan dense_fuse causal_conv1d lengths models decode}

red() { # NAME FILE: say so
    failed+=("$1")
    tail -n 20 "$2"
    echo "$1: not timed, since it is wrong or its tests fail (all of it in $2)"
    return 1
}

verified() { # whether the operation is right here; one run judges all of them
    if [[ ! -s $out/verify.json ]]; then
        "$python" -c 'from dense_lab.cli import main; main()' verify --device cuda --json \
            > "$out/verify.json" 2> "$out/verify.txt"
    fi
    "$python" - "$1" "$out/verify.json" <<'END' || red "$1" "$out/verify.txt"
import json, sys
found = [x for x in json.load(open(sys.argv[2])) if x["operation"] == sys.argv[1]]
wrong = [x for x in found if not x["ok"]]
print(*[f"{x['operation']}/{x['implementation']}: {x['text']}" for x in wrong], sep="\n", end="\n" if wrong else "")
sys.exit(bool(wrong) or not found)
END
}

tests() { # NAME FILE...: whether the tests pass
    "$python" -m pytest -q -p no:cacheprovider "${@:2}" > "$out/$1.tests.txt" 2>&1 || red "$1" "$out/$1.tests.txt"
}

table() { # NAME SCRIPT ARGUMENT...: append what the script prints
    echo "== ${*:2}" | tee -a "$out/$1.txt"
    "$python" "benchmarks/$2.py" "${@:3}" 2>&1 | tee -a "$out/$1.txt" || failed+=("$1")
}

right() { # NAME: whether it may be timed
    if [[ $quick ]]; then
        case $1 in
            decay_attention | selective_scan | dense_fuse | causal_conv1d) verified "$1" ;;
        esac
        return
    fi
    case $1 in
        decay_attention) tests "$1" tests/kernels/test_triton_decay_attention*.py ;;
        selective_scan | dense_fuse | causal_conv1d) tests "$1" "tests/kernels/test_triton_$1.py" ;;
        models) tests "$1" tests/gpu/test_graph.py ;;
        decode) tests "$1" tests/test_generation.py ;;
    esac
}

measure() { # one name of the list above
    : > "$out/$1.txt"
    case $1 in
        decay_attention)
            table "$1" ops_decay_attention
            for mode in $([[ $quick ]] || echo kernels token first); do table "$1" ops_decay_attention "--$mode"; done
            ;;
        selective_scan | dense_fuse | causal_conv1d) table "$1" "ops_$1" $quick ;;
        lengths) table "$1" lengths $quick ;;
        models) table "$1" models $([[ $quick ]] && echo speed trial) ;;
        decode) table "$1" decode ;;
        *)
            echo "$1: no such benchmark"
            failed+=("$1")
            ;;
    esac
}

peers=()
if [[ " $names " == *" decay_attention "* ]]; then
    peers+=("wide fla" "wide torch" "square sdpa")
    [[ $quick ]] || peers+=("middle fla" "square fla" "ssd fla" "ssd mamba_ssm")
fi
if [[ " $names " == *" selective_scan "* ]]; then peers+=("scan mamba_ssm"); fi
if [[ " $names " == *" causal_conv1d "* ]]; then peers+=("convolution fla"); fi
if [[ $quick ]]; then names=${names/ models decode/ models}; fi

# Peers search their launch parameters while ours are tested; nothing else runs when something is timed.
rm -f "$out"/go "$out"/*.quiet "$out"/verify.*
if ((${#peers[@]})); then
    "$python" benchmarks/peers.py --wait "$out/go" --limit "$limit" "${peers[@]}" > "$out/peers.txt" 2>&1 &
fi
timed=()
for name in $names; do
    right "$name" && timed+=("$name")
done
late=$((SECONDS + limit + 20))
while (($(find "$out" -name '*.quiet' | wc -l) < ${#peers[@]} && SECONDS < late)); do sleep 0.5; done
for name in "${timed[@]}"; do
    measure "$name"
done
if ((${#peers[@]})); then
    echo "== other libraries on the same shapes, ms"
    touch "$out/go"
    wait
    cat "$out/peers.txt"
fi
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
