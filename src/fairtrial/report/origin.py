"""Where a comparison comes from, and what to type to get it again."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version

from fairtrial.contract import Task
from fairtrial.trial.comparison import Comparison, source_of
from fairtrial.trial.fingerprint import fingerprint
from fairtrial.trial.recipe import Recipe
from fairtrial.trial.store import environment


@dataclass(frozen=True)
class Origin:
    """What it takes to carry a comparison out again.

    Attributes:
        command: the command line.
        environment: versions and the kind of machine.
        code: for every recipe, by name, the fingerprint of the code that its runs are stored under.
    """

    command: str
    environment: Mapping[str, str]
    code: Mapping[str, str]


def origin(comparison: Comparison, load: Callable[[str], Task]) -> Origin:
    """The origin of a comparison that has just been carried out on this machine; `load` gives its task."""
    task = load(comparison.recipes[0].recipe.task)
    return Origin(
        command(comparison),
        {what: str(found) for what, found in environment().items()},
        {judged.name: code_of(task, judged.recipe) for judged in comparison.recipes},
    )


def command(comparison: Comparison) -> str:
    """The command line that makes the same comparison; every slot is named, so that no default matters."""
    baseline, *others = [judged.recipe for judged in comparison.recipes]
    swapped = {slot: [str(choice)] for slot, choice in baseline.choices.items()}
    order: list[str] = []
    for recipe in others:
        for slot, choice in recipe.choices.items():
            if choice != baseline.choices[slot]:
                swapped[slot].append(str(choice))
                order += [slot] if slot not in order else []
    order += [slot for slot in swapped if slot not in order]
    words = ["fairtrial", "compare", baseline.task, *(f"{slot}={','.join(swapped[slot])}" for slot in order)]
    words += ["--trials", str(comparison.trials), "--seeds", str(len(comparison.evaluation_seeds))]
    return shlex.join(words)


def code_of(task: Task, recipe: Recipe) -> str:
    """The fingerprint that a store keeps with the recipe's runs: the task's and the methods' code, and versions."""
    modules = [source_of(task, recipe.task)]
    for slot, choice in recipe.choices.items():
        option = task.slots[slot].options[choice.name]
        modules += [option.factory.__module__, option.bind.__module__]
    versions = "-".join(version(package) for package in ("torch", "numpy", "scikit-learn"))
    return f"{fingerprint(modules)}-{versions}"
