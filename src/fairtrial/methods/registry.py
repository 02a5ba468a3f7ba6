"""What a method says of itself: its paper, the slot it takes, the hyperparameters worth tuning.

`@method` only records; it changes nothing about the class or function it decorates. The index of all methods is read
from the source text, so that listing them imports neither torch nor any method.
"""

import ast
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Uniform:
    """A float between `low` and `high`, all equally likely."""

    low: float
    high: float

    def suggest(self, trial: Any, name: str) -> float:
        return float(trial.suggest_float(name, self.low, self.high))

    def contains(self, value: Any) -> bool:
        return _is_number(value) and self.low <= value <= self.high


@dataclass(frozen=True)
class LogUniform:
    """A float between `low` and `high`, all orders of magnitude equally likely."""

    low: float
    high: float

    def suggest(self, trial: Any, name: str) -> float:
        return float(trial.suggest_float(name, self.low, self.high, log=True))

    def contains(self, value: Any) -> bool:
        return _is_number(value) and self.low <= value <= self.high


@dataclass(frozen=True)
class Integer:
    """A whole number from `low` to `high`, both included; `log` spreads them over orders of magnitude."""

    low: int
    high: int
    log: bool = False

    def suggest(self, trial: Any, name: str) -> int:
        return int(trial.suggest_int(name, self.low, self.high, log=self.log))

    def contains(self, value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high


@dataclass(frozen=True)
class Categorical:
    """One of the given options."""

    options: Sequence[str | float | int | bool | None]

    def suggest(self, trial: Any, name: str) -> Any:
        return trial.suggest_categorical(name, list(self.options))

    def contains(self, value: Any) -> bool:
        return value in self.options


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Space = Uniform | LogUniform | Integer | Categorical


def no_binding(setting: Any) -> dict[str, Any]:
    """Most methods need nothing of the task beyond what their slot hands to every method."""
    return {}


@dataclass(frozen=True)
class Method:
    """A registered method: `factory(**bind(setting), **hyperparameters)` makes one for a task.

    `bind` reads what the method needs from a task's setting (`model`, `num_samples`, `num_classes`, `total_steps`, …)
    and returns it as keyword arguments; hyperparameters given by a person win over it.
    """

    name: str
    slot: str
    factory: Callable[..., Any]
    search: Mapping[str, Space] = field(default_factory=dict)
    bind: Callable[[Any], Mapping[str, Any]] = no_binding
    paper: str | None = None


_registered: dict[tuple[str, str], Method] = {}


def method(
    *,
    paper: str,
    slot: str,
    search: Mapping[str, Space] | None = None,
    bind: Callable[[Any], Mapping[str, Any]] = no_binding,
) -> Callable[[T], T]:
    """Record a class or function as the method of a paper that takes a slot.

    Args:
        paper: slug of the catalogue record.
        slot: the place in a task that the method takes (`loss`, `optimizer`, `schedule`, `batch`, `sampler`, `layer`).
        search: hyperparameters worth tuning and their ranges; the others keep the paper's defaults.
        bind: what the method needs from a task beyond what its slot hands to every method, as keyword arguments.
    """

    def record(factory: T) -> T:
        name = factory.__name__
        _registered[factory.__module__, name] = Method(name, slot, factory, dict(search or {}), bind, paper)
        return factory

    return record


@dataclass(frozen=True)
class Entry:
    """A method as its source file announces it, not yet imported."""

    paper: str
    slot: str
    name: str
    module: str

    @property
    def address(self) -> str:
        """Where a person imports it from: the family, not the file."""
        return f"{self.module.rpartition('.')[0]}.{self.name}"

    def load(self) -> Method:
        importlib.import_module(self.module)
        return _registered[self.module, self.name]


_announcement = re.compile(
    r'^@method\(\s*paper="(?P<paper>\w+)",\s*slot="(?P<slot>\w+)".*?^(?:class|def) (?P<name>\w+)',
    re.MULTILINE | re.DOTALL,
)


@cache
def index() -> tuple[Entry, ...]:
    """All registered methods, in order of family, file and place in the file."""
    root = Path(__file__).parent
    entries = []
    for path in sorted(root.glob("*/*.py")):
        module = f"{__package__}.{path.parent.name}.{path.stem}"
        announced = _announcement.finditer(path.read_text(encoding="utf-8"))
        entries += [Entry(found["paper"], found["slot"], found["name"], module) for found in announced]
    return tuple(entries)


def exported(stub: Path) -> dict[str, list[str]]:
    """What a family exports, by the module that it comes from."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found.setdefault(node.module, []).extend(alias.name for alias in node.names)
    return found


@cache
def addresses() -> dict[str, list[str]]:
    """What a person imports of each paper: its registered methods, or all that its file exports if it has none."""
    found: dict[str, list[str]] = {}
    for entry in index():
        found.setdefault(entry.paper, []).append(entry.address)
    for stub in sorted(Path(__file__).parent.glob("*/__init__.pyi")):
        family = f"{__package__}.{stub.parent.name}"
        for module, names in exported(stub).items():
            found.setdefault(module, [f"{family}.{name}" for name in names])
    return found
