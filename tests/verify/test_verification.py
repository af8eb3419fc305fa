"""Kernels are judged before a study uses them: what is right passes and is remembered, what is wrong is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from dense_lab import verification
from dense_lab.cli import main
from dense_lab.space import Study
from dense_lab.study import RunSpec
from dense_lab.training.device import choose_place
from dense_lab.verification import KernelError, cases, ensure, examine, tag
from dense_lab_kernels import causal_conv1d, watching
from dense_lab_kernels.selective_scan import cpu

STUDY = """
dense_lab: 1
name: tiny
data: {kind: mqar, seq_len: 32, pairs: 4, vocab: 64}
model:
  width: 16
  depth: 2
  core: {choice: [{kind: mamba, state: 4}, {kind: retnet, heads: 2}]}
train: {tokens: 256, batch_tokens: 128, evaluations: 1, valid_tokens: 128, test_tokens: 0}
search: {sampler: grid, trials: 2, objective: {minimize: valid/loss}}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DENSE_LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("DENSE_LAB_VERIFY", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(STUDY)
    return path


def specs(study: Path) -> list[RunSpec]:
    loaded = Study.load(study)
    return [loaded.point(point) for point in loaded.covering()]


class Doubled(torch.autograd.Function):
    """The identity, whose gradient is a tenth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.1


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan whose gradient of B is wrong; its results are right."""
    right = cpu.selective_scan

    def wrong(u, dt, A, B, *rest, **options):
        return right(u, dt, A, Doubled.apply(B), *rest, **options)

    monkeypatch.setattr(cpu, "selective_scan", wrong)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def test_what_a_study_would_use_is_judged_once(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = examine(specs(study), "cpu")
    assert {finding.name for finding in found} == {
        "causal_conv1d/numba",
        "selective_scan/numba",
        "decay_attention/numba",
    }
    assert all(finding.ok and 0 < finding.used < 1 for finding in found)
    monkeypatch.setattr(verification, "_run", None)  # would be called
    assert examine(specs(study), "cpu") == found
    assert ensure(specs(study), "cpu") == "all"


def test_a_planted_wrong_gradient_is_refused_by_name(study: Path, planted: None) -> None:
    with pytest.raises(KernelError, match=r"selective_scan/numba is wrong on this machine: dB is \S+ times as far"):
        ensure(specs(study), "cpu")
    assert ensure(specs(study), "cpu", "unverified") == "unverified: selective_scan/numba"
    assert ensure(specs(study)[1:], "cpu") == "all"  # the retnet does not scan


@pytest.mark.parametrize("where", ["in the model", "when judged"])
def test_memory_that_ran_out_is_told_and_not_remembered(study: Path, monkeypatch: pytest.MonkeyPatch, where) -> None:
    mamba = specs(study)[:1]
    with monkeypatch.context() as patch:
        right, left = cpu.selective_scan, [1 if where == "when judged" else 0]

        def full(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                raise torch.OutOfMemoryError("no memory")
            return right(*arguments, **options)

        patch.setattr(cpu, "selective_scan", full)
        found = [finding for finding in examine(mamba, "cpu") if not finding.ok]
        assert any("no memory" in finding.text for finding in found)
    assert all(finding.ok for finding in examine(mamba, "cpu"))
    assert tag(mamba[0], choose_place("cpu", "fp32"), {"selective_scan": "numba"}) == "all"


def test_a_model_that_cannot_run_is_not_called_right(study: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setattr(cpu, "selective_scan", None)
    assert run("verify", str(study), "--device", "cpu") == 1
    assert "model/mamba: TypeError" in capfd.readouterr().out
    assert ensure(specs(study), "cpu") == "all"  # its own trials fail, those of others go on


def test_what_is_wrong_beyond_some_token_is_caught(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.selective_scan

    def wrong(u, *rest, **options):
        output, *states = right(u, *rest, **options)
        return output * (1 + 0.01 * (torch.arange(u.shape[1]) > 400)[:, None]), *states

    monkeypatch.setattr(cpu, "selective_scan", wrong)
    assert ensure(specs(study)[:1], "cpu") == "all"  # of 32 tokens
    study.write_text(STUDY.replace("seq_len: 32", "seq_len: 512").replace("vocab: 64", "vocab: 1024"))
    with pytest.raises(KernelError, match="selective_scan/numba is wrong on this machine"):
        ensure(specs(study)[:1], "cpu")


@pytest.mark.parametrize(
    ("length", "judged"), [(512, [(1, 512)]), (600, [(1, 512), (1, 600)]), (8192, [(1, 512), (1, 2048)])]
)
def test_long_sequences_are_judged_in_a_long_row_as_well(
    study: Path, length: int, judged: list[tuple[int, int]]
) -> None:
    text = STUDY.replace("kind: mqar, seq_len: 32, pairs: 4, vocab: 64", f"kind: python_source, seq_len: {length}")
    study.write_text(text.replace("width: 16", "width: 512"))
    for spec in specs(study):
        found = cases(spec, "cpu", "training")
        assert [case.judged for case in found] == judged
        assert [case.spec.model.width for case in found] == [512, 64][: len(judged)]
        assert len({case.key() for case in found}) == len(judged)


def test_what_is_wrong_in_long_sequences_only_is_caught(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of 512 tokens and fewer shows it."""
    right = cpu.selective_scan

    def wrong(u, *rest, **options):
        output, *states = right(u, *rest, **options)
        return output * (1 + 0.01 * (torch.arange(u.shape[1]) >= 1024)[:, None]), *states

    monkeypatch.setattr(cpu, "selective_scan", wrong)
    text = STUDY.replace(
        "kind: mqar, seq_len: 32, pairs: 4, vocab: 64", "kind: python_source, tokenizer: byte, seq_len: {}"
    )
    study.write_text(text.replace("{}", "512"))
    assert ensure(specs(study)[:1], "cpu") == "all"
    study.write_text(text.replace("{}", "1100"))
    with pytest.raises(KernelError, match="selective_scan/numba is wrong on this machine"):
        ensure(specs(study)[:1], "cpu")
    assert ensure(specs(study)[:1], "cpu", "unverified") == "unverified: selective_scan/numba"
    assert (
        tag(specs(study)[0], choose_place("cpu", "fp32"), {"selective_scan": "numba"})
        == "unverified: selective_scan/numba"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("core", ["mamba", "retnet", "gau_retnet"])
def test_a_long_row_is_right_and_takes_seconds_on_a_gpu(core: str) -> None:
    said = {"model.core": core, "model.width": "512", "model.depth": "3", "model.dense": "{span: 2}"}
    spec = Study.load(None, [*said.items(), ("data", "{kind: python_source, seq_len: 8192}")]).point({})
    long = cases(spec, "cuda", "training")[-1]
    assert (long.judged, long.spec.model.width) == ((1, 2048), 512)
    verification._judged(long, {})  # compiles
    begin = time.perf_counter()
    found, _ = verification._judged(long, {})
    assert all(finding.ok for finding in found.values()), found
    assert time.perf_counter() - begin < 10


def test_another_implementation_may_be_chosen(study: Path, planted: None) -> None:
    chosen = [spec.model_copy(update={"kernels": {"selective_scan": "reference"}}) for spec in specs(study)]
    assert ensure(chosen, "cpu") == "all"


def test_the_commands_refuse_and_mark(study: Path, planted: None, tmp_path: Path, capfd) -> None:
    assert run("verify", str(study), "--device", "cpu") == 1
    out = capfd.readouterr().out
    assert "WRONG" in out
    assert "selective_scan/numba: dB is" in out
    runs = ("--device", "cpu", "--set", "model.core=mamba", "--out", str(tmp_path / "run"))
    assert run("train", str(study), *runs) == 1
    assert "dB is" in capfd.readouterr().err
    assert run("train", str(study), *runs, "--allow-unverified", "--json") == 0
    tags = json.loads(capfd.readouterr().out)["tags"]
    assert tags["kernels.verified"] == "unverified: selective_scan/numba"


def test_a_verified_run_says_so(study: Path, tmp_path: Path, capfd) -> None:
    assert (
        run("train", str(study), "--device", "cpu", "--set", "model.core=mamba", "--out", str(tmp_path), "--json") == 0
    )
    assert json.loads(capfd.readouterr().out)["tags"]["kernels.verified"] == "all"


def test_a_tag_speaks_for_what_ran(study: Path) -> None:
    mamba, retnet = specs(study)
    place = choose_place("cpu", "fp32")
    assert tag(mamba, place, {"selective_scan": "numba"}) == "unverified: selective_scan/numba"
    ensure([mamba], "cpu")
    assert tag(mamba, place, {"selective_scan": "numba"}) == "all"
    between = mamba.model_copy(update={"model": mamba.model.model_copy(update={"width": 24})})
    assert tag(between, place, {"selective_scan": "numba", "rotate": "reference"}) == "all"
    assert tag(retnet, place, {"decay_attention": "numba"}) == "unverified: decay_attention/numba"


def test_verdicts_are_void_when_the_source_changes(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure(specs(study), "cpu")
    import dense_lab_kernels

    monkeypatch.setattr(dense_lab_kernels, "fingerprint", lambda operation: "changed")
    place = choose_place("cpu", "fp32")
    assert tag(specs(study)[0], place, {"selective_scan": "numba"}) == "unverified: selective_scan/numba"


def test_it_can_be_switched_off(study: Path, planted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSE_LAB_VERIFY", "off")
    assert ensure(specs(study), "cpu") == "unverified: not checked"


def test_watching_keeps_one_call_for_each_set_of_shapes_with_its_strides() -> None:
    wide = torch.randn(2, 9, 8, requires_grad=True)
    with watching() as calls:
        for _ in range(2):
            causal_conv1d(wide[..., :4], torch.ones(4, 3))
        causal_conv1d(wide[:1, :, :4], torch.ones(4, 3))
    (first, second) = calls.values()
    assert first.arguments["x"].stride() == (72, 8, 1)
    assert (first.arguments["x"].requires_grad, first.arguments["weight"].requires_grad) == (True, False)
    assert (first.operation, second.arguments["x"].shape[0]) == ("causal_conv1d", 1)
