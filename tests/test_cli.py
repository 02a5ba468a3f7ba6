"""The command line as a person meets it: what it prints, where, and how it ends."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from fairtrial import cli

QUICK = ["--trials", "2", "--seeds", "2", "--executor", "inline"]


@pytest.fixture
def run(capfd, monkeypatch, tmp_path):
    """Run a command line; gives (exit code, stdout, stderr)."""
    monkeypatch.setenv("FAIRTRIAL_STORE", str(tmp_path / "runs.db"))

    def command(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        return end.value.code, printed.out, printed.err

    return command


TASK = '''
"""A task that needs no training: the value is the choice's own."""
from fairtrial.contract import Choice, Metric, Outcome, Slot


class Options(dict):
    def names(self):
        return list(self)

    def aliases(self):
        return {}


class Option:
    search = {}

    def __init__(self, name, factory):
        self.name, self.factory = name, factory

    @staticmethod
    def bind(setting):
        return {}


def plain(level=0.5):
    return level


def loud(level=0.5):
    print("a task may print")
    return level + 1


class Tiny:
    name, version = "tiny", 1
    metric = Metric("score", "maximize", "points", margin=0.1, worst=-9.0)
    slots = {
        "part": Slot("part", Choice("Plain"), Options(Plain=Option("Plain", plain), Loud=Option("Loud", loud)))
    }

    def check(self, choices):
        for name, choice in choices.items():
            level = self.slots[name].build(choice, None)
            if not isinstance(level, (int, float)) or level < 0:
                raise ValueError(f"level must be at least 0, got {level!r}")

    def run(self, choices, seed, *, split, progress):
        value = self.slots["part"].build(choices["part"], None)
        ENDING
        return Outcome(value + seed % 3)
'''


@pytest.fixture
def tiny(tmp_path):
    def write(ending="pass"):
        path = tmp_path / "tiny_task.py"
        path.write_text(TASK.replace("ENDING", ending))
        return path

    return write


def test_looking_things_up_needs_no_torch():
    script = (
        "import sys\n"
        "from fairtrial import cli\n"
        "for arguments in (['--help'], ['papers', 'galor'], ['papers', '--json'], ['show', 'z_loss']):\n"
        "    try:\n"
        "        cli.main(arguments)\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, arguments\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_papers_finds_filters_and_prints_records(run):
    code, out, _ = run("papers", "galor")
    assert code == 0
    assert "galore" in out
    code, out, _ = run("papers", "--family", "losses", "--json")
    records = json.loads(out)
    assert code == 0
    assert {"slug", "family", "title", "status", "methods", "claims"} <= set(records[0])
    assert {record["family"] for record in records} == {"losses"}
    z_loss = next(record for record in records if record["slug"] == "z_loss")
    assert "fairtrial.methods.losses.ZLoss" in z_loss["methods"]
    assert z_loss["status"] in ("available", "checked")


def test_show_prints_claims_beside_what_was_found(run):
    code, out, _ = run("show", "z-loss")
    assert code == 0
    assert "from fairtrial.methods.losses import ZLoss" in out
    assert "output-layer-cost" in out
    code, out, _ = run("show", "z_loss", "--json")
    assert json.loads(out)["slug"] == "z_loss"


def test_tasks_lists_tasks_and_the_methods_of_their_slots(run):
    code, out, _ = run("tasks", "--json")
    assert code == 0
    assert {"digits", "mnist1d", "tabular", "text"} <= {task["name"] for task in json.loads(out)}
    code, out, _ = run("tasks", "digits")
    assert code == 0
    assert "FRUGAL" in out


def test_compare_prints_one_json_document_and_nothing_else(run, tiny):
    code, out, err = run("compare", tiny(), "part=Plain,Loud", "--json", *QUICK)
    assert code == 0, err
    document = json.loads(out)
    assert document["baseline"] == "Plain"
    assert document["recipes"][0]["difference"] is None
    assert document["recipes"][1]["difference"]["mean"] == 1.0
    assert "a task may print" in err


def test_compare_says_when_too_few_seeds_decide_nothing(run, tiny):
    code, out, _ = run("compare", tiny(), "part=Plain,Loud", *QUICK)
    assert code == 0
    assert "Use --seeds 6 or more" in out


def test_failures_are_counted_and_named(run, tiny):
    code, out, _ = run("compare", tiny("if value > 1: raise RuntimeError('out of luck')"), "part=Plain,Loud", *QUICK)
    assert code == 0
    assert "Loud: 2 of 2 runs failed and count with the worst value, -9 (RuntimeError: out of luck)" in out
    code, out, _ = run("runs", "--ended", "died")
    assert code == 0
    assert "RuntimeError: out of luck" in out


def test_runs_lists_what_was_recorded(run, tiny):
    run("compare", tiny(), "part=Plain,Loud", *QUICK)
    code, out, _ = run("runs", "--json")
    assert code == 0
    assert len(json.loads(out)) == 4


def test_new_task_writes_a_task_that_compares(run, tmp_path):
    file = tmp_path / "mine.py"
    code, out, _ = run("new-task", file)
    assert code == 0
    assert "fairtrial compare" in out
    code, out, err = run("compare", file, "optimizer=AdamW,SGD", "--json", *QUICK)
    assert code == 0, err
    assert len(json.loads(out)["recipes"]) == 2
    code, _, err = run("new-task", file)
    assert code == 2
    assert "there already" in err


def test_report_writes_a_page_from_what_was_run(run, tiny, tmp_path):
    run("compare", tiny(), "part=Plain,Loud", *QUICK)
    code, _, err = run("report", tiny(), "part=Plain,Loud", "-o", tmp_path / "page.html", *QUICK)
    assert code == 0, err
    assert "4 from the store" in err
    assert "Loud" in (tmp_path / "page.html").read_text()
    code, out, _ = run("report", tiny(), "part=Plain,Loud", "--format", "json", *QUICK)
    assert json.loads(out)
    code, _, err = run("report", tiny(), "part=Plain,Loud", "-o", tmp_path / "no" / "page.html", *QUICK)
    assert (code, err.count("\n")) == (2, 1)


def test_doctor_reports(run):
    code, out, _ = run("doctor", "--json")
    assert code == 0
    assert all(item["ok"] for item in json.loads(out))


def test_doctor_names_the_extra_that_is_missing(run, monkeypatch):
    monkeypatch.setattr("fairtrial.report.doctor.EXTRAS", {"no-such-package": "vision"})
    code, out, _ = run("doctor")
    assert code == 0
    assert "fairtrial[vision]" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["compare", "digit", "optimizer=AdamW,SGD"], "digits"),
        (["compare", "digits", "optimiser=AdamW,SGD"], "optimizer"),
        (["compare", "digits", "optimizer=AdamV"], "Adam or"),
        (["compare", "digits", "optimizer=AdamW,SGD(speed=1)"], "no hyperparameter 'speed'"),
        (["compare", "digits", "optimizer=AdamW,SGD(lr=-1)"], "lr"),
        (["compare", "digits", "optimizer=AdamW"], "nothing to compare"),
        (["compare", "digits", "optimizer"], "SLOT=METHOD"),
        (["compare", "digits", "optimizer=SGD", "optimizer=Adam"], "twice"),
        (["compare", "digits", "optimizer=SGD(nesterov=false)"], "write nesterov=False"),
        (["compare", "digits", "optimizer=SGD", "--seeds", "0"], "seeds must be"),
        (["compare", "digits", "optimizer=SGD", "--trials", "-3"], "trials must be"),
        (["compare", "digits", "optimizer=SGD", "--workers", "0"], "workers must be"),
        (["compare", "digits", "optimizer=SGD", "--executor", "cloud"], "executor"),
        (["compare", "digits", "optimizer=SGD", "--cpus-per-run", "2"], "need --executor ray"),
        (["compare", "digits", "optimizer=SGD", "--executor", "ray", "--gpus-per-run", "-1"], "GPUs per run must be"),
        (["report", "digits", "optimizer=SGD", "--executor", "ray", "--ray-address", "localhost:1"], "no Ray cluster"),
        (["compare", "digits", "loss=AdamW"], "no method 'AdamW' for the slot 'loss'"),
        (["compare", "absent.py", "optimizer=SGD"], "absent.py"),
        (["show", "zloss2"], "z_loss"),
        (["papers", "--family", "loses"], "losses"),
        (["papers", "--status", "good"], "status"),
        (["check"], "--family"),
        (["check", "nosuchpaper"], "nosuchpaper"),
        (["check", "aft"], "cannot be measured yet"),
        (["models", "smollm2", "nosuch"], "no model 'nosuch'; there is: smollm2"),
        (["calibrate", "digit"], "digits"),
        (["calibrate", "--runs", "10"], "runs must be a whole number of at least 400, got 10"),
        (["calibrate", "--comparisons", "1"], "comparisons must be"),
        (["calibrate", "--trials", "-1"], "trials must be"),
        (["calibrate", "--workers", "0"], "workers must be"),
        (["calibrate", "my_task.py", "--record"], "--record is for the tasks that ship with fairtrial"),
        (["runs"], "nothing has been run"),
        (["runs", "--ended", "well"], "--ended"),
        (["frobnicate"], "frobnicate"),
        (["compare"], "task"),
        (["papers", "--nope"], "--nope"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(run, arguments, said):
    code, out, err = run(*arguments)
    assert code == 2
    assert said in err
    assert err.startswith("fairtrial: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nosuchmodule", "nosuchmodule"),
        ("def broken(:", "line 1"),
        ("x = 1", "no task"),
        ("class Task:\n    name = 'half'", "half"),
    ],
)
def test_a_users_file_that_is_no_task_is_refused(run, tmp_path, text, said):
    path = tmp_path / "half.py"
    path.write_text(text)
    code, out, err = run("compare", path, "part=A,B")
    assert code == 2
    assert said in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_tasks_nan_counts_as_the_worst_value(run, tiny):
    code, out, _ = run("compare", tiny("value = float('nan')"), "part=Plain,Loud", "--json", *QUICK)
    assert code == 0
    assert [recipe["failed"] for recipe in json.loads(out)["recipes"]] == [2, 2]
    assert json.loads(out)["recipes"][0]["values"] == [-9.0, -9.0]


def test_an_executor_whose_extra_is_missing_names_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for module in ("ray_executor", "ray_cluster"):
        monkeypatch.delitem(sys.modules, f"fairtrial.trial.{module}", raising=False)
    code, out, err = run("compare", "digits", "optimizer=SGD", "--executor", "ray")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "pip install 'fairtrial[ray]'" in err


def test_the_environment_may_name_the_cluster_to_join(run, tiny, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "localhost:1")
    code, _, err = run("compare", tiny(), "part=Plain,Loud", "--executor", "ray")
    assert code == 2
    assert err.splitlines()[-1].startswith("fairtrial: there is no Ray cluster at localhost:1: ")


def test_debug_shows_the_traceback(run):
    code, _, err = run("--debug", "compare", "nosuchtask", "a=b")
    assert code == 2
    assert "Traceback" in err


def test_a_store_of_another_version_is_left_untouched(run, tiny, tmp_path):
    import sqlite3

    path = tmp_path / "old.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE fairtrial (key TEXT, value TEXT)")
        connection.execute("CREATE TABLE runs (key TEXT)")
        connection.execute("INSERT INTO fairtrial VALUES ('schema', '99')")
    connection.close()
    before = path.read_bytes()
    code, _, err = run("compare", tiny(), "part=Plain,Loud", "--store", path, *QUICK)
    assert code == 2
    assert "schema version 99" in err
    assert path.read_bytes() == before


def test_an_older_store_is_refused_with_the_command_that_upgrades_it(run, tiny, tmp_path):
    path = tmp_path / "old store.db"
    run("compare", tiny(), "part=Plain,Loud", "--store", path, *QUICK)
    with closing(sqlite3.connect(path)) as connection, connection:  # as the first version made it
        connection.executescript("DROP TABLE tunings; UPDATE fairtrial SET value = '1' WHERE key = 'schema'")
    code, out, err = run("runs", "--store", path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"schema version 1, this fairtrial reads version 2: fairtrial upgrade-store --store '{path}'" in err
    code, out, _ = run("upgrade-store", "--store", path)
    assert (code, out) == (0, f"The store {path} had schema version 1 and has version 2 now.\n")
    code, out, _ = run("upgrade-store", "--store", path)
    assert (code, out) == (0, f"The store {path} has schema version 2 already: there is nothing to do.\n")
    code, out, _ = run("upgrade-store", "--store", path, "--json")
    assert json.loads(out) == {"store": str(path), "had": 2, "has": 2}
    code, out, _ = run("runs", "--store", path, "--json")
    assert len(json.loads(out)) == 4
    code, _, err = run("upgrade-store", "--store", tmp_path / "none.db")
    assert (code, err) == (2, f"fairtrial: no store at {tmp_path / 'none.db'}: nothing has been run yet\n")


def test_runs_are_kept_in_postgresql_and_the_doctor_says_so(run, tiny, postgres):
    url = postgres.new_database()
    code, _, err = run("compare", tiny(), "part=Plain,Loud", "--store", url, *QUICK)
    assert code == 0, err
    code, out, _ = run("runs", "--store", url)
    assert code == 0
    heading, *lines = out.splitlines()
    assert heading.split() == ["recorded", "task", "seed", "split", "ended", "value", "seconds", "choices"]
    assert sorted(line.split()[3] for line in lines) == ["0", "0", "1", "1"]
    code, out, _ = run("doctor", "--store", url, "--json")
    assert code == 0
    (found,) = [item["found"] for item in json.loads(out) if item["what"] == "store"]
    assert found == f"{url.replace(postgres.password, '***')}, schema version 2, 4 runs"


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_says_what_is_kept_and_leaves_with_130(tiny, tmp_path):
    import signal
    import time

    path = tiny("import time; time.sleep(0.2)")
    store = tmp_path / "kept.db"
    command = [sys.executable, "-c", "from fairtrial.cli import main; main()", "compare", path, "part=Plain,Loud"]
    command += ["--store", store, "--executor", "inline", "--seeds", "500"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (store.exists() and _recorded(store)):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert out == ""
    assert _recorded(store)


NOISE = "import random; value = random.Random(seed).gauss(0, 1) - seed % 3"


def test_calibrate_prints_every_figure_and_says_whether_all_are_within_bounds(run, tiny):
    code, out, err = run("calibrate", tiny(NOISE), "--comparisons", "40", "--executor", "inline")
    assert code == 0
    assert out.startswith("tiny: 400 runs of the baseline")
    assert "False verdicts" in out
    assert "NOT within bounds: false verdicts at most 5 %" in out  # so few comparisons leave much open
    assert "400 of 400 runs done" in err
    assert "drawing comparisons from the pool as measured" in err


def test_calibrate_says_when_there_is_nothing_to_calibrate_on(run, tiny):
    code, out, err = run("calibrate", tiny("value -= seed % 3"), "--executor", "inline")
    assert code == 2
    assert err.splitlines()[-1].endswith("all 400 runs of the baseline measured 0.5: there is nothing to calibrate on")
    assert out == ""


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_a_calibration_that_was_killed_goes_on_and_comes_to_the_same(run, tiny, tmp_path):
    import time

    arguments = ["calibrate", tiny(NOISE), "--comparisons", "20", "--executor", "inline", "--json"]
    uninterrupted = json.loads(run(*arguments)[1])
    tiny("import time; time.sleep(0.005); " + NOISE)
    store = tmp_path / "killed.db"
    command = [sys.executable, "-c", "from fairtrial.cli import main; main()", *arguments, "--store", store]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (store.exists() and _recorded(store) >= 50):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = _recorded(store)
    assert 50 <= kept < 400
    code, out, err = run(*arguments, "--store", store)
    assert code == 0
    assert f"({kept} from the store)" in err
    assert _recorded(store) == 400
    resumed = json.loads(out)
    for document in (resumed, uninterrupted):
        del document["seconds"], document["fingerprint"]
    assert resumed == uninterrupted


def test_a_calibration_is_put_on_record_from_runs_that_are_stored(run, tmp_path, monkeypatch):
    """The runs behind the figures on record: what they measured is in the file."""
    from fairtrial import tasks
    from fairtrial.contract import Outcome
    from fairtrial.report import recorded
    from fairtrial.trial.comparison import code_of
    from fairtrial.trial.recipe import Recipe, Run
    from fairtrial.trial.store import Store

    task, pool = tasks.load("digits"), recorded.read(recorded.place("digits", 0)).calibration.pool
    recipe = Recipe("digits", {name: slot.default for name, slot in task.slots.items()})
    code = code_of(task, recipe)
    with Store(tmp_path / "full.db") as store:
        for seed, value in enumerate(pool.values, pool.first_seed):
            made = Run(recipe, seed, "test")
            key = made.key(task="digits", version=task.version, fingerprint=code)
            store.put(key, made, "digits", task.version, code, Outcome(value))
    arguments = ["calibrate", "--comparisons", "20", "--record", "--json", "--store", tmp_path / "full.db"]
    monkeypatch.setattr(recorded, "FOLDER", tmp_path / "nowhere")
    code, out, err = run(*arguments)
    assert code == 2
    assert "there is no folder" in err
    assert out == ""
    recorded.FOLDER.mkdir()
    code, out, err = run(*arguments)
    assert code == 0
    assert "(400 from the store)" in err
    again = recorded.read(tmp_path / "nowhere" / "digits.json")
    assert again.as_json() == json.loads(out)
    assert again.calibration.pool.values == pool.values


def _recorded(store: Path) -> int:
    import sqlite3

    try:
        with sqlite3.connect(f"file:{store}?mode=ro", uri=True) as connection:
            return connection.execute("SELECT count(*) FROM runs").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
