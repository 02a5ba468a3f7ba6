"""Hedging a sold call option where the stock's volatility is random and trading costs money.

A network learns from simulated prices of 30 days how much of the stock to hold from each day to the next. What it says
of a path is what premium, trading gains and costs come to; the target is what the option's buyer is paid. So the
squared error is the squared profit or loss of the whole deal. The stock costs 100 in the beginning, and the option's
buyer may buy it for as much in the end.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fairtrial.contract import Choice, Metric
from fairtrial.methods.optimizers.deep_hedging import DAY, DeepHedger, black_scholes_call, hedging_pnl, heston_paths
from fairtrial.tasks.measures import mean_absolute_error, root_mean_squared_error
from fairtrial.tasks.samples import Division, Part, Samples, random_part
from fairtrial.tasks.slots import optimizer_slot, regression_slots
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import SupervisedTask

DAYS, STRIKE, VOLATILITY, COST = 30, 100.0, 0.2, 1e-3
PATHS, TEST_PATHS = 6000, 4000
WORST_PART = 0.05


def paths(n: int, generator: torch.Generator) -> Part:
    """Prices and variances (n, 31, 2), and what the option pays (n,)."""
    S, V = heston_paths(n, DAYS, generator=generator)
    return Part(torch.stack([S, V], 2), (S[:, -1] - STRIKE).clamp(min=0.0))


def samples() -> Samples:
    """Paths to train on and to validate with, and others for the test."""
    return Samples(*paths(PATHS, Streams(0)("paths")), *paths(TEST_PATHS, Streams(0)("test")))


class HedgingBook(nn.Module):
    """What the seller has at the end, before paying (n,), of prices and variances (n, 31, 2)."""

    def __init__(self, hidden_size: int = 16) -> None:
        super().__init__()
        self.policy = DeepHedger(hidden_size, strike=STRIKE, maturity=DAYS * DAY, variance=VOLATILITY**2)
        self.premium = black_scholes_call(torch.tensor(STRIKE), STRIKE, VOLATILITY, DAYS * DAY).price.item()

    def forward(self, x: Float[Tensor, "n t 2"]) -> Float[Tensor, " n"]:
        S, V = x.unbind(2)
        pnl, _ = hedging_pnl(S, self.policy(S, V), STRIKE, COST, self.premium)
        return pnl + (S[:, -1] - STRIKE).clamp(min=0.0)


def expected_shortfall(output: Float[Tensor, " n"], target: Float[Tensor, " n"]) -> float:
    """Mean loss in the worst twentieth of the cases."""
    worst = (target - output).topk(max(1, round(WORST_PART * len(target)))).values
    return worst.mean().item()


@dataclass
class HedgingTask(SupervisedTask):
    """A supervised task whose inputs and targets are sums of money, and stay as they are."""

    def _divide(self, streams: Streams) -> Division:
        held = self._samples
        validation = random_part(held.y, self.validation, held.groups, streams("split"))
        training = Part(held.x[~validation], held.y[~validation])
        return Division(training, Part(held.x[validation], held.y[validation]), Part(held.x_test, held.y_test))


heston_hedging = HedgingTask(
    name="heston-hedging",
    version=1,
    metric=Metric("RMSE", "minimize", "percent of the stock's price", margin=0.01, worst=10.0),
    measure=root_mean_squared_error,
    also={"mean absolute error": mean_absolute_error, "expected shortfall": expected_shortfall},
    samples=samples,
    model=HedgingBook,
    total_steps=120,
    batch_size=256,
    slots=regression_slots() | {"optimizer": optimizer_slot(Choice("AdamW", {"lr": 0.1}))},
    validation=0.25,
)
