import json
import math
import os
import subprocess
import sys

import pytest
import toy
from hypothesis import example, given
from hypothesis import strategies as st
from tests.fuzzing import fuzz

from fairtrial.contract import BadInput, Choice, Slot
from fairtrial.trial.recipe import (
    Recipe,
    Run,
    check_budget,
    check_recipes,
    parse_choice,
    parse_choices,
    recipe_name,
    recipes_for,
    resolve,
)

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True)
keys = names.filter(lambda name: name not in {"True", "False", "None"} and not __import__("keyword").iskeyword(name))
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(plain, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
choices = st.builds(Choice, names, st.dictionaries(keys, values, max_size=3))


@fuzz(200)
@given(st.text(st.characters(), max_size=60) | st.text("Aa1=(),[]{}'\"\\:.*- \n#", max_size=40))
@example("A(x='\\'),B")
@example("A(x=1)(y=2)")
@example("A(**{'x': 1})")
@example("A(x=\0)")
@example("A(x=" + "(" * 500 + ")" * 500 + ")")
@example("A(x=" + "[" * 90 + "]" * 90 + ")")
@example("A(x=0x" + "f" * 6000 + ")")
@example("A(x=" + "-" * 5000 + "1)")
@example("A(x=1if 1else 2)")
@example("A('\ud800')")
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_arbitrary_text_is_read_as_choices_or_refused(text):
    try:
        read = parse_choices(text)
    except BadInput:
        return
    assert read
    for choice in read:
        json.dumps(choice.params, allow_nan=False, sort_keys=True)


@fuzz(200)
@given(choices)
def test_what_a_choice_is_written_as_reads_as_the_same_choice(choice):
    assert parse_choice(str(choice)) == choice


@fuzz(200)
@given(st.lists(choices, min_size=1, max_size=4))
@example([Choice("A", {"x": 'it\'s "quoted", is it'}), Choice("B", {"y": "\\"})])
def test_a_list_of_written_choices_reads_as_the_same_choices(listed):
    assert parse_choices(", ".join(map(str, listed))) == listed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("AdamW", Choice("AdamW")),
        (" AdamW ( ) ", Choice("AdamW")),
        ("z-loss(a=1)", Choice("z-loss", {"a": 1})),
        ("A(projection=svd)", Choice("A", {"projection": "svd"})),
        ("A(lr=-1e-3, on=True, off=None)", Choice("A", {"lr": -0.001, "on": True, "off": None})),
        ("A(betas=(0.9, (0.99, 1)))", Choice("A", {"betas": [0.9, [0.99, 1]]})),
    ],
)
def test_the_notation(text, expected):
    assert parse_choice(text) == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a method's name is missing"),
        ("A,,B", "a method's name is missing"),
        ("A(", "write NAME or NAME(key=value, …)"),
        ("A B", "write NAME or NAME(key=value, …)"),
        ("A(x=)", "write NAME(key=value, …)"),
        ("A(1)", "hyperparameters are written key=value"),
        ("A(x=1) + B(y=2)", "hyperparameters are written key=value"),
        ("A(x=1, x=2)", "cannot read"),
        ("A(**x)", "each hyperparameter is written once"),
        ("A(x=1e999)", "the value of x must be a finite number"),
        ("A(x=-inf)", "the value of x must be a finite number"),
        ("A(x=1j)", "the value of x must be a finite number"),
        ("A(x=b'y')", "the value of x must be a finite number"),
        ("A(x={1, 2})", "the value of x must be a finite number"),
        ("A(x={1: 2, 'a': 3})", "the value of x must be a finite number"),
        ("A(x=[{'a': 3}])", "the value of x must be a finite number"),
        ("A(x=f(1))", "the value of x must be a finite number"),
    ],
)
def test_what_the_notation_refuses(text, said):
    with pytest.raises(BadInput, match=said.replace("(", r"\(").replace(")", r"\)")):
        parse_choices(text)


def test_a_name_is_found_in_any_case_and_by_its_papers_slug():
    slot = toy.load("toy").slots["optimizer"]
    for written in ("Plain", "plain", "PLAIN", "plain_sgd", "Plain_SGD"):
        assert resolve(slot, Choice(written, {"lr": 0.1})) == Choice("Plain", {"lr": 0.1})


def test_an_unknown_name_is_answered_with_the_nearest_ones():
    slot = toy.load("toy").slots["optimizer"]
    with pytest.raises(BadInput, match="no method 'plian' for the slot 'optimizer'; did you mean Plain"):
        resolve(slot, Choice("plian"))
    with pytest.raises(BadInput, match=r"there is: Plain, Twin, Planted, Fixed"):
        resolve(slot, Choice("qqqqqqqq"))


def test_an_unknown_hyperparameter_is_answered_with_the_known_ones():
    slot = toy.load("toy").slots["optimizer"]
    with pytest.raises(BadInput, match="Plain has no hyperparameter 'rate'; it has: lr, momentum"):
        resolve(slot, Choice("Plain", {"rate": 1}))
    with pytest.raises(BadInput, match="Clean has no hyperparameter 'x'; it has: none"):
        resolve(toy.load("toy").slots["filter"], Choice("Clean", {"x": 1}))


def test_what_a_slot_and_a_method_bind_gives_way_to_what_a_person_sets():
    made = toy.Method("M", "s", lambda a, b, c=3: (a, b, c), bind=lambda setting: {"b": setting + 1, "c": setting + 2})
    slot = Slot("s", Choice("M"), toy.Options((made,)), lambda setting: {"a": setting})
    assert slot.build(Choice("M"), 10) == (10, 11, 12)
    assert slot.build(Choice("M", {"a": 0, "c": 0}), 10) == (0, 11, 0)


def asked(**wanted):
    recipes = recipes_for(toy.load("toy"), "toy", wanted)
    return [{slot: str(choice) for slot, choice in recipe.choices.items()} for recipe in recipes]


def test_one_method_is_compared_against_the_slots_default():
    assert asked(optimizer="plain") == [
        {"optimizer": "Fixed", "filter": "Clean"},
        {"optimizer": "Plain", "filter": "Clean"},
    ]


def test_of_several_methods_the_first_is_the_baselines():
    recipes = asked(optimizer="Twin,Plain(lr=0.2),fixed")
    assert [recipe["optimizer"] for recipe in recipes] == ["Twin", "Plain(lr=0.2)", "Fixed"]


def test_the_default_with_hyperparameters_is_still_a_baseline():
    recipes = asked(optimizer="Fixed(gain=0.1)", filter="Blurred")
    assert recipes == [
        {"optimizer": "Fixed(gain=0.1)", "filter": "Clean"},
        {"optimizer": "Fixed(gain=0.1)", "filter": "Blurred"},
    ]


def test_in_several_slots_each_method_is_tried_alone():
    recipes = recipes_for(toy.load("toy"), "toy", {"optimizer": "Plain,Twin", "filter": "Blurred"})
    assert [recipe_name(recipe, recipes[0]) for recipe in recipes] == ["baseline", "Twin", "Blurred"]
    assert str(recipes[1].choices["filter"]) == "Clean"
    assert str(recipes[2].choices["optimizer"]) == "Plain"


pieces = st.sampled_from(
    ["Plain", "twin", "Fixed", "Broken", "(", ")", ",", "=", "lr", "momentum", "gain", "0.1", "1e400"]
)
literals = st.sampled_from(["-1", "[1]", "'a'", "None", "True", "how", "raise", " ", "{}", "lambda: 0", "*", "é", "\\"])


@fuzz(300)
@given(st.lists(pieces | literals, max_size=12).map("".join) | st.lists(choices, max_size=3).map(repr))
@example("Plain(lr=1" + "0" * 400 + ")")
@pytest.mark.filterwarnings("ignore::SyntaxWarning", "ignore::DeprecationWarning")
def test_arbitrary_text_asks_for_recipes_that_can_be_made_or_is_refused(text):
    task = toy.load("toy")
    try:
        recipes = recipes_for(task, "toy", {"optimizer": text})
        check_recipes(task, recipes)
    except BadInput:
        return
    assert len(recipes) >= 2
    for recipe in recipes:
        choice = recipe.choices["optimizer"]
        assert parse_choice(str(choice)) == choice
        made = task.slots["optimizer"].build(choice, None)
        assert all(getattr(made, name) == value for name, value in choice.params.items())
        assert Run(recipe, 0, "test").key(task="toy", version=1, fingerprint="")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({}, "name at least one slot=METHOD,METHOD; the task 'toy' has: optimizer, filter"),
        ({"optimiser": "Plain"}, "the task 'toy' has no slot 'optimiser'; did you mean optimizer?"),
        ({"optimizer": "Plain,plain"}, "Plain is named twice for the slot 'optimizer'"),
        ({"optimizer": "Plain(lr=0.1),Plain(lr=0.1)"}, "Plain(lr=0.1) is named twice"),
        ({"optimizer": "Fixed"}, "nothing to compare"),
        ({"optimizer": "Nought"}, "no method 'Nought' for the slot 'optimizer'"),
        ({"optimizer": "Plain(rate=1)"}, "Plain has no hyperparameter 'rate'"),
        ({"optimizer": "Plain,Twin(lr=0)"}, "Twin(lr=0): lr must be above 0, got 0"),
        ({"optimizer": "Plain(lr=-1),Twin"}, "baseline: lr must be above 0, got -1"),
        ({"optimizer": "Plain(lr=much),Twin"}, "baseline: '<=' not supported"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_sentence(wanted, said):
    with pytest.raises(BadInput) as caught:
        check_recipes(toy.load("toy"), recipes_for(toy.load("toy"), "toy", wanted))
    assert said in str(caught.value)


RECIPE = Recipe("toy", {"a": Choice("X", {"p": 0.1, "q": [1, "é"]}), "b": Choice("Y")})
PARTS = {"task": "toy", "version": 1, "fingerprint": "f"}


def test_run_keys_differ_by_every_part():
    other = {
        "recipe": [
            Recipe("toy", {"a": Choice("Z", RECIPE.choices["a"].params), "b": Choice("Y")}),
            RECIPE.with_params({"a": {"p": 0.2}}),
            RECIPE.with_params({"b": {"p": 0.1}}),
            Recipe("toy", {"a": RECIPE.choices["a"]}),
            Recipe("toy", {"b": RECIPE.choices["a"], "a": RECIPE.choices["b"]}),
        ]
    }
    found = {Run(recipe, 0, "test").key(**PARTS) for recipe in [RECIPE, *other["recipe"]]}
    found |= {Run(RECIPE, 1, "test").key(**PARTS), Run(RECIPE, 0, "validation").key(**PARTS)}
    for changed in ({"task": "boy"}, {"version": 2}, {"fingerprint": "g"}):
        found.add(Run(RECIPE, 0, "test").key(**{**PARTS, **changed}))
    assert len(found) == 6 + 2 + 3


def test_run_keys_do_not_depend_on_the_order_in_which_things_are_named():
    turned = Recipe("toy", {"b": Choice("Y"), "a": Choice("X", {"q": [1, "é"], "p": 0.1})})
    assert Run(turned, 0, "test").key(**PARTS) == Run(RECIPE, 0, "test").key(**PARTS)


def test_run_keys_are_equal_in_every_process():
    code = (
        f"from fairtrial.contract import Choice; from fairtrial.trial.recipe import Recipe, Run; print(Run({RECIPE!r}"
    )
    code += f", 0, 'test').key(**{PARTS!r}))"
    for hash_seed in ("1", "2"):
        told = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert told.stdout.strip() == Run(RECIPE, 0, "test").key(**PARTS)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "3", None, math.nan])
def test_budgets_that_are_no_counts_are_refused(value):
    with pytest.raises(BadInput, match=r"seeds must be a whole number of at least 1, got"):
        check_budget("seeds", value)


def test_budgets_may_be_as_large_as_anyone_likes():
    check_budget("seeds", 1)
    check_budget("seeds", 10**400)
