"""Optuna's storage, the ledger of trials: SQLite in the study's folder, or any database by URL."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dense_lab.errors import InputError, MachineError
from dense_lab.urls import masked

if TYPE_CHECKING:
    from collections.abc import Sequence

    import optuna
    from optuna.storages import BaseStorage, RDBStorage
    from sqlalchemy.engine import Engine

    from dense_lab.study import Objective

HEARTBEAT = 20
"""Seconds between two heartbeats of a running trial."""
GRACE = 120
"""Seconds without a heartbeat after which a trial on another machine is given up and run again."""
_PATIENCE = 60
"""Seconds that a writer waits for another one to finish."""
_SQLITE = "sqlite://"
_MEETINGS = 5
"""Attempts at making the tables of a fresh database while other machines do so."""
_DRIVERS = {"postgresql": "psycopg[binary]", "mysql": "mysqlclient"}
"""Packages that reach a database, by the beginning of its URL."""


def default_url(folder: Path) -> str:
    """URL of the database within a study's folder."""
    return f"{_SQLITE}/{folder.resolve()}/optuna.db"


def open_storage(url: str, *, create: bool = False) -> BaseStorage:
    """A storage with heartbeat; its tables are made with `create` only, which one process does before others start.

    Raises InputError for a URL that is none, MachineError when the database cannot be reached.
    """
    import optuna
    import sqlalchemy.exc

    optuna.logging.set_verbosity(logging.ERROR)
    local = url.startswith(_SQLITE)
    arguments: dict[str, Any] = {"connect_args": {"timeout": _PATIENCE}} if local else {"pool_pre_ping": True}
    with warnings.catch_warnings():
        # The heartbeat is what this is built on; that its arguments may change is settled by pinning Optuna.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            storage = _connected(url, arguments, create=create)
        except (ValueError, sqlalchemy.exc.ArgumentError, sqlalchemy.exc.NoSuchModuleError) as error:
            raise InputError(
                f"--storage {masked(url)}: {error}. Expected such as postgresql://user@host/base"
            ) from None
        except ImportError as error:
            driver = next((package for name, package in _DRIVERS.items() if url.startswith(name)), "its driver")
            raise MachineError(f"--storage {masked(url)}: {error} Such as: pip install '{driver}'") from None
        except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            cause = " ".join(str(error.__cause__ or error).split())[:200]
            raise MachineError(f"--storage {masked(url)}: the database does not answer: {cause}") from None
    if local:
        _make_sqlite_share(storage.engine)
    return optuna.storages.get_storage(storage)


def _connected(url: str, arguments: dict[str, Any], *, create: bool) -> RDBStorage:
    import optuna
    import sqlalchemy.exc

    for attempt in range(_MEETINGS):
        try:
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs=arguments,
                skip_table_creation=not create,
                heartbeat_interval=HEARTBEAT,
                grace_period=GRACE,
            )
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            # Another machine makes the tables of a fresh database at this very moment.
            if not create or attempt == _MEETINGS - 1:
                raise
            time.sleep(0.5)
    raise AssertionError("the last attempt returns or raises")


def _make_sqlite_share(engine: Engine) -> None:
    """Let several processes write: readers never wait, and a transaction holds the write lock from its first statement.

    The latter makes Optuna's read-then-write transactions atomic (claiming a waiting trial, failing a stale one),
    which SQLite's deferred transactions are not.
    """
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def connected(connection: Any, record: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    @event.listens_for(engine, "begin")
    def began(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    # Connections made before the listeners were there know nothing of them.
    engine.dispose()


def create_study(url: str, name: str, goals: Sequence[Objective], digest: str) -> tuple[optuna.Study, BaseStorage]:
    """The study in the storage, made when it is not there; raises InputError when another one has its name there."""
    import optuna

    storage = open_storage(url, create=True)
    study = optuna.create_study(
        storage=storage, study_name=name, directions=[goal.direction for goal in goals], load_if_exists=True
    )
    stored = study.user_attrs.get("digest", digest)
    if stored != digest:
        raise InputError(
            f"{masked(url)} has another study named {name!r} (digest {stored}, this one has {digest}): "
            "give one of them a new name"
        )
    study.set_user_attr("digest", digest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([goal.metric for goal in goals])
    return study, storage


def load_study(url: str, name: str) -> tuple[optuna.Study, BaseStorage]:
    """The study that the supervising process has made."""
    import optuna

    storage = open_storage(url)
    return optuna.load_study(study_name=name, storage=storage), storage
