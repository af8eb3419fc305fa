"""Selective scan: the compiled loops against the reference, and what both promise."""

from __future__ import annotations

from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
from accuracy import as_dtype, assert_as_accurate, assert_equal_within, run_with_gradients

from dense_lab_kernels import selective_scan

pytest.importorskip("numba")
IMPLEMENTATIONS = ("reference", "numba")
SITES = ("readout", "carried")
reference = partial(selective_scan, impl="reference")
compiled = partial(selective_scan, impl="numba")


def inputs(
    tokens: int,
    *,
    channels: int = 6,
    states: int = 3,
    groups: int = 2,
    sources: int = 0,
    source_groups: int = 3,
    full: bool = True,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(tokens + channels)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def decays() -> torch.Tensor:
        return -0.1 - 3 * torch.rand(channels, states, generator=generator, dtype=torch.float64)

    def tokenwise() -> torch.Tensor:
        return normal(2, tokens, channels)

    given = {"u": tokenwise(), "dt": tokenwise(), "A": decays()}
    given |= {name: normal(2, tokens, groups, states) for name in "BC"}
    if full:
        given |= {"D": normal(channels), "z": tokenwise(), "dt_bias": normal(channels)}
        given |= {"initial_state": normal(2, channels, states)}
    if sources:
        given["sources"] = tuple(
            (tokenwise(), tokenwise(), decays(), normal(2, tokens, source_groups, states), normal(channels))
            for _ in range(sources)
        )
        given["gates"] = tuple(0.3 * tokenwise() for _ in range(sources))
        given["source_states"] = tuple(normal(2, channels, states) for _ in range(sources))
    return given


def assert_compiled_equals_reference(given: dict[str, Any], **options: Any) -> None:
    fast, plain = partial(compiled, **options), partial(reference, **options)
    assert_equal_within(run_with_gradients(fast, given), run_with_gradients(plain, given), tolerance=1e-11)
    low = as_dtype(given, torch.float32)
    exact = run_with_gradients(plain, as_dtype(low, torch.float64))
    assert_as_accurate(run_with_gradients(fast, low), run_with_gradients(plain, low), exact)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("full", [True, False], ids=["all-arguments", "needed-arguments"])
@pytest.mark.parametrize(("channels", "states", "groups"), [(6, 3, 2), (48, 5, 1)])
@pytest.mark.parametrize("tokens", [1, 63, 100, 257])
def test_compiled_equals_the_reference(tokens: int, channels: int, states: int, groups: int, full: bool) -> None:
    assert_compiled_equals_reference(inputs(tokens, channels=channels, states=states, groups=groups, full=full))


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("channels", "groups", "sources"), [(6, 2, 1), (48, 1, 2)])
@pytest.mark.parametrize("tokens", [1, 70])
def test_sources(tokens: int, channels: int, groups: int, sources: int, site: str) -> None:
    assert_compiled_equals_reference(inputs(tokens, channels=channels, groups=groups, sources=sources), site=site)


def test_steps_taken_as_they_are() -> None:
    given = inputs(40)
    given["dt"] = given["dt"].abs()
    del given["dt_bias"]
    assert_compiled_equals_reference(given, dt_activation="none")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("site", SITES)
def test_gradients_are_those_of_the_formula(impl: str, site: str) -> None:
    given = inputs(34, channels=2, states=2, groups=1, sources=1, source_groups=2)
    names = [name for name in given if name not in ("sources", "gates", "source_states")]
    flat = [given[name] for name in names] + [*given["sources"][0], *given["gates"], *given["source_states"]]

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        own, rest = dict(zip(names, tensors, strict=False)), tensors[len(names) :]
        found = selective_scan(
            **own, sources=[rest[:5]], gates=[rest[5]], source_states=[rest[6]], site=site, impl=impl
        )
        return found.output, found.final_state, *found.source_states

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in flat], fast_mode=True)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("site", SITES)
def test_pieces_with_the_states_handed_on_equal_the_whole(impl: str, site: str) -> None:
    given = inputs(70, sources=2)

    def in_pieces(lengths: list[int]) -> dict[str, torch.Tensor]:
        def run(u: Any, dt: Any, A: Any, B: Any, C: Any, sources: Any, gates: Any, **rest: Any) -> Any:
            state, others, outputs, begin = rest["initial_state"], rest["source_states"], [], 0
            for length in lengths:
                now = slice(begin, begin := begin + length)
                pieces = [(s[0][:, now], s[1][:, now], s[2], s[3][:, now], s[4]) for s in sources]
                output, state, others = selective_scan(
                    u[:, now],
                    dt[:, now],
                    A,
                    B[:, now],
                    C[:, now],
                    rest["D"],
                    rest["z"][:, now],
                    rest["dt_bias"],
                    initial_state=state,
                    sources=pieces,
                    gates=[gate[:, now] for gate in gates],
                    source_states=others,
                    site=site,
                    impl=impl,
                )
                outputs.append(output)
            return torch.cat(outputs, 1), state, others

        return run_with_gradients(run, given)

    whole = in_pieces([70])
    assert_equal_within(in_pieces([33, 1, 36]), whole, tolerance=1e-11)
    assert_equal_within(in_pieces([1] * 70), whole, tolerance=1e-11)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_zero_gates_leave_the_plain_scan(impl: str) -> None:
    given = inputs(20, sources=1)
    given["gates"] = (torch.zeros_like(given["u"]),)
    plain = {name: value for name, value in given.items() if name not in ("sources", "gates", "source_states")}
    expected = selective_scan(**plain, impl=impl)
    for site in SITES:
        found = selective_scan(**given, site=site, impl=impl)
        assert torch.equal(found.output, expected.output)
        assert torch.equal(found.final_state, expected.final_state)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(impl: str, dtype: torch.dtype) -> None:
    low = as_dtype(inputs(40, sources=1), dtype)
    found, exact = selective_scan(**low, impl=impl), reference(**as_dtype(low, torch.float64))
    assert (found.output.dtype, found.final_state.dtype) == (dtype, torch.float32)
    scale = exact.output.abs().max().item()
    assert (found.output.double() - exact.output).abs().max().item() <= torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strong_decay_and_large_steps_stay_finite(impl: str) -> None:
    given = as_dtype(inputs(64), torch.float32)
    given["A"], given["dt"] = given["A"] * 100, given["dt"] * 20
    assert all(
        tensor.isfinite().all() for tensor in run_with_gradients(partial(selective_scan, impl=impl), given).values()
    )


def test_nan_is_not_hidden() -> None:
    given = as_dtype(inputs(40), torch.float32)
    given["dt"][0, 5, 0] = float("nan")
    output = compiled(**given).output
    assert output[0, 5:, 0].isnan().all()
    assert output[1].isfinite().all()


@pytest.mark.parametrize("site", SITES)
def test_nothing_of_the_size_of_all_states_is_kept(site: str) -> None:
    tokens, channels, states = 256, 32, 16
    given = as_dtype(
        inputs(tokens, channels=channels, states=states, groups=1, sources=1, source_groups=1), torch.float32
    )
    given["u"].requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        compiled(**given, site=site)
    assert max(kept) <= 2 * 2 * tokens * channels * states // 16  # 2 sequences, 2 streams, a sixteenth of the tokens


def test_threads_share_the_work_and_calls_may_overlap() -> None:
    given = as_dtype(inputs(257, channels=160, states=16, groups=1), torch.float32)
    before = torch.get_num_threads()
    expected = run_with_gradients(compiled, given)
    found: list[dict[str, torch.Tensor]] = []
    try:
        torch.set_num_threads(3)
        threads = [Thread(target=lambda: found.append(run_with_gradients(compiled, given))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert len(found) == 2
    for results in found:
        # Channels and sequences do not mix, so who computes them changes no bit; softplus and sums over the batch may
        # be cut differently.
        assert_equal_within(results, expected, tolerance=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt": torch.zeros(2, 9, 5)}, r"dt must have shape \[B, T, D\] with B=2, T=9, D=6, got \[2, 9, 5\]"),
        ({"A": torch.zeros(3, 6)}, r"A must have shape \[D, N\]"),
        ({"B": torch.zeros(2, 9, 4, 3), "C": torch.zeros(2, 9, 4, 3)}, "G must divide D, got G=4 and D=6"),
        ({"C": torch.zeros(2, 9, 1, 3)}, r"C must have shape \[B, T, G, N\]"),
        ({"z": torch.zeros(2, 9, 5)}, "z must have shape"),
        ({"initial_state": torch.zeros(2, 3, 6)}, "initial_state must have shape"),
        ({"gates": ()}, "gates must have one entry per source, got 0 for 1 sources"),
        ({"source_states": ()}, "source_states must have one entry per source"),
        ({"gates": (torch.zeros(2, 9, 1),)}, r"gates\[0\] must have shape \[B, T, D\]"),
        ({"site": "middle"}, "site must be one of readout, carried, got 'middle'"),
        ({"dt_activation": "relu"}, "dt_activation must be one of softplus, none, got 'relu'"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    given = as_dtype(inputs(9, sources=1), torch.float32)
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**given, **change})
