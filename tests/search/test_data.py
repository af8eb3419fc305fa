"""Data that no trial could use is refused by every command, at the place in the file, before anything is begun."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from dense_lab.cli import group
from dense_lab.errors import InputError

HEAD = "dense_lab: 1\nname: s\nmodel: {width: 16, depth: 1}\ntrain: {tokens: 8k, batch_tokens: 1k}\n"
DATA = "data: {kind: python_source, seq_len: 256}\n"
ARMS = DATA + "baseline: a\nseeds: [0]\narms:\n  a: {}\n"
TEXT = "data:\n  choice:\n    - {kind: mqar, seq_len: 32, vocab: 64}\n    - {kind: text, path: %s, seq_len: 64}\n"
WRONG = {
    "no such file": (TEXT % "no.txt", "s.yaml:8:26 data.text.path: no file or folder 'no.txt'"),
    "too little text": (
        TEXT % "few.txt",
        "s.yaml:8:44 data.text.seq_len: the valid split has 51 bytes, a sequence of 64 needs 65: lower",
    ),
    "of an arm alone": (
        f"{ARMS}  b: {{data.seq_len: 4k}}\n",
        "s.yaml:4:35 train.batch_tokens: 1000 tokens are less than one sequence of 4000: raise it, or lower",
    ),
    "of the tuning": (
        f"{ARMS}tune: {{lr: [1e-3, 1e-2], tokens: 500}}\n",
        "s.yaml:10:34 tune.tokens: 500 tokens are less than one batch of 768: raise it, or lower",
    ),
    "no test split": (
        ARMS.replace("256", "256, test: 0"),
        "s.yaml:5:7 data: test/loss is to be compared, but the data has no",
    ),
}


@pytest.mark.parametrize("command", ["check", "plan", "show", "search"])
@pytest.mark.parametrize("case", WRONG)
def test_data_that_no_trial_could_use(command: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text("a line\n" * 145)
    text, said = WRONG[case]
    Path("s.yaml").write_text(HEAD + text)
    result = CliRunner().invoke(group, [command, "s.yaml"])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith(said)
    assert not Path("runs").exists()


def test_a_single_run_is_refused_before_its_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(HEAD + DATA.replace("256", "2M"))
    result = CliRunner().invoke(group, ["train", "s.yaml"])
    assert str(result.exception).startswith("s.yaml:5:38 data.seq_len: the valid split has")
    assert not Path("runs").exists()


def test_check_fetches_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(f"{HEAD}data: {{kind: huggingface, name: nobody/nothing}}\n")
    assert CliRunner().invoke(group, ["check", str(tmp_path / "s.yaml")]).exit_code == 0
