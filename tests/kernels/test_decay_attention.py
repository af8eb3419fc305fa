"""Decay attention: the chunked form against the reference, and what both promise."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from accuracy import as_dtype, assert_as_accurate, assert_equal_within, run_with_gradients

from dense_lab_kernels import ImplementationError, decay_attention, recording

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="numba is not installed")
IMPLEMENTATIONS = ("reference", "chunked", pytest.param("numba", marks=needs_numba))
reference = partial(decay_attention, impl="reference")
chunked = partial(decay_attention, impl="chunked")


def numba(*, log_decay: torch.Tensor, **rest: Any) -> Any:
    """The walk has no gradient of the decays."""
    return decay_attention(log_decay=log_decay.detach(), **rest, impl="numba")


def but_decays(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in results.items() if name != "dlog_decay"}


def inputs(
    tokens: int,
    *,
    groups: int = 2,
    heads: int = 4,
    key: int = 5,
    value: int = 7,
    decay: str = "token",
    strength: float = 1.0,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens + heads)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    steps = (2, tokens, heads) if decay == "token" else (heads,)
    return {
        "q": normal(2, tokens, groups, key),
        "k": normal(2, tokens, groups, key),
        "v": normal(2, tokens, heads, value),
        "log_decay": -strength * torch.rand(*steps, generator=generator, dtype=torch.float64),
        "initial_state": normal(2, heads, key, value),
    }


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("decay", ["token", "constant"])
@pytest.mark.parametrize(("groups", "heads"), [(2, 2), (1, 3)])
@pytest.mark.parametrize("tokens", [1, 63, 100, 257])
def test_chunked_equals_the_reference(tokens: int, groups: int, heads: int, decay: str) -> None:
    given = inputs(tokens, groups=groups, heads=heads, decay=decay, strength=0.2)
    exact = run_with_gradients(reference, given)
    assert_equal_within(run_with_gradients(chunked, given), exact, tolerance=1e-11)
    low = as_dtype(given, torch.float32)
    exact = run_with_gradients(reference, as_dtype(low, torch.float64))
    assert_as_accurate(run_with_gradients(chunked, low), run_with_gradients(reference, low), exact)


@needs_numba
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("decay", ["token", "constant"])
@pytest.mark.parametrize(("groups", "heads", "key", "value"), [(2, 2, 5, 7), (1, 3, 32, 40)])
@pytest.mark.parametrize("tokens", [1, 2, 63, 257])
def test_the_walk_equals_the_reference(tokens: int, groups: int, heads: int, key: int, value: int, decay: str) -> None:
    given = inputs(tokens, groups=groups, heads=heads, key=key, value=value, decay=decay, strength=0.2)
    exact = but_decays(run_with_gradients(reference, given))
    assert_equal_within(run_with_gradients(numba, given), exact, tolerance=1e-11)
    low = as_dtype(given, torch.float32)
    exact = but_decays(run_with_gradients(reference, as_dtype(low, torch.float64)))
    assert_as_accurate(run_with_gradients(numba, low), but_decays(run_with_gradients(reference, low)), exact)


@needs_numba
def test_who_walks_over_the_tokens_on_a_cpu() -> None:
    given = inputs(9)
    with recording() as ran:
        decay_attention(**given)
        assert ran == {"decay_attention": "numba"}
        decay_attention(**inputs(9, key=128, value=128))
        assert ran == {"decay_attention": "chunked"}
        given["log_decay"].requires_grad_()
        with torch.no_grad():
            decay_attention(**given)
        assert ran == {"decay_attention": "numba"}
        decay_attention(**given)
        assert ran == {"decay_attention": "chunked"}
    with pytest.raises(ImplementationError, match="numba' cannot run here: it has no gradient of log_decay"):
        decay_attention(**given, impl="numba")


def test_large_heads_take_longer_chunks() -> None:
    given = inputs(100, groups=1, heads=1, key=70, value=66, strength=0.2)
    assert_equal_within(run_with_gradients(chunked, given), run_with_gradients(reference, given), tolerance=1e-11)


@pytest.mark.parametrize("strength", [0.0, 20.0, 1e4])
@pytest.mark.parametrize("decay", ["token", "constant"])
def test_any_strength_of_decay(strength: float, decay: str) -> None:
    low = as_dtype(inputs(100, decay=decay, strength=strength), torch.float32)
    fast, plain = run_with_gradients(chunked, low), run_with_gradients(reference, low)
    assert all(tensor.isfinite().all() for tensor in fast.values())
    assert_as_accurate(fast, plain, run_with_gradients(reference, as_dtype(low, torch.float64)))


def test_weak_decays_keep_their_digits_after_strong_ones() -> None:
    given = as_dtype(inputs(64, strength=0.1), torch.float32)
    given["log_decay"][:, 3] = -1e4  # forgets all that came before
    exact = run_with_gradients(reference, as_dtype(given, torch.float64))
    assert_as_accurate(run_with_gradients(chunked, given), run_with_gradients(reference, given), exact)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", ["token", "constant"])
def test_gradients_are_those_of_the_formula(impl: str, decay: str) -> None:
    given = inputs(35, groups=1, heads=2, key=2, value=3, decay=decay)
    leaves = {name: tensor[:1] if tensor.ndim > 1 else tensor for name, tensor in given.items()}
    fixed = {"log_decay": leaves.pop("log_decay")} if impl == "numba" else {}

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(decay_attention(**dict(zip(leaves, tensors, strict=True)), **fixed, impl=impl))

    assert torch.autograd.gradcheck(run, [x.clone().requires_grad_() for x in leaves.values()], fast_mode=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("decay", ["token", "constant"])
def test_pieces_with_the_state_handed_on_equal_the_whole(impl: str, decay: str) -> None:
    given = inputs(100, decay=decay)

    def in_pieces(lengths: list[int]) -> Any:
        def run(q: Any, k: Any, v: Any, log_decay: Any, initial_state: Any) -> Any:
            state, outputs = initial_state, []
            log_decay = log_decay.detach() if impl == "numba" else log_decay
            steps = [log_decay] * len(lengths) if decay == "constant" else log_decay.split(lengths, 1)
            for q_, k_, v_, decay_ in zip(
                q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), steps, strict=True
            ):
                output, state = decay_attention(q_, k_, v_, decay_, initial_state=state, impl=impl)
                outputs.append(output)
            return torch.cat(outputs, 1), state

        return run_with_gradients(run, given)

    whole = in_pieces([100])
    assert_equal_within(in_pieces([33, 1, 66]), whole, tolerance=1e-11)
    assert_equal_within(in_pieces([1] * 100), whole, tolerance=1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(impl: str, dtype: torch.dtype) -> None:
    low = as_dtype(inputs(40), dtype, keep=("log_decay", "initial_state"))
    low |= as_dtype({name: low[name] for name in ("log_decay", "initial_state")}, torch.float32)
    output, state = decay_attention(**low, impl=impl)
    assert (output.dtype, state.dtype) == (dtype, torch.float32)
    exact = reference(**as_dtype(low, torch.float64))
    # Half a unit in the last place for rounding the result, and as much again for float32 on the way there.
    scale = exact.output.abs().max().item()
    assert (output.double() - exact.output).abs().max().item() <= torch.finfo(dtype).eps * scale


def test_a_group_is_read_by_neighbouring_heads() -> None:
    given = inputs(20, groups=2, heads=6)
    repeated = {name: given[name].repeat_interleave(3, dim=2) for name in "qk"}
    assert_equal_within(
        dict(enumerate(chunked(**{**given, **repeated}))), dict(enumerate(reference(**given))), tolerance=1e-12
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_one_input_alone_may_need_its_gradient(impl: str) -> None:
    given = inputs(40)
    given["v"].requires_grad_()
    decay_attention(**given, impl=impl).final_state.sum().backward()
    assert given["v"].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 9, 2, 6)}, r"k must have shape \[B, T, G, K\] .* got \[2, 9, 2, 6\]"),
        ({"v": torch.zeros(2, 9, 3, 7)}, "G must divide H, got G=2 and H=3"),
        ({"log_decay": torch.zeros(2, 9, 2)}, r"log_decay must have shape \[B, T, H\].* got \[2, 9, 2\]"),
        ({"log_decay": torch.zeros(5)}, r"log_decay must have shape \[H\] with H=4, got \[5\]"),
        ({"initial_state": torch.zeros(2, 4, 7, 5)}, "initial_state must have shape"),
        ({"q": torch.zeros(2, 9, 2, 5, dtype=torch.int64)}, "q must be a floating-point tensor, got torch.int64"),
        ({"v": torch.zeros(2, 9, 4, 7, dtype=torch.float64)}, "float64 does not mix"),
        ({"q": torch.zeros(2, 9, 2, 5, device="meta")}, "is on cpu but q is on meta"),
        ({"q": None}, "q must be a floating-point tensor, got NoneType"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = as_dtype(inputs(9), torch.float32)
    with pytest.raises(ValueError, match=message):
        decay_attention(**{**given, **change})


def test_no_tokens_is_an_error() -> None:
    with pytest.raises(ValueError, match="T must be at least 1, got T=0"):
        decay_attention(torch.zeros(1, 0, 2, 3), torch.zeros(1, 0, 2, 3), torch.zeros(1, 0, 2, 3), torch.zeros(2))
