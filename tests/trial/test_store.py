import hashlib
import json
import math
import os
import sqlite3
import threading
from dataclasses import asdict
from typing import get_args

import children
import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzzing import fuzz

from fairtrial.contract import BadInput, Costs, Ended, Outcome
from fairtrial.trial.database import StoreError
from fairtrial.trial.schema import SCHEMA_VERSION
from fairtrial.trial.store import AT_ONCE, Store, default_store, environment


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change(path, statement):
    """By another program's hand."""
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


@pytest.fixture
def written(tmp_path):
    """The file of a closed store that holds twenty runs."""
    path = tmp_path / "runs.db"
    with Store(path) as store:
        for seed in range(20):
            children.put(store, seed)
    return path


FULL = Outcome(
    0.1 + 0.2,
    "pruned",
    {"loss": 1e-300, "größe": -2.0},
    [(1, 0.5), (2, 1 / 3)],
    Costs(0.001, 2**40, None, 7),
    "Traceback …\n'\"\x00\ud800",
    1.5,
)


@pytest.mark.parametrize("outcome", [FULL, Outcome(0.0), Outcome(-1e308, "died", error="killed")])
def test_what_is_recorded_is_read_back_equal(either, outcome):
    key = children.put(either, 3, outcome)
    assert either.get(key) == Outcome(**{**vars(outcome), "curve": list(outcome.curve)})
    (stored,) = either.list()
    assert (stored.key, stored.task, stored.version, stored.seed, stored.split) == (key, "toy", 1, 3, "test")
    assert stored.choices == children.job("raise").run.recipe.as_json()
    assert stored.outcome == either.get(key)


def test_any_number_of_outcomes_is_read_at_once(either):
    keys = [children.put(either, seed) for seed in range(3)]
    unknown = [f"{number:032x}" for number in range(3 * AT_ONCE)]
    found = either.outcomes([*unknown[:2000], *keys, *unknown[2000:]])
    assert {key: outcome.value for key, outcome in found.items()} == dict(zip(keys, [0.0, 0.1, 0.2], strict=True))
    assert either.outcomes([]) == {}


def test_what_is_recorded_is_there_when_the_store_is_opened_again(written):
    with Store(written) as store:
        assert store.count() == 20
        assert store.get(children.put(store, 7)).value == 0.7


def test_an_unknown_run_is_none(either):
    assert either.get("0" * 32) is None


def test_a_run_that_was_pruned_gives_way_and_any_other_stands(either):
    children.put(either, 1, Outcome(0.05, "pruned"))
    key = children.put(either, 1, Outcome(0.1, "pruned"))
    assert either.get(key) == Outcome(0.1, "pruned", curve=[])
    for later in (Outcome(0.2), Outcome(0.3), Outcome(0.1, "pruned")):
        children.put(either, 1, later)
        assert either.get(key) == Outcome(0.2, curve=[])
    assert either.count() == 1


def test_what_tunings_tried_is_read_back_and_the_newest_stands(either):
    tried = [({"optimizer.lr": 0.1 + 0.2, "filter.kind": "soft", "filter.width": 3}, 2, 1e-300), ({}, None, -2.0)]
    either.put_tuning("a", "toy", [])
    either.put_tuning("a", "toy", tried)
    either.put_tuning("b", "toy", [])
    assert either.tunings(["a", "b", "c"]) == {"a": tried, "b": []}
    assert either.count() == 0


def test_to_look_whether_a_store_can_be_written_leaves_no_trace(either):
    children.put(either, 1)
    either.check_writable()
    assert either.count() == 1


def test_listing_filters_by_task_and_end_and_gives_the_newest_first(either):
    store = either
    for seed in range(3):
        children.put(store, seed, Outcome(0.0, "died"))
    for seed in range(3, 5):
        children.put(store, seed, task="other")
    with store.database.engine.begin() as connection:
        connection.execute(sa.text("UPDATE runs SET recorded = '2026-01-0' || (seed + 1) || 'T00:00:00+00:00'"))
    assert [stored.seed for stored in store.list()] == [4, 3, 2, 1, 0]
    assert [stored.seed for stored in store.list(task="other")] == [4, 3]
    assert [stored.seed for stored in store.list(ended="died")] == [2, 1, 0]
    assert [stored.seed for stored in store.list(task="toy", ended="died", limit=2)] == [2, 1]
    assert store.list(task="other", ended="died") == []
    assert store.list(limit=0) == []


def test_a_store_makes_its_folder_and_takes_an_empty_file(tmp_path):
    Store(tmp_path / "a" / "b" / "runs.db").database.close()
    assert (tmp_path / "a" / "b" / "runs.db").is_file()
    (tmp_path / "empty.db").touch()
    with Store(tmp_path / "empty.db") as store:
        assert store.count() == 0


@pytest.mark.parametrize("name", ["what?.db", "50%25.db", "a#b.db", "ä ö.db"])
def test_a_files_name_may_hold_what_means_something_in_a_url(tmp_path, name):
    with Store(tmp_path / name) as store:
        children.put(store, 1)
    assert (tmp_path / name).stat().st_size > 0


def test_a_database_may_be_named_by_url(tmp_path):
    with Store(f"sqlite:///{tmp_path}/by-url.db") as store:
        children.put(store, 1)
    with Store(tmp_path / "by-url.db") as store:
        assert store.count() == 1
    with Store("sqlite://") as store:
        assert store.count() == 0


@pytest.fixture(params=["path", "URL"])
def named(request):
    """A store's file, named in either way."""
    return lambda path: str(path) if request.param == "path" else f"sqlite:///{path}"


def test_another_schema_version_is_refused_and_left_untouched(written, named):
    change(written, "UPDATE fairtrial SET value = '99' WHERE key = 'schema'")
    before = digest(written)
    with pytest.raises(StoreError, match=f"has schema version 99, this fairtrial reads version {SCHEMA_VERSION}"):
        Store(named(written))
    assert digest(written) == before


def test_another_programs_database_is_refused_and_left_untouched(tmp_path, named):
    path = tmp_path / "foreign.db"
    change(path, "CREATE TABLE invoices (id INTEGER)")
    before = digest(path)
    with pytest.raises(StoreError, match="foreign.db is a database, but no store of fairtrial"):
        Store(named(path))
    assert digest(path) == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "content", [b"name,value\n" * 500, b"x", b"SQLite format 3\0", b"SQLite format 3\0" + b"\xff" * 4096]
)
def test_a_file_that_is_no_database_is_refused_and_left_untouched(tmp_path, content, named):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(StoreError, match="notes.txt is damaged or no database"):
        Store(named(path))
    assert path.read_bytes() == content


def test_a_file_cut_short_is_refused_and_left_untouched(written):
    written.write_bytes(written.read_bytes()[:3000])
    before = digest(written)
    with pytest.raises(StoreError, match="damaged"):
        Store(written)
    assert digest(written) == before


def test_damaged_pages_are_reported_and_no_other_exception_comes_out(written):
    content = bytearray(written.read_bytes())
    content[4096 * 3 :] = b"\xa5" * (len(content) - 4096 * 3)
    written.write_bytes(content)
    with pytest.raises(StoreError, match="damaged|cannot be used"), Store(written) as store:
        store.list()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"value": 1}', '{"costs": {}, "curve": [[1]]}', '{"costs": 3}']
)
def test_a_damaged_outcome_names_the_run(written, text):
    change(written, f"UPDATE runs SET outcome = '{text}'")
    with Store(written) as store:
        key = children.job("raise", 3).run.key(task="toy", version=1, fingerprint="f")
        with pytest.raises(StoreError, match=f"is damaged: run {key} cannot be read"):
            store.get(key)
        with pytest.raises(StoreError, match="is damaged: run"):
            store.list()


@pytest.mark.parametrize("change_to", [{"value": "high"}, {"ended": "well"}, {"error": 3}, {"seconds": None}])
def test_an_outcome_that_no_run_has_is_damaged(written, change_to):
    with Store(written) as store:
        content = json.dumps({**json.loads(json.dumps(asdict(store.list()[0].outcome))), **change_to})
        change(written, f"UPDATE runs SET outcome = '{content}'")
        with pytest.raises(StoreError, match="is damaged: run"):
            store.list()


@pytest.mark.parametrize("text", ["", "{", "3", "[[]]", '[["a", null, 1]]', '[[{}, "x", 1]]', "[[{}, 1]]"])
def test_a_damaged_tuning_is_named(written, text):
    with Store(written) as store:
        store.put_tuning("abc", "toy", [])
        change(written, f"UPDATE tunings SET tried = '{text}'")
        with pytest.raises(StoreError, match="is damaged: tuning abc cannot be read"):
            store.tunings(["abc"])


@pytest.mark.parametrize(
    "text", ["", "{", "3", '{"a": 1}', '{"a": {"name": "A"}}', '{"a": {"name": "A", "params": 1}}']
)
def test_damaged_choices_name_the_run(written, text):
    change(written, f"UPDATE runs SET choices = '{text}'")
    with Store(written) as store, pytest.raises(StoreError, match="is damaged: run"):
        store.list()


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(StoreError, match="is a folder; name a file"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("nosuch://host/db", "no usable path or database URL"),
        ("postgresql://user:secret@host:abc/db", "no usable path or database URL"),
        ("nosuch://user:secret@host/db", "no usable path or database URL"),
        ("/dev/null/runs.db", "cannot be opened|cannot be made|cannot be used"),
        ("x" * 300, "cannot be opened"),
        ("~nobody-of-this-name/runs.db", "no usable path"),
    ],
)
def test_a_location_that_cannot_be_is_refused_without_telling_a_password(location, said):
    with pytest.raises(StoreError, match=said) as caught:
        Store(location)
    assert "secret" not in str(caught.value)


def test_a_store_error_is_bad_input_so_that_a_person_sees_one_line():
    assert issubclass(StoreError, BadInput)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everything")
def test_a_file_without_permission_to_write_is_refused(written):
    written.chmod(0o444)
    with pytest.raises(StoreError, match="is read-only"):
        Store(written)


def test_a_database_that_may_only_be_read_is_read_and_says_so_when_written(written):
    before = digest(written)
    with Store(f"sqlite:///file:{written}?mode=ro&uri=true") as store:
        assert store.count() == 20
        with pytest.raises(StoreError, match="cannot be used: attempt to write a readonly database"):
            store.check_writable()
        with pytest.raises(StoreError, match="attempt to write a readonly database"):
            children.put(store, 1)
    assert digest(written) == before


def test_a_database_that_has_reached_its_size_is_reported_and_loses_nothing(tmp_path):
    with Store(tmp_path / "runs.db") as store:
        key = children.put(store, 0)
        with store.database.engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA max_page_count = 1")
        with pytest.raises(StoreError, match="database or disk is full"):
            children.put(store, 1, Outcome(0.0, error="x" * 100_000))
        assert store.get(key) is not None


def test_a_full_disk_is_reported_and_loses_no_run_that_was_recorded(tmp_path):
    told = tmp_path / "told.json"
    process = children.start(children.write_until_full, str(tmp_path / "runs.db"), 300_000, str(told))
    process.join(children.PATIENCE)
    written, said = json.loads(told.read_text())
    assert "cannot be used: " in said
    assert written > 1
    with Store(tmp_path / "runs.db") as store:
        assert store.count() == written


def test_processes_that_open_write_and_read_a_new_store_at_once_lose_nothing(location, tmp_path):
    go, stop = tmp_path / "go", tmp_path / "stop"
    writers = [children.start(children.write_runs, location, str(go), 30 * k, 40) for k in range(4)]
    reader = children.start(children.read_until, str(stop), location)
    go.touch()
    for writer in writers:
        writer.join(children.PATIENCE)
    stop.touch()
    reader.join(children.PATIENCE)
    assert [process.exitcode for process in (*writers, reader)] == [0] * 5
    with Store(location) as store:
        assert {stored.seed for stored in store.list()} == set(range(130))  # each overlaps the next by ten


def test_threads_that_open_a_new_store_at_once_all_get_one(tmp_path):
    for attempt in range(5):
        barrier, failed = threading.Barrier(6), []

        def open_store(path, barrier=barrier, failed=failed):
            barrier.wait()
            try:
                Store(path).database.close()
            except StoreError as error:
                failed.append(str(error))

        threads = [threading.Thread(target=open_store, args=(tmp_path / f"{attempt}.db",)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []


def test_the_environment_names_the_store_that_is_used_by_default(monkeypatch):
    monkeypatch.setenv("FAIRTRIAL_STORE", "/a/b.db")
    assert default_store() == "/a/b.db"
    monkeypatch.delenv("FAIRTRIAL_STORE")
    assert default_store().endswith("runs.db")


def test_a_run_is_recorded_with_what_its_figures_depend_on(store):
    children.put(store, 0)
    with store.database.engine.connect() as connection:
        recorded = json.loads(connection.exec_driver_sql("SELECT environment FROM runs").scalar())
    assert recorded == environment()
    assert {"python", "torch", "numpy", "optuna", "fairtrial"} <= recorded.keys()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
outcome_fields = st.sampled_from([*vars(FULL), "costs.step_time", "costs.peak_memory", "curve.0", "metrics.loss"])


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """A store with one run, and another program's hand on its row."""
    path = tmp_path_factory.mktemp("damaged") / "runs.db"
    with Store(path) as store:
        key = children.put(store, 0, FULL)
        connection = sqlite3.connect(path)
        yield store, key, connection
        connection.close()


@fuzz(200)
@given(outcome_fields, json_values | st.just(...))
def test_a_damaged_outcome_is_refused_or_as_it_says(damaged, field, value):
    store, key, connection = damaged
    fields = json.loads(json.dumps(asdict(FULL)))
    *way, last = field.split(".")
    at = fields[way[0]] if way else fields
    last = int(last) if last.isdigit() else last
    if value is ...:
        del at[last]
    else:
        at[last] = value
    with connection:
        connection.execute("UPDATE runs SET outcome = ?", [json.dumps(fields)])
    try:
        read = store.get(key)
        (listed,) = store.list()
    except StoreError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert f"run {key} cannot be read" in refusal
        assert "\n" not in refusal
        return
    assert listed.outcome == read
    assert math.isfinite(read.value)
    assert read.ended in get_args(Ended)
    assert all(isinstance(step, int) and isinstance(value, float) for step, value in read.curve)
    assert all(cost is None or isinstance(cost, int | float) for cost in vars(read.costs).values())
    assert all(isinstance(value, int | float) for value in read.metrics.values())
    json.dumps(asdict(read))


@fuzz(200)
@given(
    st.sampled_from(["choices", "outcome", "seed", "version", "recorded", "split"]),
    st.text() | st.integers() | st.binary(),
)
def test_a_damaged_row_is_refused_or_read(damaged, column, value):
    store, key, connection = damaged
    with connection:
        row = connection.execute(f"SELECT {column} FROM runs").fetchone()[0]
        try:
            connection.execute(f"UPDATE runs SET {column} = ?", [value])
        except (OverflowError, UnicodeEncodeError):  # a number or a text that SQLite has no room for
            return
    refusal = "cannot be read"
    try:
        store.list()
        store.get(key)
    except StoreError as error:
        refusal = str(error)
    finally:
        with connection:
            connection.execute(f"UPDATE runs SET {column} = ?", [row])
    assert "cannot be read" in refusal
