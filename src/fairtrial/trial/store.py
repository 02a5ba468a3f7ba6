"""Where runs are kept: a database through SQLAlchemy Core, SQLite unless a URL says PostgreSQL.

A run is recorded in one transaction when it ends. Killing the process at any moment loses at most the runs in flight.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, partial
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import sqlalchemy as sa
from platformdirs import user_data_path
from sqlalchemy.dialects import postgresql, sqlite

from fairtrial.contract import Costs, Ended, Outcome
from fairtrial.trial.database import Database, StoreError
from fairtrial.trial.recipe import Run
from fairtrial.trial.schema import SCHEMA_VERSION, make_schema, other_version, runs, schema_version, tunings

if TYPE_CHECKING:
    from fairtrial.trial.tuning import Tried

T = TypeVar("T")
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
AT_ONCE = 900  # keys that are asked for in one query; SQLite may take no more than 999


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

    Every method tries for a while to reach a server that was lost, and raises StoreError if it does not come back or if
    something else is wrong.

    Args:
        location: path of an SQLite file, made if missing, or a URL: `sqlite:///…`, `postgresql://…`.

    Attributes:
        location: as a person may see it, without a password.

    Raises:
        StoreError: not a store of this version, damaged, or not to be reached or written.
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.database = Database(location)
        self.location = self.database.location
        version = self.database.look(partial(schema_version, location=self.location))
        if version is None:
            self.database.make_folder()
            version = self.database.transact(partial(make_schema, location=self.location), patience=0)
        if version != str(SCHEMA_VERSION):
            raise other_version(self.location, version)

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *exception: object) -> None:
        self.database.close()

    def get(self, key: str) -> Outcome | None:
        """The recorded outcome of a run, if there is one."""
        return self.outcomes([key]).get(key)

    def outcomes(self, keys: Sequence[str]) -> dict[str, Outcome]:
        """The recorded outcomes of those of the runs that there are, by key."""
        return {key: self._outcome(key, text) for key, text in self._texts(runs.c.key, runs.c.outcome, keys)}

    def put(self, key: str, run: Run, task: str, version: int, fingerprint: str, outcome: Outcome) -> None:
        """Record a run. Equal keys mean equal results: only a run that was pruned gives way to one that came later."""
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
            "recorded": _now(),
        }
        insert = self._insert(runs).values(row)
        later = {name: insert.excluded[name] for name in row}
        self._write(
            insert.on_conflict_do_update(index_elements=[runs.c.key], set_=later, where=runs.c.ended == "pruned")
        )

    def check_writable(self) -> None:
        """Refuse a store that can only be read, before anything is run in vain."""
        nothing = sa.select(runs).where(sa.false())
        self._write(self._insert(runs).from_select(list(runs.c.keys()), nothing))

    def tunings(self, keys: Sequence[str]) -> dict[str, "Sequence[Tried]"]:
        """What those of the tunings tried that are recorded, by key."""
        return {key: self._tried(key, text) for key, text in self._texts(tunings.c.key, tunings.c.tried, keys)}

    def put_tuning(self, key: str, task: str, tried: "Sequence[Tried]") -> None:
        """Record what a tuning tried; of equal keys the newest stands."""
        row = {"key": key, "task": task, "tried": json.dumps(tried), "recorded": _now()}
        self._write(self._insert(tunings).values(row).on_conflict_do_update(index_elements=[tunings.c.key], set_=row))

    def count(self) -> int:
        """How many runs are recorded."""
        query = sa.select(sa.func.count()).select_from(runs)
        return self.database.transact(lambda connection: int(connection.scalar(query) or 0))

    def list(self, *, task: str | None = None, ended: str | None = None, limit: int | None = None) -> list[Stored]:
        """Recorded runs, the newest first."""
        columns = (
            runs.c[name] for name in ("key", "task", "version", "choices", "seed", "split", "recorded", "outcome")
        )
        query = sa.select(*columns).order_by(runs.c.recorded.desc(), runs.c.key).limit(limit)
        if task is not None:
            query = query.where(runs.c.task == task)
        if ended is not None:
            query = query.where(runs.c.ended == ended)
        rows = self.database.transact(lambda connection: connection.execute(query).all())
        return [
            Stored(
                self._intact(row.key, row.key, str),
                self._intact(row.key, row.task, str),
                self._intact(row.key, row.version, int),
                self._choices(row.key, row.choices),
                self._intact(row.key, row.seed, int),
                self._intact(row.key, row.split, str),
                self._intact(row.key, row.recorded, str),
                self._outcome(row.key, row.outcome),
            )
            for row in rows
        ]

    def _texts(self, key: sa.Column[str], text: sa.Column[str], wanted: Sequence[str]) -> Sequence[tuple[str, str]]:
        if not wanted:
            return []

        def read(connection: sa.Connection) -> Sequence[tuple[str, str]]:
            found = []
            for start in range(0, len(wanted), AT_ONCE):
                asked = sa.select(key, text).where(key.in_(wanted[start : start + AT_ONCE]))
                found += [(row[0], row[1]) for row in connection.execute(asked)]
            return found

        return self.database.transact(read)

    def _insert(self, table: sa.Table) -> Any:
        return {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[self.database.engine.dialect.name](table)

    def _write(self, statement: sa.Insert) -> None:
        self.database.transact(lambda connection: connection.execute(statement))

    def _intact(self, key: str, value: T, kind: type[T]) -> T:
        """SQLite keeps whatever it is given, in any column."""
        if not isinstance(value, kind):
            raise self._damaged(f"run {key}", f"{value!r} is no {kind.__name__}")
        return value

    def _choices(self, key: str, text: str) -> dict[str, Any]:
        try:
            read = json.loads(text)
            return {slot: {"name": choice["name"], "params": dict(choice["params"])} for slot, choice in read.items()}
        except UNREADABLE as error:
            raise self._damaged(f"run {key}", error) from error

    def _outcome(self, key: str, text: str) -> Outcome:
        try:
            fields = json.loads(text)
            fields["costs"] = Costs(**fields["costs"])
            fields["curve"] = [(int(step), float(value)) for step, value in fields["curve"]]
            outcome = Outcome(**fields)
            _check(outcome)
        except UNREADABLE as error:
            raise self._damaged(f"run {key}", error) from error
        return outcome

    def _tried(self, key: str, text: str) -> "Sequence[Tried]":
        try:
            return [
                (dict(params), None if stopped is None else int(stopped), float(value))
                for params, stopped, value in json.loads(text)
            ]
        except UNREADABLE as error:
            raise self._damaged(f"tuning {key}", error) from error

    def _damaged(self, what: str, why: object) -> StoreError:
        return StoreError(f"the store {self.location} is damaged: {what} cannot be read ({shorten(str(why), 200)})")


def _check(outcome: Outcome) -> None:
    """Refuse what no run comes to."""
    known = [cost for cost in vars(outcome.costs).values() if cost is not None]
    for number in (outcome.value, outcome.seconds, *outcome.metrics.values(), *known):
        math.isfinite(number)  # a text or a list is a TypeError
    if not math.isfinite(outcome.value):
        raise ValueError(f"the value {outcome.value} is not finite")
    if outcome.ended not in get_args(Ended) or not isinstance(outcome.error, str | None):
        raise ValueError(f"it ended {outcome.ended!r} with {outcome.error!r}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


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
