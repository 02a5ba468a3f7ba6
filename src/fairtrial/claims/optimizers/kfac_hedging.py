"""The claims of the K-FAC hedging paper: trading costs, variance of profit and loss, and steps, against Adam.

An LSTM of 16 units hedges a sold call over 30 days of a Heston market, with the objective Var(PL) + weight · E[cost].
Costs alone can be brought to 0 by not trading; so costs are compared at equal variance, and variances at equal cost,
along Adam's own trade-off over three weights. Every optimizer gets the best of twelve settings on validation paths, at
the middle weight: learning rates, and with K-FAC dampings too. Training, validation and test paths are drawn anew for
each seed, the same for all.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from fairtrial.catalog import Finding, Measurement, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import relative_gaps, surely_below
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.optimizers.deep_hedging import (
    DAY,
    DeepHedger,
    black_scholes_call,
    hedging_pnl,
    heston_paths,
    mean_variance,
)
from fairtrial.methods.optimizers.kfac_hedging import KFAC
from fairtrial.tasks.samples import Part
from fairtrial.tasks.standard import constant
from fairtrial.tasks.streams import Streams

DAYS, STRIKE, VOLATILITY, COST, HIDDEN = 30, 100.0, 0.2, 1e-3, 16
TRAINING, VALIDATION, TEST = 20_000, 2000, 50_000
STEPS, BATCH, LOOK = 120, 256, 5
WEIGHTS = (0.1, 1.0, 10.0)
MIDDLE = WEIGHTS[1]
TUNING_SEEDS, SEEDS = 1, 6
TIMED_STEPS, LONGEST = 20, 4.0
WORST = 100.0  # what every figure of a run that diverges counts with
WORST_PART = 0.05

KFAC_, ADAM, ADAMW, SGD = "K-FAC", "Adam", "AdamW, cosine", "SGD, momentum 0.9"
NO_TRADE, DELTA = "no trading", "Black-Scholes delta"
ADAM_RATES = (0.002, 0.004, 0.008, 0.015, 0.03, 0.05, 0.08, 0.12, 0.18, 0.25, 0.35, 0.5)
SGD_RATES = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.006, 0.008, 0.011, 0.015, 0.02, 0.03)
RATES = {ADAM: ADAM_RATES, ADAMW: ADAM_RATES, SGD: SGD_RATES}
KFAC_RATES, DAMPINGS = (0.01, 0.03, 0.1, 0.3), (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Setting:
    """An optimizer, or a policy that is not trained, the weight of costs, and the number of steps."""

    arm: str
    lr: float = 0.0
    damping: float = 0.0
    weight: float = MIDDLE
    steps: int = STEPS


@dataclass(frozen=True)
class Hedge:
    """What a policy comes to: the objective, and of profit and loss variance, mean, mean cost and expected shortfall.

    `curve` is the objective on validation paths after every few steps.
    """

    objective: float
    variance: float
    mean: float
    cost: float
    shortfall: float
    curve: tuple[float, ...] = ()


def check(measure: Measure) -> list[Finding]:
    grids = {arm: [Setting(arm, lr) for lr in rates] for arm, rates in RATES.items()}
    grids[KFAC_] = [Setting(KFAC_, lr, damping) for lr in KFAC_RATES for damping in DAMPINGS]
    chosen = tune(measure, hedge, grids, seeds=TUNING_SEEDS, score=lambda found: -found.objective)
    (times,) = measure.map(step_times, [TIMED_STEPS])
    longer = min(LONGEST, times[KFAC_] / times[ADAM])
    wanted = {(arm, weight): replace(chosen[arm], weight=weight) for arm in (KFAC_, ADAM) for weight in WEIGHTS}
    wanted |= {(arm, MIDDLE): chosen[arm] for arm in (ADAMW, SGD)}
    wanted |= {(arm, MIDDLE): Setting(arm) for arm in (NO_TRADE, DELTA)}
    as_long = f"{ADAM}, as long as K-FAC"
    wanted[as_long, MIDDLE] = replace(chosen[ADAM], steps=max(STEPS, round(longer * STEPS)))
    found = evaluate(measure, hedge, wanted, seeds=SEEDS)
    settings = ", ".join(
        f"{arm} {setting.lr:g}" + (f" with damping {setting.damping:g}" if arm == KFAC_ else "")
        for arm, setting in chosen.items()
    )
    note = f"Learning rates: {settings}."
    return [_costs(found, note), _variance(found, note), _convergence(found, times, note)]


Found = dict[tuple[str, float], list[Hedge]]


def _costs(found: Found, note: str) -> Finding:
    lower = at_equal(found, "cost", "variance")
    return Finding(
        claim="transaction-costs",
        verdict=_below(lower, -0.5, -0.1),
        criterion="At cost weight 1, K-FAC's mean cost is at least 50 % lower than what Adam's trade-off over the cost "
        "weights 0.1, 1 and 10 has at the same variance, by the upper end of the 95 % interval of the mean; partly if "
        "at least 10 %.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("cost of K-FAC above Adam's at equal variance", lower, "part of Adam's", paper="-0.783"),
            measured(
                "cost of K-FAC above Adam's at equal weight",
                relative_gaps(values(found, KFAC_, "cost"), values(found, ADAM, "cost")),
                "part of Adam's",
            ),
            *_each(found, "cost", "mean cost"),
            *_each(found, "objective", "objective"),
        ),
        note=f"{note} Figures without a weight are at weight 1. Between two weights the logarithm of the one figure is "
        "taken to be linear in that of the other, and beyond the weights to stay.",
    )


def _variance(found: Found, note: str) -> Finding:
    lower = at_equal(found, "variance", "cost")
    sharpe = {arm: [hedge.mean / hedge.variance**0.5 for hedge in found[arm, MIDDLE]] for arm in (KFAC_, ADAM)}
    paper = {KFAC_: "0.0401", ADAM: "-0.0025"}
    return Finding(
        claim="profit-variance",
        verdict=_below(lower, -0.2, 0.0),
        criterion="At cost weight 1, K-FAC's variance of profit and loss is at least 20 % lower than what Adam's "
        "trade-off over the cost weights 0.1, 1 and 10 has at the same mean cost, by the upper end of the 95 % "
        "interval of the mean; partly if that end is below 0.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("variance of K-FAC above Adam's at equal cost", lower, "part of Adam's", paper="-0.344"),
            measured(
                "variance of K-FAC above Adam's at equal weight",
                relative_gaps(values(found, KFAC_, "variance"), values(found, ADAM, "variance")),
                "part of Adam's",
            ),
            *_each(found, "variance", "variance"),
            *_each(found, "shortfall", "expected shortfall at 95 %"),
            *(measured(f"Sharpe ratio, {arm}", ratios, "ratio", paper=paper[arm]) for arm, ratios in sharpe.items()),
        ),
        note=f"{note} The stock costs 100 in the beginning. The Sharpe ratio of a hedge is near 0 by construction, "
        "and moves with the premium, which is that of Black and Scholes here.",
    )


def _convergence(found: Found, times: dict[str, float], note: str) -> Finding:
    shares = [
        share_of_steps(hedge.curve, adam.curve[-1])
        for hedge, adam in zip(found[KFAC_, MIDDLE], found[ADAM, MIDDLE], strict=True)
    ]
    ratio = times[KFAC_] / times[ADAM]
    return Finding(
        claim="convergence",
        verdict=_below(shares, 2 / 3, 1.0),
        criterion="K-FAC reaches Adam's final objective on validation paths in at most two thirds of the steps, by the "
        "upper end of the 95 % interval of the mean; partly if that end is below 1.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("steps of K-FAC until Adam's final objective", shares, "part of Adam's steps"),
            measured("the same in seconds", [ratio * share for share in shares], "part of Adam's seconds"),
            *_each(found, "objective", "objective", weights=(MIDDLE,)),
            single("step of K-FAC over step of Adam", ratio, "ratio"),
            single("step of Adam with torch's own LSTM over that with K-FAC's", times["torch"] / times[ADAM], "ratio"),
        ),
        note=f"{note} Objectives are looked at every {LOOK} of {STEPS} steps; a run that does not get there counts "
        "with twice all steps.",
    )


def _below(found: Sequence[float], fully: float, partly: float) -> Verdict:
    if surely_below(found, fully):
        return "reproduced"
    return "partly" if surely_below(found, partly) else "not reproduced"


def _each(found: Found, figure: str, name: str, weights: Sequence[float] = WEIGHTS) -> list[Measurement]:
    measurements = []
    for arm, weight in found:
        if weight in weights:
            at = "" if weight == MIDDLE else f", weight {weight:g}"
            measurements.append(measured(f"{name}, {arm}{at}", values(found, arm, figure, weight), ""))
    return measurements


def values(found: Found, arm: str, figure: str, weight: float = MIDDLE) -> list[float]:
    return [getattr(hedge, figure) for hedge in found[arm, weight]]


def at_equal(found: Found, figure: str, other: str) -> list[float]:
    """How far one figure of K-FAC lies above Adam's where the other is equal, as a part of Adam's, for each seed."""
    gaps = []
    for seed, hedge in enumerate(found[KFAC_, MIDDLE]):
        adams = [found[ADAM, weight][seed] for weight in WEIGHTS]
        curve = sorted((getattr(adam, other), getattr(adam, figure)) for adam in adams)
        xs, ys = np.log(curve).T
        equal = np.exp(np.interp(np.log(getattr(hedge, other)), xs, ys))
        gaps.append(float(getattr(hedge, figure) / equal) - 1)
    return gaps


def share_of_steps(curve: Sequence[float], goal: float) -> float:
    """The part of the steps after which an objective is first at most the goal; 2 if it never is."""
    reached = [place for place, value in enumerate(curve, 1) if value <= goal]
    return reached[0] / len(curve) if reached else 2.0


def market(n: int, generator: torch.Generator) -> Float[Tensor, "n t 2"]:
    return torch.stack(heston_paths(n, DAYS, generator=generator), 2)


class Book(nn.Module):
    """Profit and loss, and the cost in it (n, 2), of prices and variances (n, 31, 2)."""

    def __init__(self, policy: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.policy = policy
        self.premium = black_scholes_call(torch.tensor(STRIKE), STRIKE, VOLATILITY, DAYS * DAY).price.item()

    def forward(self, x: Float[Tensor, "n t 2"]) -> Float[Tensor, "n 2"]:
        S, V = x.unbind(2)
        return torch.stack(hedging_pnl(S, self.policy(S, V), STRIKE, COST, self.premium), 1)


def no_trade(S: Tensor, V: Tensor) -> Tensor:
    return torch.zeros_like(S[:, :-1])


def black_scholes_delta(S: Tensor, V: Tensor) -> Tensor:
    left = DAY * torch.arange(DAYS, 0, -1, dtype=S.dtype)
    return black_scholes_call(S[:, :-1], STRIKE, VOLATILITY, left.expand(len(S), -1)).delta


def new_policy() -> DeepHedger:
    return DeepHedger(HIDDEN, strike=STRIKE, maturity=DAYS * DAY, variance=VOLATILITY**2)


def objective(output: Float[Tensor, "n 2"], weight: float) -> Float[Tensor, ""]:
    pnl, cost = output.unbind(1)
    return mean_variance(pnl, cost, weight)


def optimizer_of(setting: Setting, model: nn.Module) -> Optimizer:
    match setting.arm:
        case "K-FAC":
            return KFAC(model, lr=setting.lr, damping=setting.damping)
        case "Adam":
            return torch.optim.Adam(model.parameters(), lr=setting.lr)
        case "AdamW, cosine":
            return torch.optim.AdamW(model.parameters(), lr=setting.lr)
        case _:
            return torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=0.9)


@torch.no_grad()
def judged(book: Book, x: Float[Tensor, "n t 2"], weight: float) -> Hedge:
    pnl, cost = torch.cat([book(part) for part in torch.split(x, VALIDATION)]).unbind(1)
    return Hedge(
        objective=mean_variance(pnl, cost, weight).item(),
        variance=pnl.var(correction=0).item(),
        mean=pnl.mean().item(),
        cost=cost.mean().item(),
        shortfall=-pnl.topk(max(1, round(WORST_PART * len(pnl))), largest=False).values.mean().item(),
    )


def hedge(run: Run[Setting]) -> Hedge:
    """Train a policy, or take one that needs no training, and judge it on paths of its own."""
    setting, streams = run.setting, Streams(run.seed)
    validation, split = market(VALIDATION, streams("validation")), run.split
    judged_on = validation if split == "validation" else market(TEST, streams("test"))
    if setting.arm in (NO_TRADE, DELTA):
        return judged(Book(no_trade if setting.arm == NO_TRADE else black_scholes_delta), judged_on, setting.weight)
    with streams.globally("model"):
        book = Book(new_policy())
    optimizer = optimizer_of(setting, book)
    curve: list[float] = []

    def look(step: int) -> None:
        if step % LOOK == 0:
            curve.append(judged(book, validation, setting.weight).objective)

    x = market(TRAINING, streams("training paths"))
    try:
        fit(
            book,
            optimizer,
            Part(x, x[:, -1, 0]),
            streams,
            steps=setting.steps,
            batch_size=BATCH,
            loss=lambda output, target: objective(output, setting.weight),
            schedule=None if setting.arm == ADAMW else constant(optimizer),
            after=look if split == "test" else lambda step: None,
        )
    except Diverged:
        return Hedge(WORST, WORST, -WORST, WORST, WORST, (WORST,) * (setting.steps // LOOK))
    return replace(judged(book, judged_on, setting.weight), curve=tuple(curve))


def step_times(steps: int) -> dict[str, float]:
    """Median seconds of a step with K-FAC, with Adam, and with Adam and torch's own LSTM ('torch')."""
    x = market(BATCH, Streams(0)("timing"))
    seconds: dict[str, list[float]] = {KFAC_: [], ADAM: [], "torch": []}
    with Streams(0).globally("model"):
        policies = {name: new_policy() for name in seconds}
        policies["torch"].lstm = nn.LSTM(3, HIDDEN, batch_first=True)  # type: ignore[assignment]
    books = {name: Book(policy) for name, policy in policies.items()}
    optimizers = {
        name: optimizer_of(Setting(KFAC_ if name == KFAC_ else ADAM, 1e-3, 0.1), book) for name, book in books.items()
    }
    for _ in range(steps):
        for name, book in books.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            objective(book(x), MIDDLE).backward()  # type: ignore[no-untyped-call]
            optimizers[name].step()
            seconds[name].append(time.perf_counter() - start)
    return {name: median(found) for name, found in seconds.items()}
