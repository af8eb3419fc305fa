"""The studies that are shipped, the page that explains them, and golden files that say what each of them means.

`UPDATE_GOLDEN=1 pytest tests/spec/test_studies.py` rewrites tests/golden/; a changed default then shows in the diff.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from dense_lab.ablation.spec import AblateSpec, AblationSpec, AnalysisSpec, TuneSpec
from dense_lab.components import Spec
from dense_lab.counting import count
from dense_lab.dense import DenseSpec
from dense_lab.model import BlockSpec, ModelSpec
from dense_lab.space import Study
from dense_lab.space_frozen import leaves
from dense_lab.study import METRICS, BudgetSpec, Objective, SearchSpec, StudySpec, TrainSpec
from tests.spec.studies import ROOT, SHIPPED, study

GOLDEN = ROOT / "tests" / "golden"
README = (ROOT / "studies" / "README.md").read_text()
VOCABULARY = 256
"""Of the golden counts, so that they do not depend on data."""


def meaning(loaded: Study) -> str:
    """The resolved space, the first spec and its size, in lines that diff well."""
    resolved = loaded.resolved()
    del resolved["plugins"]
    first = loaded.point(loaded.covering()[0])
    sizes = count(first.model, VOCABULARY)._asdict()
    parts = [
        f"# What studies/{loaded.name}.yaml means; UPDATE_GOLDEN=1 rewrites this file.",
        f"points: {loaded.size()}",
    ]
    parts += [f"open {p.pop('path')}: {json.dumps(p)}" for p in resolved["parameters"]]
    parts += [f"fixed {path}: {json.dumps(value)}" for path, value in resolved["fixed"].items()]
    parts += [f"arm {arm}: {json.dumps(own)}" for arm, own in resolved.get("arms", {}).items()]
    parts += [f"{key}: {json.dumps(resolved[key])}" for key in ("search", "budget", "tune") if key in resolved]
    parts += [f"analysis: {json.dumps(loaded.ablation.analysis())}"] if loaded.ablation else []
    parts += [
        f"first {'.'.join(map(str, at))}: {json.dumps(value)}" for at, value in leaves(first.model_dump(mode="json"))
    ]
    parts += [f"first, {name} at a vocabulary of {VOCABULARY}: {value:.0f}" for name, value in sizes.items()]
    return "\n".join(parts) + "\n"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_study_means_what_it_meant(path: Path) -> None:
    golden, found = GOLDEN / f"{path.stem}.txt", meaning(Study.load(path))
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(found)
    assert golden.is_file(), f"no golden file for {path.name}: UPDATE_GOLDEN=1 writes it"
    assert found == golden.read_text()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_study_fits(path: Path) -> None:
    Study.load(path).check_sizes()


def test_no_golden_file_is_left_over() -> None:
    assert {path.stem for path in GOLDEN.glob("*.txt")} <= {path.stem for path in SHIPPED}


def test_quickstart_meets_both_cores_plain_and_dense() -> None:
    quick = Study.load(ROOT / "studies" / "quickstart.yaml")
    runs = [quick.point(point).model for point in quick.covering()]
    assert {(run.core.kind, run.dense.span > 0) for run in runs} >= {("retnet", False), ("mamba", True)}
    assert {parameter.path for parameter in quick.space} >= {"model.core", "model.dense"}
    assert quick.search.trials >= 16


@pytest.mark.parametrize(
    "spec",
    [
        AblationSpec,
        TuneSpec,
        AnalysisSpec,
        AblateSpec,
        StudySpec,
        ModelSpec,
        DenseSpec,
        BlockSpec,
        TrainSpec,
        BudgetSpec,
        SearchSpec,
        Objective,
    ],
)
def test_the_page_explains_every_key(spec: type[Spec]) -> None:
    missing = [name for name in spec.model_fields if not re.search(rf"[`{{ ,]{name}[`,:}}]", README)]
    assert not missing


def test_the_page_names_every_metric() -> None:
    assert [metric for metric in METRICS if f"`{metric}`" not in README] == []


def test_the_page_states_the_defaults() -> None:
    """A row such as | `width` | 128 | ... is compared with the spec of its section."""
    sections = {
        "model": ModelSpec,
        "model.dense": DenseSpec,
        "train": TrainSpec,
        "budget": BudgetSpec,
        "search": SearchSpec,
        "analysis": AnalysisSpec,
        "ablate": AblateSpec,
    }
    checked = 0
    for section, spec in sections.items():
        table = README.split(f"### `{section}`\n")[1].split("\n### ")[0]
        for key, default in re.findall(r"^\| `(\w+)` \| `?([\w.%-]+)`? \|", table, re.MULTILINE):
            if key in spec.model_fields and default not in ("needed", "batch_tokens"):
                written = spec.model_validate(
                    {"params": 1, key: default} if spec is BudgetSpec else {key: _plain(default)}
                )
                empty = spec.model_validate({"params": 1} if spec is BudgetSpec else {})
                assert getattr(written, key) == getattr(empty, key), key
                checked += 1
    assert checked > 25


def _plain(text: str) -> object:
    from dense_lab.yaml_file import parse

    return parse(text, "README.md").tree


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", README, re.DOTALL))
def test_its_examples_load(tmp_path: Path, block: str) -> None:
    text = block if "dense_lab:" in block else f"dense_lab: 1\n{block}"
    loaded = study(tmp_path, text)
    assert loaded.space or loaded.arms()
