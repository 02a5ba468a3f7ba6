"""From an older version of a store's schema to this one: Alembic's scripts, one in `versions` for each version.

The version stands in the table `fairtrial`, where every fairtrial looks for it, and not in a table of Alembic's.
"""

import os
from functools import partial
from pathlib import Path

import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from fairtrial.trial.database import Database, StoreError, alone
from fairtrial.trial.schema import SCHEMA_VERSION, about, other_version, schema_version


def upgrade(location: str | os.PathLike[str]) -> tuple[str, int]:
    """Bring a store to this version's schema, all the way or not at all; gives where it is, and the version it had.

    Raises:
        StoreError: no store, of a later version, or not to be reached or written; it is then as it was.
    """
    database = Database(location)
    try:
        had = database.look(partial(_version, location=database.location))
        if had is None:
            raise _no_store(database.location)
        if had < SCHEMA_VERSION:
            had = database.transact(partial(_upgrade, location=database.location), patience=0)
        return database.location, had
    finally:
        database.close()


def _version(connection: sa.Connection, location: str) -> int:
    found = schema_version(connection, location)
    if found is None:
        raise _no_store(location)
    if not found.isdecimal() or int(found) > SCHEMA_VERSION:
        raise other_version(location, found)
    return int(found)


def _no_store(location: str) -> StoreError:
    return StoreError(f"no store at {location}: nothing has been run yet")


def _upgrade(connection: sa.Connection, location: str) -> int:
    alone(connection)
    had = _version(connection, location)
    with Operations.context(MigrationContext.configure(connection)):
        for version in range(had + 1, SCHEMA_VERSION + 1):
            scripts().get_revision(str(version)).module.upgrade()
    connection.execute(about.update().where(about.c.key == "schema").values(value=str(SCHEMA_VERSION)))
    return had


def scripts() -> ScriptDirectory:
    """The scripts, by the version that each leads to."""
    return ScriptDirectory(str(Path(__file__).parent))
