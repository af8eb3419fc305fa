"""Who may import whom: the product names no component, the kernels know only torch and triton."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STDLIB = sys.stdlib_module_names
KERNELS_MAY = {"torch", "triton", "numpy", "numba", "llvmlite", "dense_lab_kernels"}


def imported(path: Path) -> set[str]:
    """Top-level names of all modules imported anywhere in a file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


@pytest.mark.parametrize("path", files("dense_lab"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_product_names_no_component_and_no_kernel(path: Path) -> None:
    assert not imported(path) & {"dense_lab_plugins", "dense_lab_kernels"}


@pytest.mark.parametrize("path", files("kernels"), ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_import_only_torch_and_what_compiles_loops(path: Path) -> None:
    assert not imported(path) - KERNELS_MAY - STDLIB


def test_the_folders_that_hold_packages_are_no_packages() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "plugins" / "__init__.py").exists()


def test_help_imports_neither_torch_nor_services() -> None:
    script = (
        "import sys; from dense_lab.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'optuna', 'mlflow', 'datasets', 'pandas', 'pydantic') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip().endswith("[]"), out.stdout[-200:]


def test_the_command_ends_without_a_last_look_for_garbage() -> None:
    script = (
        "import atexit, gc; from dense_lab.cli import main\n"
        "atexit.register(lambda: print(f'{gc.get_freeze_count() > 0} {len(gc.get_objects()) < 1000}'))\n"
        "main(['--help'])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.endswith("True True\n"), out.stdout[-200:]
