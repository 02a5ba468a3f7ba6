"""Runs on a real Ray cluster of two nodes, and on one that a command starts for itself."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import children
import pytest
import ray
from jobs import WRONG, apart_from_times, job, load, outcomes, sound
from ray.cluster_utils import Cluster

import fairtrial
from fairtrial.contract import BadInput, Choice
from fairtrial.trial import ray_cluster, ray_executor
from fairtrial.trial.comparison import compare
from fairtrial.trial.execute import ATTEMPTS, Inline, Job
from fairtrial.trial.ray_executor import Bench, Ray, differences, makings
from fairtrial.trial.recipe import Recipe, Run
from fairtrial.trial.store import Store
from fairtrial.trial.tuning import MedianPruner

HERE = str(Path(__file__).parent)
LIBRARY = str(Path(fairtrial.__file__).parents[1])


@pytest.fixture(scope="module")
def cluster():
    """Two nodes with two CPUs each, whose workers find the toy task; this process is connected to it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([HERE, LIBRARY]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        cluster.add_node(num_cpus=2)
        ray.init(address=cluster.address, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def there(cluster):
    """With so many CPUs for each run there is a worker on each node, and room for others beside it."""
    with Ray(load, cpus=1.5) as executor:
        yield executor


def inline(jobs):
    with Inline(load) as executor:
        return [apart_from_times(outcome) for outcome in outcomes(executor, jobs)]


def test_workers_on_two_nodes_and_this_process_come_to_the_same_outcomes(there):
    high = tuple((step, 0.9) for step in range(1, 6))
    hopeless = Job(sound(0).run, MedianPruner("maximize", (high, high, high, high)))
    jobs = [sound(seed) for seed in range(6)] + [job(how, seed=3) for how in [*WRONG, "threads"]] + [hopeless]
    found = [apart_from_times(outcome) for outcome in outcomes(there, jobs)]
    assert found == inline(jobs)
    assert found[-1].ended == "pruned"
    assert there.running == 0


def keep_busy(executor, workers):
    """Submit jobs until so many workers carry one out at once, which take their time to start."""
    jobs, ended = [], {}
    while executor.running < workers:
        jobs.append(sound(len(jobs), task="toy pause=0.5"))
        executor.submit(jobs[-1])
        if len(jobs) > workers:
            ended.update([executor.next()])
    return jobs, ended


def test_outcomes_come_back_as_runs_end_and_what_runs_is_told(there):
    jobs, ended = keep_busy(there, 2)
    for _ in range(len(jobs) - len(ended)):
        there.next()
    slow, *quick = [sound(0, task="toy pause=3"), *(sound(seed) for seed in range(9))]
    for each in (slow, *quick):
        there.submit(each)
    ended = [there.next()[0] for _ in quick]
    assert ended == quick
    assert there.running == 1
    assert there.next()[0] is slow


def test_a_worker_that_is_killed_once_has_its_run_tried_again(there, tmp_path):
    marker = tmp_path / "marker"
    found = outcomes(there, [job("kill once", where=str(marker)), sound(0), sound(1)])
    assert marker.exists()
    assert [outcome.ended for outcome in found] == ["finished"] * 3


def test_a_run_that_always_takes_its_worker_along_is_lost_and_its_neighbours_are_not(there):
    lost, *others = outcomes(there, [job("kill"), sound(0), sound(1)])
    assert (lost.ended, lost.value) == ("lost", 0.0)
    assert lost.error.startswith(f"its Ray worker on {socket.gethostname()} (")
    assert lost.error.endswith(f"), {ATTEMPTS} times")
    assert [outcome.ended for outcome in others] == ["finished"] * 2
    assert there.attempts.cost == {}


def test_a_comparison_comes_out_the_same_tuning_and_pruning_too(there, store, tmp_path):
    wanted = {"optimizer": "Plain,Planted,BrokenTuned(how='raise')", "filter": "Clean,Blurred"}
    found = compare(load, "toy", wanted, executor=there, store=store, trials=6, seeds=3)
    with Store(tmp_path / "inline.db") as empty, Inline(load) as executor:
        here = compare(load, "toy", wanted, executor=executor, store=empty, trials=6, seeds=3)
    assert found.as_json() == here.as_json()
    assert "pruned" in {run.outcome.ended for run in store.list()}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"cpus": 3}, "no node of the Ray cluster has 3 CPUs and 0 GPUs, .* there are nodes with 2 CPUs and 0 GPUs"),
        ({"gpus": 0.5}, "has 1 CPU and 0.5 GPUs, which each run is to have"),
    ],
)
def test_what_no_node_can_give_is_refused(cluster, asked, said):
    with Ray(load, **asked) as executor, pytest.raises(BadInput, match=said):
        executor.submit(sound(0))


def test_runs_of_a_node_that_is_killed_are_tried_again(cluster, there):
    third = cluster.add_node(num_cpus=2)
    jobs, ended = keep_busy(there, 3)
    cluster.remove_node(third, allow_graceful=False)
    ended.update(there.next() for _ in range(len(jobs) - len(ended)))
    assert [apart_from_times(ended[each]) for each in jobs] == inline([sound(seed) for seed in range(len(jobs))])


def test_a_comparison_whose_process_is_killed_goes_on_where_it_was(cluster, there, tmp_path):
    location, log = str(tmp_path / "runs.db"), tmp_path / "log"
    asked = (f"toy pause=0.2 log={log}", {"optimizer": "Plain,Planted"}, 4, 3)
    process = children.start(children.compare_on_ray, location, cluster.address, *asked)
    log.touch()
    children.wait_for(lambda: log.read_text().count("\n") > 8)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    reference, wanted, trials, seeds = asked
    told = []
    with Store(location) as store:
        kept = store.count()
        found = compare(
            load,
            reference,
            wanted,
            executor=there,
            store=store,
            trials=trials,
            seeds=seeds,
            progress=lambda **now: told.append(now),
        )
    with Store(tmp_path / "inline.db") as store, Inline(load) as executor:
        here = compare(load, "toy", wanted, executor=executor, store=store, trials=trials, seeds=seeds)
    assert found.as_json()["recipes"] == here.as_json()["recipes"]
    assert kept >= 6
    assert told[-1]["stored"] == kept
    assert told[-1]["total"] <= log.read_text().count("\n") <= told[-1]["total"] + 2  # at most what was in flight


TASK = """
from pathlib import Path

from beside import Options, answer
from fairtrial.contract import Choice, Metric, Outcome, Slot


class Mine:
    name, version = "mine", 1
    metric = Metric("score", "maximize", "points", margin=0.1, worst=0.0)
    slots = {"part": Slot("part", Choice("Plain"), Options())}

    def check(self, choices):
        pass

    def run(self, choices, seed, *, split, progress):
        at_home = Path("numbers.csv").exists()
        data = float(Path(__file__).with_name("numbers.csv").read_text())
        return Outcome(answer(choices["part"].name) + seed + data, metrics={"at home": at_home})


first, second = Mine(), Mine()
"""
BESIDE = """
def answer(name):
    return len(name)


class Option:
    search = {}

    def __init__(self, name):
        self.name = name

    def factory(self):
        return self.name

    def bind(self, setting):
        return {}


class Options:
    def names(self):
        return ["Plain", "Loud"]

    def aliases(self):
        return {}

    def __getitem__(self, name):
        return Option(name)
"""


@pytest.fixture
def project(tmp_path):
    """A task file with a module and data beside it."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "task.py").write_text(TASK)
    (folder / "beside.py").write_text(BESIDE)
    (folder / "numbers.csv").write_text("0.25")
    return folder


def test_a_task_file_reaches_workers_that_do_not_have_its_folder(there, project, monkeypatch):
    monkeypatch.chdir(project)
    mine = Job(Run(Recipe("task.py:second", {"part": Choice("Loud")}), 3, "test"))
    there.submit(mine)
    project.rename(project.with_name("elsewhere"))
    _, outcome = there.next()
    assert (outcome.value, outcome.ended, outcome.error) == (7.25, "finished", None)
    assert outcome.metrics == {"at home": 1.0}


def test_runs_of_a_task_file_are_the_same_for_every_executor(there, project, store):
    reference = f"{project}/task.py:first"
    wanted = {"part": "Plain,Loud"}
    with Inline(load) as executor:
        begun = compare(load, reference, wanted, executor=executor, store=store, seeds=4)
    told = []
    again = compare(
        load, reference, wanted, executor=there, store=store, seeds=6, progress=lambda **now: told.append(now)
    )
    assert (told[-1]["stored"], told[-1]["done"], store.count()) == (8, 12, 12)
    assert [recipe.values[:4] for recipe in again.recipes] == [recipe.values for recipe in begun.recipes]
    assert not again.recipes[0].failed


def test_one_worker_and_a_task_that_only_this_machine_can_load(cluster, project, monkeypatch):
    monkeypatch.syspath_prepend(project.parent)
    (project.parent / "outside.py").write_text("")
    (project / "task.py").write_text("import outside\n" + TASK)
    mine = Job(Run(Recipe(f"{project}/task.py:first", {"part": Choice("Loud")}), 3, "test"))
    with Ray(load, workers=1, cpus=0.5) as executor:
        for each in (sound(0), sound(1), mine):
            executor.submit(each)
        assert executor.running == 0
        executor.next()
        assert executor.running == 1
        executor.next()
        with pytest.raises(BadInput, match="Ray node .* cannot carry runs out: task.py, line 1: .*'outside'") as caught:
            executor.next()
    assert "\n" not in str(caught.value)


def test_a_node_with_other_code_or_none_is_refused(cluster, tmp_path):
    library = tmp_path / "fairtrial"
    node = cluster.add_node(num_cpus=8, env_vars={"PYTHONPATH": os.pathsep.join([str(tmp_path), HERE])})

    def said():
        with Ray(load, cpus=5) as executor:
            executor.submit(sound(0))
            with pytest.raises(BadInput) as caught:
                executor.next()
        first, _, rest = str(caught.value).partition(") ")
        assert first.startswith(f"the Ray node {socket.gethostname()} (")
        return rest

    try:
        shutil.copytree(Path(LIBRARY) / "fairtrial", library, ignore=shutil.ignore_patterns("__pycache__"))
        with (library / "contract.py").open("a") as file:
            file.write("\nCHANGED = True\n")
        code = "must have what this one has: the code of fairtrial is [0-9a-f]{16} there and [0-9a-f]{16} here"
        assert re.fullmatch(code, said())
        shutil.rmtree(library)
        library.mkdir()
        (library / "__init__.py").write_text("")
        none = "must have what this one has: ModuleNotFoundError: No module named 'fairtrial.trial'"
        assert said() == none
    finally:
        cluster.remove_node(node)


def test_a_cluster_that_loses_its_only_node_with_room_is_given_some_time(cluster, monkeypatch):
    monkeypatch.setattr(ray_executor, "PATIENCE", 1)
    node = cluster.add_node(num_cpus=8)
    with Ray(load, cpus=5) as executor:
        executor.submit(sound(0))
        cluster.remove_node(node)
        with pytest.raises(BadInput, match="no node of the Ray cluster has 5 CPUs and 0 GPUs"):
            executor.next()


def test_what_differs_is_named():
    assert {"python", "torch", "numpy", "fairtrial", "the code of fairtrial"} <= set(makings())
    assert differences(makings(), makings()) == ""
    here, there = {"python": "3.11.7", "torch": "2.13.0", "optuna": "5.0.0"}, {"python": "3.11.7", "torch": "2.12.0"}
    assert differences(here, there) == "torch is 2.12.0 there and 2.13.0 here, optuna is None there and 5.0.0 here"


def test_a_recipe_whose_code_differs_is_refused():
    with pytest.raises(BadInput, match="the code or the data of toy is another than here"):
        Bench(load).carry_out(sound(0), "0" * 16, None)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("ray://localhost:10001", "is for Ray's client, which hangs when it is interrupted"),
        ("localhost", "cannot read the Ray address 'localhost': write HOST:PORT or auto"),
        ("http://localhost:8265", "cannot read the Ray address"),
        ("localhost:http", "cannot read the Ray address"),
        ("localhost:1", "there is no Ray cluster at localhost:1: "),
        ("no.such.host.invalid:6379", "there is no Ray cluster at no.such.host.invalid:6379: "),
        ("silent", "there is no Ray cluster at .*: no answer within 2 seconds"),
    ],
)
def test_an_address_without_a_cluster_is_refused(address, said, monkeypatch):
    monkeypatch.setattr(ray_cluster, "PATIENCE", 2)
    with socket.create_server(("localhost", 0)) as silent, Ray(load, address=address) as executor:
        if address == "silent":
            executor.address = f"localhost:{silent.getsockname()[1]}"
        with pytest.raises(BadInput, match=said) as caught:
            executor.submit(sound(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"cpus": 0}, "CPUs per run must be a number of at least 0.0001, got 0"),
        ({"cpus": float("nan")}, "CPUs per run must be"),
        ({"cpus": float("inf")}, "CPUs per run must be"),
        ({"gpus": -1}, "GPUs per run must be a whole number or a share of one, got -1"),
        ({"gpus": 1.5}, "GPUs per run must be"),
        ({"gpus": float("nan")}, "GPUs per run must be"),
        ({"gpus": float("inf")}, "GPUs per run must be"),
    ],
)
def test_amounts_that_cannot_be(asked, said):
    with pytest.raises(BadInput, match=said):
        Ray(load, **asked)


def processes_of(session):
    """Those that name a cluster's folder in their command lines."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if session in (process / "cmdline").read_text():
                found.append(process.name)
        except (OSError, UnicodeDecodeError):
            continue
    return found


def test_a_cluster_of_its_own_ends_with_the_command(project, tmp_path):
    """Interrupted in the middle, then taken to its end by another executor."""
    store = tmp_path / "runs.db"
    (project / "task.py").write_text(TASK.replace("return Outcome", "__import__('time').sleep(0.1); return Outcome"))
    command = [sys.executable, "-c", "from fairtrial.cli import main; main()", "compare", f"{project}/task.py:first"]
    command += ["part=Plain,Loud", "--store", store, "--executor", "ray", "--seeds", "500", "--json"]
    home = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": LIBRARY}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=home, start_new_session=True, **pipes) as process:
        children.wait_for(lambda: process.poll() is not None or (store.exists() and recorded(store) > 3))
        session = f"_{process.pid}/"
        assert processes_of(session)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        out, err = process.communicate(timeout=children.PATIENCE)
    assert (process.returncode, out) == (130, "")
    assert "goes on from there" in err.splitlines()[-1]
    assert "Traceback" not in err
    children.wait_for(lambda: not processes_of(session))
    assert not list(Path("/tmp/ray").glob(f"session_*_{process.pid}"))
    assert not (tmp_path / ".ray").exists()
    with Store(store) as kept:
        values = {(run.choices["part"]["name"], run.seed): run.outcome.value for run in kept.list()}
    assert values == {(name, seed): len(name) + seed + 0.25 for name, seed in values}


def recorded(store):
    with Store(store) as opened:
        return opened.count()
