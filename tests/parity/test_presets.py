"""The published models by name: their sizes, and what may be laid over them."""

from __future__ import annotations

import pytest

from dense_lab import presets, registry
from dense_lab.counting import count
from dense_lab.errors import InputError
from dense_lab.model import ModelSpec

SIZES = {
    "gau-retnet-350m": (32_000, 362_595_840),
    "gau-retnet-1.3b": (32_000, 1_310_818_560),
    "denseretnet-350m": (32_000, 367_965_696),
    "denseretnet-1.3b": (32_000, 1_334_018_560),
    # The released files hold 4 bytes for each: 1.493 GB and 5.551 GB.
    "denseretnet-350m-released": (32_001, 373_277_184),
    "denseretnet-1.3b-released": (32_001, 1_387_783_680),
}


def test_every_preset_is_counted() -> None:
    assert set(registry.default().presets) == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_official_parameter_counts(name: str) -> None:
    vocabulary, parameters = SIZES[name]
    spec = ModelSpec.model_validate(presets.expand({"preset": name}))
    assert count(spec, vocabulary).parameters == parameters
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


def test_users_keys_are_laid_over() -> None:
    tree = presets.expand({"model": {"preset": "denseretnet-350m", "depth": 3, "dense": {"span": 2}}, "seed": 1})
    assert tree["seed"] == 1
    spec = ModelSpec.model_validate(tree["model"])
    assert (spec.depth, spec.width, spec.dense.span, spec.dense.owners) == (3, 1536, 2, "every")
    assert spec.core.heads == 2


def test_another_kind_or_an_open_value_replaces() -> None:
    core = presets.expand({"preset": "denseretnet-350m", "core": {"kind": "mamba", "state": 8}})["core"]
    assert core == {"kind": "mamba", "state": 8}
    open_value = {"choice": ["none", {"kind": "densessm"}]}
    assert presets.expand({"preset": "denseretnet-350m", "dense": open_value})["dense"] == open_value
    assert presets.expand({"preset": "denseretnet-350m", "dense": "none"})["dense"] == "none"


def test_presets_may_be_options_of_a_choice() -> None:
    tree = {"model": {"choice": [{"preset": "denseretnet-350m"}, {"preset": "gau-retnet-350m", "width": 64}]}}
    first, second = presets.expand(tree)["model"]["choice"]
    assert (first["width"], second["width"]) == (1536, 64)


def test_what_names_no_preset_is_unchanged() -> None:
    tree = {"x-notes": {"preset": "my own"}, "model": {"width": 8, "core": "mamba"}, "list": [1, "a", None]}
    assert presets.expand(tree) == tree


def test_a_preset_cannot_be_changed_through_what_it_gave() -> None:
    presets.expand({"preset": "denseretnet-350m"})["dense"]["span"] = 7
    assert presets.expand({"preset": "denseretnet-350m"})["dense"]["span"] == 1


def test_unknown_preset() -> None:
    with pytest.raises(
        InputError, match=r"model.preset: no preset named 'denseretnet-350'\. Did you mean 'denseretnet-350m'"
    ):
        presets.expand({"model": {"preset": "denseretnet-350"}})
    with pytest.raises(InputError, match="no preset named 3"):
        presets.expand({"model": {"preset": 3}})
