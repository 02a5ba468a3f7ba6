"""The tables of a store, and which version of them a database has.

Version 1 had no tunings. Every later version is reached from the one before by a script in `migrations/versions`.
"""

import shlex

import sqlalchemy as sa

from fairtrial.trial.database import StoreError, alone

SCHEMA_VERSION = 2

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
tunings = sa.Table(
    "tunings",
    schema,
    sa.Column("key", sa.String(32), primary_key=True),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("tried", sa.Text, nullable=False),
    sa.Column("recorded", sa.String(32), nullable=False),
)


def schema_version(connection: sa.Connection, location: str) -> str | None:
    """The version of the schema that a database has; None where there is no store yet.

    Raises:
        StoreError: there are tables that are not fairtrial's.
    """
    inspector = sa.inspect(connection)
    present = [name for name in schema.tables if inspector.has_table(name)]
    alien = connection.dialect.name == "sqlite" and inspector.get_table_names()  # a server's database may be shared
    if not present and not alien:
        return None
    if about.name in present and runs.name in present:
        columns = {column["name"] for column in inspector.get_columns(about.name)}
        asked = sa.select(about.c.value).where(about.c.key == "schema")
        version: str | None = connection.scalar(asked) if {"key", "value"} <= columns else None
        if version is not None:
            return version
    whose = f": its table {present[0]!r} is another program's" if present else ""
    raise StoreError(f"{location} is a database, but no store of fairtrial{whose}")


def make_schema(connection: sa.Connection, location: str) -> str:
    """Make a store's tables unless another process has just done it; gives the version that is there now."""
    alone(connection)
    version = schema_version(connection, location)
    if version is None:
        version = str(SCHEMA_VERSION)
        schema.create_all(connection, checkfirst=False)
        connection.execute(about.insert().values(key="schema", value=version))
    return version


def other_version(location: str, version: str) -> StoreError:
    """That a store is of another version than this one, and what to do."""
    older = version.isdecimal() and int(version) < SCHEMA_VERSION
    what_to_do = (
        f"fairtrial upgrade-store --store {shlex.quote(location)} brings it up to date"
        if older
        else "use another store (--store) or the fairtrial that wrote it"
    )
    found = f"schema version {version}, this fairtrial reads version {SCHEMA_VERSION}"
    return StoreError(f"the store {location} has {found}: {what_to_do}")
