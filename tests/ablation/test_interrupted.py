"""An ablation whose worker is killed in the middle ends with the numbers of one that was not, bit for bit."""

import json
import os
import signal

import psutil

from dense_lab.ablation.results import cells
from dense_lab.files import read_lines
from dense_lab.search import search
from tests.ablation.studies import study
from tests.search.helpers import Here

TINY = """\
dense_lab: 1
name: s
data: {kind: mqar, seq_len: 32, vocab: 64, pairs: 2}
model: {width: 16, depth: 2, dropout: 10%}
train: {tokens: 6k, batch_tokens: 128, evaluations: 6, valid_tokens: 256, test_tokens: 512, checkpoints: 3}
arms:
  plain: {}
  dense: {model.dense.span: 1}
baseline: plain
seeds: 2
tune: {lr: [1e-3, 1e-2], tokens: 512}
"""
CLOCKS = ("seconds", "tokens_per_second", "step_seconds")


def lines(folder):
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_lines(folder / "metrics.jsonl")]


def test_killed_and_resumed_is_uninterrupted(tmp_path):
    space = study(tmp_path, TINY)
    whole = Here(space, tmp_path / "whole", None).run().results
    killed = []

    def look(progress):
        for one in progress.running:
            if len(killed) < 2 and one.trial.role == "cell" and one.fraction and 0.3 < one.fraction < 0.9:
                pid = json.loads((one.trial.folder / "trial.json").read_text())["owner"]["pid"]
                if psutil.pid_exists(pid) and pid not in killed:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    parts = search(space, tmp_path / "parts", device="cpu", mlflow_uri="none", on_progress=look).results
    assert killed, "no worker was caught in the middle"
    assert parts.complete
    assert [(t.role, t.label, t.params) for t in parts.trials] == [(t.role, t.label, t.params) for t in whole.trials]
    for one, other in zip(whole.trials, parts.trials, strict=True):
        assert json.dumps(lines(one.folder)) == json.dumps(lines(other.folder))
        assert one.digest == other.digest
        assert (one.tags["batches"], one.tags["data"]) == (other.tags["batches"], other.tags["data"])
    for metric in ("test/loss", "valid/loss"):
        assert cells(whole, metric) == cells(parts, metric)
    assert all(len(values) == 2 for values in cells(whole, "test/loss").values())
