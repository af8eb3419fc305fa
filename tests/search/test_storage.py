"""Opening Optuna's storage: what is said when it cannot be, and machines that meet at a fresh database."""

from __future__ import annotations

import optuna
import pytest
import sqlalchemy.exc

from dense_lab.errors import InputError, MachineError
from dense_lab.search import storage


def meeting(times: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the first `times` attempts at making tables find those of another machine half made."""
    tried: list[int] = []

    class Met(optuna.storages.RDBStorage):
        def __init__(self, *args, **named):
            tried.append(1)
            if len(tried) <= times:
                raise sqlalchemy.exc.IntegrityError("CREATE TYPE", {}, Exception("duplicate key value"))
            super().__init__(*args, **named)

    monkeypatch.setattr(optuna.storages, "RDBStorage", Met)
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    return tried


def test_machines_that_make_the_tables_at_once_all_go_on(tmp_path, monkeypatch) -> None:
    tried = meeting(3, monkeypatch)
    storage.open_storage(storage.default_url(tmp_path), create=True)
    assert len(tried) == 4


def test_tables_that_never_come_are_an_error(tmp_path, monkeypatch) -> None:
    meeting(100, monkeypatch)
    with pytest.raises(MachineError, match=r"does not answer: .*duplicate key value"):
        storage.open_storage(storage.default_url(tmp_path), create=True)


def test_a_worker_makes_no_tables_and_does_not_wait(tmp_path, monkeypatch) -> None:
    tried = meeting(1, monkeypatch)
    with pytest.raises(MachineError):
        storage.open_storage(storage.default_url(tmp_path))
    assert len(tried) == 1


def test_a_url_that_is_none() -> None:
    with pytest.raises(InputError, match="Expected such as postgresql://user@host/base"):
        storage.open_storage("nonsense", create=True)


def test_the_package_of_a_database_is_named_and_its_password_is_not(monkeypatch) -> None:
    def missing(*args, **named):
        raise ImportError("Failed to import DB access module.")

    monkeypatch.setattr(optuna.storages, "RDBStorage", missing)
    with pytest.raises(MachineError, match=r"pip install 'psycopg\[binary\]'") as error:
        storage.open_storage("postgresql://me:hidden@host/base", create=True)
    assert "hidden" not in str(error.value)
