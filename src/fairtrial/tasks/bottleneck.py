"""Regression through a bottleneck: what such a task's model gives, its losses, and errors under attack."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.contract import Choice, Slot
from fairtrial.methods.arguments import require
from fairtrial.methods.losses.cs_ib import gaussian_gram
from fairtrial.methods.registry import LogUniform, Method
from fairtrial.tasks.slots import Options, optimizer_slot, schedule_slot

ATTACKS = (0.1, 0.3)  # steps on standardised inputs

BottleneckLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class BottleneckNetwork(nn.Module):
    """Encoder inputs-64-64-codes and decoder codes-64-1.

    What it gives has a row for each sample, from which losses and measures take what they need: while training input,
    code and prediction; otherwise the prediction, and for each step of `ATTACKS` the predictions after the inputs have
    been moved by it along the sign of the gradient, once upwards and once downwards.

    Args:
        inputs: numbers in an input.
        codes: numbers in a code.
        dropout: the part of hidden units that is left out while training.
    """

    def __init__(self, inputs: int, codes: int = 8, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(inputs, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, codes)
        )
        self.decoder = nn.Sequential(nn.Linear(codes, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 1))

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        code = self.encoder(x)
        prediction: Tensor = self.decoder(code)
        return torch.cat([x, code, prediction], 1) if self.training else torch.cat([prediction, *self._moved(x)], 1)

    def _moved(self, x: Float[Tensor, "n d"]) -> list[Float[Tensor, "n 1"]]:
        with torch.enable_grad():
            moving = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.decoder(self.encoder(moving)).sum(), moving)
        return [self.decoder(self.encoder(x + sign * step * slope.sign())) for step in ATTACKS for sign in (1.0, -1.0)]


def root_mean_squared_error(output: Float[Tensor, "n k"], target: Float[Tensor, " n"]) -> float:
    """Of the prediction."""
    return F.mse_loss(output[:, 0], target).sqrt().item()


def attacked_error(output: Float[Tensor, "n k"], target: Float[Tensor, " n"], attack: int) -> float:
    """Root mean squared error when each input has been moved by the fast gradient sign method, along its error's sign.

    Args:
        output: what the network gives while it is not trained.
        target: the targets.
        attack: number of the step in `ATTACKS`.
    """
    up, down = output[:, 1 + 2 * attack], output[:, 2 + 2 * attack]
    return F.mse_loss(torch.where(output[:, 0] > target, up, down), target).sqrt().item()


class OfBottleneck(nn.Module):
    """A loss of inputs, codes, targets and predictions, of what the network gives while it is trained.

    Args:
        loss: called with x (n, inputs), t (n, codes), y (n,) and y_pred (n,).
        inputs: numbers in an input.
    """

    def __init__(self, loss: BottleneckLoss, inputs: int) -> None:
        super().__init__()
        self.loss, self.inputs = loss, inputs

    def forward(self, output: Float[Tensor, "n k"], target: Float[Tensor, " n"]) -> Float[Tensor, ""]:
        return self.loss(output[:, : self.inputs], output[:, self.inputs : -1], target, output[:, -1])


class SquaredErrorLoss(nn.Module):
    """Mean squared error, whatever the code."""

    def forward(
        self, x: Float[Tensor, "n d"], t: Float[Tensor, "n t"], y: Float[Tensor, " n"], y_pred: Float[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        return F.mse_loss(y_pred, y)


class HSICBottleneckLoss(nn.Module):
    """Mean squared error + weight (HSIC(x, t) - balance HSIC(y, t)), each normalised to at most 1 (Wang et al. 2021).

    HSIC is the product of centred Gram matrices, over their lengths; kernels are Gaussian with σ = sqrt(dimension).

    Args:
        weight: of both dependences, at least 0.
        balance: of the code's dependence on the target against that on the input, at least 0.
    """

    def __init__(self, weight: float = 0.01, balance: float = 1.0) -> None:
        super().__init__()
        require(0 <= weight < float("inf"), "weight", weight, "at least 0 and finite")
        require(0 <= balance < float("inf"), "balance", balance, "at least 0 and finite")
        self.weight, self.balance = weight, balance

    def forward(
        self, x: Float[Tensor, "n d"], t: Float[Tensor, "n t"], y: Float[Tensor, " n"], y_pred: Float[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        inputs, codes, targets = (centred_gram(a) for a in (x, t, y[:, None]))
        dependence = (inputs * codes).sum() - self.balance * (targets * codes).sum()
        return F.mse_loss(y_pred, y) + self.weight * dependence


def centred_gram(a: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Of length 1 as a vector; zeros where all rows are alike."""
    gram = gaussian_gram(a, a, a.shape[1] ** 0.5)
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    return centred / (centred.square().sum() + 1e-12).sqrt()


BOTTLENECK_LOSSES = (
    Method("SquaredErrorLoss", "bottleneck_loss", SquaredErrorLoss),
    Method(
        "HSICBottleneckLoss",
        "bottleneck_loss",
        HSICBottleneckLoss,
        {"weight": LogUniform(1e-3, 1.0), "balance": LogUniform(0.1, 10.0)},
    ),
)


@dataclass(frozen=True)
class BottleneckLossSlot(Slot):
    """Losses of inputs x (n, inputs), codes t (n, codes), targets y (n,) and predictions y_pred (n,).

    Attributes:
        inputs: numbers in an input.
    """

    inputs: int = 0

    def build(self, choice: Choice, setting: Any) -> OfBottleneck:
        return OfBottleneck(super().build(choice, setting), self.inputs)


def bottleneck_slots(inputs: int) -> dict[str, Slot]:
    """The slots of a task whose model is a `BottleneckNetwork`."""
    losses = Options(BOTTLENECK_LOSSES, "bottleneck_loss")
    loss = BottleneckLossSlot("loss", Choice("SquaredErrorLoss"), losses, inputs=inputs)
    return {slot.name: slot for slot in (optimizer_slot(), loss, schedule_slot())}
