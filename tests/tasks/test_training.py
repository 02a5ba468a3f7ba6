"""The loop by itself, on parts put together by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from fairtrial.contract import Diverged
from fairtrial.tasks.standard import NoTransform
from fairtrial.tasks.training import Parts, index_batches, train

X = torch.tensor([[1.0, 2.0, 0.0, 1.0], [0.0, 1.0, 3.0, -1.0]])
Y = torch.tensor([1.0, -1.0])


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.01, momentum=0.9)


def parts(optimizer: Callable[[Any], torch.optim.Optimizer] = momentum, **changed: Any) -> Parts:
    model = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Flatten(0))
    nn.init.constant_(model[0].weight, 0.5)
    stepping = optimizer(model.parameters())
    standard = {"loss": nn.MSELoss(), "schedule": LambdaLR(stepping, lambda step: 1.0), "batch": NoTransform()}
    return Parts(model=model, optimizer=stepping, **{**standard, "sampler": range(2), **changed})


def run(filled: Parts, **changed: Any) -> Any:
    arguments = {"steps": 3, "batch_size": 2, "generator": torch.Generator()} | changed
    return train(filled, X, Y, **arguments)


def test_it_does_the_same_as_a_loop_written_by_hand() -> None:
    filled, by_hand = parts(), parts()
    run(filled, steps=10)
    for _ in range(10):
        by_hand.optimizer.zero_grad()
        nn.functional.mse_loss(by_hand.model(X), Y).backward()
        by_hand.optimizer.step()
    assert torch.equal(filled.model[0].weight, by_hand.model[0].weight)


def test_costs_are_exact() -> None:
    costs = run(parts())
    # From step to step: weights 16, momentum 16, batch 32 + 8. The old gradient is freed first. Most is alive when the
    # new one, 16, is made: the loss (8: torch makes it in place of the squares), its derivative 4, the output's 8.
    assert costs.peak_memory == (16 + 16 + 32 + 8) + (8 + 4 + 8 + 16)
    assert costs.optimizer_state_bytes == 16
    assert costs.trainable_parameters == 4
    assert costs.step_time is None  # not within the first steps
    assert run(parts(), steps=8).step_time > 0


def test_memory_counts_what_a_loss_keeps() -> None:
    class Keeping(nn.MSELoss):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("history", torch.zeros(1000))

    assert run(parts(loss=Keeping())).peak_memory == run(parts()).peak_memory + 4000


def test_frozen_weights_are_not_counted_as_trained() -> None:
    filled = parts()
    filled.model.register_parameter("frozen", nn.Parameter(torch.zeros(5), requires_grad=False))
    assert run(filled).trainable_parameters == 4


def test_the_sampler_decides_what_is_seen_and_the_steps_stay() -> None:
    seen: list[list[float]] = []

    class Watching(NoTransform):
        def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            seen.append(y.tolist())
            return x, y

    run(parts(sampler=[1], batch=Watching()), steps=4)
    assert seen == [[-1.0]] * 4


def test_index_batches_leave_the_rest_of_an_epoch_out() -> None:
    batches = index_batches(range(7), 3)
    assert [next(batches).tolist() for _ in range(3)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert next(index_batches(range(2), 3)).tolist() == [0, 1]
    with pytest.raises(ValueError, match="the sampler must keep at least one sample"):
        next(index_batches([], 3))


def test_a_loss_that_asks_for_indices_gets_them() -> None:
    seen: list[list[int]] = []

    class Indexed(nn.Module):
        def forward(self, input: Tensor, target: Tensor, index: Tensor) -> Tensor:
            seen.append(index.tolist())
            return (input - target).square().mean()

    run(parts(loss=Indexed(), sampler=[1, 0]), steps=2)
    assert seen == [[1, 0], [1, 0]]


def test_a_batch_transform_may_bring_its_own_loss_and_targets_of_its_own_kind() -> None:
    class Bringing:
        def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            return x, (y, -y)

        def criterion(self, input: Tensor, target: tuple[Tensor, Tensor]) -> Tensor:
            return (input - target[0]).square().mean() + 0 * target[1].sum()

    filled, ordinary = parts(batch=Bringing(), loss=None), parts()
    run(filled)
    run(ordinary)
    assert torch.equal(filled.model[0].weight, ordinary.model[0].weight)


def test_an_optimizer_that_needs_a_closure_gets_one() -> None:
    class Twice(torch.optim.SGD):
        needs_closure = True

        def step(self, closure: Any = None) -> Any:
            closure()
            loss = closure()
            super().step()
            return loss

    twice = parts(lambda params: Twice(params, lr=0.01))
    once = parts(lambda params: torch.optim.SGD(params, lr=0.01))
    run(twice)
    run(once)
    assert torch.equal(twice.model[0].weight, once.model[0].weight)


def test_a_loss_without_bounds_has_diverged() -> None:
    filled = parts(lambda params: torch.optim.SGD(params, lr=1e20))
    with pytest.raises(Diverged, match="the loss was (inf|nan) at step [23] of 3"):
        run(filled)


class Refusing(nn.MSELoss):
    """A loss that takes nothing but outputs below a bound, with weights of its own."""

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound, self.weights = bound, nn.Parameter(torch.ones(3))

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        if not input.abs().max() < self.bound:
            raise ValueError(f"input must be below {self.bound}")
        return super().forward(input, target)


def test_outputs_that_a_loss_refuses_have_diverged_if_not_finite() -> None:
    with pytest.raises(Diverged, match="outputs are no longer finite"):
        run(parts(lambda params: torch.optim.SGD(params, lr=1e38), loss=Refusing(torch.inf)))
    with pytest.raises(ValueError, match=r"below 0\.0"):
        run(parts(loss=Refusing(0.0)))


def test_what_a_loss_has_of_its_own_is_counted() -> None:
    assert run(parts(loss=Refusing(torch.inf))).trainable_parameters == 4 + 3


def test_it_says_when_steps_are_done() -> None:
    steps: list[int] = []
    run(parts(), after=steps.append)
    assert steps == [1, 2, 3]
