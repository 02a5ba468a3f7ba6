"""A store in PostgreSQL: what is refused and how that is told, who may only read, and a server that goes away."""

import json
import subprocess
import sys
import threading
import time

import children
import psycopg
import pytest
import toy

from fairtrial.trial import database
from fairtrial.trial.comparison import compare
from fairtrial.trial.database import StoreError
from fairtrial.trial.execute import Inline
from fairtrial.trial.store import Store

WANTED = {"optimizer": "Plain,Planted", "filter": "Blurred"}
OTHERS = {"optimizer": "Plain,Twin"}


@pytest.fixture
def url(postgres):
    """Of an empty database; the server runs again after the test, whatever it did."""
    yield postgres.new_database()
    postgres.start()


def name_of(url):
    return url.rpartition("/")[2]


def compared(store, wanted=WANTED, reference="toy", **more):
    with Inline(toy.load) as executor:
        return compare(toy.load, reference, wanted, executor=executor, store=store, trials=6, seeds=3, **more)


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_any_of_the_usual_ways_to_write_the_url_will_do(url, scheme):
    with Store(url) as store:
        children.put(store, 1)
    with Store(url.replace("postgresql", scheme)) as store:
        assert store.count() == 1
        assert store.location == f"{scheme}://postgres:***@{url.rpartition('@')[2]}"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda url: url.replace("@127", "secret@127"), 'FATAL:  password authentication failed for user "postgres"'),
        (lambda url: f"{url}x", 'FATAL:  database "db_.*x" does not exist'),
        (lambda url: "postgresql://u:secret@127.0.0.1:1/db", "port 1 failed: Connection refused"),
        (lambda url: "postgresql://u:secret@no-such-host.invalid/db", "failed to resolve host 'no-such-host.invalid'"),
        (lambda url: "postgresql://127.0.0.1:1/db?user=u&password=secret", "Connection refused"),
        (lambda url: f"{url}?nosuchoption=1", 'invalid connection option "nosuchoption"'),
        (lambda url: "postgresql://u:my@secret@127.0.0.1/db", "%40 for @"),
        (lambda url: "postgresql://u:my@very:secret@127.0.0.1/db", "%40 for @"),
        (lambda url: "postgresql+psycopg2://u:secret@127.0.0.1/db", "an SQLite file or under postgresql://"),
        (lambda url: "mysql://u:secret@127.0.0.1/db", "an SQLite file or under postgresql://"),
    ],
)
def test_what_cannot_be_reached_is_told_in_one_line_without_a_password(postgres, url, changed, said):
    with pytest.raises(StoreError, match=said) as caught:
        Store(changed(url))
    told = str(caught.value)
    assert "\n" not in told
    assert "secret" not in told
    assert postgres.password not in told


def test_without_the_driver_the_extra_is_named():
    script = "import sys; sys.modules['psycopg'] = None; from fairtrial.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", script, "runs", "--store", "postgresql://host/db"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("fairtrial: a store in PostgreSQL needs an extra: pip install 'fairtrial[postgres]'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "statements",
    [
        ["CREATE TABLE runs (run_uuid TEXT)"],
        ["CREATE TABLE tunings (key TEXT)"],
        ["CREATE VIEW fairtrial AS SELECT 1 AS key"],
        ["CREATE TABLE fairtrial (name TEXT)", "CREATE TABLE runs (key TEXT)"],
        ["CREATE TABLE fairtrial (key TEXT, value TEXT)", "CREATE TABLE runs (key TEXT)"],
    ],
)
def test_another_programs_tables_are_refused_and_left_alone(postgres, url, statements):
    postgres.execute(name_of(url), *statements)
    with pytest.raises(
        StoreError, match="is a database, but no store of fairtrial: its table '.*' is another program's"
    ):
        Store(url)
    with psycopg.connect(url) as connection:
        counted = connection.execute("SELECT count(*) FROM information_schema.tables WHERE table_schema = 'public'")
        assert counted.fetchone() == (len(statements),)


def test_other_tables_in_the_database_are_no_trouble(postgres, url):
    postgres.execute(
        name_of(url), "CREATE TABLE alembic_version (version_num TEXT)", "CREATE TABLE experiments (id INT)"
    )
    with Store(url) as store:
        children.put(store, 1)
        assert store.count() == 1


def test_who_may_only_read_gets_a_comparison_that_is_stored_and_is_stopped_before_a_run_in_vain(
    postgres, url, tmp_path
):
    with Store(url) as store:
        written = compared(store, OTHERS).as_json()
    role = f"reader_{name_of(url)}"
    grants = [f"CREATE ROLE {role} LOGIN PASSWORD 'r'", f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}"]
    postgres.execute(name_of(url), *grants, "DELETE FROM tunings")
    with Store(postgres.url(name_of(url), role, "r")) as store:
        assert compared(store, OTHERS).as_json() == written
        with pytest.raises(StoreError, match="cannot be used: permission denied for table runs"):
            compared(store, reference=f"toy log={tmp_path / 'log'}")
    assert not (tmp_path / "log").exists(), "nothing has been run"
    empty = postgres.new_database()
    with pytest.raises(StoreError, match="cannot be used: permission denied for schema public"):
        Store(postgres.url(name_of(empty), role, "r"))


def test_what_the_database_cannot_hold_is_told(url):
    with Store(url) as store:
        for task in ("\x00", "\ud800"):
            with pytest.raises(StoreError, match="cannot be used|cannot hold this"):
                children.put(store, 1, task=task)
        with pytest.raises(StoreError, match="out of range"):
            store.put("k", children.job("raise").run, "toy", 2**40, "f", toy.Outcome(0.0))
        assert store.count() == 0


def test_comparisons_and_a_reader_at_once_come_to_the_same_as_one_after_the_other(location, tmp_path):
    with Store(tmp_path / "alone.db") as alone:
        expected = [json.loads(json.dumps(compared(alone, wanted).as_json())) for wanted in (WANTED, OTHERS)]
        keys = {stored.key for stored in alone.list()}
    stop = tmp_path / "stop"
    answers = [tmp_path / f"{place}.json" for place in range(4)]
    drivers = [
        children.start(children.compare_into, location, str(answer), "toy pause=0.005", wanted, 6, 3)
        for answer, wanted in zip(answers, [WANTED, OTHERS, WANTED, OTHERS], strict=True)
    ]
    reader = children.start(children.read_until, str(stop), location)
    for driver in drivers:
        driver.join(children.PATIENCE)
    stop.touch()
    reader.join(children.PATIENCE)
    assert [process.exitcode for process in (*drivers, reader)] == [0] * 5
    assert [json.loads(answer.read_text()) for answer in answers] == expected * 2
    with Store(location) as store:
        assert {stored.key for stored in store.list()} == keys
        assert store.count() == len(keys)


def test_a_server_that_was_started_anew_between_two_runs_is_not_noticed(postgres, url, capfd):
    def restart(*, done, **_):
        if done in (5, 30):
            postgres.stop("fast" if done == 5 else "immediate")
            postgres.start()

    with Store(url) as store, Store("sqlite://") as alone:
        assert compared(store, progress=restart).as_json() == compared(alone).as_json()
        assert store.count() == alone.count()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_a_server_that_is_gone_for_a_while_is_waited_for(postgres, url, how, capfd):
    back = threading.Timer(1.5, postgres.start)

    def stop(*, done, **_):
        if done == 5:
            postgres.stop(how)
            back.start()

    with Store(url) as store, Store("sqlite://") as alone:
        assert compared(store, progress=stop).as_json() == compared(alone).as_json()
        assert store.count() == alone.count()
        back.join()
    assert capfd.readouterr().err == ""


def test_a_server_that_stays_away_is_reported_and_what_was_recorded_is_kept(postgres, url, monkeypatch, capfd):
    monkeypatch.setattr(database, "PATIENCE", 0.5)

    def stop(*, done, **_):
        if done == 5:
            postgres.stop()

    said = "the store .* cannot be reached for 0 seconds: .* Connection refused; the runs recorded before are kept"
    with Store(url) as store:
        with pytest.raises(StoreError, match=said) as caught:
            compared(store, progress=stop)
        with pytest.raises(StoreError, match="cannot be reached for 0 seconds: .* Connection refused"):
            store.list()
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    postgres.start()
    with Store(url) as store, Store("sqlite://") as alone:
        assert store.count() == 5
        assert compared(store).as_json() == compared(alone).as_json()


def test_a_connection_cut_in_the_middle_of_a_transaction_is_made_anew(postgres, url):
    """The run is recorded once, though the first attempt at it came to nothing."""
    with Store(url) as store, psycopg.connect(url) as blocker:
        children.put(store, 0)
        blocker.execute("LOCK TABLE runs IN EXCLUSIVE MODE")
        writer = threading.Thread(target=children.put, args=(store, 1))
        writer.start()
        waiting = "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        while not (found := blocker.execute(waiting).fetchall()):
            time.sleep(0.01)
        blocker.execute("SELECT pg_terminate_backend(%s)", found[0])
        blocker.commit()
        writer.join(children.PATIENCE)
        assert store.count() == 2
