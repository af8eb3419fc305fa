"""Who computes an operation: explicit, recorded, never a silent fallback, and nothing imported before it is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from dense_lab_kernels import ImplementationError, _dispatch, decay_attention, dense_fuse, recording, using

X = torch.ones(2, 16)
BEST = "numba" if find_spec("numba") else "chunked"


def scan(impl: str = "auto") -> torch.Tensor:
    x = torch.ones(1, 3, 2, 4)
    return decay_attention(x, x, x, torch.zeros(2), impl=impl).output


def test_auto_takes_the_first_that_can_run() -> None:
    with recording() as ran:
        scan()
        dense_fuse(X, [X])
    assert ran == {"decay_attention": BEST, "dense_fuse": "numba" if find_spec("numba") else "reference"}


def test_the_argument_goes_before_the_block_and_the_inner_block_before_the_outer() -> None:
    with recording() as ran, using({"decay_attention": "reference", "dense_fuse": "reference"}):
        scan()
        assert ran == {"decay_attention": "reference"}
        scan(impl="chunked")
        assert ran == {"decay_attention": "chunked"}
        with using({"decay_attention": "chunked"}):
            scan()
            dense_fuse(X, [X])
            assert ran == {"decay_attention": "chunked", "dense_fuse": "reference"}
    with recording() as after:
        scan()
    assert after == {"decay_attention": BEST}


def test_an_implementation_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = r"decay_attention: impl='triton' cannot run here: tensors are on cpu. These can: auto, .*chunked"
    with pytest.raises(ImplementationError, match=message):
        scan(impl="triton")
    with using({"decay_attention": "triton"}), pytest.raises(ImplementationError, match=message):
        scan()


def test_an_unknown_implementation_names_those_there_are() -> None:
    with pytest.raises(ImplementationError, match=r"unknown; there are .*triton.*reference"):
        scan(impl="cuda")


def test_without_numba_auto_goes_on_and_numba_by_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_numba_is_installed", lambda: False)
    with recording() as ran:
        dense_fuse(X, [X])
    assert ran == {"dense_fuse": "reference"}
    with pytest.raises(ImplementationError, match="numba is not installed"):
        dense_fuse(X, [X], impl="numba")


def test_kernels_are_not_launched_beside_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    said = _dispatch.triton_verdict("rotate", "auto", torch.device("cuda:1"))
    assert said == "tensors are on cuda:1, which is not the current GPU: call within torch.cuda.device(1)"


def test_a_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "dense_lab_kernels.decay_attention.triton", None)
    with pytest.raises(ImplementationError, match="this operation has no Triton kernel"):
        scan(impl="triton")
    monkeypatch.delitem(sys.modules, "dense_lab_kernels.decay_attention.triton")
    # Whatever another test has imported already was told whether to interpret kernels then.
    for name in [name for name in sys.modules if "triton" in name and name.startswith(("triton", "dense_lab_kernels"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImplementationError, match="triton is not installed"):
        scan(impl="triton")


def test_importing_the_operations_imports_no_compiler() -> None:
    code = (
        "import sys, torch, dense_lab_kernels as k; x = torch.ones(1, 3, 2, 4);"
        "k.decay_attention(x, x, x, torch.zeros(2), impl='chunked');"
        "sys.exit(','.join(name for name in ('numba', 'triton') if name in sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert found.stderr.strip() == ""
