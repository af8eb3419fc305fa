"""The files of a run: spec.json first, metrics.jsonl as it goes, result.json last; each is whole when it is there."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from dense_lab.errors import InputError
from dense_lab.files import read_json, read_lines, write_json, write_text
from dense_lab.study import RunSpec
from dense_lab.training.outcome import Result, Status

SPEC, METRICS, RESULT = "spec.json", "metrics.jsonl", "result.json"


class Recorder:
    """Writes one run's files into `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started = now()

    def begin(self, spec: RunSpec, plugins: dict[str, str]) -> None:
        """Write spec.json; raises InputError when the folder holds another run."""
        digest = spec.digest(plugins)
        stored = read_json(self.folder / SPEC).get("digest", digest)
        if stored != digest:
            raise InputError(
                f"{self.folder} holds another run (its spec is {stored}, this one is {digest}): choose another folder, "
                "or remove that one"
            )
        write_json(self.folder / SPEC, {**spec.model_dump(mode="json"), "digest": digest, "plugins": plugins})

    def result(self) -> Result | None:
        """What result.json holds, or None while the run has not ended."""
        stored = read_json(self.folder / RESULT)
        return Result(**stored) if stored else None

    def keep_until(self, step: int) -> None:
        """Cut what was written after `step`: training goes on from there."""
        (self.folder / RESULT).unlink(missing_ok=True)
        kept = [line for line in read_lines(self.folder / METRICS) if line["step"] <= step]
        write_text(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, line: dict[str, float]) -> None:
        """Append a line to metrics.jsonl; it is on its way to the disk when this returns."""
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def end(self, status: Status, reason: str, metrics: dict[str, float], tags: dict[str, str]) -> Result:
        """Write result.json."""
        result = Result(status, reason, metrics, tags, self.started, now())
        write_json(self.folder / RESULT, asdict(result))
        return result


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
