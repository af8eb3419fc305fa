"""Every core x projection x gate x fusion x pattern x site works: `--full-product` runs all, otherwise every pair."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dense_lab import registry
from dense_lab.model import LanguageModel, ModelSpec
from dense_lab.modules import CoreModule
from dense_lab.testing import ROUNDING, relative_difference, seeded
from tests.combinations.pairs import covering, full_product

# Tokens: a convolution sees 4.
VOCABULARY, TOKENS = 29, 5
GATES = [
    "none",
    *(
        {"kind": kind, "activation": activation, "sharing": sharing}
        for kind in ("linear", "mlp")
        for activation in ("silu", "sigmoid")
        for sharing in ("shared", "per_source")
    ),
]


def core_of(kind: str) -> CoreModule:
    with torch.device("meta"):
        return registry.default().find("core", kind)().build(16)


def sites_of(kind: str) -> list[object]:
    """All dense-able streams together, each alone, each state that is read out, and all these at once."""
    core = core_of(kind)
    streams = [stream.name for stream in core.streams if stream.dense]
    states = [site.name for site in core.state_sites if site.form == "readout"]
    return ["all", *([name] for name in [*streams, *states]), *([[*streams, *states]] if states else [])]


def factors(core: str) -> dict[str, list[object]]:
    kinds = registry.default().kinds
    return {
        "projection": list(kinds("projection")),
        "gate": GATES,
        "fusion": list(kinds("fusion")),
        "pattern": list(kinds("pattern")),
        "sites": sites_of(core),
        "norm": ["rmsnorm", "none"],
        "span": [2, 1, 3],
        "ffn": ["none", "swiglu"],
    }


def carried_factors(kind: str) -> dict[str, list[object]] | None:
    """Those of sites inside the recurrence, which take gated sums only: alone, and with all that is read out."""
    core = core_of(kind)
    carried = [site.name for site in core.state_sites if site.form == "carried"]
    if not carried:
        return None
    only = {"projection": ["identity"], "fusion": ["add"], "sites": [carried, [*sites_of(kind)[-1], *carried]]}
    return {**factors(kind), **only}


def rows() -> list[tuple[str, dict[str, Any]]]:
    # Pairs with the core are covered too: every core has a covering array of its own.
    return [
        (core, row)
        for core in registry.default().kinds("core")
        for chosen in (factors(core), carried_factors(core))
        if chosen is not None
        for row in covering(chosen)
    ]


def full_rows() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for core in registry.default().kinds("core"):
        for chosen in (factors(core), carried_factors(core)):
            if chosen is not None:
                wide = {**chosen, "norm": ["rmsnorm"], "span": [2], "ffn": ["none"]}
                found += [(core, row) for row in full_product(wide)]
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        chosen = full_rows() if metafunc.config.getoption("--full-product") else rows()
        metafunc.parametrize(("core", "row"), chosen, ids=[f"{core}-{n}" for n, (core, _) in enumerate(chosen)])


def spec_of(core: str, row: dict[str, Any]) -> ModelSpec:
    transition = {"projection": row["projection"], "gate": row["gate"]}
    dense = {key: row[key] for key in ("span", "fusion", "pattern", "sites", "norm")}
    depth = max(3, row["span"] + 1)  # The last layer finds as many sources as any can; a dilated one needs three.
    tree = {"width": 16, "depth": depth, "core": core, "ffn": row["ffn"], "dense": {**dense, "transition": transition}}
    return ModelSpec.model_validate(tree)


def build(spec: ModelSpec) -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return seeded(spec.build(VOCABULARY))


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


def in_pieces(model: LanguageModel, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    state, logits = None, []
    for piece in ids.split(sizes, 1):
        out = model.run(piece, state)
        state = out.state
        logits.append(out.logits)
    return torch.cat(logits, 1)


def test_combination(core: str, row: dict[str, Any]) -> None:
    spec = spec_of(core, row)
    assert ModelSpec.model_validate(json.loads(spec.model_dump_json())) == spec
    model, ids = build(spec), tokens()
    assert any(block.reads for block in model.blocks)
    logits = model(ids)

    with torch.no_grad():
        assert relative_difference(in_pieces(model, ids, [1] * TOKENS), logits) < ROUNDING, "token by token differs"
        assert relative_difference(in_pieces(model, ids, [2, 3]), logits) < ROUNDING, "pieces differ"

        changed = torch.cat([ids[:, :3], tokens(1)[:, 3:]], 1)
        assert relative_difference(model(changed)[:, :3], logits[:, :3]) < ROUNDING, "not causal"

    logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("core", registry.default().kinds("core"))
def test_span_zero_is_the_plain_core_bit_for_bit(core: str) -> None:
    plain = ModelSpec.model_validate({"width": 16, "core": core, "dense": "none"})
    spans = ModelSpec.model_validate(
        {"width": 16, "core": core, "dense": {"span": 0, "fusion": "concat", "pattern": "all", "sites": "all"}}
    )
    assert plain == spans
    a, b = plain.build(VOCABULARY).initialise(3), spans.build(VOCABULARY).initialise(3)
    assert a.state_dict().keys() == b.state_dict().keys()
    assert torch.equal(a(tokens()), b(tokens()))


@pytest.mark.parametrize("core", registry.default().kinds("core"))
def test_a_dense_model_shares_the_plain_ones_initial_weights(core: str) -> None:
    plain = ModelSpec.model_validate({"width": 16, "core": core}).build(VOCABULARY).initialise(3).state_dict()
    dense = ModelSpec.model_validate({"width": 16, "core": core, "dense": {"span": 2}}).build(VOCABULARY).initialise(3)
    for name, weight in plain.items():
        assert torch.equal(dense.state_dict()[name], weight), name


def test_cores_of_two_kinds_share_a_model() -> None:
    spec = ModelSpec.model_validate(
        {
            "width": 16,
            "blocks": [{"core": "retnet", "repeat": 2}, {"core": "gau_retnet"}, {"core": "mamba"}],
            "dense": {"span": 2, "transition": {"projection": "linear"}},
        }
    )
    model, ids = build(spec), tokens()
    assert [sorted(block.reads) for block in model.blocks] == [[], ["k", "v"], ["k", "v"], []]
    assert relative_difference(in_pieces(model, ids, [2, 3]), model(ids)) < ROUNDING
