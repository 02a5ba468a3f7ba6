import json
import os
import random
import signal
import sqlite3
from collections import deque
from pathlib import Path

import children
import numpy as np
import pytest
import toy
from scipy import stats

from fairtrial.contract import BadInput
from fairtrial.trial.comparison import FIRST_TUNING_SEED, compare, source_of
from fairtrial.trial.execute import Inline, Local
from fairtrial.trial.statistics import power
from fairtrial.trial.store import Store, StoreError


def run(store, reference="toy", executor=None, trials=6, seeds=8, progress=None, tune_once=False, **wanted):
    told = {"tune_once": tune_once} if progress is None else {"tune_once": tune_once, "progress": progress}
    with executor or Inline(toy.load) as opened:
        return compare(
            toy.load,
            reference,
            wanted or {"optimizer": "Plain,Planted,Twin"},
            executor=opened,
            store=store,
            trials=trials,
            seeds=seeds,
            **told,
        )


class Unkept:
    """A store that keeps nothing, for the many comparisons of a calibration."""

    def outcomes(self, keys):
        return {}

    def tunings(self, keys):
        return {}

    def check_writable(self):
        pass

    def put(self, *run):
        pass

    def put_tuning(self, *tuning):
        pass


class Bare:
    """Runs a task with nothing around it, for the many comparisons of a calibration."""

    running = 0

    def __init__(self):
        self.waiting = deque()

    def submit(self, job):
        self.waiting.append(job)

    def next(self):
        job = self.waiting.popleft()
        recipe = job.run.recipe
        made = toy.load(recipe.task)
        return job, made.run(recipe.choices, job.run.seed, split=job.run.split, progress=lambda *report: None)


def judged_in_many_worlds(worlds, wanted, seeds, trials=1):
    """Each world is another draw of everything."""
    for world in range(worlds):
        yield compare(
            toy.load,
            f"toy world={world}",
            {"optimizer": wanted},
            executor=Bare(),
            store=Unkept(),
            trials=trials,
            seeds=seeds,
        ).recipes[1:]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    with Store(tmp_path_factory.mktemp("found") / "runs.db") as store:
        return run(store)


def test_the_json_has_exactly_the_documented_shape(found):
    told = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert told == found.as_json()
    assert list(told) == [
        "task",
        "version",
        "metric",
        "baseline",
        "trials",
        "seeds",
        "decidable",
        "until_decided",
        "recipes",
    ]
    assert told["until_decided"] is None
    assert told["metric"] == {
        "name": "score",
        "direction": "maximize",
        "unit": "fraction",
        "margin": 0.005,
        "worst": 0.0,
    }
    assert (told["task"], told["version"], told["baseline"], told["trials"]) == ("toy", 1, "Plain", 6)
    assert told["seeds"] == {
        "tuning": [FIRST_TUNING_SEED + seed for seed in range(8)],
        "evaluation": list(range(8)),
    }
    assert told["decidable"] is True
    for place, recipe in enumerate(told["recipes"]):
        assert list(recipe) == [
            "name",
            "choices",
            "tuned",
            "tuned_by_seed",
            "values",
            "mean",
            "difference",
            "verdict",
            "seeds_to_decide",
            "failed",
            "costs",
        ]
        assert recipe["name"] == ["Plain", "Planted", "Twin"][place]
        assert recipe["choices"] == {
            "filter": {"name": "Clean", "params": {}},
            "optimizer": {"name": recipe["name"], "params": {}},
        }
        assert recipe["tuned"].keys() == {"optimizer"}
        assert recipe["tuned"]["optimizer"].keys() == {"lr", "momentum"}
        assert len(recipe["tuned_by_seed"]) == 8
        assert recipe["tuned"] in recipe["tuned_by_seed"]
        assert len(recipe["values"]) == 8
        assert recipe["mean"] == pytest.approx(np.mean(recipe["values"]))
        assert recipe["costs"] == {
            "step_time_ratio": 1.0,
            "peak_memory_ratio": 1.0,
            "optimizer_state_bytes": 8,
            "trainable_parameters": 2,
        }
        assert recipe["failed"] == 0
        if place == 0:
            assert (recipe["difference"], recipe["verdict"], recipe["seeds_to_decide"]) == (None, None, None)
        else:
            assert list(recipe["difference"]) == ["mean", "low", "high", "p", "p_holm"]
            assert recipe["verdict"] in ("better", "worse", "equivalent", "undecided")
            assert (recipe["seeds_to_decide"] is None) == (recipe["verdict"] != "undecided")


def test_the_figures_follow_from_the_values_paired_by_seed(found):
    baseline, planted, _ = found.recipes
    paired = np.array(planted.values) - np.array(baseline.values)
    assert planted.difference.mean == pytest.approx(paired.mean())
    assert planted.difference.low <= paired.mean() <= planted.difference.high
    assert paired.std() < np.std(baseline.values), "what the recipes share by seed cancels"


def test_the_values_are_those_of_the_best_configuration_on_test_data(found):
    made = toy.load("toy")
    for judged in found.recipes:
        best = [judged.recipe.with_params(tuned.params).choices for tuned in judged.tunings]
        silent = {"split": "test", "progress": lambda *_: None}
        assert judged.values == [made.run(choices, seed, **silent).value for seed, choices in enumerate(best)]
        assert judged.tuned.value == max(tuned.value for tuned in judged.tunings)


def test_a_single_tuning_serves_all_seeds_if_asked_to(store):
    found = run(store, tune_once=True)
    assert found.as_json()["seeds"]["tuning"] == [FIRST_TUNING_SEED]
    for judged in found.recipes:
        assert len({str(tuned.params) for tuned in judged.tunings}) == 1
        assert judged.tuned == judged.tunings[0]


def test_worker_processes_and_this_process_come_to_the_same_figures(found, tmp_path):
    with Store(tmp_path / "runs.db") as store:
        assert run(store, executor=Local(toy.load, 2)).as_json() == found.as_json()


def lines(log):
    return log.read_text().splitlines() if log.exists() else []


def test_a_second_run_of_the_same_comparison_runs_nothing_and_is_equal(store, tmp_path):
    log = tmp_path / "log"
    first = run(store, f"toy log={log}")
    ran = lines(log)
    assert len(ran) == len(set(ran)) == 3 * 8 * (6 + 1)
    told = []
    second = run(store, f"toy log={log}", progress=lambda **figures: told.append(figures))
    assert lines(log) == ran
    assert second.as_json() == first.as_json()
    assert told[-1] == {"done": 168, "total": 168, "running": 0, "failed": 0, "stored": 168}


def test_what_is_all_stored_needs_nothing_made(store, monkeypatch):
    run(store)

    def check(self, choices):
        pytest.fail("nothing is to be run")

    monkeypatch.setattr(toy.Toy, "check", check)
    run(store)


def test_a_comparison_with_larger_budgets_takes_over_the_runs_of_a_smaller_one(store, tmp_path):
    log = tmp_path / "log"
    small = run(store, f"toy log={log}", trials=6, seeds=4)
    before = set(lines(log))
    large = run(store, f"toy log={log}", trials=10, seeds=7)
    ran = lines(log)
    assert len(ran) == len(set(ran)), "nothing is run twice"
    assert sum("validation" in line for line in set(ran) - before) == 3 * (4 * 4 + 3 * 10)
    for few, many in zip(small.recipes, large.recipes, strict=True):
        for a, b in zip(few.tunings, many.tunings, strict=False):
            assert [params for params, _ in b.history[:6]] == [params for params, _ in a.history]
    alone = Store(tmp_path / "alone.db")
    with alone:
        assert run(alone, trials=10, seeds=7).as_json() == large.as_json()


def test_more_seeds_only_run_the_further_seeds(store, tmp_path):
    log = tmp_path / "log"
    run(store, f"toy log={log}", seeds=5, optimizer="FixedTwin")
    run(store, f"toy log={log}", seeds=9, optimizer="FixedTwin")
    assert sorted(lines(log)) == sorted(f"{name} {seed} test" for name in ("Fixed", "FixedTwin") for seed in range(9))


def test_runs_of_another_version_are_not_taken_over(store, tmp_path):
    log = tmp_path / "log"
    run(store, f"toy log={log}", optimizer="FixedTwin")
    run(store, f"toy log={log} version=2", optimizer="FixedTwin")
    assert len(lines(log)) == 2 * 16


def test_progress_counts_every_run_once(store):
    told = []
    run(store, optimizer="Fixed,Plain,Broken(every=4)", progress=lambda **figures: told.append(figures))
    assert [figures["done"] for figures in told] == list(range(1, 8 * 6 + 24 + 1))
    assert told[-1]["total"] == 8 * 6 + 24
    assert told[-1]["failed"] == 2
    assert all(figures["done"] <= figures["total"] for figures in told)
    assert {figures["stored"] for figures in told} == {0}


@pytest.mark.parametrize(("reference", "worst"), [("toy", 0.0), ("toy minimize", 2.0)])
@pytest.mark.parametrize("how", ["raise", "diverge", "nan"])
def test_failed_runs_count_with_the_worst_value_and_are_told(store, reference, worst, how):
    found = run(store, reference, seeds=10, optimizer=f"Broken(how={how!r}, every=2)")
    broken = found.recipes[1]
    assert broken.failed == 5
    assert broken.as_json()["failed"] == 5
    assert broken.values[::2] == [worst] * 5
    assert worst not in broken.values[1::2]
    assert broken.verdict in ("undecided", "worse")
    assert abs(broken.difference.mean) > 0.1
    assert (broken.difference.mean > 0) == (reference == "toy minimize")


def test_a_method_that_always_fails_is_worse(store):
    found = run(store, optimizer="Broken")
    assert (found.recipes[1].verdict, found.recipes[1].failed) == ("worse", 8)
    assert found.recipes[1].as_json()["costs"] == dict.fromkeys(
        ["step_time_ratio", "peak_memory_ratio", "optimizer_state_bytes", "trainable_parameters"]
    )


def test_costs_are_relative_to_the_baseline(store):
    costs = run(store, filter="Blurred", trials=1).recipes[1].costs
    assert (costs.step_time_ratio, costs.peak_memory_ratio) == (2.0, 1.001)


@pytest.mark.parametrize(("reference", "said"), [("toy", "better"), ("toy minimize", "worse")])
def test_a_planted_effect_is_found_and_has_the_right_sign(store, reference, said):
    planted = run(store, reference, seeds=10, optimizer="Fixed,Fixed(gain=0.08),Fixed(gain=0.0801)").recipes[1]
    assert planted.verdict == said
    assert planted.difference.low <= 0.08 <= planted.difference.high


def test_what_differs_by_less_than_matters_is_equivalent(store):
    assert run(store, "toy margin=0.05", seeds=10, optimizer="FixedTwin").recipes[1].verdict == "equivalent"


def test_a_method_against_itself_gets_a_false_verdict_in_no_more_than_one_case_in_twenty():
    worlds = 400
    verdicts = [judged.verdict for (judged,) in judged_in_many_worlds(worlds, "Fixed,FixedTwin", 10)]
    false = sum(said in ("better", "worse") for said in verdicts)
    attainable = 2 * 25 / 2**10  # the largest level below 5 % that ten sign flips can have
    low, high = stats.binom.ppf([1e-3, 1 - 1e-3], worlds, attainable)
    assert low <= false <= high
    assert false <= stats.binom.ppf(0.95, worlds, 0.05)


def test_several_methods_against_themselves_get_any_false_verdict_in_no_more_than_one_case_in_twenty():
    worlds = 200
    wanted = "Fixed,FixedTwin,Plain(lr=0.1,momentum=0.5),Twin(lr=0.1,momentum=0.5)"
    families = judged_in_many_worlds(worlds, wanted, 8)
    false = sum(any(judged.verdict in ("better", "worse") for judged in family) for family in families)
    assert false <= stats.binom.ppf(0.95, worlds, 0.05)
    assert false > 0


def test_a_tuned_method_against_itself_gets_a_false_verdict_in_no_more_than_one_case_in_twenty():
    """Luck in tuning is part of what is compared: with one tuning for all seeds this comes to one case in four."""
    worlds = 120
    judged = [judged for (judged,) in judged_in_many_worlds(worlds, "Plain,Twin", 6, trials=4)]
    false = sum(each.verdict in ("better", "worse") for each in judged)
    assert false <= stats.binom.ppf(0.95, worlds, 0.05)


@pytest.mark.parametrize("gain", [0.02, 0.03])
def test_a_planted_effect_is_found_as_often_as_the_power_calculation_says(gain):
    worlds = 200
    found = [judged for (judged,) in judged_in_many_worlds(worlds, f"Fixed,Fixed(gain={gain})", 10)]
    expected = power(gain, toy.NOISE * 2**0.5, 10)
    assert 0.4 < expected < 0.95
    rate = sum(judged.verdict == "better" for judged in found) / worlds
    assert rate == pytest.approx(expected, abs=0.04 + 3 * (expected * (1 - expected) / worlds) ** 0.5)
    assert not any(judged.verdict == "worse" for judged in found)


def test_an_undecided_method_is_told_with_how_many_seeds_it_would_probably_be_decided():
    for world, (judged,) in enumerate(judged_in_many_worlds(30, "Fixed,Fixed(gain=0.012)", 8)):
        if judged.verdict == "undecided":
            assert judged.seeds_to_decide is None or judged.seeds_to_decide > 8, world


@pytest.mark.parametrize(
    ("wanted", "seeds", "decidable"),
    [("Fixed,FixedTwin", 5, False), ("Fixed,FixedTwin", 6, True), ("Fixed,FixedTwin,Fixed(gain=9)", 6, False)],
)
def test_with_too_few_seeds_nothing_can_be_decided_and_the_comparison_says_so(store, wanted, seeds, decidable):
    found = run(store, seeds=seeds, optimizer=wanted)
    assert found.as_json()["decidable"] is decidable
    if not decidable:
        assert {judged.verdict for judged in found.recipes[1:]} == {"undecided"}
    if seeds == 5:
        assert found.recipes[1].as_json()["difference"]["low"] is None


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"trials": 0}, "trials must be a whole number of at least 1, got 0"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1, got 0"),
        ({"seeds": 2.5}, "seeds must be a whole number of at least 1, got 2.5"),
        ({"seeds": FIRST_TUNING_SEED + 1}, "seeds must be at most 1000000, got 1000001"),
        ({"optimiser": "Plain"}, "no slot 'optimiser'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(store, budget, said):
    with pytest.raises(BadInput, match=said):
        run(store, **budget)
    assert store.count() == 0


WANTED = {"optimizer": "Plain,Planted", "filter": "Blurred"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    with Store(folder / "runs.db") as store:
        told = run(store, f"toy log={folder / 'log'}", trials=7, seeds=6, **WANTED).as_json()
    return json.loads(json.dumps(told)), lines(folder / "log")


@pytest.mark.parametrize("draw", [0, 1])
def test_a_comparison_killed_at_any_moments_goes_on_to_the_same_result(uninterrupted, tmp_path, draw):
    moments = random.Random(draw)
    location, answer, log = tmp_path / "runs.db", tmp_path / "answer.json", tmp_path / "log"
    arguments = (str(location), str(answer), f"toy pause=0.01 log={log}", WANTED, 7, 6)
    kills = 0
    for _ in range(4):
        process = children.start(children.compare_into, *arguments)
        further = len(lines(log)) + moments.randint(1, 7)
        children.wait_for(lambda process=process, further=further: len(lines(log)) >= further or not process.is_alive())
        process.join(moments.uniform(0, 0.015))  # anywhere within a run or between two
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not answer.exists()
        kills += 1
    process = children.start(children.compare_into, *arguments)
    process.join(children.PATIENCE)
    assert process.exitcode == 0
    told, ran = uninterrupted
    assert json.loads(answer.read_text()) == told
    assert set(lines(log)) == set(ran)
    assert len(lines(log)) <= len(ran) + kills, "only the run in flight is lost"


def test_a_store_damaged_between_two_runs_of_a_comparison_is_refused_and_left_untouched(tmp_path):
    path = tmp_path / "runs.db"
    with Store(path) as store:
        run(store, seeds=4)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    damaged = path.read_bytes()
    with pytest.raises(StoreError, match="damaged|cannot be used"), Store(path) as store:
        run(store, seeds=5)
    assert path.read_bytes() == damaged


def by_another_hand(store, statement):
    connection = sqlite3.connect(store.location)
    with connection:
        connection.execute(statement)
    connection.close()


def test_a_store_damaged_while_a_comparison_runs_ends_it_with_a_clear_sentence(tmp_path):
    def meddle(*, done, **_):
        if done == 5:
            by_another_hand(store, "DROP TABLE runs")

    with Store(tmp_path / "runs.db") as store, pytest.raises(StoreError, match="cannot be used: no such table: runs"):
        run(store, progress=meddle)


def test_a_damaged_record_is_named_and_not_run_over(store):
    run(store, optimizer="FixedTwin")
    by_another_hand(store, "UPDATE runs SET outcome = substr(outcome, 1, 20)")
    with pytest.raises(StoreError, match="is damaged: run [0-9a-f]{32} cannot be read"):
        run(store, optimizer="FixedTwin")


@pytest.mark.parametrize(
    ("reference", "source"),
    [
        ("toy", "toy"),
        ("mine.py", "mine.py"),
        ("/a/mine.py:task", "/a/mine.py"),
        ("/a/with.python/mine.py", "/a/with.python/mine.py"),
        ("toy.pyramid", "toy"),
    ],
)
def test_a_task_comes_from_the_file_it_is_named_by_or_from_its_module(reference, source):
    assert source_of(toy.Toy(), reference) == source


def test_a_users_task_is_run_again_when_its_code_changes(store, tmp_path):
    log, path = tmp_path / "log", tmp_path / "mine.py"

    def load(reference):
        return toy.load(f"toy log={log}")

    def compare_mine():
        with Inline(load) as executor:
            compare(load, str(path), {"optimizer": "FixedTwin"}, executor=executor, store=store, trials=1, seeds=2)
        return len(lines(log))

    Path(path).write_text("x = 1\n")
    assert [compare_mine(), compare_mine()] == [4, 4]
    Path(path).write_text("x = 1  # one\n")
    assert compare_mine() == 4
    Path(path).write_text("x = 2\n")
    assert compare_mine() == 8
