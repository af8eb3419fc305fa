"""How a trial's folder says that it has ended, beside what the trainer writes there itself."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from dense_lab.errors import DenseLabError
from dense_lab.files import last_line, read_json, write_json
from dense_lab.results import FINISHED, TRIAL_FILE


def has_ended(folder: Path) -> bool:
    """Whether the trial is complete, pruned or failed."""
    return read_json(folder / "result.json").get("status") in FINISHED


def fail(folder: Path, reason: str) -> None:
    """Make the trial one that failed for `reason`, keeping what its trainer has said already, the reason included."""
    said, result = read_json(folder / TRIAL_FILE), read_json(folder / "result.json")
    if result.get("status") == "failed" and result.get("reason"):
        return
    metrics = last_line(folder / "metrics.jsonl")
    default = {"metrics": metrics, "tags": {}, "started": said.get("started"), "ended": now()}
    write_json(folder / "result.json", {**default, **result, "status": "failed", "reason": reason})


def interrupt(folder: Path, reason: str) -> None:
    """Say why the trial was left where it is; the next attempt takes that back."""
    write_json(folder / TRIAL_FILE, {**read_json(folder / TRIAL_FILE), "interrupted": reason})


def reason_of(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, DenseLabError) else f"{type(error).__name__}: {text}"


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
