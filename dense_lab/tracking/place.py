"""Where a study's MLflow store is, how it is opened, and what of it is remembered beside the study's files."""

from __future__ import annotations

import logging
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dense_lab.files import read_json, write_json
from dense_lab.results import StudyResults
from dense_lab.urls import masked

if TYPE_CHECKING:
    from mlflow import MlflowClient

NONE = "none"
"""Given to a search for the tracking URI, leaves MLflow out."""
MEMORY = "mlflow.json"
"""What was sent, in the study's folder and in each trial's."""
_SQLITE = "sqlite:///"


def default_uri(folder: Path) -> str:
    """The database in the study's folder."""
    return f"{_SQLITE}{folder.resolve()}/mlflow.db"


def choose_uri(folder: Path, uri: str | None) -> str:
    """`uri`, else the one the study's searches were given, else the default."""
    given = read_json(folder / "manifest.json").get("mlflow")
    return uri or (given if given and given != NONE else default_uri(folder))


def open_client(uri: str) -> MlflowClient:
    """A client that looks nowhere else, and that gives a dead server up within seconds rather than minutes."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    probe(uri)
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if uri.startswith(_SQLITE):
        _create(Path(uri.removeprefix(_SQLITE)))
    return MlflowClient(uri)


def _create(path: Path) -> None:
    """Make MLflow's database whole or not at all: killed half-way through its migrations, it could not be opened again.

    It takes seconds, and two processes that do it to one file at once break it as well.
    """
    from mlflow import MlflowClient

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    MlflowClient(f"{_SQLITE}{draft}").search_experiments(max_results=1)
    # Another process may have made one meanwhile, and put runs into it.
    with suppress(FileExistsError):
        os.link(draft, path)
    draft.unlink()


def probe(uri: str) -> None:
    """Raise at once when an SQLite database is locked; MLflow itself would try again for up to an hour."""
    path = Path(uri.removeprefix(_SQLITE))
    if not uri.startswith(_SQLITE) or not path.exists():
        return
    with closing(sqlite3.connect(path, timeout=1, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("ROLLBACK")


class Memory:
    """What one file remembers of what one tracking URI has been sent; written after every step."""

    def __init__(self, path: Path, place: str) -> None:
        self.path, self.place = path, place
        self.sent: dict[str, Any] = read_json(path).get(place, {})

    def update(self, **values: Any) -> None:
        """Remember `values` as well."""
        self.sent |= values
        write_json(self.path, {**read_json(self.path), self.place: self.sent})

    def forget(self) -> None:
        """Start over, as though nothing had been sent."""
        self.sent = {}
        self.update()


def place_of(folder: Path, uri: str) -> str:
    """How a memory calls a tracking URI: without a password, and so that the folder can be moved."""
    return "mlflow.db" if uri == default_uri(folder) else masked(uri)


def pending(study: StudyResults, uri: str) -> list[int]:
    """Numbers of the trials of which something has not been sent to `uri`; imports nothing and asks nobody."""
    place = place_of(study.folder, uri)
    return [t.number for t in study.trials if t.folder and not Memory(t.folder / MEMORY, place).sent.get("done")]
