"""What is begun before the first kernels is what Triton asks for later, and nothing else changes."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")

from triton.backends.compiler import GPUTarget  # noqa: E402

from dense_lab_kernels import _ahead, _early, _triton  # noqa: E402


def at_once(work: Any, *arguments: Any) -> Future[Any]:
    """Stands in for the start of a thread."""
    future: Future[Any] = Future()
    future.set_result(work(*arguments))
    return future


class FakeDriver:
    """Compiles for an H100, launches nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Triton believes in a GPU, and finds empty caches."""
    monkeypatch.setattr(triton.runtime.driver, "_active", FakeDriver())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_dry_runs_do_not_import_torchs_compiler() -> None:
    code = (
        "import sys\n"
        "from dense_lab_kernels import _early\n"
        "from dense_lab_kernels.decay_attention import triton as attention\n"
        "from dense_lab_kernels.selective_scan import triton as scan\n"
        "with _early.WithoutMemory():\n"
        "    assert len(list(scan.sm90_cases())) > 5 and len(list(attention.sm90_cases())) > 5\n"
        "print({'sympy', 'torch._dynamo'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "call",
    [
        lambda t: torch.stack([t, t, t]),
        lambda t: torch.stack([t, t], 1),
        lambda t: torch.stack([t, t], dim=-1),
        lambda t: torch.stack([t, t.double()]),
        lambda t: torch.stack([t.mT, t.mT]),
        lambda t: t.sum(1),
        lambda t: t.mT.sum(-1),
        lambda t: t.sum(),
        lambda t: torch.sum(t, 2, dtype=torch.float16),
        lambda t: torch.sum(t, 0, out=t.new_empty(3, 5)),
        lambda t: torch.sum(t, 0, out=t.new_empty(3, 5, dtype=torch.float64)),
        lambda t: torch.sum(t, dim=0),
        lambda t: t.sum((0, 2)),
        lambda t: t.sum(1, keepdim=True),
        lambda t: t.sum(1, dtype=torch.float64),
        lambda t: t.int().sum(0),
        lambda t: torch.zeros_like(t),
        lambda t: torch.empty_like(t.mT),
        lambda t: torch.empty_like(t, dtype=torch.int8),
        lambda t: torch.zeros_like(t[:, 1:]),
        lambda t: torch.empty_like(t[:, 0]),
        lambda t: torch.empty_like(t[:1, :1]),
        lambda t: torch.empty_like(t[:1, :, ::2]),
        lambda t: torch.empty_like(t[:, :1, :2]),
        lambda t: torch.empty_like(t[:, :, ::2].mT),
        lambda t: torch.empty_like(t[0].expand(4, 3, 5)),
    ],
)
def test_tensors_without_memory_are_as_those_with(call: Any) -> None:
    expected = call(torch.ones(2, 3, 5, dtype=torch.bfloat16))
    with _early.WithoutMemory():
        found = call(torch.empty(2, 3, 5, dtype=torch.bfloat16, device="meta"))
        real = call(torch.ones(2, 3, 5, dtype=torch.bfloat16))
    for result in (found, real):
        assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())
    assert found.is_meta
    assert not real.is_meta


@pytest.mark.usefixtures("hopper")
def test_launchers_begun_early_are_those_that_triton_asks_for() -> None:
    from dense_lab_kernels.selective_scan import triton as scan

    join = next(x for x in scan._launches(*scan._example(32768, 16, 0, "readout", torch.bfloat16), training=True)
                if x.kernel.__name__ == "join")  # fmt: skip
    for launch in (join, _triton.sum_rows_launch(torch.float32, torch.bfloat16, 100, 32)):
        found = _early.signature_of(*launch)
        compiled = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
        assert found == compiled.src.signature
        from triton.backends.nvidia import driver

        if hasattr(driver, "make_launcher"):
            meta = getattr(compiled.metadata, "tensordesc_meta", None)
            source = driver.make_launcher(compiled.src.constants, compiled.src.signature, meta)
            assert _early._source(driver, found) == source


def test_launchers_are_built_once_and_never_in_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[dict[str, Any]] = []
    driver = SimpleNamespace(
        make_launcher=lambda constants, signature, meta: " ".join(signature.values()),
        compile_module_from_src=lambda **options: built.append(options),
        library_dirs=list, include_dirs=[], libraries=[],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "triton.backends.nvidia.driver", driver)
    monkeypatch.setattr(_early, "_launchers", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def kernel(*kinds: str) -> Any:
        def bind(*arguments: Any, **options: Any) -> Any:
            return {}, [(kind, None) for kind in kinds], options

        return SimpleNamespace(arg_names=[*"abcdef"[: len(kinds)]], device_caches={0: ({}, bind)})

    assert _early.launcher(at_once, kernel("*fp32", "i32"), (1, 2), {}) is not None
    assert _early.launcher(at_once, kernel("*fp32", "i32"), (3, 4), {}) is not None
    assert [options["src"] for options in built] == ["*fp32 i32"]
    assert _early.launcher(at_once, kernel("tensordesc<fp16[1]>"), (1,), {}) is None
    assert _early.launcher(at_once, SimpleNamespace(), (1,), {}) is None  # not as expected: left to Triton
    del driver.make_launcher
    assert _early.launcher(at_once, kernel("*fp32"), (1,), {}) is None
    assert len(built) == 1


class Config:
    """Stands in for what holds Triton's driver."""

    def __init__(self) -> None:
        self._active: Any = None
        self._default: Any = None
        self.made = 0
        self.compiler = True

    @property
    def default(self) -> Any:
        if not self.compiler:
            raise RuntimeError("no C compiler")
        if self._default is None:
            self.made += 1
            self._default = SimpleNamespace(utils="utils")
        return self._default

    def set_active(self, driver: Any) -> None:
        self._active = driver


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    config = Config()
    monkeypatch.setattr(triton.runtime, "driver", config)
    monkeypatch.setattr(triton.runtime.cache, "triton_key", lambda: "key", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return config


def begun(later: list[Any]) -> Any:
    """The stand-in for the driver; what would build it is left in `later`."""
    _early.begin(lambda work, *arguments: at_once(work, *arguments) if arguments else later.append(work))
    return triton.runtime.driver._active


def test_a_driver_that_cannot_be_built_leaves_triton_as_it_was(config: Config) -> None:
    later: list[Any] = []
    begun(later)
    config.compiler = False
    with pytest.raises(RuntimeError, match="no C compiler"):
        later[0]()
    assert config._active is None


def test_a_driver_that_another_has_put_there_stays(config: Config) -> None:
    later: list[Any] = []
    coming, other = begun(later), SimpleNamespace()
    config.set_active(other)
    later[0]()
    assert coming.utils == "utils"
    assert config._active is other


def test_the_driver_is_built_once_by_whoever_comes_first(config: Config) -> None:
    later: list[Any] = []
    key = _early.begin(lambda work, *arguments: at_once(work, *arguments) if arguments else later.append(work))
    assert key is not None
    assert key.result() == "key"
    coming = config._active
    assert coming.get_current_target() == GPUTarget("cuda", 90, 32)
    assert not config.made
    threads = [threading.Thread(target=work) for work in (later[0], lambda: coming.utils, lambda: coming.utils)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert config.made == 1
    assert config._active is config._default
    assert coming.utils == "utils"
    _early.begin(at_once)
    assert config._active is config._default  # a driver that is there stays


@pytest.mark.usefixtures("hopper")
def test_every_launch_is_compiled_and_a_failure_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def warmup(self, *arguments: Any, grid: Any, **options: Any) -> Any:
            if self.name == "broken":
                raise ValueError("no such type")
            compiled.append(self.name)
            return SimpleNamespace(run=None)

    monkeypatch.setattr(_triton, "_compiled", set())
    monkeypatch.setattr(_early, "begin", lambda start: None)
    _triton.compile_once("fine", lambda: [_triton.Launch(Kernel(name), (), {}) for name in "abc"])
    assert sorted(compiled) == ["a", "b", "c"]
    assert gc.isenabled()
    with pytest.raises(ValueError, match="no such type"):
        _triton.compile_once("broken", lambda: [_triton.Launch(Kernel("broken"), (), {})])
    assert gc.isenabled()
    assert _triton._compiled == {"fine"}


def test_no_garbage_is_collected_until_the_last_thread_has_compiled() -> None:
    first, second = _ahead.side_by_side(), _ahead.side_by_side()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()
