import json
import pickle
import random
import shutil
import sqlite3
from contextlib import closing

import children
import optuna
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from fairtrial.contract import Choice, Outcome
from fairtrial.trial.comparison import FIRST_TUNING_SEED, compare
from fairtrial.trial.execute import Inline, Job, carry_out
from fairtrial.trial.recipe import Recipe, Run
from fairtrial.trial.store import Store
from fairtrial.trial.tuning import WAVE, MedianPruner, search_space, tune, tuning_key

SEED = FIRST_TUNING_SEED


def recipe(method="Plain", filtering="Clean", **params):
    return Recipe("toy", {"optimizer": Choice(method, params), "filter": Choice(filtering)})


def drive(flow, answer):
    """Answer every job of every wave; returns what tuning came to, and all the jobs."""
    jobs, outcomes = [], None
    while True:
        try:
            wave = flow.send(outcomes)
        except StopIteration as end:
            return end.value, jobs
        jobs.append(wave)
        outcomes = [answer(job) for job in wave]


def tuned(asked, trials=10, task="toy", answer=None):
    made = toy.load(task)
    return drive(tune(made, asked, trials, SEED), answer or (lambda job: carry_out(made, job)))


def params_of(job):
    return {slot: dict(choice.params) for slot, choice in job.run.recipe.choices.items()}


@pytest.mark.parametrize("trials", [1, 3, 4, 5, 11])
@pytest.mark.parametrize("method", ["Plain", "Twin", "BrokenTuned"])
def test_every_recipe_gets_the_same_number_of_runs_in_waves(method, trials):
    found, waves = tuned(recipe(method), trials)
    assert [len(wave) for wave in waves] == [WAVE] * (trials // WAVE) + ([trials % WAVE] if trials % WAVE else [])
    assert len(found.history) == trials


def test_tuning_runs_use_the_tuning_seed_and_validation_data():
    _, waves = tuned(recipe())
    assert {(job.run.seed, job.run.split) for wave in waves for job in wave} == {(SEED, "validation")}


def test_the_first_configuration_is_the_methods_own_defaults():
    _, waves = tuned(recipe(filtering="Blurred"), 1)
    assert params_of(waves[0][0]) == {
        "optimizer": {"lr": 0.03, "momentum": 0.5},
        "filter": {"width": 1, "kind": "soft"},
    }


def test_every_configuration_lies_in_the_space_that_is_searched():
    asked = recipe(filtering="Blurred")
    space = search_space(toy.load("toy"), asked)
    found, _ = tuned(asked, 20)
    assert sorted(space) == ["filter.kind", "filter.width", "optimizer.lr", "optimizer.momentum"]
    for params, _ in found.history:
        assert params.keys() == space.keys()
        assert all(space[key].contains(value) for key, value in params.items())
    assert len({tuple(params.values()) for params, _ in found.history}) > 10


def test_a_hyperparameter_that_is_set_is_not_searched():
    asked = recipe(lr=0.02)
    assert list(search_space(toy.load("toy"), asked)) == ["optimizer.momentum"]
    found, waves = tuned(asked, 6)
    assert {job.run.recipe.choices["optimizer"].params["lr"] for wave in waves for job in wave} == {0.02}
    assert found.params.keys() == {"optimizer"}
    assert found.params["optimizer"].keys() == {"momentum"}


def test_with_nothing_to_tune_nothing_is_run():
    found, waves = tuned(recipe("Fixed"))
    assert waves == []
    assert (found.params, found.history) == ({}, ())
    found, waves = tuned(recipe(lr=0.1, momentum=0.5))
    assert (waves, found.params) == ([], {})


@pytest.mark.parametrize(("reference", "sign"), [("toy", 1), ("toy minimize", -1)])
def test_the_best_configuration_is_the_one_that_measured_best(reference, sign):
    found, _ = tuned(recipe(), 12, reference)
    best = max(sign * outcome.value for _, outcome in found.history if outcome.ended == "finished")
    chosen = {f"optimizer.{name}": value for name, value in found.params["optimizer"].items()}
    assert [sign * outcome.value for params, outcome in found.history if params == chosen] == [best]


def test_ties_go_to_the_configuration_tried_first():
    found, waves = tuned(recipe(), 9, answer=lambda job: Outcome(0.5))
    assert found.params == {"optimizer": params_of(waves[0][0])["optimizer"]}


def test_pruned_and_failed_runs_are_never_the_best():
    order = iter(["diverged", "pruned", "finished", "died", "pruned"])
    found, waves = tuned(recipe(), 5, answer=lambda job: Outcome(0.1 if (e := next(order)) == "finished" else 9.9, e))
    assert found.params == {"optimizer": params_of(waves[0][2])["optimizer"]}


@pytest.mark.parametrize("ended", ["died", "diverged", "pruned"])
def test_if_no_run_came_through_the_defaults_stand(ended):
    found, _ = tuned(recipe(), 9, answer=lambda job: Outcome(0.0, ended))
    assert found.params == {}
    assert len(found.history) == 9


def test_a_default_outside_the_searched_range_does_not_break_tuning():
    made = toy.Toy()
    searched = {"lr": toy.Uniform(0.5, 0.9), "momentum": toy.Uniform(0.0, 0.9)}
    made.slots["optimizer"].options.__dict__["methods"] = (toy.Method("Plain", "optimizer", toy.Plain, searched),)
    _, waves = drive(tune(made, recipe(), 2, SEED), lambda job: carry_out(made, job))
    first = params_of(waves[0][0])["optimizer"]
    assert 0.5 <= first["lr"] <= 0.9
    assert first["momentum"] == 0.5


def known_again(found, task="toy", answer=None):
    """Tune again with what is known; the tuning, and the number of jobs in each wave."""
    made = toy.load(task)
    known = [tuple(tried) for tried in json.loads(json.dumps(found.tried))]  # as from a store
    again, waves = drive(
        tune(made, found.recipe, len(found.history), SEED, known), answer or (lambda job: carry_out(made, job))
    )
    return again, [len(wave) for wave in waves]


@pytest.mark.parametrize("asked", [recipe(), recipe("Planted", "Blurred"), recipe("BrokenTuned", how="prune")])
def test_what_a_tuning_tried_is_tried_again_in_one_wave_and_comes_to_the_same(asked):
    found, _ = tuned(asked, 16)
    assert "pruned" in {outcome.ended for _, outcome in found.history}
    again, waves = known_again(found)
    assert waves == [16]
    assert again.tried == found.tried
    assert [list(outcome.curve) for _, outcome in again.history] == [list(o.curve) for _, o in found.history]
    assert (again.params, again.value) == (found.params, found.value)


def test_a_tuning_is_looked_for_anew_when_its_runs_come_to_something_else():
    found, _ = tuned(recipe(), 9, answer=lambda job: Outcome(0.0, "died"))
    again, waves = known_again(found)
    assert waves == [9, 4, 4, 1]
    assert again.tried == tuned(recipe(), 9)[0].tried


def test_what_a_tuning_tried_is_known_by_all_that_it_depends_on():
    def key(task="toy", trials=8, seed=SEED, code="f", **params):
        return tuning_key(toy.load(task), recipe(**params), trials, seed, code)

    others = [
        key("toy minimize"),
        key("toy version=2"),
        key(trials=9),
        key(seed=SEED + 1),
        key(code="g"),
        key(lr=0.1),
        key(method="Twin"),
    ]
    assert key() == key()
    assert len({key(), *others}) == 1 + len(others)
    made = toy.load("toy")
    searched = {"lr": toy.Uniform(0.5, 0.9), "momentum": toy.Uniform(0.0, 0.9)}
    made.slots["optimizer"].options.__dict__["methods"] = (toy.Method("Plain", "optimizer", toy.Plain, searched),)
    assert tuning_key(made, recipe(), 8, SEED, "f") != key()


def test_proposals_differ_by_seed_but_not_by_repetition_or_name():
    def proposals(asked, seed):
        found, _ = drive(tune(toy.load("toy"), asked, 6, seed), lambda job: Outcome(0.5))
        return [tuple(params.values()) for params, _ in found.history]

    assert proposals(recipe(), 1) == proposals(recipe(), 1)
    assert proposals(recipe(), 1)[1:] != proposals(recipe(), 2)[1:]
    assert proposals(recipe(), 1) == proposals(recipe("Twin"), 1)  # the same search space


class Contrary(Inline):
    """Carries jobs out in an order of its own, as a crowd of workers might."""

    random = random.Random(0)

    def next(self):
        self.random.shuffle(self.waiting)
        return super().next()


def history(location, executor=Inline, trials=16):
    """What tuning two recipes came to, through a store."""
    with Store(location) as store, executor(toy.load) as opened:
        found = compare(
            toy.load, "toy", {"optimizer": "Plain,Planted"}, executor=opened, store=store, trials=trials, seeds=1
        )
    return [
        [(params, outcome.ended, outcome.value, list(outcome.curve)) for params, outcome in judged.tuned.history]
        for judged in found.recipes
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Tuning on an empty store, and the store."""
    location = tmp_path_factory.mktemp("reference") / "runs.db"
    return history(location), location


def test_proposals_do_not_depend_on_the_order_in_which_runs_end(reference, tmp_path):
    assert history(tmp_path / "runs.db", Contrary) == reference[0]


def test_some_runs_are_pruned_and_none_of_the_first_wave(reference):
    ended = [[ended for _, ended, _, _ in one] for one in reference[0]]
    assert all("pruned" in one for one in ended)
    assert all(one[:WAVE] == ["finished"] * WAVE for one in ended)


def test_stored_runs_are_replayed_as_if_just_run(reference):
    assert history(reference[1]) == reference[0]


def tunings_in(location):
    with closing(sqlite3.connect(location)) as connection:
        return connection.execute("SELECT * FROM tunings ORDER BY key").fetchall()


def test_what_tunings_tried_is_stored_and_a_replay_neither_asks_nor_changes_it(reference):
    stored = tunings_in(reference[1])
    assert len(stored) == 2
    assert history(reference[1]) == reference[0]
    assert tunings_in(reference[1]) == stored


def test_runs_that_somebody_took_out_of_a_store_are_run_again_and_come_to_the_same(reference, tmp_path):
    location = shutil.copy(reference[1], tmp_path)
    with closing(sqlite3.connect(location)) as connection, connection:
        connection.execute("DELETE FROM runs WHERE ended = 'pruned' OR seed = 0 OR value > 0.5")
    with Store(location) as store:
        left = store.count()
    assert history(location) == reference[0]
    with Store(location) as store:
        assert store.count() > left


class Losing(Inline):
    """Every second job takes its worker along, time and again."""

    def next(self):
        job, outcome = super().next()
        return job, Outcome(0.0, "lost") if len(self.waiting) % 2 else outcome


def test_a_tuning_with_a_lost_run_is_not_remembered(tmp_path):
    location = tmp_path / "runs.db"
    assert all("lost" in {ended for _, ended, _, _ in one} for one in history(location, Losing))
    assert tunings_in(location) == []


def test_a_run_stored_to_its_end_is_stopped_where_the_pruner_would_have_stopped_it(reference, tmp_path):
    """All configurations are first run to their ends, then compared."""
    location = tmp_path / "runs.db"
    made = toy.load("toy")
    with Store(reference[1]) as old, Store(location) as new:
        for stored in old.list():
            choices = {slot: Choice(choice["name"], choice["params"]) for slot, choice in stored.choices.items()}
            run = Run(Recipe("toy", choices), stored.seed, stored.split)
            outcome = carry_out(made, Job(run))
            assert outcome.ended == "finished"
            new.put(stored.key, run, stored.task, stored.version, "f", outcome)
        assert new.count() == old.count()
    assert history(location) == reference[0]
    with Store(location) as store:
        assert not store.list(ended="pruned"), "everything was there already"


def test_a_stored_run_that_was_stopped_is_run_to_its_end_where_nothing_would_stop_it(reference, tmp_path):
    """With fewer trials than a wave nothing is pruned, so stopped runs of another comparison are of no use."""
    location = tmp_path / "runs.db"
    with Store(reference[1]) as old, Store(location) as new:
        for stored in old.list():
            choices = {slot: Choice(choice["name"], choice["params"]) for slot, choice in stored.choices.items()}
            run = Run(Recipe("toy", choices), stored.seed, stored.split)
            curve = stored.outcome.curve[:2]
            new.put(stored.key, run, stored.task, stored.version, "f", Outcome(curve[-1][1], "pruned", curve=curve))
    assert history(location) == reference[0]


curves = st.lists(
    st.lists(st.floats(-1, 1).map(lambda x: round(x, 1)), min_size=1, max_size=5).map(
        lambda values: tuple((step + 1, value) for step, value in enumerate(values))
    ),
    max_size=7,
)


@settings(deadline=None, max_examples=50)
@given(curves, st.lists(st.floats(-1, 1), min_size=1, max_size=5), st.sampled_from(["maximize", "minimize"]))
def test_the_pruner_agrees_with_optunas_run_directly_also_after_a_journey(finished, values, direction):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction=direction, pruner=optuna.pruners.MedianPruner(WAVE, 0))
    for curve in finished:
        trial = study.ask()
        for step, value in curve:
            trial.report(value, step)
        study.tell(trial, curve[-1][1])
    trial = study.ask()
    pruner = MedianPruner(direction, tuple(finished))
    curve = []
    for step, value in enumerate(values, 1):
        trial.report(value, step)
        curve.append((step, value))
        assert pruner.hopeless(curve) == trial.should_prune()
        assert pickle.loads(pickle.dumps(pruner)).hopeless(curve) == trial.should_prune()


def test_a_pruner_does_not_carry_its_study_along():
    pruner = MedianPruner("maximize", (((1, 0.5),),) * 5)
    before = pickle.dumps(pruner)
    pruner.hopeless([(1, 0.1)])
    assert pickle.dumps(pruner) == before
    assert pickle.loads(before) == pruner


def test_a_run_without_a_curve_can_be_tuned_over_too():
    found, _ = tuned(recipe("BrokenTuned", how="number"), 6)
    assert [outcome.ended for _, outcome in found.history].count("died") > 0
    assert children.job("number").pruner is None
