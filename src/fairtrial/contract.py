"""The words that tasks, the bench and everything above them share. Nothing here imports torch."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

Split = Literal["validation", "test"]
Ended = Literal["finished", "pruned", "diverged", "died", "lost"]


class BadInput(ValueError):
    """A person asked for something that cannot be done; the message says what is wrong and what to do."""


class Diverged(Exception):
    """Raised by a task when training has left all bounds: the run counts with the metric's worst value."""


class Pruned(Exception):
    """Raised by `progress` when a tuning run has become hopeless; a task lets it pass."""


@dataclass(frozen=True)
class Metric:
    """What a task measures.

    Attributes:
        name: 'accuracy'.
        direction: which way is better.
        unit: what a value counts, for people: 'fraction', 'bits per byte'.
        margin: the smallest difference that matters in practice; closer than that counts as equivalent.
        worst: the value of a run that diverged, died or was lost.
    """

    name: str
    direction: Literal["maximize", "minimize"]
    unit: str
    margin: float
    worst: float

    def __post_init__(self) -> None:
        if self.direction not in ("maximize", "minimize"):
            raise ValueError(f"direction must be 'maximize' or 'minimize', got {self.direction!r}")
        if not (math.isfinite(self.margin) and self.margin > 0):
            raise ValueError(f"margin must be a finite number above 0, got {self.margin!r}")
        if not math.isfinite(self.worst):
            raise ValueError(f"worst must be a finite number, got {self.worst!r}")

    @property
    def sign(self) -> int:
        """+1 where more is better, -1 where less is."""
        return 1 if self.direction == "maximize" else -1


@dataclass(frozen=True)
class Choice:
    """A method, by name, and its hyperparameters; what is not given keeps the method's default."""

    name: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={value!r}" for key, value in self.params.items())
        return f"{self.name}({inside})" if inside else self.name

    def with_params(self, params: Mapping[str, Any]) -> "Choice":
        """The same choice with further hyperparameters."""
        return replace(self, params={**self.params, **params})


class Option(Protocol):
    """Something that can fill a slot; `fairtrial.methods.registry.Method` is one.

    `search` maps hyperparameters worth tuning to ranges with `suggest(optuna_trial, name)` and `contains(value)`.
    """

    @property
    def name(self) -> str: ...
    @property
    def factory(self) -> Callable[..., Any]: ...
    @property
    def search(self) -> Mapping[str, Any]: ...
    @property
    def bind(self) -> Callable[[Any], Mapping[str, Any]]: ...


class Lookup(Protocol):
    """Options by name; loads them only when asked for, and knows other spellings of a name."""

    def names(self) -> Sequence[str]: ...
    def aliases(self) -> Mapping[str, str]:
        """Other accepted spellings, in lower case, and the names they stand for."""

    def __getitem__(self, name: str) -> Option: ...


@dataclass(frozen=True)
class Slot:
    """A place in a task where something can be swapped.

    Attributes:
        name: 'optimizer'.
        default: the choice that fills it when nothing else is asked for.
        options: what may fill it.
        bind: what the slot hands to every method, read from the task's setting.
    """

    name: str
    default: Choice
    options: Lookup
    bind: Callable[[Any], Mapping[str, Any]] = lambda setting: {}

    def check(self, choice: Choice) -> None:
        """Refuse hyperparameters that the method does not have."""
        accepted = hyperparameters(self.options[choice.name])
        for name in choice.params:
            if name not in accepted:
                listing = ", ".join(accepted) or "none"
                raise BadInput(f"{choice.name} has no hyperparameter {name!r}; it has: {listing}")

    def build(self, choice: Choice, setting: Any) -> Any:
        """Make what the choice names; `setting` is what the task tells methods about itself."""
        option = self.options[choice.name]
        given = choice.params
        bound = {key: value for key, value in option.bind(setting).items() if key not in given}
        return option.factory(**{**self.bind(setting), **bound, **given})


_not_hyperparameters = {"self", "params", "model", "optimizer", "generator", "reduction"}


def hyperparameters(option: Option) -> list[str]:
    """The names that a choice may set."""
    accepted = inspect.signature(option.factory).parameters.values()
    named = (p for p in accepted if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return [p.name for p in named if p.name not in _not_hyperparameters]


@dataclass(frozen=True)
class Costs:
    """What a run cost; None where the task does not say.

    Attributes:
        step_time: median seconds of a training step; where nothing is trained, of a step of inference: a decoded token,
            or a passage that is read.
        peak_memory: most bytes of tensors alive at once in a training step, weights and data batch included; where
            nothing is trained, bytes that what was chosen holds.
        optimizer_state_bytes: bytes of optimizer state after training.
        trainable_parameters: number of trained weights.
    """

    step_time: float | None = None
    peak_memory: int | None = None
    optimizer_state_bytes: int | None = None
    trainable_parameters: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run measured, and how it ended.

    Attributes:
        value: the task's metric; the worst value if the run failed.
        ended: 'finished'; 'pruned' as hopeless while tuning; 'diverged'; 'died' of an error; 'lost' with its process,
            time and again, and therefore not kept in a store.
        metrics: whatever else the task measured.
        curve: (step, metric on validation data) as training went on.
        costs: see `Costs`.
        error: the traceback or reason of a run that did not finish.
        seconds: how long the run took.
    """

    value: float
    ended: Ended = "finished"
    metrics: Mapping[str, float] = field(default_factory=dict)
    curve: Sequence[tuple[int, float]] = ()
    costs: Costs = field(default_factory=Costs)
    error: str | None = None
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.ended in ("diverged", "died", "lost")


class Progress(Protocol):
    """How a task tells where it is: after `step` of `total` steps, the metric on validation data was `value`.

    May raise `Pruned`; the task lets it pass.
    """

    def __call__(self, step: int, total: int, value: float) -> None: ...


class Task(Protocol):
    """Model, data, metric and slots; `run` carries the whole thing out."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int:
        """Raised when results are no longer comparable with earlier ones."""

    @property
    def metric(self) -> Metric: ...
    @property
    def slots(self) -> Mapping[str, Slot]: ...

    def check(self, choices: Mapping[str, Choice]) -> None:
        """Raise `ValueError` or `TypeError` if the choices cannot be carried out, without training."""

    def run(self, choices: Mapping[str, Choice], seed: int, *, split: Split, progress: Progress) -> Outcome:
        """Train with the choices and measure on `split`. The seed alone decides every draw."""
