"""What a run records of the code that it called, wherever the study lies."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from dense_lab import __version__, registry
from dense_lab.report.tables import provenance
from dense_lab.results import StudyResults, read_trial
from dense_lab.study import RunSpec
from dense_lab.training import code, train

ODD = Path(__file__).parents[1] / "components" / "odd.py"


@pytest.fixture(autouse=True)
def fresh() -> None:
    """As in a process of its own."""
    for remembered in (code.commit_in, code.release, code.digest):
        remembered.cache_clear()


def digests(spec: RunSpec) -> dict[str, str]:
    return dict(item.split("=") for item in code.code(spec).split(","))


def test_a_run_outside_of_a_repository_says_which_code_it_called(
    small: Callable[..., RunSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train(small(), tmp_path / "0000", device="cpu", threads=1)
    assert result.tags["commit"] == "unknown"
    assert re.fullmatch(rf"{re.escape(__version__)}(, commit [0-9a-f]{{40}}(-dirty)?)?", result.tags["dense_lab"])
    named = ("dense_lab", "dense_lab_kernels", "dense_lab_plugins")
    assert re.fullmatch(",".join(f"{name}=[0-9a-f]{{8}}" for name in named), result.tags["code"])
    trial = read_trial(tmp_path / "0000")
    assert trial is not None
    rows = dict(provenance(StudyResults("s", tmp_path, "", (), {}, [trial], 1)).rows)
    assert rows["code"] == result.tags["code"]
    assert rows["dense-lab"] == result.tags["dense_lab"]


def test_a_changed_file_of_a_stranger_shows_and_nothing_else_does(tmp_path: Path) -> None:
    def found(text: str) -> dict[str, str]:
        code.digest.cache_clear()
        file = tmp_path / "odd.py"
        file.write_text(text)
        loaded = registry.load((file,), (registry.BUILTIN,))
        tree = {"model": {"core": {"kind": "odd"}}}
        return digests(RunSpec.model_validate(tree, context={"registry": loaded}))

    text = ODD.read_text()
    before, again, after = found(text), found(text), found(text + "# more\n")
    assert before == again
    assert {name for name in after if after[name] != before[name]} == {"dense_lab_loose_odd"}
    assert "dense_lab_loose_odd" not in digests(RunSpec())


def test_what_a_loose_plugin_imports_from_its_folder_belongs_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "parts_of_beside" / "deep").mkdir(parents=True)
    files = {
        "beside.py": ODD.read_text() + "import json\nimport torch\nfrom helps_beside import x\n",
        "helps_beside.py": "x = 1\ndef later():\n    import parts_of_beside.deep.er\n",
        "parts_of_beside/__init__.py": "",
        "parts_of_beside/deep/er.py": "from lasts_beside import y\n",
        "lasts_beside.py": "y = 1\n",
        "alone.py": "",  # Nobody imports it.
        "json.py": "",  # Python's own is meant.
        "torch.py": "",
        "dense_lab.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    registry.load((tmp_path / "beside.py",), (registry.BUILTIN,))

    def digest() -> str:
        code.digest.cache_clear()
        return code.digest("dense_lab_loose_beside")

    changed = set()
    for name in files:
        before, text = digest(), (tmp_path / name).read_text()
        assert digest() == before
        (tmp_path / name).write_text(text + "# more\n")
        changed |= {name} if digest() != before else set()
    assert changed == set(list(files)[:5])
    # A component may be defined in the other file as well.
    before = code.digest("helps_beside")
    (tmp_path / "lasts_beside.py").write_text("no Python (")
    code.digest.cache_clear()
    assert code.digest("helps_beside") != before


def test_what_was_typed_at_a_prompt_has_no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "typed", ModuleType("typed"))
    assert code.digest("typed") == "unknown"


def test_the_digest_does_not_depend_on_the_place_and_is_soon_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests(RunSpec())
    times, found = [], []
    for _ in range(5):
        code.digest.cache_clear()
        start = time.perf_counter()
        found.append(digests(RunSpec())["dense_lab"])
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
    copy = tmp_path / "elsewhere" / "dense_lab"
    shutil.copytree(Path(code.__file__).parents[1], copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setitem(sys.modules, "copied", SimpleNamespace(__file__=str(copy / "__init__.py")))
    assert {code.digest("copied")} == set(found)


def test_the_commit_is_that_of_a_checkout_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "project" / "env" / "dense_lab"
    (package / "training").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.setattr(code, "__file__", str(package / "training" / "code.py"))
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(tmp_path / "project")]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert code.release() == __version__  # It lies in somebody's project and is no part of it.
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "second"], check=True)
    code.release.cache_clear()
    assert re.fullmatch(rf"{re.escape(__version__)}, commit [0-9a-f]{{40}}", code.release())
    (package / "__init__.py").write_text("changed = 1\n")
    code.commit_in.cache_clear()
    code.release.cache_clear()
    assert code.release().endswith("-dirty")
