"""Where a comparison comes from, and what to type to get it again."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fairtrial.contract import Choice, Task
from fairtrial.report.runs import tuned_once
from fairtrial.trial.comparison import Comparison, code_of
from fairtrial.trial.store import environment


@dataclass(frozen=True)
class Origin:
    """What it takes to carry a comparison out again.

    Attributes:
        command: the command line.
        environment: versions and the kind of machine.
        code: for every recipe, the baseline first, the fingerprint of the code that its runs are stored under.
    """

    command: str
    environment: Mapping[str, str]
    code: Sequence[str] = ()


def origin(comparison: Comparison, load: Callable[[str], Task]) -> Origin:
    """The origin of a comparison that has just been carried out on this machine; `load` gives its task."""
    task = load(comparison.recipes[0].recipe.task)
    return Origin(
        command(comparison),
        {what: str(found) for what, found in environment().items()},
        tuple(code_of(task, judged.recipe) for judged in comparison.recipes),
    )


def command(comparison: Comparison) -> str:
    """The command line that makes the same comparison; every slot is named, so that no default matters."""
    baseline, *others = [judged.recipe for judged in comparison.recipes]
    swapped = {slot: [_written(choice)] for slot, choice in baseline.choices.items()}
    order: list[str] = []
    for recipe in others:
        for slot, choice in recipe.choices.items():
            if choice != baseline.choices[slot]:
                swapped[slot].append(_written(choice))
                order += [slot] if slot not in order else []
    order += [slot for slot in swapped if slot not in order]
    words = ["fairtrial", "compare", baseline.task, *(f"{slot}={','.join(swapped[slot])}" for slot in order)]
    stopping = comparison.until_decided
    seeds = len(comparison.evaluation_seeds) if stopping is None else stopping.budget
    words += ["--trials", str(comparison.trials), "--seeds", str(seeds)]
    words += [] if stopping is None else ["--until-decided"]
    words += ["--tune-once"] if tuned_once(comparison) else []
    return shlex.join(words)


def _written(choice: Choice) -> str:
    """As it is typed, with double quotes: the shell's are single ones."""
    values = {
        key: json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
        for key, value in choice.params.items()
    }
    inside = ",".join(f"{key}={value}" for key, value in values.items())
    return f"{choice.name}({inside})" if inside else choice.name
