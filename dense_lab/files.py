"""Files that several processes read and write: whole or not at all, and a lock that dies with its holder."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a later run after a crash, sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file or it is not whole yet."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> Iterable[dict[str, float]]:
    """The objects of a file of JSON lines; a last line that is still being written is left out."""
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return
    for line in text.splitlines(keepends=True):
        if line.endswith("\n") and line.strip():
            yield json.loads(line)


def last_line(path: Path, tail: int = 8192) -> dict[str, float]:
    """The last whole line of a file of JSON lines, read from its last `tail` bytes; empty when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - tail))
            lines = file.read().split(b"\n")[:-1]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    # The first of several pieces may be the end of a line.
    whole = lines if size <= tail else lines[1:]
    found: dict[str, float] = json.loads(whole[-1]) if whole and whole[-1].strip() else {}
    return found


class FileLock:
    """An exclusive lock between processes of one host; the kernel takes it back when its holder is killed.

    The file is left in place when the lock is released. One object is not for two threads.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    def acquire(self, *, wait: bool = True) -> bool:
        """Take the lock; with `wait=False`, return False at once when somebody else holds it."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._file = descriptor
        return True

    def release(self) -> None:
        """Give the lock back; nothing happens when it is not held."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.release()
