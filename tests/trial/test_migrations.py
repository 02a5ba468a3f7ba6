"""Stores that an older fairtrial made: told apart, brought up to date, and never left in between."""

import signal

import children
import pytest
import sqlalchemy as sa
import toy

from fairtrial.trial.comparison import compare
from fairtrial.trial.database import Database, StoreError
from fairtrial.trial.execute import Inline
from fairtrial.trial.migrations import scripts, upgrade
from fairtrial.trial.schema import SCHEMA_VERSION, runs
from fairtrial.trial.store import Store

FIRST_VERSION = """
CREATE TABLE fairtrial (
    key VARCHAR(32) NOT NULL,
    value TEXT NOT NULL,
    PRIMARY KEY (key)
);
CREATE TABLE runs (
    key VARCHAR(32) NOT NULL,
    task TEXT NOT NULL,
    version INTEGER NOT NULL,
    choices TEXT NOT NULL,
    seed BIGINT NOT NULL,
    split VARCHAR(16) NOT NULL,
    fingerprint TEXT NOT NULL,
    ended VARCHAR(16) NOT NULL,
    value FLOAT NOT NULL,
    outcome TEXT NOT NULL,
    environment TEXT NOT NULL,
    recorded VARCHAR(32) NOT NULL,
    PRIMARY KEY (key)
);
CREATE INDEX ix_runs_recorded ON runs (recorded);
CREATE INDEX ix_runs_task ON runs (task);
INSERT INTO fairtrial VALUES ('schema', '1');
"""


def compared(store, seeds=3):
    told = []
    with Inline(toy.load) as executor:
        found = compare(
            toy.load,
            "toy",
            {"optimizer": "Plain,Planted"},
            executor=executor,
            store=store,
            trials=6,
            seeds=seeds,
            progress=lambda **figures: told.append(figures),
        )
    return found.as_json(), told[-1]["done"] - told[-1]["stored"]


def content(location):
    """All rows of all tables, and how the tables are made."""
    database = Database(location)
    with database.engine.connect() as connection:
        inspector = sa.inspect(connection)
        found = {}
        for name in inspector.get_table_names():
            columns = [(c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(name)]
            indices = [(i["name"], i["column_names"]) for i in inspector.get_indexes(name)]
            made = (columns, sorted(indices), inspector.get_pk_constraint(name)["constrained_columns"])
            rows = connection.exec_driver_sql(f"SELECT * FROM {name} ORDER BY key").all()
            found[name] = (made, [tuple(row) for row in rows])
    database.close()
    return found


@pytest.fixture
def old(location, tmp_path):
    """A store of the first version that holds a comparison."""
    with Store(tmp_path / "new.db") as store:
        compared(store)
        with store.database.engine.connect() as connection:
            rows = [dict(row) for row in connection.execute(sa.select(runs)).mappings()]
    database = Database(location)
    with database.engine.begin() as connection:
        for statement in FIRST_VERSION.split(";")[:-1]:
            connection.exec_driver_sql(statement)
        connection.execute(runs.insert(), rows)
    database.close()
    return location


def test_every_version_after_the_first_has_its_script():
    found = {script.revision for script in scripts().walk_revisions()}
    assert found == {str(version) for version in range(2, SCHEMA_VERSION + 1)}


def test_an_older_store_is_refused_with_what_to_do_and_left_as_it_is(old):
    before = content(old)
    said = f"has schema version 1, this fairtrial reads version {SCHEMA_VERSION}: fairtrial upgrade-store --store .*"
    with pytest.raises(StoreError, match=said):
        Store(old)
    assert content(old) == before


def test_an_upgraded_store_is_made_like_a_new_one_and_has_kept_every_run(old, location, tmp_path, request):
    before = content(old)
    told, had = upgrade(old)
    assert had == 1
    assert told in old or "***" in told
    after = content(old)
    assert after["runs"] == before["runs"]
    assert after["fairtrial"][1] == [("schema", str(SCHEMA_VERSION))]
    fresh = request.getfixturevalue("postgres").new_database() if "://" in old else str(tmp_path / "fresh.db")
    Store(fresh).database.close()
    assert {name: made for name, (made, _) in content(fresh).items()} == {
        name: made for name, (made, _) in after.items()
    }
    assert upgrade(old) == (told, SCHEMA_VERSION)
    assert content(old) == after


def test_a_comparison_goes_on_in_an_upgraded_store_and_runs_only_what_is_new(old, tmp_path):
    upgrade(old)
    with Store(old) as store, Store(tmp_path / "alone.db") as alone:
        again, ran = compared(store)
        assert ran == 0
        assert again == compared(alone)[0]
        more, ran = compared(store, seeds=5)
        assert (more, ran) == compared(alone, seeds=5)


@pytest.mark.parametrize("moment", ["CREATE TABLE", "UPDATE", "COMMIT"])
def test_an_upgrade_that_is_killed_leaves_the_old_version(old, moment):
    before = content(old)
    process = children.start(children.upgrade_and_die, old, moment)
    process.join(children.PATIENCE)
    assert process.exitcode == -signal.SIGKILL
    assert content(old) == before
    assert upgrade(old)[1] == 1
    assert Store(old).count() == 42


def test_an_upgrade_that_fails_leaves_the_old_version(old):
    database = Database(old)
    with database.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE tunings (key INTEGER)")
    database.close()
    before = content(old)
    with pytest.raises(StoreError, match="cannot be used: .*tunings.* already exists"):
        upgrade(old)
    assert content(old) == before


def test_several_upgrades_at_once_make_one(old, tmp_path):
    processes = [children.start(upgrade, old) for _ in range(4)]
    for process in processes:
        process.join(children.PATIENCE)
    assert [process.exitcode for process in processes] == [0] * 4
    with Store(old) as store:
        assert store.count() == 42


@pytest.mark.parametrize("version", ["99", "newest"])
def test_a_later_store_is_neither_read_nor_upgraded(old, version):
    database = Database(old)
    with database.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE fairtrial SET value = '{version}'")
    database.close()
    before = content(old)
    for attempt in (Store, upgrade):
        with pytest.raises(StoreError, match=f"has schema version {version}, .* or the fairtrial that wrote it"):
            attempt(old)
    assert content(old) == before


def test_where_there_is_no_store_there_is_nothing_to_upgrade(location, tmp_path):
    with pytest.raises(StoreError, match="no store at .*: nothing has been run yet"):
        upgrade(location)
    assert list(tmp_path.iterdir()) == []
