"""Tasks that train a model on samples with targets, by the shared loop."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from time import perf_counter
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.optim import Optimizer

from fairtrial.contract import BadInput, Choice, Costs, Diverged, Outcome, Progress, Slot, Split
from fairtrial.contract import Metric as Metric
from fairtrial.methods.arguments import require
from fairtrial.tasks.samples import Division, Part, Samples, divide
from fairtrial.tasks.slots import classification_slots, regression_slots
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.training import Parts, criterion_of, index_batches, train

REPORTS = 5  # how often a run says where it is
CHUNK = 512  # samples that go through the model at once when nothing is trained

Measure = Callable[[Tensor, Tensor], float]


@dataclass
class Setting:
    """What a task tells methods about itself; `bind` of a method or a slot reads from it.

    The slots are filled in this order, and each finds what those before it have made: model (by the slot `layer`),
    loss, batch, sampler, optimizer, schedule.

    Attributes:
        model: the model, after surgery.
        num_samples: size of the training set.
        num_classes: number of classes; 0 where the targets are numbers.
        total_steps: optimizer steps of the run.
        steps_per_epoch: optimizer steps in which the whole training set is seen once.
        batch_size: samples in a step.
        generator: the methods' own source of randomness.
        order: the source of the order in which samples are seen.
        pretrain: `pretrain(fraction, member)` gives the model from initialisation number `member`, trained for that
            fraction of the steps with every slot at its default.
        score_batches: gives batches (x, y) of the whole training set, in order.
        optimizer: the optimizer, once there is one.
    """

    model: nn.Module
    num_samples: int
    num_classes: int
    total_steps: int
    steps_per_epoch: int
    batch_size: int
    generator: torch.Generator
    order: torch.Generator
    pretrain: Callable[[float, int], nn.Module]
    score_batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    optimizer: Optimizer = field(init=False)


def nothing(step: int) -> None:
    """Nothing happens after a step."""


def silent(step: int, total: int, value: float) -> None:
    """Nobody wants to know where the run is."""


@dataclass
class SupervisedTask:
    """A task that trains a model on samples with targets.

    Attributes:
        name: what the task is called.
        version: to be raised when results are no longer comparable with earlier ones.
        metric: what is measured on outputs and targets, and which way is better.
        measure: how it is measured.
        samples: gives all samples, the test part held out.
        model: makes the model, initialised from torch's global random numbers. It maps a batch of inputs to scores
            (n, classes), or to predictions (n,) where the targets are numbers.
        total_steps: optimizer steps of a run.
        batch_size: samples in a step.
        slots: what may be swapped: all of `classification_slots()` or `regression_slots()`, or some of them.
        scale: inputs are standardised 'each' feature by itself, or 'all' alike, as the pixels of an image.
        validation: the share of the validation part in what the test leaves.
        also: further measures, recorded beside the metric.
    """

    name: str
    version: int
    metric: Metric
    measure: Measure
    samples: Callable[[], Samples]
    model: Callable[[], nn.Module]
    total_steps: int
    batch_size: int = 64
    slots: Mapping[str, Slot] = field(default_factory=classification_slots)
    scale: Literal["each", "all"] = "each"
    validation: float = 0.2
    also: Mapping[str, Measure] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(self.total_steps >= 1, "total_steps", self.total_steps, "at least 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        require(self.scale in ("each", "all"), "scale", self.scale, "'each' or 'all'")

    @property
    def source(self) -> str:
        """The module that defines the task."""
        function = self.samples.func if isinstance(self.samples, partial) else self.samples
        return function.__module__

    @property
    def data_hash(self) -> str:
        """Changes when any of the samples does."""
        return self._samples.hash

    def check(self, choices: Mapping[str, Choice]) -> None:
        """Make everything that the choices name, and ask for the loss of one batch; nothing is trained."""
        self._know(choices)
        for name, choice in choices.items():
            self.slots[name].check(choice)
        streams = Streams(0)
        division = self._divide(streams)
        try:
            with streams.globally("training"):
                parts = self._parts(choices, division, streams, pretraining_steps=1)
                index = next(index_batches(parts.sampler, self.batch_size))
                x, y = division.training.x[index], division.training.y[index].flatten()
                inputs, targets = parts.batch(x, y, streams("batch"))
                loss = criterion_of(parts)(parts.model(inputs), targets, index)
        except RuntimeError as error:  # torch's word for tensors that do not fit
            raise BadInput(f"the choices do not fit together or to the data: {error}") from error
        if loss.ndim:
            raise BadInput(f"the loss must be a single number, got one of shape {tuple(loss.shape)}")

    def run(
        self, choices: Mapping[str, Choice], seed: int, *, split: Split = "validation", progress: Progress = silent
    ) -> Outcome:
        """Train with the choices and measure on `split`. The seed alone decides every draw."""
        start = perf_counter()
        require(split in ("validation", "test"), "split", split, "'validation' or 'test'")
        self._know(choices)
        streams = Streams(seed)
        division = self._divide(streams)
        curve: list[tuple[int, float]] = []

        def report(step: int) -> None:
            if step * REPORTS // self.total_steps > (step - 1) * REPORTS // self.total_steps:
                value = self.measure(*predict(parts.model, division.validation))
                curve.append((step, value))
                progress(step, self.total_steps, value)

        with streams.globally("training"):
            parts = self._parts(choices, division, streams)
            costs = self._train(parts, division, streams, self.total_steps, report)
            output, target = predict(parts.model, getattr(division, split))
        return Outcome(
            value=self.measure(output, target),
            metrics={name: measure(output, target) for name, measure in self.also.items()},
            curve=curve,
            costs=costs,
            seconds=perf_counter() - start,
        )

    @cached_property
    def _samples(self) -> Samples:
        return self.samples()

    def _know(self, choices: Mapping[str, Choice]) -> None:
        for name in choices:
            if name not in self.slots:
                raise BadInput(f"the task {self.name!r} has no slot {name!r}; it has: {', '.join(self.slots)}")

    def _divide(self, streams: Streams) -> Division:
        return divide(self._samples, self.validation, self.scale, streams)

    def _train(
        self, parts: Parts, division: Division, streams: Streams, steps: int, after: Callable[[int], None] = nothing
    ) -> Costs:
        return train(
            parts,
            *division.training,
            steps=steps,
            batch_size=self.batch_size,
            generator=streams("batch"),
            after=after,
        )

    def _parts(
        self, choices: Mapping[str, Choice], division: Division, streams: Streams, pretraining_steps: int | None = None
    ) -> Parts:
        """Fill the slots. Each draws from streams of its own, so that a swapped one leaves the others as they are."""
        standard = classification_slots()
        if not self._samples.num_classes:
            standard.update(regression_slots())
        slots = {**standard, **self.slots}  # a slot that is not for swapping is filled all the same
        chosen = {name: slot.default for name, slot in slots.items()} | dict(choices)
        with streams.globally("model"):
            model = self.model()
        setting = Setting(
            model=model,
            num_samples=len(division.training.x),
            num_classes=self._samples.num_classes,
            total_steps=self.total_steps,
            steps_per_epoch=max(1, len(division.training.x) // self.batch_size),
            batch_size=self.batch_size,
            generator=streams("method"),
            order=streams("order"),
            pretrain=partial(self._pretrained, division, streams, pretraining_steps),
            score_batches=lambda: zip(*(torch.split(part, CHUNK) for part in division.training), strict=True),
        )

        def fill(name: str) -> Any:
            with streams.globally(name):
                return slots[name].build(chosen[name], setting)

        setting.model = fill("layer")
        loss, batch, sampler = fill("loss"), fill("batch"), fill("sampler")
        setting.optimizer = fill("optimizer")
        if hasattr(batch, "criterion") and chosen["loss"].name != slots["loss"].default.name:
            raise BadInput(f"{chosen['batch']} brings a loss of its own, so {chosen['loss']} cannot be used with it")
        return Parts(setting.model, loss, setting.optimizer, fill("schedule"), batch, sampler)

    def _pretrained(
        self, division: Division, streams: Streams, steps: int | None, fraction: float, member: int
    ) -> nn.Module:
        own = streams.inside(f"pretraining {member}")
        steps = steps or max(1, round(fraction * self.total_steps))
        with own.globally("training"):
            parts = self._parts({}, division, own)
            self._train(parts, division, own, steps)
        return parts.model.eval()


@torch.no_grad()
def predict(model: nn.Module, part: Part) -> tuple[Float[Tensor, "n ..."], Shaped[Tensor, " n"]]:
    """The model's outputs in evaluation mode, and the targets.

    Raises:
        Diverged: the outputs are no longer finite.
    """
    was_training = model.training
    model.eval()
    output = torch.cat([model(x) for x in torch.split(part.x, CHUNK)])
    model.train(was_training)
    if not output.isfinite().all():
        raise Diverged("the model's outputs are no longer finite")
    return output, part.y.flatten()
