"""What the Triton implementations share: where they can run, compiling several kernels at once, the sm_90 contract.

The contract, which `tests/kernels/test_sm90.py` holds every operation to on machines without a GPU: a `triton.py`
module exposes `sm90_cases() -> Iterator[Sm90Case]`, one case for every kernel and every choice that its launch rules
can make (dtype, tile sizes, feature flags, warps, stages; the choices that matter, not their whole product). Each case
is compiled for sm_90; its registers, stack (spills) and shared memory are held to `tests/kernels/sm90_resources.json`
(`UPDATE_SM90=1` rewrites the table), and `wgmma` must be in the PTX where `needs_wgmma` says so. Names are unique
within an operation, and stable.

Triton's interpreter (`TRITON_INTERPRET=1`, set before triton is imported) runs the same kernels on CPU tensors.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dense_lab_kernels import _ahead, _early

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETED_PROCESSORS = 2  # few, so that tiny test shapes still walk the loops of persistent programs


ASSEMBLY = tl.constexpr(not INTERPRETED)


@triton.jit
def sigmoid(x):  # noqa: ANN001, ANN202 - kernels have no annotations but constexpr
    """1 / (1 + exp(-x)) of fp32 in four instructions, to a few units in the last place; values under 1e-38 become 0.

    What Triton makes of the formula takes three times as many, for denormal numbers, and bounds kernels that are
    otherwise bound by memory.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "mul.ftz.f32 $0, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 $0, $0;"  # 2 ** (-log2(e) x)
            "add.ftz.f32 $0, $0, 0f3F800000; rcp.approx.ftz.f32 $0, $0;",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:  # noqa: RET505 - the branch is resolved when compiling, and must not leave a second return behind
        return tl.sigmoid(x)


@triton.jit
def reciprocal(x):  # noqa: ANN001, ANN202
    """1 / x in one instruction, to one unit in the last place."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:  # noqa: RET505
        return 1.0 / x


@triton.jit(do_not_specialize=["rows"])
def sum_rows_kernel(shares, out, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):  # noqa: ANN001, ANN202
    """out[c] = sum over r of shares[r, c], added in float32 and rounded once. One program: BLOCK_COLUMNS columns."""
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < columns
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, rows, BLOCK_ROWS):
        row = first + tl.arange(0, BLOCK_ROWS)
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        total += tl.load(shares + place, mask=(row < rows)[:, None] & inside[None, :], other=0.0)
    tl.store(out + column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=inside)


class Sm90Case(NamedTuple):
    """One kernel with one set of launch choices, as the compiler sees it.

    `signature` maps every argument that is no constexpr to its Triton type: "*bf16", "i32", "fp32"; a tuple of types
    for a tuple argument. The suffix ":16" promises divisibility by 16, as launches find it for aligned pointers and
    sizes; without it loads are narrow. `constexprs` maps the remaining arguments to their values.
    """

    name: str
    kernel: Any
    signature: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    needs_wgmma: bool = False
    limit: int | None = None
    """Registers of a thread, at most."""


class Launch(NamedTuple):
    """A launch to compile: positional arguments (tensors, or torch dtypes in their place) and keyword options."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


_compiled: set[Hashable] = set()
_compiling = threading.Lock()


def compile_once(key: Hashable, launches: Callable[[], Iterable[Launch]]) -> None:
    """Compile `launches()` in parallel threads, the first time this process meets `key`.

    Triton releases the interpreter lock in its passes and in ptxas, so that an operation with forward and backward
    kernels is ready in the time of its slowest one. Does nothing in Triton's interpreter.
    """
    if INTERPRETED or key in _compiled:
        return
    with _compiling:
        if key in _compiled:
            return
        ahead = _ahead.current()
        if ahead is not None:
            _compile(launches, ahead.start)
        else:
            with _ahead.side_by_side() as compilations:
                _compile(launches, compilations.start)
        _compiled.add(key)


def _compile(launches: Callable[[], Iterable[Launch]], start: _early.Start) -> None:
    """Have `launches()` compiled in threads, behind what they wait for."""
    device = torch.cuda.current_device()

    def compile_one(launch: Launch, *needed: Future[Any] | None) -> None:
        with torch.cuda.device(device):
            own, launcher = needed
            _ = own and own.result()
            compiled = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
            _ = launcher and launcher.result()
            _ = compiled.run  # Builds the launcher and loads the binary, which would else happen one by one.

    cache_key = _early.begin(start)
    with _early.WithoutMemory():
        found = list(launches())
    launchers = [_early.launcher(start, *launch) for launch in found]
    for launch in found:
        _early.read(launch.kernel)
    for launch, launcher in reversed(list(zip(found, launchers, strict=True))):  # Backward kernels take longest.
        start(compile_one, launch, cache_key, launcher)


_MOST_BINARIES = 4096  # remembered launches; each length of a sequence is one of its own
_binaries: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any, programs: int | tuple[int, int, int], arguments: Sequence[Any], options: Mapping[str, Any]
) -> None:
    """`kernel[programs](*arguments, **options)`, remembering which binary serves equal sizes, types and options.

    arguments: every parameter that is no constexpr, in order (constexprs too, where one stands among them). Finding the
    binary is most of what a launch costs the host, and passes of many launches over small tensors are bound by it.
    """
    if _ahead.current() is not None:
        return
    grid = programs if isinstance(programs, tuple) else (programs, 1, 1)
    if INTERPRETED:
        kernel[grid](*arguments, **options)
        return
    kinds = [argument if type(argument) is int else _kind(argument) for argument in arguments]
    key = (id(kernel), torch.cuda.current_device(), *kinds, *options.values())
    known = _binaries.get(key)
    if known is not None:
        binary, constants = known
        binary[grid](*arguments, *constants)
        return
    binary = kernel[grid](*arguments, **options)
    if len(_binaries) >= _MOST_BINARIES:
        _binaries.clear()
    _binaries[key] = binary, tuple(options[name] for name in kernel.arg_names[len(arguments) :])


class _NoGraph:
    """Stands in for autograd's context where nothing is differentiated."""

    def __init__(self, inputs: int) -> None:
        self.needs_input_grad = (False,) * inputs

    def save_for_backward(self, *tensors: Any) -> None:
        """Nothing is kept."""

    def set_materialize_grads(self, value: bool) -> None:
        """There are no gradients."""


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`function.apply(*inputs)`; without gradients its forward alone, ten times cheaper to call, and what is compiled
    for a backward to come is not."""
    if torch.is_grad_enabled():
        return function.apply(*inputs)
    return function.forward(_NoGraph(len(inputs)), *inputs)


def sum_rows_launch(shares: Any, out: Any, rows: int, columns: int) -> Launch:
    """The launch of `sum_rows`, to compile it beside others."""
    options = {"BLOCK_ROWS": 16 if INTERPRETED else 512, "BLOCK_COLUMNS": 16, "num_warps": 8}
    return Launch(sum_rows_kernel, (shares, out, rows, columns), options)


def sum_rows(shares: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum of [rows, columns] (float32, contiguous) over its rows, in `dtype`: a weight's gradient from its shares.

    One launch where torch takes two (sum, cast); many rows of few columns are what it is made for.
    """
    rows, columns = shares.shape
    out = torch.empty(columns, dtype=dtype, device=shares.device)
    kernel, arguments, options = sum_rows_launch(shares, out, rows, columns)
    launch(kernel, cdiv(columns, options["BLOCK_COLUMNS"]), arguments, options)
    return out


def _kind(argument: Any) -> Hashable:
    """What decides which binary serves an argument (for a number: more than that)."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    return tuple(map(_kind, argument)) if isinstance(argument, tuple) else argument


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, which kernels can call as well, costs a host microseconds."""
    return -(-a // b)


def power_of_2(size: int) -> int:
    """The least power of two that is not below `size` (at least 1); cheap where `triton.next_power_of_2` is not."""
    return 1 << (size - 1).bit_length()


def unsupported_place(tensor: torch.Tensor) -> str | None:
    """Why Triton cannot run where `tensor` lives, or None."""
    if tensor.is_cuda or INTERPRETED:
        return None
    return f"needs CUDA tensors, got {tensor.device.type}"


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of `device`, which launch rules divide the work among."""
    return INTERPRETED_PROCESSORS if INTERPRETED else _processors(device.index)


@functools.cache
def _processors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
