"""A study with many arms. `python -m tests.planning.many 200` says how long its plan takes."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

CORES = ("retnet", {"kind": "gau_retnet", "heads": 2}, "mamba")
PROJECTIONS = ("identity", "linear", {"kind": "low_rank", "rank": 8})
GATES = ("none", "linear", "mlp", {"kind": "mlp", "sharing": "per_source"})


def arms(number: int) -> str:
    """The YAML of a study with so many different arms, 12 layers deep, each brought to 12M parameters."""
    product = itertools.product(range(1, 4), CORES, PROJECTIONS, GATES, ("add", "concat", "attention"))
    made = {"plain": {"model.dense": "none"}}
    for span, core, projection, gate, fusion in itertools.islice(product, number - 1):
        transition = {"projection": projection, "gate": gate}
        dense = {"kind": "densessm", "span": span, "transition": transition, "fusion": fusion}
        made[f"arm-{len(made)}"] = {"model.core": core, "model.dense": dense}
    study = {
        "dense_lab": 1,
        "name": "many",
        "data": {"kind": "python_source", "tokenizer": "byte"},
        "model": {"depth": 12, "ffn": "swiglu"},
        "budget": {"params": "12M", "tolerance": "1%", "solve": ["width", "ffn"]},
        "arms": made,
        "baseline": "plain",
    }
    return json.dumps(study, indent=1)  # JSON is YAML.


def main(number: int, file: Path) -> None:
    """Write the study, plan it, and print how long that took a processor, whatever else the machine does."""
    file.write_text(arms(number))
    start = time.process_time()
    from dense_lab.planning import plan
    from dense_lab.space import Study

    imported = time.process_time()
    study = Study.load(file)
    loaded = time.process_time()
    found = plan(study)
    end = time.process_time()
    off = max(abs(row.non_embedding / 12e6 - 1) for row in found.rows)
    print(
        f"{len(found.rows)} arms: imports {imported - start:.2f} s, reading {loaded - imported:.2f} s, plan "
        f"{end - loaded:.2f} s of processor time; sizes within {off:.2%}"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
