"""The search with the real trainer on tiny models."""

import json

import pytest

from dense_lab.errors import InputError
from dense_lab.files import read_json, read_lines
from dense_lab.search import search
from dense_lab.training import train
from dense_lab.training.loop import _corpora
from tests.search.helpers import HEAD, Here, study

TINY = (
    HEAD
    + """
data: {kind: mqar, seq_len: 32, vocab: 64, pairs: 2}
model: {width: 16, depth: 1, core: {choice: [retnet, mamba]}}
train: {tokens: 4k, batch_tokens: 128, evaluations: 4, valid_tokens: 256, test_tokens: 256}
"""
)


def test_a_search_with_the_real_trainer(tmp_path):
    here = Here(study(tmp_path, TINY, "sampler: grid"), tmp_path / "s", None)
    results = here.run().results
    assert [trial.state for trial in results.trials] == ["complete", "complete"]
    assert {trial.params["model.core"] for trial in results.trials} == {"retnet", "mamba"}
    for trial in results.trials:
        assert here.ledger.trials()[trial.number].value == trial.curve[-1]["valid/loss"]
        assert trial.metrics["parameters"] > 0
        assert trial.tags["spec"] == trial.digest == read_json(trial.folder / "spec.json")["digest"]
        assert trial.values["model.width"] == 16


def test_data_that_is_not_there_is_refused_before_the_first_trial(tmp_path):
    space = study(
        tmp_path, TINY.replace("{kind: mqar, seq_len: 32, vocab: 64, pairs: 2}", "{kind: text, path: no.txt}")
    )
    with pytest.raises(InputError, match=r"s\.yaml:4:26 data\.path: .*no\.txt"):
        search(space, tmp_path / "s", device="cpu", mlflow_uri="none")
    # Nothing is begun that the corrected study would not fit.
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("after", [1, 3])
def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(tmp_path, after):
    spec = study(tmp_path, TINY).point({"model.core": "mamba"})
    asked = []

    def should_stop():
        asked.append(True)
        return len(asked) == after

    train(spec, tmp_path / "whole", device="cpu", threads=1)
    with pytest.raises(KeyboardInterrupt):
        train(spec, tmp_path / "parts", device="cpu", threads=1, should_stop=should_stop)
    assert (tmp_path / "parts" / "checkpoint" / "state.json").exists()
    assert not (tmp_path / "parts" / "result.json").exists()
    train(spec, tmp_path / "parts", device="cpu", threads=1)
    clocks = ("seconds", "tokens_per_second", "step_seconds")
    whole, parts = (
        [{k: v for k, v in line.items() if k not in clocks} for line in read_lines(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "parts")
    )
    assert json.dumps(whole) == json.dumps(parts)


def test_a_trial_is_not_taken_over_when_its_data_has_changed(tmp_path):
    (tmp_path / "a.txt").write_text("to be, or not to be: " * 200)
    data = f"{{kind: text, path: {tmp_path / 'a.txt'}, seq_len: 32, tokenizer: byte}}"
    text = TINY.replace("{kind: mqar, seq_len: 32, vocab: 64, pairs: 2}", data).replace(
        "{choice: [retnet, mamba]}", "retnet"
    )
    text += "arms:\n  plain: {}\n  two: {model.depth: 2}\nbaseline: plain\nseeds: 1\n"
    Here(study(tmp_path, text), tmp_path / "first", None).run()

    def taken(name):
        results = Here(study(tmp_path, text), tmp_path / name, None, reuse=(tmp_path / "first",)).run().results
        assert results.complete
        return ["reused_from" in trial.tags for trial in results.trials]

    assert taken("same") == [True, True]
    (tmp_path / "a.txt").write_text("that is the question. " * 200)
    _corpora.clear()  # as in another process
    assert taken("other") == [False, False]
