"""Every Triton kernel and launch choice, compiled for sm_90 (H100, H200) on a machine without a GPU.

Held to `sm90_resources.json`: registers, stack (spills) and shared memory may not grow, matrix
products must use wgmma. The numbers belong to the Triton version that the table names; under another version only the
hard limits hold (it compiles, fits an SM, uses wgmma). `UPDATE_SM90=1 pytest tests/kernels/test_sm90.py` rewrites it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import dense_lab_kernels

triton = pytest.importorskip("triton", reason="triton is not installed")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels cannot be compiled: unset TRITON_INTERPRET"
)

TABLE = Path(__file__).with_name("sm90_resources.json")
UPDATE = os.environ.get("UPDATE_SM90") == "1"
SHARED_MEMORY = 227 * 1024  # bytes that one program can have on sm_90
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def operations() -> Iterator[str]:
    """Names of the operations whose folder holds a Triton module."""
    for path in sorted(Path(dense_lab_kernels.__file__).parent.glob("*/triton.py")):
        yield path.parent.name


def cases() -> list[Any]:
    """One pytest parameter per case of every operation that exposes `sm90_cases`."""
    found = []
    for operation in operations():
        module = importlib.import_module(f"dense_lab_kernels.{operation}.triton")
        for case in getattr(module, "sm90_cases", tuple)():
            found.append(pytest.param(operation, case, id=f"{operation}-{case.name}"))
    return found


CASES = cases()
NAMES = {f"{case.values[0]}/{case.values[1].name}" for case in CASES}


def split_type(kind: Any, place: tuple[int, ...], attributes: dict[tuple[int, ...], Any]) -> Any:
    """The type without its ":16" promise, which goes into `attributes`."""
    if isinstance(kind, tuple):
        return tuple(split_type(item, (*place, i), attributes) for i, item in enumerate(kind))
    name, _, divisor = kind.partition(":")
    if divisor:
        attributes[place] = [["tt.divisibility", int(divisor)]]
    return name


def compile_case(case: Any) -> Any:
    """The kernel compiled for sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    given = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    assert set(given) == set(names), f"{case.name}: signature and constexprs miss {set(names) ^ set(given)}"
    attributes: dict[tuple[int, ...], Any] = {}
    signature = {name: split_type(given[name], (i,), attributes) for i, name in enumerate(names)}
    source = ASTSource(case.kernel, signature, dict(case.constexprs), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "maxnreg": case.limit}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def resources(compiled: Any) -> dict[str, int]:
    """Registers and stack bytes (what left the registers) per thread, bytes of shared memory per program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin.name]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = map(int, USAGE.search(report).groups())
    return {"registers": registers, "stack": stack + local, "shared": compiled.metadata.shared}


def one_line_each(stored: dict[str, Any]) -> str:
    """The table as JSON with one kernel a line, so that a change reads well in a diff."""
    lines = [f"  {json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in sorted(stored["kernels"].items())]
    body = ",\n".join(lines)
    return f'{{\n"triton": {json.dumps(stored["triton"])},\n"kernels": {{\n{body}\n}}\n}}\n'


def stored_table() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": triton.__version__, "kernels": {}}


@pytest.fixture(scope="session")
def table() -> Iterator[dict[str, Any]]:
    """The stored table, or with UPDATE_SM90=1 an empty one that is merged into what is stored at the end."""
    if not UPDATE:
        yield stored_table()
        return
    found: dict[str, Any] = {"triton": triton.__version__, "kernels": {}}
    yield found
    stored = stored_table()
    if stored["triton"] == triton.__version__:
        found["kernels"] = {**stored["kernels"], **found["kernels"]}
    found["kernels"] = {name: numbers for name, numbers in found["kernels"].items() if name in NAMES}
    TABLE.write_text(one_line_each(found))


@pytest.mark.parametrize(("operation", "case"), CASES)
def test_compiles_within_the_resources_on_record(operation: str, case: Any, table: dict[str, Any]) -> None:
    compiled = compile_case(case)
    found = resources(compiled)
    assert found["shared"] <= SHARED_MEMORY
    if case.needs_wgmma:
        assert "wgmma" in compiled.asm["ptx"], "no wgmma instruction: the matrix products are on a slower path"
    name = f"{operation}/{case.name}"
    if UPDATE:
        table["kernels"][name] = found
    elif table["triton"] == triton.__version__:
        stored = table["kernels"].get(name)
        assert stored, f"{name} is not in {TABLE.name}: run once with UPDATE_SM90=1"
        grown = {key: (stored[key], value) for key, value in found.items() if value > stored[key]}
        assert not grown, f"{name} needs more than on record (on record, now): {grown}"


@pytest.mark.skipif(UPDATE, reason="the table is being rewritten")
def test_every_case_and_nothing_else_is_on_record() -> None:
    assert set(stored_table()["kernels"]) == NAMES
    assert {name.split("/")[0] for name in NAMES} == set(operations()), "a Triton module without sm90_cases"
