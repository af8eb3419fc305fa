"""Decoding equals the step function, and the step function equals a pass over the whole text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from dense_lab.errors import InputError
from dense_lab.generation import Sampling, generate
from dense_lab.model import LanguageModel, ModelSpec
from dense_lab.prefill import prefill
from dense_lab.recording import MergedProducts

CORES = ["retnet", "gau_retnet", "mamba"]
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def build(core: str, device: str = "cpu") -> LanguageModel:
    dense = {"kind": "densessm", "span": 2}
    spec = ModelSpec.model_validate({"width": 32, "depth": 3, "core": core, "dense": dense, "dropout": 0.5})
    return spec.build(vocab_size=50).initialise(0).to(device)


def prompt(device: str) -> torch.Tensor:
    return torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("core", CORES)
def test_greedy_tokens_are_those_of_whole_passes(core: str, device: str) -> None:
    model, ids = build(core, device), prompt(device)
    tokens = model.generate(ids, 8)
    assert model.training
    model.eval()
    with torch.no_grad():
        logits = model(torch.cat([ids, tokens], 1))[:, ids.shape[1] - 1 : -1]
    # float32: a step and a pass may differ by rounding, so a token must be within that of the largest logit.
    chosen = logits.gather(-1, tokens[..., None])[..., 0]
    assert (logits.max(-1).values - chosen).max() < 1e-4 * logits.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("core", CORES)
def test_a_recorded_prompt_is_the_eager_one_and_sees_new_weights(core: str) -> None:
    model = build(core, "cuda").eval()
    first, other = prompt("cuda"), prompt("cuda").flip(1)

    def run(ids: torch.Tensor) -> list[torch.Tensor]:
        logits, state = prefill(model, ids, "recorded")
        return [logits.clone(), *(t.clone() for t in torch.utils._pytree.tree_leaves(state))]

    def passed(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids)[:, -1]

    results = [run(ids) for ids in (first, other, first, other)]  # Eager, then recorded.
    for early, late in ((results[0], results[2]), (results[1], results[3])):
        for one, another in zip(early, late, strict=True):
            assert torch.equal(one, another)
    model.embedding.weight.data.mul_(1.5)
    torch.testing.assert_close(run(first)[0], passed(first), rtol=1e-4, atol=1e-4)
    model.double()  # Other weights in other places: nothing recorded fits.
    torch.testing.assert_close(run(first)[0], passed(first))


@pytest.mark.parametrize("core", CORES)
def test_drawn_tokens_follow_the_seed(core: str) -> None:
    model, ids = build(core), prompt("cpu")
    first, again, other = (generate(model, ids, 12, temperature=2.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(generate(model, ids, 5, temperature=1.0, top_k=1), generate(model, ids, 5))


def test_tokens_are_drawn_with_their_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20000, -1)
    generator = torch.Generator().manual_seed(0)
    for sampling, kept in ((Sampling(0.5), 4), (Sampling(1.0, top_k=2), 2)):
        drawn = torch.bincount(sampling.choose(logits, generator), minlength=4) / len(logits)
        expected = (logits[0] / sampling.temperature).softmax(0)
        order = logits[0].argsort(descending=True)[:kept]
        expected = torch.zeros(4).scatter(0, order, expected[order] / expected[order].sum())
        # Four standard deviations of a frequency over 20,000 draws are at most 4 * 0.5 / sqrt(20000).
        assert (drawn - expected).abs().max() < 0.0142


@pytest.mark.parametrize("core", CORES)
def test_linear_maps_of_one_tensor_are_one_product(core: str) -> None:
    model, merged, products = build(core).eval(), MergedProducts(), []
    with torch.no_grad():
        for token in prompt("cpu").unbind(1)[:3]:
            with Products() as counted, merged:
                logits = model.step(token).logits
            products.append(counted.number)
            expected = model.step(token).logits
            # float32: sums of at most 64 products in another order, through three layers.
            assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    assert products[0] > products[1] == products[2]


class Products(TorchFunctionMode):
    """Counts linear maps."""

    number = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is torch.nn.functional.linear
        return func(*args, **(kwargs or {}))


def test_the_state_stays_the_decoders_own() -> None:
    model, ids = build("retnet"), prompt("cpu")
    assert torch.equal(model.generate(ids, 6), model.generate(ids, 6))


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": 0}])
def test_options_that_make_no_sense(options: dict) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))}="):
        build("retnet").generate(prompt("cpu"), **{"max_new_tokens": 1, **options})
    with pytest.raises(InputError, match="prompt must have shape"):
        build("retnet").generate(prompt("cpu")[0], 3)
