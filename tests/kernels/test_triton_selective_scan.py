"""selective_scan in Triton: outputs, states and every gradient against float64, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import as_dtype, assert_as_accurate, run_with_gradients

from dense_lab_kernels import compiling_ahead
from dense_lab_kernels.selective_scan import selective_scan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a GPU (README.md here)"
    ),
    pytest.mark.usefixtures("poisoned_empty"),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
# The interpreter computes bf16 wrongly; on a GPU bf16 is what matters.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
WIDE = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
FLOAT32 = ("A", "D", "dt_bias")  # as training keeps them
Shape = tuple[int, int, int, int]  # B, T, D, N


def make(
    shape: Shape = (1, 11, 12, 3), *, groups: int = 1, m: int = 0, source_groups: int | None = None,
    softplus: bool = True, without: tuple[str, ...] = (), seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """float64 inputs for B, T, D, N = shape; decays from strong to almost none."""
    generator = torch.Generator().manual_seed(seed)
    B, T, D, N = shape

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(DEVICE)

    def step() -> torch.Tensor:
        return draw(B, T, D) - 1 if softplus else draw(B, T, D).abs() * 0.3

    inputs: dict[str, Any] = {
        "u": draw(B, T, D), "dt": step(), "A": -draw(D, N).exp(),
        "B": draw(B, T, groups, N), "C": draw(B, T, groups, N),
        "D": draw(D), "z": draw(B, T, D), "dt_bias": draw(D), "initial_state": draw(B, D, N),
    }  # fmt: skip
    if m:
        grouped = source_groups or groups
        inputs["sources"] = tuple(
            (draw(B, T, D), step(), -draw(D, N).exp(), draw(B, T, grouped, N), draw(D)) for _ in range(m)
        )
        inputs["gates"] = tuple(draw(B, T, D) * 0.3 for _ in range(m))
        inputs["source_states"] = tuple(draw(B, D, N) for _ in range(m))
    return {name: value for name, value in inputs.items() if name not in without}


def check(inputs: dict[str, Any], dtype: torch.dtype, *, wide: tuple[str, ...] = FLOAT32, **options: Any) -> None:
    def run(impl: str, kind: torch.dtype) -> dict[str, torch.Tensor]:
        # Rounded to the dtype first, so that all see the same numbers; what training keeps in float32 stays so.
        rounded = as_dtype(inputs, dtype, keep=wide)
        converted = as_dtype(rounded, kind, keep=wide if kind != torch.float64 else ())
        if kind != torch.float64:
            converted = {n: v.float() if n in wide else v for n, v in converted.items()}
        return run_with_gradients(lambda **x: selective_scan(**x, **options, impl=impl), converted)

    inputs = {n: v.float().double() if n in wide else v for n, v in inputs.items()}
    assert_as_accurate(run("triton", dtype), run("reference", dtype), run("reference", torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_states_and_gradients(dtype: torch.dtype) -> None:
    check(make(), dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(
    "without", [("z",), ("D",), ("dt_bias",), ("initial_state",), ("z", "D", "dt_bias", "initial_state")], ids=str
)
def test_optional_arguments(without: tuple[str, ...], dtype: torch.dtype) -> None:
    check(make(without=without), dtype)


@pytest.mark.parametrize("wide", [("B", "C"), ("B",), ("dt",), ("u", "z")], ids=str)
def test_some_inputs_in_float32(wide: tuple[str, ...]) -> None:
    check(make((1, 9, 33, 2)), torch.float16 if INTERPRETED else torch.bfloat16, wide=FLOAT32 + wide)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_step_as_given(dtype: torch.dtype) -> None:
    check(make(softplus=False, without=("dt_bias",)), dtype, dt_activation="none")


# One token, tokens and channels beside the tiles, one and many states. Interpreted: under 0.1 s for a state of a tile.
INTERPRETED_ODD = [(2, 1, 5, 1), (1, 9, 33, 2), (1, 17, 32, 3), (1, 3, 4, 17)]
ODD = [(2, 1, 5, 1), (1, 9, 33, 4), (1, 17, 3, 16), (1, 5, 4, 40), (1, 8, 2, 64)]
LONG = [(2, 63, 40, 16), (1, 100, 64, 16), (1, 257, 96, 5), (2, 2048, 64, 16), (1, 300, 50, 128), (8, 130, 2048, 16)]


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("shape", INTERPRETED_ODD if INTERPRETED else ODD + LONG, ids=str)
def test_odd_shapes(shape: Shape, dtype: torch.dtype) -> None:
    check(make(shape), dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("site", ["readout", "carried"])
@pytest.mark.parametrize("m", [1, 2] if INTERPRETED else [1, 2, 3])  # three are beyond what is written as assembly
def test_sources(m: int, site: str, dtype: torch.dtype) -> None:
    check(make((1, 6, 12, 2) if INTERPRETED else (2, 77, 80, 16), m=m), dtype, site=site)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("site", ["readout", "carried"])
def test_groups(site: str, dtype: torch.dtype) -> None:
    shape = (1, 3, 12, 2) if INTERPRETED else (1, 9, 12, 3)
    check(make(shape, groups=2), dtype)
    check(make(shape, groups=2, m=1, source_groups=3 if site == "readout" else 1), dtype, site=site)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(("m", "site"), [(0, "readout"), (1, "readout"), (1, "carried")])
def test_segments(m: int, site: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long sequences of few channels are cut in segments that hand on their states."""
    from dense_lab_kernels._triton import processors
    from dense_lab_kernels.selective_scan import triton_plan as plans

    tile = 8 if m == 0 else 4
    if INTERPRETED:
        monkeypatch.setattr(plans, "KEPT", 2 * tile)
    shape = (1, 5 * tile - 3, 3, 1) if INTERPRETED else (1, 700, 40, 16)
    plan = plans.make_plan(
        torch.Size(shape[:3]), shape[3], 1, m, processors(torch.device(DEVICE, None if INTERPRETED else 0)),
        carried=site == "carried", softplus=True, gated=True, skip=True,
    )  # fmt: skip
    assert plan.segments > 2
    check(make(shape, m=m), dtype, site=site)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(("m", "site"), [(0, "readout"), (1, "readout"), (1, "carried"), (2, "carried")])
def test_spans(m: int, site: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large shapes give a program of the gradients several tiles in turn; here three, and fewer to the last one."""
    from dense_lab_kernels.selective_scan import triton_plan as plans

    rule = plans.make_plan
    changes = {"span": 3, "back": 1 << 30}
    monkeypatch.setattr(plans, "make_plan", lambda *sizes, **options: rule(*sizes, **options)._replace(**changes))
    tokens = (5 if INTERPRETED else 16) * (8 if m == 0 else 4) - 3
    check(make((1, tokens, 6, 2) if INTERPRETED else (2, tokens, 80, 16), m=m), dtype, site=site)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize(("m", "forward"), [(0, "cut"), (0, "whole"), (1, "cut"), (2, "whole")])
def test_spans_of_segments(m: int, forward: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles a program of the gradients, and segments of the walk back that are two programs long."""
    from dense_lab_kernels.selective_scan import triton_plan as plans

    rule, tile = plans.make_plan, 8 if m == 0 else 4
    kept = 4 * tile if INTERPRETED else 64
    monkeypatch.setattr(plans, "KEPT", kept)
    changes = {"span": 2, "back": kept} | ({"segment": 100 * kept} if forward == "whole" else {"segment": kept})
    monkeypatch.setattr(plans, "make_plan", lambda *sizes, **options: rule(*sizes, **options)._replace(**changes))
    check(make((1, 5 * kept // 2 - 3, 3, 2) if INTERPRETED else (2, 5 * kept // 2 - 3, 80, 16), m=m), dtype)


def test_rows_of_a_wider_tensor() -> None:
    """u and z are often halves of one projection: strided rows are read where they are."""
    inputs = as_dtype(make((2, 9, 8, 2)), torch.float32)
    both = torch.cat([inputs["u"], inputs["z"]], dim=-1)
    halves = inputs | {"u": both[..., :8], "z": both[..., 8:]}
    strided, apart = (selective_scan(**x, impl="triton") for x in (halves, inputs))
    for found, expected in zip(strided, apart, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_pieces_equal_the_whole() -> None:
    """Handing the states on between two calls gives what one call gives."""
    inputs = as_dtype(make((1, 24, 6, 2), m=1), torch.float32)
    whole = selective_scan(**inputs, site="carried", impl="triton")
    timed = ("u", "dt", "B", "C", "z")

    def piece(where: slice, **state: Any) -> Any:
        sources = tuple((*(x[:, where] for x in (s[0], s[1])), s[2], s[3][:, where], s[4]) for s in inputs["sources"])
        cut = {name: value[:, where] if name in timed else value for name, value in inputs.items()}
        cut |= {"sources": sources, "gates": tuple(g[:, where] for g in inputs["gates"])} | state
        return selective_scan(**cut, site="carried", impl="triton")

    first = piece(slice(0, 16))
    second = piece(slice(16, 24), initial_state=first.final_state, source_states=first.source_states)
    torch.testing.assert_close(torch.cat([first.output, second.output], 1), whole.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.final_state, whole.final_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(second.source_states[0], whole.source_states[0], rtol=1e-5, atol=1e-5)


def test_sums_over_channels_that_only_together_fit_float16() -> None:
    """32 channels give B a gradient of 128000, and another 32 take as much away again."""
    everywhere = {"dtype": torch.float16, "device": DEVICE}
    b = torch.ones(1, 1, 1, 1, **everywhere, requires_grad=True)
    rows, rates = torch.ones(1, 1, 64, **everywhere), -torch.ones(64, 1, device=DEVICE)
    output = selective_scan(rows, rows, rates, b, b.detach(), dt_activation="none", impl="triton").output
    output.backward(torch.tensor([4000.0, -3996.0], **everywhere).repeat_interleave(32).expand(1, 1, 64))
    assert b.grad.item() == 32 * 4


def test_nothing_runs_while_kernels_are_compiled_ahead() -> None:
    inputs = as_dtype(make((1, 3, 4, 2)), torch.float32)
    inputs["u"].requires_grad_()
    with compiling_ahead():
        ahead = selective_scan(**inputs, impl="triton")
    assert ahead.output.isnan().all()  # see `poisoned_empty`
    found, expected = (selective_scan(**inputs, impl=impl).output for impl in ("triton", "reference"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("m", "site"), [(0, "readout"), (1, "carried")])
def test_a_graph_can_be_walked_back_twice(m: int, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that waits for the backward is written to, cut in segments or not; the order of sums is fixed."""
    from dense_lab_kernels.selective_scan import triton_plan as plans

    if INTERPRETED:
        monkeypatch.setattr(plans, "KEPT", 8)
    inputs = as_dtype(make((1, 12, 3, 1) if INTERPRETED else (2, 700, 40, 16), m=m), torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("u", "dt", "A", "B", "C", "D", "z", "initial_state")]
    found = selective_scan(**inputs, site=site, impl="triton")
    total = found.output.square().sum() + found.final_state.sum()
    first, second = (torch.autograd.grad(total, leaves, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def training_step(shape: Shape, m: int) -> Callable[[], tuple[torch.Tensor, ...]]:
    """What computes output and gradients, always of the same numbers."""
    inputs = as_dtype(make(shape, m=m), torch.bfloat16)
    leaves = [inputs[name].requires_grad_() for name in ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")]

    def step() -> tuple[torch.Tensor, ...]:
        output = selective_scan(**inputs, impl="triton").output
        # Detached: a graph that lives on keeps nodes of the stream it was made on, which captures must not meet.
        return output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)

    return step


ONLY_A_GPU = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no streams")
WALKS = [((2, 130, 64, 16), 0), ((1, 1500, 64, 16), 0), ((1, 1500, 40, 16), 1)]  # whole, and cut in segments


@ONLY_A_GPU
@pytest.mark.parametrize(("shape", "m"), WALKS)
def test_what_is_made_beside_is_waited_for(shape: Shape, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the stream beside starts late; memory that is given back meanwhile is not written to."""
    from dense_lab_kernels.selective_scan import triton

    step, late = training_step(shape, m), torch.cuda.Stream()
    expected = step()
    monkeypatch.setattr(triton, "_side_stream", lambda device: late)
    torch.cuda.synchronize()
    with torch.cuda.stream(late):
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
    found = step()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@ONLY_A_GPU
@pytest.mark.parametrize(("shape", "m"), WALKS)
def test_a_captured_step_gives_what_it_gives_when_called(shape: Shape, m: int) -> None:
    step, warm = training_step(shape, m), torch.cuda.Stream()
    expected = step()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
