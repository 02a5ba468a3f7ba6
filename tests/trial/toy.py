"""A task that costs next to nothing, and can be told through a choice's hyperparameters to go wrong in many ways."""

import os
import signal
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fairtrial.contract import Choice, Costs, Diverged, Metric, Outcome, Pruned, Slot
from fairtrial.methods.registry import Categorical, Integer, LogUniform, Method, Uniform

STEPS = 5
NOISE = 0.02  # standard deviation of a recipe's own share of a run's value


@dataclass
class Plain:
    """Best at lr = 0.1."""

    lr: float = 0.03
    momentum: float = 0.5
    gain = 0.0


class Twin(Plain):
    """Plain by another name."""


@dataclass
class Planted(Plain):
    """Plain with an effect of known size."""

    gain: float = 0.05


@dataclass
class Fixed:
    """Nothing to tune."""

    gain: float = 0.0
    lr = 0.1
    momentum = 0.5


class FixedTwin(Fixed):
    """Fixed by another name."""


@dataclass
class Broken:
    """Goes wrong as it is told to; `where` is a file that it leaves behind the first time."""

    how: str = "raise"
    where: str = ""
    every: int = 1
    gain = 0.0
    lr = 0.1
    momentum = 0.5


@dataclass
class Clean:
    pass


@dataclass
class Blurred:
    """More noise."""

    width: int = 1
    kind: str = "soft"


OPTIMIZERS = (
    Method(
        "Plain", "optimizer", Plain, {"lr": LogUniform(1e-3, 1.0), "momentum": Uniform(0.0, 0.9)}, paper="plain_sgd"
    ),
    Method("Twin", "optimizer", Twin, {"lr": LogUniform(1e-3, 1.0), "momentum": Uniform(0.0, 0.9)}),
    Method("Planted", "optimizer", Planted, {"lr": LogUniform(1e-3, 1.0), "momentum": Uniform(0.0, 0.9)}),
    Method("Fixed", "optimizer", Fixed),
    Method("FixedTwin", "optimizer", FixedTwin),
    Method("Broken", "optimizer", Broken),
    Method("BrokenTuned", "optimizer", Broken, {"every": Integer(1, 3)}),
)
FILTERS = (
    Method("Clean", "filter", Clean),
    Method("Blurred", "filter", Blurred, {"width": Integer(1, 4), "kind": Categorical(["soft", "hard"])}),
)


@dataclass(frozen=True)
class Options:
    methods: tuple[Method, ...]

    def names(self) -> list[str]:
        return [method.name for method in self.methods]

    def aliases(self) -> Mapping[str, str]:
        return {method.paper: method.name for method in self.methods if method.paper}

    def __getitem__(self, name: str) -> Method:
        return next(method for method in self.methods if method.name == name)


@dataclass
class Toy:
    name: str = "toy"
    version: int = 1
    metric: Metric = field(default_factory=lambda: Metric("score", "maximize", "fraction", margin=0.005, worst=0.0))
    slots: Mapping[str, Slot] = field(
        default_factory=lambda: {
            "optimizer": Slot("optimizer", Choice("Fixed"), Options(OPTIMIZERS)),
            "filter": Slot("filter", Choice("Clean"), Options(FILTERS)),
        }
    )
    pause: float = 0.0
    log: str = ""
    world: int = 0

    def check(self, choices: Mapping[str, Choice]) -> None:
        made = {name: self.slots[name].build(choice, None) for name, choice in choices.items()}
        if made["optimizer"].lr <= 0:
            raise ValueError(f"lr must be above 0, got {made['optimizer'].lr}")

    def run(self, choices: Mapping[str, Choice], seed: int, *, split: str, progress: Any) -> Any:
        if self.log:
            with open(self.log, "a") as log:
                log.write(f"{choices['optimizer']} {seed} {split}\n")
        optimizer = self.slots["optimizer"].build(choices["optimizer"], None)
        blur = self.slots["filter"].build(choices["filter"], None)
        width = getattr(blur, "width", 0)
        drawn = (self.world, seed, split == "test")
        shared = np.random.default_rng(drawn).normal()
        own = np.random.default_rng([*drawn, zlib.crc32(str(sorted_text(choices)).encode())]).normal()
        distance = np.log10(optimizer.lr / 0.1) ** 2 + 0.2 * (optimizer.momentum - 0.5) ** 2
        value = 0.5 + optimizer.gain + 0.05 * shared + NOISE * (1 + width) * own - 0.1 * distance - 0.01 * width
        for step in range(1, STEPS + 1):
            if self.pause:
                time.sleep(self.pause / STEPS)
            progress(step, STEPS, value * step / STEPS)
            if isinstance(optimizer, Broken) and step == 2 and seed % optimizer.every == 0:
                wrong = go_wrong(optimizer, progress)
                if wrong is not None:
                    return wrong
        costs = Costs(0.001 * (2 if width else 1), 1000 + width, 8, 2)
        return Outcome(float(value), metrics={"distance": float(distance)}, costs=costs)


def sorted_text(choices: Mapping[str, Choice]) -> list[str]:
    return [f"{slot}={choice.name}{sorted(choice.params.items())}" for slot, choice in sorted(choices.items())]


def go_wrong(told: Broken, progress: Any) -> Any:
    match told.how:
        case "diverge":
            raise Diverged("the loss is infinite")
        case "raise":
            raise RuntimeError("a task's own mistake")
        case "exit":
            raise SystemExit(3)
        case "prune":
            raise Pruned
        case "nan":
            return Outcome(float("nan"))
        case "nan on the way":
            progress(3, STEPS, float("nan"))
        case "said to diverge":
            return Outcome(0.9, "diverged", error="as the task says")
        case "numpy":
            return Outcome(np.float32(0.5), metrics={"n": np.int64(3)}, costs=Costs(np.float64(0.1), np.int64(7)))
        case "number":
            return 0.5
        case "text":
            return Outcome("0.5 or so")
        case "negative step":
            progress(-1, STEPS, 0.5)
        case "print":
            print("a task prints")
            os.write(1, b"past Python too\n") if told.where == "worker" else None
        case "threads":
            import torch
            from threadpoolctl import threadpool_info

            most = max([torch.get_num_threads(), *(pool["num_threads"] for pool in threadpool_info())])
            return Outcome(float(most))
        case "sleep":
            time.sleep(600)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "kill once":
            if not Path(told.where).exists():
                Path(told.where).touch()
                os.kill(os.getpid(), signal.SIGKILL)
    return None


def load(reference: str) -> Toy:
    """'toy', or with settings: 'toy minimize', 'toy pause=0.1 log=/a/file'."""
    _, *settings = reference.split()
    toy = Toy()
    for setting in settings:
        key, _, value = setting.partition("=")
        if key == "pause":
            toy.pause = float(value)
        elif key == "log":
            toy.log = value
        elif key == "minimize":
            toy.metric = Metric("error", "minimize", "fraction", margin=0.005, worst=2.0)
        elif key == "margin":
            toy.metric = replace(toy.metric, margin=float(value))
        elif key == "world":
            toy.world = int(value)
        elif key == "version":
            toy.version = int(value)
        else:
            raise ValueError(f"no setting {key!r}")
    return toy
