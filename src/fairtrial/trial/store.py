"""Where runs are kept: a database through SQLAlchemy Core, SQLite (WAL) unless a URL says otherwise.

A run is recorded in one transaction when it ends. Killing the process at any moment loses at most the runs in flight.
"""

import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from platformdirs import user_data_path
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError

from fairtrial.contract import BadInput, Costs, Outcome
from fairtrial.trial.recipe import Run

SCHEMA_VERSION = 1
PATIENCE = 60  # seconds to wait for another process that writes

schema = sa.MetaData()
about = sa.Table(
    "fairtrial",
    schema,
    sa.Column("key", sa.String(32), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
runs = sa.Table(
    "runs",
    schema,
    sa.Column("key", sa.String(32), primary_key=True),
    sa.Column("task", sa.Text, nullable=False, index=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("choices", sa.Text, nullable=False),
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("split", sa.String(16), nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("ended", sa.String(16), nullable=False),
    sa.Column("value", sa.Float, nullable=False),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("environment", sa.Text, nullable=False),
    sa.Column("recorded", sa.String(32), nullable=False, index=True),
)


class StoreError(BadInput):
    """The store cannot be used; nothing in it was changed."""


@dataclass(frozen=True)
class Stored:
    """A recorded run, as `fairtrial runs` lists it."""

    key: str
    task: str
    version: int
    choices: Mapping[str, Any]
    seed: int
    split: str
    recorded: str
    outcome: Outcome


def default_store() -> str:
    """The environment's FAIRTRIAL_STORE, or runs.db in the user's data folder."""
    return os.environ.get("FAIRTRIAL_STORE") or str(user_data_path("fairtrial", appauthor=False) / "runs.db")


class Store:
    """Recorded runs by key.

    Args:
        location: path of an SQLite file, made if missing, or a database URL.

    Raises:
        StoreError: not a store of this version, damaged, or not to be written.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        url = _url(os.fspath(location))
        self.location = str(url) if "://" in os.fspath(location) else os.fspath(location)  # hides a URL's password
        try:
            sqlite = url.get_backend_name() == "sqlite"
            self.engine = sa.create_engine(url, connect_args={"timeout": PATIENCE} if sqlite else {})
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise StoreError(f"the store {self.location!r} is no usable path or database URL: {error}") from error
        if sqlite:
            sa.event.listen(self.engine, "connect", _prepare_sqlite)
            if url.database and url.database != ":memory:":
                _prepare_file(Path(url.database))
        with self._guarded():
            self._open()

    def _open(self) -> None:
        with self.engine.begin() as connection:
            if connection.dialect.name == "sqlite":  # one process at a time, and all tables or none
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            schema.create_all(connection)
            version = connection.scalar(sa.select(about.c.value).where(about.c.key == "schema"))
            if version is None:
                connection.execute(about.insert().values(key="schema", value=str(SCHEMA_VERSION)))
            elif version != str(SCHEMA_VERSION):
                raise _other_version(self.location, version)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self.engine.dispose()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            reason = str(error.orig).strip().splitlines()[0]
            raise StoreError(f"the store {self.location} cannot be used: {reason}") from error

    def get(self, key: str) -> Outcome | None:
        """The recorded outcome of a run, if there is one."""
        with self._guarded(), self.engine.connect() as connection:
            text = connection.scalar(sa.select(runs.c.outcome).where(runs.c.key == key))
        return None if text is None else self._outcome(key, text)

    def put(self, key: str, run: Run, task: str, version: int, fingerprint: str, outcome: Outcome) -> None:
        """Record a run, in one transaction. Equal keys mean equal results: the newest stands."""
        row = {
            "key": key,
            "task": task,
            "version": version,
            "choices": json.dumps(run.recipe.as_json(), sort_keys=True),
            "seed": run.seed,
            "split": run.split,
            "fingerprint": fingerprint,
            "ended": outcome.ended,
            "value": outcome.value,
            "outcome": json.dumps(asdict(outcome), sort_keys=True),
            "environment": json.dumps(environment(), sort_keys=True),
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self._guarded():
            try:
                with self.engine.begin() as connection:
                    connection.execute(runs.delete().where(runs.c.key == key))
                    connection.execute(runs.insert().values(row))
            except IntegrityError:
                pass  # somebody else has just recorded the same run

    def count(self) -> int:
        """How many runs are recorded."""
        with self._guarded(), self.engine.connect() as connection:
            return int(connection.scalar(sa.select(sa.func.count()).select_from(runs)) or 0)

    def list(self, *, task: str | None = None, ended: str | None = None, limit: int | None = None) -> list[Stored]:
        """Recorded runs, the newest first."""
        query = sa.select(runs).order_by(runs.c.recorded.desc(), runs.c.key).limit(limit)
        if task is not None:
            query = query.where(runs.c.task == task)
        if ended is not None:
            query = query.where(runs.c.ended == ended)
        with self._guarded(), self.engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [
            Stored(
                row["key"],
                row["task"],
                row["version"],
                self._choices(row["key"], row["choices"]),
                row["seed"],
                row["split"],
                row["recorded"],
                self._outcome(row["key"], row["outcome"]),
            )
            for row in rows
        ]

    def _choices(self, key: str, text: str) -> dict[str, Any]:
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise self._damaged(key, error) from error

    def _outcome(self, key: str, text: str) -> Outcome:
        try:
            fields = json.loads(text)
            fields["costs"] = Costs(**fields["costs"])
            fields["curve"] = [(int(step), float(value)) for step, value in fields["curve"]]
            return Outcome(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self._damaged(key, error) from error

    def _damaged(self, key: str, error: Exception) -> StoreError:
        return StoreError(f"the store {self.location} is damaged: run {key} cannot be read ({error})")


def _url(location: str) -> sa.URL:
    try:
        if "://" in location:
            return sa.make_url(location)
        return sa.URL.create("sqlite", database=str(Path(location).expanduser()))
    except (ArgumentError, ValueError, RuntimeError) as error:
        raise StoreError(f"the store named is no usable path or database URL: {error}") from error


def _prepare_file(path: Path) -> None:
    _refuse_foreign_file(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"the folder of the store {path} cannot be made: {error.strerror}") from error


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


def _other_version(location: str | Path, version: str) -> StoreError:
    return StoreError(
        f"the store {location} has schema version {version}, this fairtrial reads version {SCHEMA_VERSION}: "
        "use another store (--store) or the fairtrial that wrote it"
    )


def _refuse_foreign_file(path: Path) -> None:
    """Look at an existing file without changing it: another program's database is left untouched."""
    try:
        if path.is_dir():
            raise StoreError(f"the store {path} is a folder; name a file")
        if not path.exists() or path.stat().st_size == 0:
            return
        if not os.access(path, os.W_OK):
            raise StoreError(f"the store {path} is read-only")
        with path.open("rb") as file:  # SQLite takes any file of a few bytes for an empty database, and overwrites it
            if len(start := file.read(512)) < 512 or not start.startswith(b"SQLite format 3\0"):
                raise StoreError(f"the store {path} is damaged or no database: it does not begin like one")
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(f"the store {path} cannot be opened: {error}") from error
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not {"fairtrial", "runs"} <= tables:
            if tables:
                raise StoreError(f"{path} is a database, but no store of fairtrial")
            return
        found = connection.execute("SELECT value FROM fairtrial WHERE key = 'schema'").fetchone()
        if found and found[0] != str(SCHEMA_VERSION):
            raise _other_version(path, found[0])
    except sqlite3.Error as error:
        raise StoreError(f"the store {path} is damaged or no database: {error}") from error
    finally:
        connection.close()


@cache
def environment() -> dict[str, Any]:
    """What a recorded figure depends on beside the code: versions and the kind of machine."""
    import platform
    from importlib.metadata import version

    packages = ("fairtrial", "torch", "numpy", "scikit-learn", "optuna")
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        **{package: version(package) for package in packages},
    }
