"""The database under a store: an SQLite file (WAL), or PostgreSQL by URL. What goes wrong there is told in one line."""

import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError

from fairtrial.contract import BadInput

T = TypeVar("T")

PATIENCE = 60  # seconds to wait for another process that writes, and for a server that was lost to come back
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0  # seconds between attempts to reach a lost server; they double
DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
# A server that has gone without a word is noticed within half a minute. What the URL says of these stands.
CONNECTION = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


class StoreError(BadInput):
    """The store cannot be used; nothing in it was changed."""


class Database:
    """Transactions on a database, which is reached when the first one begins.

    Args:
        location: path of an SQLite file, or a URL: `sqlite:///…`, `postgresql://…`.

    Attributes:
        location: as a person may see it, without a password.

    Raises:
        StoreError: no usable location, or a file that is no database.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        named = os.fspath(location)
        url = _url(named)
        self.location = _shown(url) if "://" in named else named
        self.file: Path | None = None
        if url.get_backend_name() == "sqlite":
            if url.database and url.database != ":memory:" and not url.database.startswith("file:"):
                self.file = Path(url.database)
                _check_file(self.file)
            self.engine = sa.create_engine(url, connect_args={"timeout": PATIENCE})
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
        else:
            self.engine = _postgresql(url)

    def close(self) -> None:
        self.engine.dispose()

    def look(self, work: Callable[[sa.Connection], T]) -> T | None:
        """Read things as they are at one moment; None if there is no file yet. An SQLite file is left to the last byte.

        Raises:
            StoreError: it cannot be read.
        """
        if self.file is None:
            return self.transact(lambda connection: work(_at_one_moment(connection)), patience=0)
        if not self.file.exists() or self.file.stat().st_size == 0:
            return None
        address = f"{self.file.resolve().as_uri()}?mode=ro"
        engine = sa.create_engine("sqlite://", creator=lambda: sqlite3.connect(address, PATIENCE, uri=True))
        try:
            with engine.connect() as connection:
                return work(_at_one_moment(connection))
        except DBAPIError as error:
            raise StoreError(f"the store {self.location} is damaged or no database: {_reason(error)}") from error
        finally:
            engine.dispose()

    def make_folder(self) -> None:
        """Make the folder for a new SQLite file."""
        if self.file is not None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StoreError(f"the folder of the store {self.file} cannot be made: {error.strerror}") from error

    def transact(self, work: Callable[[sa.Connection], T], *, patience: float | None = None) -> T:
        """Do some work in a transaction of its own: all of it stands in the end, or nothing.

        When a server is lost, the work is done anew as soon as it is back, if that takes no longer than `PATIENCE`
        seconds, or `patience` if given. The work must therefore come to the same when it is done twice.

        Raises:
            StoreError: it could not be done.
        """
        patience = PATIENCE if patience is None else patience
        pause, lost = FIRST_PAUSE, None
        while True:
            try:
                with self.engine.begin() as connection:
                    return work(connection)
            except DBAPIError as error:
                if not self._is_loss(error):
                    raise StoreError(f"the store {self.location} cannot be used: {_reason(error)}") from error
                now = time.monotonic()
                lost = now if lost is None else lost
                if now + pause > lost + patience:
                    tried = f" for {now - lost:.0f} seconds" if patience else ""
                    raise StoreError(f"the store {self.location} cannot be reached{tried}: {_reason(error)}") from error
            except (OverflowError, UnicodeError) as error:
                raise StoreError(f"the store {self.location} cannot hold this: {error}") from error
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _is_loss(self, error: DBAPIError) -> bool:
        """Whether the server went away in the middle of something, or no connection came about at all."""
        return self.engine.dialect.name != "sqlite" and (error.connection_invalidated or error.statement is None)


def alone(connection: sa.Connection) -> None:
    """Until its transaction ends, nobody else makes or upgrades the store, nor writes at all to an SQLite file."""
    if connection.dialect.name == "sqlite":
        connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{PATIENCE}s'")
        connection.exec_driver_sql("SELECT pg_advisory_xact_lock(hashtext('fairtrial'))")


def _at_one_moment(connection: sa.Connection) -> sa.Connection:
    """What another process changes while this transaction reads does not show in it."""
    sqlite = connection.dialect.name == "sqlite"
    connection.exec_driver_sql("BEGIN" if sqlite else "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    return connection


def _url(named: str) -> sa.URL:
    if "://" not in named:
        try:
            return sa.URL.create("sqlite", database=str(Path(named).expanduser()))
        except RuntimeError as error:
            raise StoreError(f"the store {named!r} is no usable path or database URL: {error}") from error
    try:
        url = sa.make_url(named)
    except (ArgumentError, ValueError):
        url = None
    if url is None or "@" in (url.host or ""):  # what could be told of it might be part of a password
        raise StoreError(
            "the store named is no usable path or database URL: write postgresql://USER:PASSWORD@HOST:PORT/DATABASE, "
            "and in user and password %40 for @, %3A for : and %2F for /"
        )
    if url.drivername not in DRIVERS:
        raise StoreError(
            f"the store {_shown(url)} is no usable path or database URL: "
            "runs are kept in an SQLite file or under postgresql://…"
        )
    return url


def _shown(url: sa.URL) -> str:
    secret = [key for key in url.query if "password" in key]
    return url.update_query_dict(dict.fromkeys(secret, "***")).render_as_string(hide_password=True)


def _postgresql(url: sa.URL) -> sa.Engine:
    given = {key: value for key, value in CONNECTION.items() if key not in url.query}
    url = url.set(drivername=DRIVERS[url.drivername])
    try:
        return sa.create_engine(url, connect_args=given, pool_pre_ping=True)
    except ImportError as error:
        raise StoreError(
            f"a store in PostgreSQL needs an extra: pip install 'fairtrial[postgres]' ({error})"
        ) from error


def _check_file(path: Path) -> None:
    """Refuse what cannot be an SQLite file."""
    try:
        if path.is_dir():
            raise StoreError(f"the store {path} is a folder; name a file")
        if not path.exists():
            return
        if not os.access(path, os.W_OK):
            raise StoreError(f"the store {path} is read-only")
        with path.open("rb") as file:  # SQLite takes any file of a few bytes for an empty database, and overwrites it
            start = file.read(512)
    except OSError as error:
        raise StoreError(f"the store {path} cannot be opened: {error.strerror}") from error
    if start and (len(start) < 512 or not start.startswith(b"SQLite format 3\0")):
        raise StoreError(f"the store {path} is damaged or no database: it does not begin like one")


def _prepare_sqlite(connection: sqlite3.Connection, _: object) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:  # unlike all else, the switch to WAL does not wait for its turn
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous=NORMAL")


def _reason(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0]
