"""The training loop that the shipped tasks share."""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fairtrial.contract import Costs, Diverged
from fairtrial.methods.optimizers.state_size import optimizer_state_bytes
from fairtrial.tasks.memory import PeakMemory

MEMORY_STEP = 2  # the step whose memory is counted: the optimizer has its state by then
SETTLED = 5  # so many steps pass before their time is taken


@dataclass
class Parts:
    """What the slots of a task are filled with for one run."""

    model: nn.Module
    loss: Callable[..., Tensor]
    optimizer: Optimizer
    schedule: LRScheduler
    batch: Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Any]]
    sampler: Iterable[int]


def train(
    parts: Parts,
    x: Shaped[Tensor, "n ..."],
    y: Shaped[Tensor, "n ..."],
    *,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    after: Callable[[int], None] = lambda step: None,
) -> Costs:
    """Train the model for a number of steps, however many samples the sampler keeps.

    Args:
        parts: what the slots are filled with.
        x: inputs of the training set.
        y: their targets. They are flattened: a model that predicts at several places of a sample gives a row for each.
        steps: how many optimizer steps.
        batch_size: samples in a step.
        generator: what the batch transform draws from.
        after: called after every step with its number, from 1; not part of the step's time.

    Raises:
        Diverged: the loss, or what it is asked for, is no longer finite.
    """
    model, optimizer, schedule = parts.model, parts.optimizer, parts.schedule
    criterion = criterion_of(parts)
    needs_closure = getattr(optimizer, "needs_closure", False)
    batches = index_batches(parts.sampler, batch_size)
    times = []
    peak_memory = None

    def loss_of(output: Tensor) -> Tensor:
        try:
            return criterion(output, targets, index)
        except ValueError as error:  # so losses refuse what is not finite
            if not output.isfinite().all():
                raise Diverged("the model's outputs are no longer finite") from error
            raise

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model(inputs))
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def take_step() -> float:
        if needs_closure:
            loss: Any = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step()
        schedule.step()
        return float(loss.item())

    model.train()
    for step in range(1, steps + 1):
        start = perf_counter()
        index = next(batches)
        inputs, targets = parts.batch(x.index_select(0, index), y.index_select(0, index).flatten(), generator)
        if step == MEMORY_STEP:
            with PeakMemory([*tensors_of(parts), inputs, targets]) as memory:
                loss = take_step()
            peak_memory = memory.peak
        else:
            loss = take_step()
        times.append(perf_counter() - start)
        if not math.isfinite(loss):
            raise Diverged(f"the loss was {loss} at step {step} of {steps}")
        after(step)
    return Costs(
        step_time=median(times[SETTLED:]) if steps > SETTLED else None,
        peak_memory=peak_memory,
        optimizer_state_bytes=optimizer_state_bytes(optimizer),
        trainable_parameters=sum(p.numel() for p in weights_of(parts) if p.requires_grad),
    )


def index_batches(sampler: Iterable[int], batch_size: int) -> Iterator[Int[Tensor, " b"]]:
    """Indices for one step after the other; the sampler is asked anew for every epoch.

    What does not fill a batch at the end of an epoch is left out, unless the epoch has nothing else.
    """
    while True:
        epoch = torch.from_numpy(np.fromiter(sampler, np.int64))
        if not len(epoch):
            raise ValueError("the sampler must keep at least one sample")
        whole = len(epoch) // batch_size * batch_size
        yield from torch.split(epoch[: whole or None], batch_size)


def criterion_of(parts: Parts) -> Callable[[Tensor, Any, Int[Tensor, " b"]], Tensor]:
    """The loss as a function of output, target and the samples' indices in the training set.

    A batch transform may bring its own, `criterion(input, target)`. A loss that asks for `index` gets the indices.
    """
    own = getattr(parts.batch, "criterion", None)
    if own is not None:
        return lambda output, target, index: own(output, target)
    loss = parts.loss
    if "index" in inspect.signature(getattr(loss, "forward", loss)).parameters:
        return lambda output, target, index: loss(output, target, index=index)
    return lambda output, target, index: loss(output, target)


def tensors_of(parts: Parts) -> list[Any]:
    """The tensors that live from step to step."""
    weights = weights_of(parts)
    return [
        weights,
        [p.grad for p in weights],
        [buffer for module in modules_of(parts) for buffer in module.buffers()],
        parts.optimizer.state,
    ]


def weights_of(parts: Parts) -> list[nn.Parameter]:
    """The weights of the model, and those that a loss or a batch transform has of its own."""
    return [p for module in modules_of(parts) for p in module.parameters()]


def modules_of(parts: Parts) -> list[nn.Module]:
    return [part for part in (parts.model, parts.loss, parts.batch) if isinstance(part, nn.Module)]
