"""A trainer that writes what the real one writes, at no cost; what it does is told by the spec's learning rate."""

import json
import os
import time
from datetime import UTC, datetime

from dense_lab.errors import MachineError
from dense_lab.files import read_json, write_json
from dense_lab.training.outcome import Evaluation, Pruned, TrialFailed

STEPS = 4


def train(spec, folder, *, device="auto", threads=1, on_evaluation=None, should_stop=None, pause=0.0):
    """Loss = |log10(lr) + 3| + 1 / step; the file trained.log in the study's folder has one line for each call."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent.parent / "trained.log").open("a") as log:
        log.write(f"{folder.name} {os.getpid()}\n")
    started = datetime.now(UTC).isoformat()
    write_json(folder / "spec.json", {**spec.model_dump(mode="json"), "digest": spec.digest(), "plugins": {}})
    begun, metrics, ended = time.perf_counter(), {}, None
    lines = (folder / "metrics.jsonl").open("w")
    try:
        for step in range(1, STEPS + 1):
            if should_stop is not None and should_stop():
                raise KeyboardInterrupt
            time.sleep(pause)
            metrics = {
                "train/loss": loss(spec, step),
                "valid/loss": loss(spec, step),
                "tokens_per_second": 1000.0 * step,
            }
            seconds = time.perf_counter() - begun
            line = {"step": step, "tokens": step * spec.train.tokens // STEPS, "seconds": seconds, **metrics}
            lines.write(json.dumps(line) + "\n")
            lines.flush()
            if spec.seed == 13:
                raise TrialFailed("valid/loss is nan at step 1")
            if spec.seed == 14:
                raise RuntimeError("a component is broken")
            if on_evaluation is not None:
                on_evaluation(Evaluation(step, line["tokens"], seconds, metrics))
        ended = "complete", ""
    except Pruned as error:
        ended = "pruned", str(error)
    except TrialFailed as error:
        ended = "failed", str(error)
        raise
    finally:
        lines.close()
        if ended:
            write_json(folder / "result.json", result(*ended, metrics, started))


def slow(spec, folder, **options):
    """The same, in about half a second."""
    train(spec, folder, pause=0.12, **options)


def deaf(spec, folder, **options):
    """Never asks whether it should stop."""
    while True:
        time.sleep(0.05)


def hopeless(spec, folder, **options):
    """Kills its process at every attempt."""
    os.kill(os.getpid(), 9)


def loss(spec, step):
    import math

    return abs(math.log10(spec.train.lr) + 3) + 1 / step


def result(status, reason, metrics, started):
    final = {**metrics, "parameters": 1000, "state_bytes": 64, "test/loss": 2.0, "seconds": 0.1}
    ended = datetime.now(UTC).isoformat()
    return {
        "status": status,
        "reason": reason,
        "metrics": final,
        "tags": {"seed": "0", "data": "d" * 8, "commit": "unknown", "device": "cpu"},
        "started": started,
        "ended": ended,
    }


def calls(folder):
    """Trials that were trained, one entry a call."""
    log = folder / "trained.log"
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def stored(folder, number):
    return read_json(folder / "trials" / f"{number:04d}" / "result.json")


def lacking(spec, folder, **options):
    """Finds that the machine is at fault."""
    raise MachineError("no GPU here")
