"""Connections to the databases of the study and the tracker: an SQLite file, or a server."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import IntegrityError, InvalidatePoolError

T = TypeVar("T")

BUSY_SECONDS = 60.0
"""How long one writer waits for another on the same SQLite file."""

IDLE_SECONDS = 1.0
"""A connection to a server that lay unused for longer is tried before it is used."""

MAKERS = 10
"""How many may make the tables of one new database on a server at once."""


_used: WeakSet[Engine] = WeakSet()


@event.listens_for(Engine, "engine_connect")
def _note(connection: Connection) -> None:
    _used.add(connection.engine)


@atexit.register
def close_all() -> None:
    """Close what lies unused of every database of this process, MLflow's too, which closes none of them.

    The last connection to an SQLite file folds its log into it. Left to the end of the process, that is left
    to chance.
    """
    for engine in list(_used):
        engine.dispose()


@event.listens_for(Engine, "connect")
def _do_not_wait_for_the_disk(connection: Any, record: Any) -> None:
    """Halves the time of a write, MLflow's too.

    What is committed survives the death of the process. A power cut may take the last moments with it, and
    leaves the database whole.
    """
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=NORMAL")


class _AppendsToLog(sqlite3.Connection):
    """Writes go to a log of the file's own: 1 ms, not 15, and readers never wait for the driver."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode=WAL")


def sqlite_options(for_writing: bool) -> dict[str, Any]:
    """What `sqlite3.connect` is given."""
    factory = {"factory": _AppendsToLog} if for_writing else {}
    return {"timeout": BUSY_SECONDS, **factory}


@contextlib.contextmanager
def one_makes(file: Path) -> Iterator[None]:
    """Others wait who are about to make a database in the same folder, which is made.

    SQLite, Optuna and MLflow let several make one at once, and all but one of them fail. Nobody waits for
    longer than `BUSY_SECONDS`, or on a file system that knows no locks.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        _wait_to_lock(folder)
        yield
    finally:
        os.close(folder)


def _wait_to_lock(folder: int) -> None:
    give_up = time.monotonic() + BUSY_SECONDS
    while time.monotonic() < give_up:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:
            return
        else:
            return


def make_on_a_server(make: Callable[[], T]) -> T:
    """What `make` gives, which makes the tables of a database that lacks them.

    Of several that find the same new database one makes each table, and the others fail: they look again.
    """
    for _ in range(MAKERS - 1):
        try:
            return make()
        except Exception as error:  # a database says it in its own way
            if not isinstance(error, IntegrityError) and "already exists" not in str(error):
                raise
            time.sleep(0.05)
    return make()


def try_before_use(engine: Engine) -> None:
    """A connection that a server has dropped, as when it restarts, is noticed before it is used.

    SQLAlchemy's own `pool_pre_ping` asks the server before each use, also of a connection in steady use.
    """

    @event.listens_for(engine, "checkin")
    def note_the_time(connection: Any, record: Any) -> None:
        record.info["used"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def try_if_idle(connection: Any, record: Any, proxy: Any) -> None:
        if time.monotonic() - record.info.get("used", -math.inf) < IDLE_SECONDS:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error:
            raise InvalidatePoolError from None  # SQLAlchemy then connects anew


def without_transactions(engine: Engine) -> Engine:
    """The same database for single statements, which need none.

    On a server an engine of its own: there a connection that changes between the two costs a message each
    time.
    """
    if engine.dialect.name == "sqlite":
        return engine.execution_options(isolation_level="AUTOCOMMIT")
    single = create_engine(engine.url, isolation_level="AUTOCOMMIT")
    try_before_use(single)
    return single
