import shlex
import sqlite3
from contextlib import closing
from dataclasses import replace

import made
import pytest
import toy

from fairtrial.contract import Choice
from fairtrial.report.origin import command, origin
from fairtrial.trial.comparison import compare
from fairtrial.trial.execute import Inline
from fairtrial.trial.recipe import Recipe, recipes_for
from fairtrial.trial.store import Store


def carried_out(folder, wanted, reference="toy", **budget):
    with Inline(toy.load) as executor, Store(folder / "runs.db") as store:
        return compare(toy.load, reference, wanted, executor=executor, store=store, **budget)


@pytest.mark.parametrize(
    ("wanted", "budget"),
    [
        ({"optimizer": "Fixed,FixedTwin,Fixed(gain=0.1)"}, {"trials": 1, "seeds": 2}),
        ({"filter": "Clean,Blurred(kind='so \"ft', width=2)", "optimizer": "Plain(lr=0.5)"}, {"trials": 2, "seeds": 1}),
        ({"optimizer": "FixedTwin"}, {"trials": 1, "seeds": 3, "tune_once": True}),
        ({"optimizer": "Fixed,Planted(gain=0.3)"}, {"trials": 1, "seeds": 13, "until_decided": True}),
    ],
)
def test_the_command_makes_the_same_comparison(tmp_path, wanted, budget):
    found = carried_out(tmp_path, wanted, **budget)
    program, verb, reference, *rest = shlex.split(command(found))
    assert (program, verb, reference) == ("fairtrial", "compare", "toy")
    again, options = {}, []
    for word in rest:
        slot, equals, methods = word.partition("=")
        if equals and not options:
            again[slot] = methods
        else:
            options.append(word)
    assert recipes_for(toy.load("toy"), "toy", again) == [judged.recipe for judged in found.recipes]
    seeds = found.until_decided.budget if found.until_decided else budget["seeds"]
    asked = ["--trials", str(budget["trials"]), "--seeds", str(seeds)]
    asked += ["--until-decided"] * budget.get("until_decided", False) + ["--tune-once"] * budget.get("tune_once", False)
    assert options == asked


def test_the_code_is_what_the_runs_are_stored_under(tmp_path):
    found = carried_out(
        tmp_path, {"optimizer": "Fixed,FixedTwin", "filter": "Clean,Blurred(width=1)"}, trials=1, seeds=1
    )
    with closing(sqlite3.connect(tmp_path / "runs.db")) as stored:
        fingerprints = {code for (code,) in stored.execute("SELECT DISTINCT fingerprint FROM runs")}
    told = origin(found, toy.load)
    assert set(told.code) == fingerprints
    assert len(told.code) == len(found.recipes)
    assert {"python", "torch", "numpy", "scikit-learn", "optuna", "fairtrial"} <= told.environment.keys()
    assert told.command == command(found)


def test_a_comparison_of_a_recipe_with_itself_has_a_command_too():
    found = made.comparison({"A": [made.finished(0.5)] * 6, "A ": [made.finished(0.5)] * 6})
    same = Recipe("a file.py", {"loss": Choice("A", {"kind": "it's", "of": [1, "x"]})})
    found = replace(found, recipes=[replace(judged, recipe=same) for judged in found.recipes])
    words = shlex.split(command(found))
    assert words[2:4] == ["a file.py", """loss=A(kind="it's",of=[1, 'x'])"""]
