"""Recipes, runs, and the notation in which a person writes choices down: `AdamW(lr=1e-3),FRUGAL(density=0.25)`."""

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fairtrial.contract import BadInput, Choice, Slot, Split, Task
from fairtrial.spelling import nearest


@dataclass(frozen=True)
class Recipe:
    """A task, by the reference under which it is loaded, and a choice for every slot."""

    task: str
    choices: Mapping[str, Choice]

    def with_params(self, params: Mapping[str, Mapping[str, Any]]) -> "Recipe":
        """The same recipe with further hyperparameters, by slot."""
        return Recipe(
            self.task,
            {
                slot: choice.with_params(params[slot]) if slot in params else choice
                for slot, choice in self.choices.items()
            },
        )

    def as_json(self) -> dict[str, Any]:
        """Plain data, in a fixed order."""
        return {
            slot: {"name": choice.name, "params": {key: choice.params[key] for key in sorted(choice.params)}}
            for slot, choice in sorted(self.choices.items())
        }


@dataclass(frozen=True)
class Run:
    """A recipe and a seed, to be carried out on one split."""

    recipe: Recipe
    seed: int
    split: Split

    def key(self, *, task: str, version: int, fingerprint: str) -> str:
        """What identifies the run in a store: equal keys mean equal results."""
        content = [task, version, self.recipe.as_json(), self.seed, self.split, fingerprint]
        return hashlib.sha256(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()[:32]


def _split_at_commas(text: str) -> list[str]:
    parts, depth, start, quote, escaped = [], 0, 0, "", False
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def parse_choice(text: str) -> Choice:
    """Read `NAME` or `NAME(key=value, …)`; values are Python literals, and bare words stand for themselves."""
    text = text.strip()
    name, parenthesis, rest = text.partition("(")
    name = name.strip()
    if not name.replace("-", "_").isidentifier() or (parenthesis and not rest.endswith(")")):
        raise BadInput(f"cannot read {text!r}: write NAME or NAME(key=value, …)")
    if not parenthesis or not rest[:-1].strip():
        return Choice(name)
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise BadInput(f"cannot read {text!r}: write NAME(key=value, …)") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise BadInput(f"cannot read {text!r}: hyperparameters are written key=value")
    params: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in params:
            raise BadInput(f"cannot read {text!r}: each hyperparameter is written once, as key=value")
        params[keyword.arg] = _value(keyword.value, keyword.arg, name)
    return Choice(name, params)


def _value(node: ast.expr, key: str, name: str) -> Any:
    if isinstance(node, ast.Name):  # projection=svd reads as the text 'svd'
        return node.id
    try:
        if any(isinstance(part, ast.Dict) for part in ast.walk(node)):
            raise ValueError
        return json.loads(json.dumps(ast.literal_eval(node), allow_nan=False))  # tuples become lists, as in a store
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise BadInput(
            f"{name}: the value of {key} must be a finite number, True, False, None, a text or a list of those"
        ) from None


def parse_choices(text: str) -> list[Choice]:
    """Read a comma-separated list of choices."""
    parts = _split_at_commas(text)
    if any(not part.strip() for part in parts):
        raise BadInput(f"cannot read {text!r}: a method's name is missing")
    return [parse_choice(part) for part in parts]


def resolve(slot: Slot, choice: Choice) -> Choice:
    """The choice under the option's own name; names match without regard to case, and a paper's slug works too."""
    names = slot.options.names()
    spelling = {**slot.options.aliases(), **{name.lower(): name for name in names}}
    name = spelling.get(choice.name.lower())
    if name is None:
        raise BadInput(f"no method {choice.name!r} for the slot {slot.name!r}; {nearest(choice.name, names)}")
    resolved = Choice(name, choice.params)
    slot.check(resolved)
    return resolved


def recipes_for(task: Task, reference: str, wanted: Mapping[str, str]) -> list[Recipe]:
    """The recipes that `slot=METHOD,METHOD` asks for, the baseline first.

    In each slot the first method named is the baseline's; a slot with one method named is compared against the slot's
    default. With several slots each method is tried alone, everything else as in the baseline.
    """
    if not wanted:
        raise BadInput(f"name at least one slot=METHOD,METHOD; the task {task.name!r} has: {', '.join(task.slots)}")
    baseline = {name: slot.default for name, slot in task.slots.items()}
    others: list[tuple[str, Choice]] = []
    for slot_name, text in wanted.items():
        if slot_name not in task.slots:
            raise BadInput(f"the task {task.name!r} has no slot {slot_name!r}; {nearest(slot_name, task.slots)}")
        slot = task.slots[slot_name]
        named = [resolve(slot, choice) for choice in parse_choices(text)]
        if len(named) == 1 and named[0].name != slot.default.name:
            named.insert(0, slot.default)
        for place, choice in enumerate(named):
            if choice in named[:place]:
                raise BadInput(f"{choice} is named twice for the slot {slot_name!r}")
        baseline[slot_name] = named[0]
        others += [(slot_name, choice) for choice in named[1:]]
    if not others:
        raise BadInput("nothing to compare: name a method other than the slot's default, or several")
    recipes = [Recipe(reference, baseline)]
    return recipes + [Recipe(reference, {**baseline, slot: choice}) for slot, choice in others]


def check_recipes(task: Task, recipes: Sequence[Recipe]) -> None:
    """Make everything that the recipes name; nothing is trained.

    Raises:
        BadInput: something cannot be made; the message names the recipe, told apart from the first, the baseline.
    """
    for recipe in recipes:
        try:
            task.check(recipe.choices)
        except (ValueError, TypeError) as error:
            changed = recipe_name(recipe, recipes[0])
            raise BadInput(f"{changed}: {error}") from error


def recipe_name(recipe: Recipe, baseline: Recipe) -> str:
    """What sets a recipe apart from the baseline; the baseline is named by what the others swap, or 'baseline'."""
    changed = [str(choice) for slot, choice in recipe.choices.items() if choice != baseline.choices[slot]]
    return " + ".join(changed) if changed else "baseline"


def check_budget(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadInput(f"{name} must be a whole number of at least {least}, got {value!r}")
