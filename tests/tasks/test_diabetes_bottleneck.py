"""Regression through a bottleneck: what losses and measures are handed, attacks, and runs."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fairtrial.contract import BadInput, Choice, Diverged
from fairtrial.tasks import load
from fairtrial.tasks.bottleneck import (
    ATTACKS,
    BottleneckNetwork,
    HSICBottleneckLoss,
    OfBottleneck,
    SquaredErrorLoss,
    attacked_error,
    root_mean_squared_error,
)
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import SupervisedTask


def task() -> SupervisedTask:
    found = load("diabetes-bottleneck")
    assert isinstance(found, SupervisedTask)
    return found


def network() -> BottleneckNetwork:
    with Streams(0).globally("model"):
        return BottleneckNetwork(3, 2)


X, Y = torch.randn(20, 3, generator=Streams(0)("x")), torch.randn(20, generator=Streams(0)("y"))


def test_losses_are_handed_inputs_codes_targets_and_predictions() -> None:
    model, seen = network(), []
    output = model(X)
    OfBottleneck(lambda *arguments: seen.append(arguments) or arguments[0].sum(), 3)(output, Y)
    for given, expected in zip(seen[0], (X, model.encoder(X), Y, model.decoder(model.encoder(X))[:, 0]), strict=True):
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize(("attack", "step"), list(enumerate(ATTACKS)))
def test_attacks_follow_the_sign_of_the_gradient_of_the_squared_error(attack: int, step: float) -> None:
    model = network().eval()
    moving = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.mse_loss(model(moving)[:, 0], Y), moving)
    with torch.no_grad():
        output, moved = model(X), model(X + step * gradient.sign())
    assert attacked_error(output, Y, attack) == pytest.approx(root_mean_squared_error(moved, Y), rel=1e-6)
    assert attacked_error(output, Y, attack) > root_mean_squared_error(output, Y)


def test_the_hsic_bottleneck_is_squared_error_and_dependences_of_at_most_one() -> None:
    code, prediction = X[:, :2], 0.5 * Y
    plain = SquaredErrorLoss()(X, code, Y, prediction)
    torch.testing.assert_close(HSICBottleneckLoss(0.0)(X, code, Y, prediction), plain)
    torch.testing.assert_close(HSICBottleneckLoss(1.0, 0.0)(X, X, Y, prediction), plain + 1)
    torch.testing.assert_close(HSICBottleneckLoss(1.0, 1.0)(Y[:, None], Y[:, None], Y, prediction), plain)
    torch.testing.assert_close(HSICBottleneckLoss(1.0)(X, torch.zeros_like(code), Y, prediction), plain)
    assert 0 < HSICBottleneckLoss(1.0, 0.0)(X, code, Y, prediction) - plain < 1
    for name in ("weight", "balance"):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            HSICBottleneckLoss(**{name: float("nan")})


def test_dropout_is_for_training_only() -> None:
    with Streams(0).globally("model"):
        model = BottleneckNetwork(3, 2, dropout=0.5)
    torch.testing.assert_close(model.eval()(X), network().eval()(X))
    assert not torch.equal(model.train()(X), model(X))


def test_every_loss_of_the_slot_can_be_chosen_and_repeats_bit_for_bit() -> None:
    short = replace(task(), total_steps=4)
    names = short.slots["loss"].options.names()
    assert {"SquaredErrorLoss", "HSICBottleneckLoss", "CSInformationBottleneckLoss"} <= set(names)
    for name in names:
        choices = {"loss": Choice(name)}
        short.check(choices)
        first, second = (short.run(choices, 2) for _ in range(2))
        assert (first.value, first.metrics, first.curve) == (second.value, second.metrics, second.curve)
    with pytest.raises(BadInput, match="no method 'MSELoss' here"):
        short.check({"loss": Choice("MSELoss")})


def test_the_baseline_learns_and_attacks_hurt() -> None:
    outcome = task().run({}, 0, split="test")
    assert 0.7 < outcome.value < 0.85  # of the mean: 1
    small, large = (outcome.metrics[f"RMSE under attack, step {step:g}"] for step in ATTACKS)
    assert outcome.value < small < large


@pytest.mark.parametrize("loss", ["SquaredErrorLoss", "HSICBottleneckLoss", "CSInformationBottleneckLoss"])
def test_a_run_beyond_all_bounds_diverges(loss: str) -> None:
    with pytest.raises(Diverged):
        task().run({"loss": Choice(loss), "optimizer": Choice("AdamW", {"lr": 1e25})}, 0)
