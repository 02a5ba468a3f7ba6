"""What may fill the slots: names, and a few steps with every one of them."""

import subprocess
import sys
from dataclasses import replace

import pytest

from fairtrial.contract import BadInput, Choice
from fairtrial.methods.registry import Entry, Method, index
from fairtrial.tasks import load, slots
from fairtrial.tasks.supervised import SupervisedTask

EVERY = [(slot.name, name) for slot in load("digits").slots.values() for name in slot.options.names()]
STEPS = 12


def short(name: str) -> SupervisedTask:
    task = load(name)
    assert isinstance(task, SupervisedTask)
    return replace(task, total_steps=STEPS)


@pytest.mark.parametrize(("slot", "name"), EVERY)
def test_every_method_runs_and_repeats_itself(slot: str, name: str) -> None:
    task = short("digits")
    choices = {slot: Choice(name)}
    task.check(choices)
    first, second = (task.run(choices, 1) for _ in range(2))
    assert (first.value, first.metrics, first.curve) == (second.value, second.metrics, second.curve)
    assert first.costs.peak_memory == second.costs.peak_memory
    assert 0 <= first.value <= 1
    assert first.curve[-1] == (STEPS, first.value)


@pytest.mark.parametrize("task_name", ["digits-cnn", "tabular", "tabular-diabetes", "text"])
def test_on_other_tasks_every_method_runs_or_is_refused_before_training(task_name: str) -> None:
    task = replace(short(task_name), total_steps=2)
    refused = []
    for slot in task.slots.values():
        for name in slot.options.names():
            try:
                task.check({slot.name: Choice(name)})
            except (ValueError, TypeError):
                refused.append(name)
                continue
            if task_name != "text" and slot.name in ("optimizer", "loss", "layer"):
                task.run({slot.name: Choice(name)}, 0)
    standard = {method.name for slot in task.slots.values() for method in slot.options.standard}  # type: ignore[attr-defined]
    assert not standard & set(refused)


@pytest.mark.parametrize(("slot", "name"), EVERY)
def test_search_spaces_name_hyperparameters(slot: str, name: str) -> None:
    filled = load("digits").slots[slot]
    filled.check(Choice(name, dict.fromkeys(filled.options[name].search)))


def test_registered_methods_are_offered_in_their_slot() -> None:
    for entry in index():
        if entry.slot in ("optimizer", "loss", "schedule", "batch", "sampler", "layer"):
            assert (entry.slot, entry.name) in EVERY
    assert len(set(EVERY)) == len(EVERY)


def test_a_slug_stands_for_its_namesake_or_for_the_first_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    announced = [
        ("two_words", "TwoWordsPlus"),
        ("two_words", "TwoWords"),
        ("other", "First"),
        ("other", "Second"),
        ("odd", "Odder"),
        ("odd", "o_d_d"),
    ]
    entries = tuple(Entry(paper, "loss", name, "nowhere") for paper, name in announced)
    monkeypatch.setattr("fairtrial.methods.registry.index", lambda: (*entries, Entry("other", "batch", "X", "nowhere")))
    options = slots.Options([], "loss")
    assert options.names() == ["TwoWordsPlus", "TwoWords", "First", "Second", "Odder", "o_d_d"]
    assert options.aliases() == {"two_words": "TwoWords", "other": "First", "odd": "o_d_d"}


def test_the_paper_of_a_real_method_is_its_alias() -> None:
    options = load("digits").slots["loss"].options
    assert options.aliases()["z_loss"] == "ZLoss"
    assert options["ZLoss"].name == "ZLoss"
    assert isinstance(options["CrossEntropyLoss"], Method)
    with pytest.raises(BadInput, match="no method 'Nothing' here; there is: CrossEntropyLoss, "):
        options["Nothing"]


def test_regression_offers_no_classification_loss() -> None:
    offered = load("tabular-diabetes").slots["loss"].options.names()
    assert {"MSELoss", "HuberLoss"} <= set(offered)
    assert not {"ZLoss", "CrossEntropyLoss"} & set(offered)


def test_names_are_listed_without_importing_torch_or_methods() -> None:
    code = (
        "import sys; from fairtrial import tasks; tasks.names();"
        "from fairtrial.tasks.reference import load;"
        "assert 'torch' not in sys.modules; task = load('digits');"
        "[slot.options.names() for slot in task.slots.values()];"
        "assert 'fairtrial.methods.losses.z_loss' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
