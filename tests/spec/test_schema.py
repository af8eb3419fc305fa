"""The JSON Schema that editors get: it accepts what is valid, and marks the slips that people make."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from dense_lab import registry
from dense_lab.schema import study_schema
from dense_lab.yaml_file import load, parse
from tests.spec.studies import SHIPPED, SPACE, of


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = study_schema(registry.default())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_studies_are_valid(validator: jsonschema.Draft202012Validator, path: Any) -> None:
    validator.validate(load(path).tree)


@pytest.mark.parametrize(
    "text",
    [
        SPACE,
        of("model: {core: retnet, x-note: 3}"),
        of("model: {core: {choice: installed}, preset: denseretnet-350m}"),
        of("model: {core: {choice: {a: retnet, b: {kind: mamba, state: {int: [8, 16], log: true}}}}}"),
        of("model: {blocks: [{core: retnet, ffn: {choice: [none, swiglu]}, repeat: 2}]}"),
        of("model: {dense: {site_transitions: {k: {gate: linear}}, span: {int: [1, 4k]}}}"),
        of("train: {clip: none, lr: .5%, tokens: {choice: [1M, 2e6]}, micro_batch_tokens: null}"),
        of("search: {objective: [{minimize: valid/loss}, {maximize: tokens_per_second}]}"),
        of("budget: {params: 1M, tolerance: 1%, solve: width}"),
        of("kernels: {decay_attention: reference}\nseed: {choice: [1, 2]}"),
        of("arms: {a: {}, b: {seed: 3, model: {width: 8}}}\nbaseline: a\nseeds: [1, 2]\ntune: {lr: [1e-3, 1%]}"),
        of("ablate: {plan: factorial, baseline: {seed: 1}}\nseeds: 5\nanalysis: {alpha: 1%, correction: dunnett}"),
    ],
)
def test_what_is_valid_passes(validator: jsonschema.Draft202012Validator, text: str) -> None:
    validator.validate(parse(text, "x.yaml").tree)


@pytest.mark.parametrize(
    "text",
    [
        "name: without-version",
        of("modle: {}"),
        of("model: {wdth: 8}"),
        of("model: {width: 0}"),
        of("model: {width: wide}"),
        of("model: {core: retnt}"),
        of("model: {core: {heads: 2}}"),
        of("model: {core: {kind: retnet, hads: 2}}"),
        of("model: {core: {choice: []}}"),
        of("model: {dense: {kind: dense}}"),
        of("train: {lr: {float: [1e-3]}}"),
        of("train: {lr: {flaot: [1e-3, 1e-2]}}"),
        of("train: {warmup: 2}"),
        of("seed: true"),
        of("search: {trials: {int: [1, 2]}}"),
        of("search: {sampler: tpee}"),
        of("workers: 2"),
        of("arms: [a, b]"),
        of("seeds: many"),
        of("ablate: {plan: all}"),
        of("analysis: {alpha: 2}"),
    ],
)
def test_slips_are_marked(validator: jsonschema.Draft202012Validator, text: str) -> None:
    assert not validator.is_valid(parse(text, "x.yaml").tree)


def test_every_component_and_field_is_described(validator: jsonschema.Draft202012Validator) -> None:
    definitions = validator.schema["$defs"]
    installed = registry.default()
    for slot in installed.slots():
        for kind in installed.kinds(slot):
            entry = definitions[f"{slot} {kind}"]
            assert entry["description"]
            assert entry["properties"]["kind"]["const"] == kind
