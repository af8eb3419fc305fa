"""Launch parameters by measuring: what is faster is kept for this GPU, everything else leaves the rules alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from click.testing import CliRunner

from dense_lab.cli.tune import command
from dense_lab.errors import InputError, MachineError
from dense_lab_kernels import _tuned, tuning
from dense_lab_kernels._dispatch import Call
from dense_lab_kernels._tuned import TunedFileIgnored, chosen, store

KNOBS = {"warps": (2, 4, 8), "part.stages": (1, 2, 3)}
CALL = Call("toy", "triton", {}, "wanted")


class Part(NamedTuple):
    stages: int = 2


class Rule(NamedTuple):
    warps: int = 4
    part: Part = Part()


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("DENSE_LAB_CACHE", str(tmp_path))
    monkeypatch.setattr(_tuned, "_device", lambda: "a GPU")
    _tuned.forget()
    yield tmp_path / "tuned.json"
    _tuned.forget()


def rule() -> Rule:
    return chosen("toy", "W8", Rule(), KNOBS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], float]:
    """Two warps and three stages are best; one stage cannot be had."""
    met: list[Rule] = []
    monkeypatch.setattr(tuning, "repeated", lambda call: lambda: met.append(rule()))

    def time(work: Callable[[], object]) -> float:
        work()
        if met[-1].part.stages == 1:
            raise RuntimeError("out of resources")
        return 1.0 + 0.1 * met[-1].warps - 0.01 * met[-1].part.stages

    return time


def test_what_is_faster_is_kept_and_used(clock, file: Path) -> None:
    (gain,) = tuning.tune(CALL, clock)
    # Three stages save less than noise, one cannot run.
    assert gain[:3] == ("toy", "W8", {"warps": 2})
    assert gain.tuned_ms < gain.rule_ms
    assert rule() == Rule()
    tuning.keep([gain._asdict()])
    assert rule() == Rule(warps=2)
    tuning.keep([gain._asdict() | {"changes": {}}])
    assert rule() == Rule()


def test_another_gpu_and_another_class_have_their_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    store({("toy", "W8"): {"part.stages": 3}})
    assert rule() == Rule(part=Part(3))
    assert chosen("toy", "W16", Rule(), KNOBS) == Rule()
    monkeypatch.setattr(_tuned, "_device", lambda: "another GPU")
    _tuned.forget()
    assert rule() == Rule()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting"),
        ("[1]", "not a mapping of GPUs"),
        ('{"a GPU": {"toy": 3}}', "shapes by operation"),
        ('{"a GPU": {"toy": {"W8": {"warps": 64}}}}', "warps = 64 is none of"),
        ('{"a GPU": {"toy": {"W8": {"rows": 4}}}}', "rows = 4 is none of"),
        ('{"a GPU": {"toy": {"W8": 4}}}', "no attribute"),
    ],
)
def test_a_broken_or_foreign_file_is_left_out_and_named(file: Path, text: str, reason: str) -> None:
    file.write_text(text)
    with pytest.warns(TunedFileIgnored, match=f"tuned.json is not used: .*{reason}"):
        assert rule() == Rule()
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        assert rule() == Rule()


def test_a_file_that_is_not_ours_is_not_lost(file: Path) -> None:
    file.write_text(json.dumps({"another GPU": {"toy": {"W8": {"warps": 8}}}}))
    store({("toy", "W8"): {"warps": 2}})
    assert json.loads(file.read_text())["another GPU"] == {"toy": {"W8": {"warps": 8}}}


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(MachineError, match="sees none here") as stop:
        CliRunner().invoke(command, [], standalone_mode=False, catch_exceptions=False)
    assert stop.value.exit_code == 3


def test_an_unknown_operation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(InputError, match="Did you mean 'selective_scan'"):
        CliRunner().invoke(command, ["--operation", "selectivescan"], standalone_mode=False, catch_exceptions=False)
