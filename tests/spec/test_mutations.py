"""400 study files gone wrong: each means something valid, or is refused with a place for every problem."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dense_lab.errors import InputError, Problem
from dense_lab.space import Study
from dense_lab.study import RunSpec
from tests.spec.mutations import mutated
from tests.spec.studies import ROOT, SPACE, of

SOURCES = [
    SPACE,
    (ROOT / "studies" / "quickstart.yaml").read_text(),
    of("model: {preset: denseretnet-350m, depth: 2}\ndata: {kind: text, path: a.txt}\nkernels: {rotate: reference}"),
    of(
        "model: {depth: 2, dense: {sites: [k], span: {int: [0, 2]}}, core: {choice: installed}}\n"
        "budget: {params: 200k, tolerance: 10%}\nsearch: {objective: [{minimize: valid/loss}, {minimize: seconds}]}"
    ),
    of("model: {blocks: [{core: retnet, repeat: 2}, {core: {kind: mamba, state: {choice: [8, 16]}}, ffn: swiglu}]}"),
]
PER_BATCH = 100


def problems(file: Path) -> list[Problem]:
    """What is wrong with a file; empty if it loads."""
    try:
        Study.load(file)
    except InputError as error:
        return list(error.problems)
    return []


def outcome(file: Path) -> str:
    """`refused`, after a look at what was said; or `valid`, after the study was held to what it promises."""
    if found := problems(file):
        assert [problem for problem in found if not problem.where.startswith(str(file)) or not problem.message] == []
        assert "pydantic" not in str(found)
        return "refused"
    study = Study.load(file)
    json.dumps(study.resolved(), allow_nan=False)
    paths = [parameter.path for parameter in study.space]
    assert len(paths) == len(set(paths))
    if study.budget is None:
        for point in study.covering():
            run = study.point(point)
            assert RunSpec.model_validate_json(run.canonical()) == run
    return "valid"


@pytest.mark.parametrize("batch", range(4))
def test_mutated_studies_mean_something_or_are_refused_with_a_place(tmp_path: Path, batch: int) -> None:
    outcomes = []
    for seed in range(batch * PER_BATCH, (batch + 1) * PER_BATCH):
        file = tmp_path / f"m{seed}.yaml"
        file.write_bytes(mutated(SOURCES[seed % len(SOURCES)], seed))
        try:
            outcomes.append(outcome(file))
        except BaseException as error:
            raise AssertionError(f"seed {seed}:\n{file.read_text(errors='replace')}") from error
    assert outcomes.count("refused") > PER_BATCH / 3
    assert outcomes.count("valid") > PER_BATCH / 20
