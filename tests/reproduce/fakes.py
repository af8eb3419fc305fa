"""Trainers that write what the real one writes; the loss is told by width and seed."""

import json
import random
from datetime import UTC, datetime

from dense_lab.errors import MachineError
from dense_lab.files import write_json
from dense_lab.training.outcome import TrialFailed

DATA = "0" * 64


def steady(spec, folder, *, shift=0.0, curve=0.0, **options):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent.parent / "trained.log").open("a") as log:
        log.write(f"{folder.name}\n")
    write_json(folder / "spec.json", {**spec.model_dump(mode="json"), "digest": spec.digest(), "plugins": {}})
    loss = 1 + spec.model.width / 100 + random.Random(spec.seed).gauss(0, 0.01) + shift
    (folder / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "tokens": 1000, "seconds": 0.1, "valid/loss": loss + curve}) + "\n"
    )
    now = datetime.now(UTC).isoformat()
    metrics = {"valid/loss": loss, "test/loss": loss, "seconds": random.random(), "tokens_per_second": random.random()}
    tags = {"data": DATA, "device": "cpu (1 threads)", "host": "elsewhere", "seed": str(spec.seed)}
    said = {"status": "complete", "reason": "", "metrics": metrics, "tags": tags, "started": now, "ended": now}
    write_json(folder / "result.json", said)


def shifted(spec, folder, **options):
    """Far outside."""
    steady(spec, folder, shift=1.0)


def nudged(spec, folder, **options):
    """A little, all seeds alike: twice the spread between seeds."""
    steady(spec, folder, shift=0.02)


def rounded(spec, folder, **options):
    """As if sums had been taken in another order."""
    steady(spec, folder, shift=1e-7)


def other_way(spec, folder, **options):
    """Ends in the same numbers by another curve."""
    steady(spec, folder, curve=1e-7)


def failing(spec, folder, **options):
    if spec.seed == 1:
        now = datetime.now(UTC).isoformat()
        write_json(
            folder / "result.json",
            {"status": "failed", "reason": "nan", "metrics": {}, "tags": {}, "started": now, "ended": now},
        )
        raise TrialFailed("nan")
    steady(spec, folder)


def fails_once(spec, folder, **options):
    """The machine goes down before the second run."""
    if (folder.parent.parent / "trained.log").exists() and not (folder.parent.parent / "up").exists():
        (folder.parent.parent / "up").touch()
        raise MachineError("the machine went down")
    steady(spec, folder)


def calls(folder):
    return (folder / "trained.log").read_text().split()
