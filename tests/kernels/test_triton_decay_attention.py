"""The Triton form of decay attention against the specification: on a GPU, else in Triton's interpreter, small."""

from __future__ import annotations

import dataclasses
import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.accuracy import as_dtype, assert_as_accurate, run_with_gradients

GPU = torch.cuda.is_available()
if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from dense_lab_kernels.decay_attention import DecayAttentionOutput, decay_attention, plain  # noqa: E402
from dense_lab_kernels.decay_attention.triton import _Problem  # noqa: E402
from dense_lab_kernels.decay_attention.triton_launch import Tile, Tiles, using_tiles  # noqa: E402

DEVICE = "cuda" if GPU else "cpu"
# Several chunks, blocks and tiles within few tokens, since the interpreter takes milliseconds per program.
SMALL = Tiles(
    32,
    states=Tile(16, 16, 16, 4, 2),
    scores=Tile(16, 16, 16, 4, 2),
    score_grads=Tile(16, 16, 16, 4, 2),
    values=Tile(16, 16, 16, 4, 2),
    keys=Tile(16, 16, 16, 4, 2),
)


WEIGHED = dataclasses.replace(SMALL, weighed=True)


def draw(sizes: tuple[int, ...], decay: str, state: str, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs for B, T, G, H, K, V, rounded to `dtype` (decays and states stay float32)."""
    batch, tokens, groups, heads, key_size, value_size = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    inputs = {
        "q": normal(batch, tokens, groups, key_size) * key_size**-0.5,
        "k": normal(batch, tokens, groups, key_size),
        "v": normal(batch, tokens, heads, value_size),
    }
    inputs = as_dtype(inputs, dtype)
    if decay == "constant":
        inputs["log_decay"] = torch.log(1 - 2.0 ** (-5 - torch.arange(heads).float()))
    else:
        inputs["log_decay"] = -torch.rand(batch, tokens, heads, generator=generator)
    if state == "initial state":
        inputs["initial_state"] = normal(batch, heads, key_size, value_size)
    return inputs


def plain_form(*tensors: Tensor, **named: Any) -> DecayAttentionOutput:
    """What a plain implementation on a GPU does."""
    return DecayAttentionOutput(*plain.decay_attention(*tensors, **named))


def check(sizes: tuple[int, ...], decay: str, state: str, dtype: torch.dtype, tiles: Tiles | None) -> None:
    inputs = {name: x.to(DEVICE) for name, x in draw(sizes, decay, state, dtype).items()}
    # The gradient of a constant decay is one number per head: too few to judge an error by, so it has its own test.
    fixed = {"log_decay": inputs.pop("log_decay")} if decay == "constant" else {}
    with_double = partial(decay_attention, **as_dtype(fixed, torch.float64), impl="reference")
    exact = run_with_gradients(with_double, as_dtype(inputs, torch.float64))
    low = run_with_gradients(partial(plain_form, **fixed), inputs)
    with using_tiles(tiles):
        fast = run_with_gradients(partial(decay_attention, **fixed, impl="triton"), inputs)
    assert_as_accurate(fast, low, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("sizes", "decay", "state"),
    [
        ((1, 1, 1, 1, 4, 6), "constant", "initial state"),
        ((1, 63, 1, 2, 20, 24), "per token", "initial state"),
        ((2, 40, 2, 2, 20, 24), "constant", "no state"),
        ((1, 70, 2, 2, 33, 17), "constant", "initial state"),
        ((1, 65, 2, 4, 16, 16), "per token", "no state"),
    ],
    ids=str,
)
def test_equals_the_reference_with_small_tiles(
    sizes: tuple[int, ...], decay: str, state: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    check(sizes, decay, state, dtype, SMALL)


HEADS = [(2, 2, 128, 128), (2, 2, 100, 72), (1, 4, 128, 64), (1, 1, 384, 1030), (2, 4, 24, 40)]  # G, H, K, V
DECAYS = ["constant", "per token"]
RULE_CASES = [(heads, tokens, decay, torch.bfloat16) for heads in HEADS for tokens in (100, 257) for decay in DECAYS]
RULE_CASES += [((1, 4, 128, 64), tokens, decay, torch.bfloat16) for tokens in (1, 63, 1000, 2048) for decay in DECAYS]
RULE_CASES += [
    (heads, 257, decay, dtype) for heads in HEADS[1:3] for decay in DECAYS for dtype in (torch.float16, torch.float32)
]


@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "tokens", "decay", "dtype"), RULE_CASES, ids=str)
def test_equals_the_reference_by_rule(
    heads: tuple[int, ...], tokens: int, decay: str, dtype: torch.dtype, poisoned_empty: None
) -> None:
    check((2, tokens, *heads), decay, "initial state", dtype, None)


@pytest.mark.parametrize("decay", ["constant", "per token"])
def test_decays_multiplied_in_before_the_states(decay: str, poisoned_empty: None) -> None:
    check((1, 45, 2, 2, 20, 24), decay, "initial state", torch.float16, WEIGHED)


def test_states_too_large_to_keep_are_computed_again(poisoned_empty: None) -> None:
    tiles = dataclasses.replace(SMALL, chunk=16)
    problem = _Problem(1, 20, 1, 1, 64, 64, False, tiles)
    assert not problem.keeps_states
    assert problem.keeps_scores
    check((1, 20, 1, 1, 64, 64), "constant", "no state", torch.float32, tiles)


def test_a_strong_decay_forgets_everything_before_it() -> None:
    inputs = {name: x.to(DEVICE) for name, x in draw((1, 24, 1, 1, 8, 8), "per token", "none", torch.float32).items()}
    inputs["log_decay"][:, 11] = -torch.inf
    with using_tiles(SMALL):
        whole = decay_attention(**inputs, impl="triton")
        rest = decay_attention(**{name: x[:, 11:] for name, x in inputs.items()}, impl="triton")
    torch.testing.assert_close(whole.output[:, 11:], rest.output, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.final_state, rest.final_state, rtol=0, atol=1e-5)


def test_pieces_with_the_state_handed_on_equal_the_whole() -> None:
    inputs = {name: x.to(DEVICE) for name, x in draw((1, 50, 1, 2, 8, 8), "per token", "none", torch.float32).items()}
    with using_tiles(SMALL):
        whole = decay_attention(**inputs, impl="triton")
        first = decay_attention(**{name: x[:, :37] for name, x in inputs.items()}, impl="triton")
        second = decay_attention(
            **{name: x[:, 37:] for name, x in inputs.items()}, initial_state=first.final_state, impl="triton"
        )
    joined = torch.cat([first.output, second.output], dim=1)
    scale = whole.output.abs().max().item()
    torch.testing.assert_close(joined, whole.output, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(second.final_state, whole.final_state, rtol=0, atol=1e-5 * scale)


def test_gradient_of_a_constant_decay_is_summed_over_batch_and_time(poisoned_empty: None) -> None:
    inputs = {name: x.to(DEVICE) for name, x in draw((2, 40, 1, 2, 8, 8), "constant", "none", torch.float32).items()}
    exact = run_with_gradients(partial(decay_attention, impl="reference"), as_dtype(inputs, torch.float64))
    with using_tiles(SMALL):
        fast = run_with_gradients(lambda **x: decay_attention(**x, impl="triton"), inputs)
    scale = exact["dlog_decay"].abs().max().item()
    torch.testing.assert_close(fast["dlog_decay"].double(), exact["dlog_decay"], rtol=0, atol=1e-5 * scale)


def test_strided_inputs_equal_contiguous_ones() -> None:
    inputs = {name: x.to(DEVICE) for name, x in draw((1, 20, 2, 2, 16, 16), "constant", "none", torch.float32).items()}
    joined = torch.cat([inputs["q"], inputs["k"], inputs["v"]], dim=-1)
    q, k, v = joined.split(16, dim=-1)
    with using_tiles(SMALL):
        strided = decay_attention(
            q, k, v.transpose(-1, -2).contiguous().transpose(-1, -2), inputs["log_decay"], impl="triton"
        )
        plain = decay_attention(**inputs, impl="triton")
    assert torch.equal(strided.output, plain.output)


@pytest.mark.gpu
def test_long_sequences_take_memory_in_proportion(poisoned_empty: None) -> None:
    def peak(tokens: int) -> int:
        inputs = {
            n: x.to(DEVICE) for n, x in draw((1, tokens, 2, 2, 64, 64), "constant", "none", torch.bfloat16).items()
        }
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = run_with_gradients(lambda **x: decay_attention(**x, impl="triton"), inputs)
        assert all(x.isfinite().all() for x in results.values())
        return torch.cuda.max_memory_allocated() - before

    assert peak(131072) < 2.5 * peak(65536)
