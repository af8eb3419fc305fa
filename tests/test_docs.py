"""Documentation that cannot drift: every command, component and make target is in the README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dense_lab import registry
from dense_lab.cli import COMMANDS
from dense_lab.space import Study

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_readme(command: str) -> None:
    assert f"| `{command}` |" in README


def test_every_builtin_component_is_in_the_readme() -> None:
    found = registry.default()
    for slot in found.slots():
        row = next((line for line in README.splitlines() if line.startswith(f"| `{slot}` |")), "")
        missing = [k for k in found.kinds(slot) if found.owner(slot, k).name == "builtin" and f"`{k}`" not in row]
        assert not missing, f"{slot}: {missing}"


def test_every_path_named_in_the_readme_exists() -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_study_in_the_readme_is_valid(tmp_path: Path) -> None:
    studies = re.findall(r"```yaml\n(.*?)```", README, re.S)
    assert len(studies) >= 2
    for number, text in enumerate(studies):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        Study.load(path).check_sizes()


def test_the_readme_plugin_passes_the_kit(tmp_path: Path) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "register_components" in block)
    path = tmp_path / "even.py"
    path.write_text(code)
    loaded = registry.load((path,))
    assert "pattern/even" in loaded.plugins[-1].components
    assert loaded.find("pattern", "even")().layers(5, 2) == (4, 2)


def test_no_file_names_a_machine_or_a_registry() -> None:
    private = re.compile(r"/work/|/root/|/home/\w|pypi\.org|file:///opt")
    for path in ROOT.rglob("*"):
        kept = path.suffix in {".py", ".md", ".yaml", ".toml", ".sh"} or path.name == "Makefile"
        if kept and not {".venv", "runs", ".git", ".gpu"} & set(path.parts) and path != Path(__file__):
            assert not private.search(path.read_text()), path
