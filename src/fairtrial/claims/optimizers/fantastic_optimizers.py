"""The claims of Fantastic Pretraining Optimizers: what tuning is worth, which optimizers are faster, and rank flips.

The bench's byte transformer at width 32 on Python's documentation text instead of Llamas on web text. A run of data
ratio 1 has 64 steps of 512 bytes, and every run a warm-up and a decay of its own. Each optimizer is tuned by one round
of coordinate descent at ratio 1, 12 runs, and then its learning rate at half, once and twice the best value at every
ratio that it is judged at, 3 runs each; both on validation text of a tuning seed. Losses are on test text, in nats.
"""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from fairtrial.catalog import Finding, Measurement, Verdict
from fairtrial.claims.arms import FIRST_TUNING_SEED, Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.training import fit
from fairtrial.contract import BadInput, Diverged
from fairtrial.methods.optimizers.fantastic_optimizers import (
    Flip,
    Search,
    Speedup,
    coordinate_descent,
    rank_flips,
    speedup,
)
from fairtrial.methods.optimizers.packages import Muon, muon_param_groups, of_package
from fairtrial.tasks.measures import cross_entropy
from fairtrial.tasks.samples import Samples, divide
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict
from fairtrial.tasks.text import ByteTransformer, samples, text
from fairtrial.trial.statistics import LEVEL, holm, sign_flip_p

WIDTH, BATCH, STEPS = 32, 8, 64
DATA, COMPARED = (1, 2, 4), 2  # AdamW's ratios, and the one at which all are compared
TUNING_SEEDS, SEEDS = 1, 10
GUESSING = math.log(256)  # the loss that a run which diverges counts with

ADAMW, NADAMW, CAUTIOUS, LION, MARS, MUON, SOAP = "AdamW", "NAdamW", "Cautious AdamW", "Lion", "MARS", "Muon", "SOAP"
MATRIX, SCALAR = (MUON, SOAP), (NADAMW, CAUTIOUS, LION, MARS)
ARMS = (ADAMW, *SCALAR, *MATRIX)
UNTUNED, UNTUNED_RATE = "untuned AdamW", 1e-3  # PyTorch's default

RATES, DECAYS, BETAS = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128), (0.0, 0.1, 0.3, 1.0), (0.9, 0.95, 0.98, 0.99)
Config = Mapping[str, Any]
ADAM_GRIDS = {"lr": RATES, "weight_decay": DECAYS, "beta2": BETAS}
GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
    ADAMW: ADAM_GRIDS,
    NADAMW: ADAM_GRIDS,
    CAUTIOUS: ADAM_GRIDS,
    LION: {
        "lr": tuple(rate / 10 for rate in RATES),
        "weight_decay": tuple(10 * decay for decay in DECAYS),
        "beta2": BETAS,
    },
    MARS: {"lr": RATES, "weight_decay": DECAYS, "gamma": (0.0125, 0.025, 0.05, 0.1)},
    MUON: {"lr": RATES, "weight_decay": DECAYS, "momentum": (0.8, 0.9, 0.95, 0.98)},
    SOAP: {"lr": RATES, "weight_decay": DECAYS, "beta2": BETAS},
}
ADAM_START = {"lr": 8e-3, "weight_decay": 0.1, "beta2": 0.95}
STARTS: dict[str, dict[str, float]] = {
    ADAMW: ADAM_START,
    NADAMW: ADAM_START,
    CAUTIOUS: ADAM_START,
    LION: {"lr": 8e-4, "weight_decay": 1.0, "beta2": 0.99},
    MARS: {"lr": 8e-3, "weight_decay": 0.1, "gamma": 0.025},
    MUON: {"lr": 8e-3, "weight_decay": 0.1, "momentum": 0.95},
    SOAP: ADAM_START,
}
FINER = (0.5, 1.0, 2.0)  # times the best learning rate


@dataclass(frozen=True)
class Setting:
    """An optimizer with its hyperparameters, and the data ratio of the run."""

    optimizer: str
    data: int
    config: Config


Losses = Mapping[tuple[str, int], list[dict[int, float]]]  # by optimizer and ratio, each seed's after so many steps


def check(measure: Measure) -> list[Finding]:
    try:
        of_package("pytorch_optimizer", "SOAP")
    except ImportError as error:
        raise BadInput(str(error)) from None
    searches = dict(zip(ARMS, measure.map(descend, ARMS), strict=True))
    best = {arm: search.best.config for arm, search in searches.items()}
    regimes = [*((ADAMW, data) for data in DATA[1:]), *((arm, COMPARED) for arm in ARMS[1:])]
    grids = {
        (arm, data): [Setting(arm, data, best[arm] | {"lr": factor * best[arm]["lr"]}) for factor in FINER]
        for arm, data in regimes
    }
    chosen = tune(measure, losses, grids, seeds=TUNING_SEEDS, score=lambda found: -found[max(found)])
    chosen[ADAMW, DATA[0]] = Setting(ADAMW, DATA[0], best[ADAMW])
    chosen[UNTUNED, DATA[-1]] = Setting(ADAMW, DATA[-1], ADAM_START | {"lr": UNTUNED_RATE})
    reached = evaluate(measure, losses, chosen, seeds=SEEDS)
    return [
        _tuning_gain(reached, chosen),
        _matrix_beats_scalar(reached, chosen),
        _rank_flips(reached),
    ]


def _tuning_gain(reached: Losses, chosen: Mapping[tuple[str, int], Setting]) -> Finding:
    untuned, tuned = (_at_the_end(reached, arm, DATA[-1]) for arm in (UNTUNED, ADAMW))
    slower = _speedup(reached, UNTUNED, DATA[-1])
    faster = _inverse(slower) if slower else None
    (gain,) = above_zero(gaps(untuned, tuned))
    says: Verdict = (
        "reproduced" if gain and faster and faster.estimate > 1.3 else "partly" if gain else "not reproduced"
    )
    return Finding(
        claim="tuning-gain",
        verdict=says,
        criterion="At data ratio 4 tuned AdamW has significantly less loss than AdamW at a learning rate of 1e-3 "
        "(paired sign-flip test) and is more than 1.3 times as fast, by the data with which it would come to the "
        "latter's loss; partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            _times("speed-up of tuned AdamW over AdamW at 1e-3", faster, paper="about 2, from the peak rate alone"),
            measured("test loss, AdamW at 1e-3", untuned, "nats"),
            *(measured(f"test loss, tuned AdamW, ratio {d}", _at_the_end(reached, ADAMW, d), "nats") for d in DATA),
        ),
        note=_settings({key: value for key, value in chosen.items() if key[0] in (ADAMW, UNTUNED)})
        + _beyond({UNTUNED: slower}),
    )


def _matrix_beats_scalar(reached: Losses, chosen: Mapping[tuple[str, int], Setting]) -> Finding:
    ends = {arm: _at_the_end(reached, arm, COMPARED) for arm in ARMS}
    faster = {arm: _speedup(reached, arm, COMPARED) for arm in ARMS[1:]}
    better = above_zero(*(gaps(ends[ADAMW], ends[arm]) for arm in MATRIX))
    alike = all(found and 0.9 <= found.estimate <= 1.1 for found in (faster[arm] for arm in SCALAR))
    says: Verdict = "reproduced" if any(better) and alike else "partly" if any(better) else "not reproduced"
    paper = {NADAMW: "1.0 to 1.2", CAUTIOUS: "1.0 to 1.2", LION: "1.0 to 1.2", MARS: "1.0 to 1.2", MUON: "1.4"}
    return Finding(
        claim="matrix-beats-scalar",
        verdict=says,
        criterion="At data ratio 2 Muon or SOAP has significantly less loss than AdamW (paired sign-flip test, Holm "
        "over the two), so that its speed-up is above 1, and the speed-ups of NAdamW, cautious AdamW, Lion and MARS "
        "are estimated within 0.9 and 1.1; partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                _times(f"speed-up over AdamW, {arm}", found, paper=paper.get(arm, "1.3") + " at 130M parameters")
                for arm, found in faster.items()
            ),
            *(measured(f"test loss, {arm}", found, "nats") for arm, found in ends.items()),
        ),
        note=f"Speed-ups count data, not seconds; their intervals are bootstrapped. "
        f"{_settings({key: value for key, value in chosen.items() if key[0] in ARMS[1:]})}{_beyond(faster)}",
    )


def _rank_flips(reached: Losses) -> Finding:
    half, end = STEPS * COMPARED // 2, STEPS * COMPARED
    means = {
        arm: {step: float(np.mean([found[step] for found in reached[arm, COMPARED]])) for step in (half, end)}
        for arm in ARMS
    }
    flips = rank_flips(means, [half])
    larger = {flip: _larger_p(reached, flip, end) for flip in flips}
    pairs = len(list(combinations(ARMS, 2)))
    corrected = dict(zip(larger, holm([*larger.values(), *[1.0] * (pairs - len(larger))]), strict=False))
    sure = [flip for flip in flips if corrected[flip] < LEVEL]
    likely = [flip for flip in flips if larger[flip] < LEVEL]
    clearest = min(flips, key=lambda flip: larger[flip], default=None)
    return Finding(
        claim="rank-flips",
        verdict="reproduced" if sure else "partly" if likely else "not reproduced",
        criterion="At data ratio 2 the losses of at least one pair of optimizers differ significantly after half of "
        "the steps and, the other way round, at the end (paired sign-flip tests; the larger p-value of a pair's two, "
        "Holm over all pairs); partly if so without the correction.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            single("pairs in another order at half time, by mean loss", len(flips), f"of {pairs} pairs"),
            single("pairs significantly so on both sides", len(sure), f"of {pairs} pairs"),
            *(_both_sides(reached, clearest, end) if clearest else ()),
            *(measured(f"test loss at half time, {arm}", _after(reached, arm, half), "nats") for arm in ARMS),
        ),
        note="All runs decay to 0 over the same steps. Losses at the end are those of the claim before.",
    )


def _larger_p(reached: Losses, flip: Flip, end: int) -> float:
    sides = (gaps(_after(reached, flip.winner, step), _after(reached, flip.ahead, step)) for step in (flip.step, end))
    return max(sign_flip_p(side) for side in sides)


def _both_sides(reached: Losses, flip: Flip, end: int) -> list[Measurement]:
    return [
        measured(
            f"clearest pair: loss of {flip.winner} above {flip.ahead} {when}",
            gaps(_after(reached, flip.winner, step), _after(reached, flip.ahead, step)),
            "nats",
        )
        for when, step in (("at half time", flip.step), ("at the end", end))
    ]


def _after(reached: Losses, arm: str, step: int) -> list[float]:
    return [found[step] for found in reached[arm, COMPARED]]


def _at_the_end(reached: Losses, arm: str, data: int) -> list[float]:
    return [found[STEPS * data] for found in reached[arm, data]]


def _speedup(reached: Losses, arm: str, data: int) -> Speedup | None:
    """Over tuned AdamW; None if no amount of data brings that to the same loss, or its loss does not fall with data."""
    baseline = np.array([_at_the_end(reached, ADAMW, ratio) for ratio in DATA])
    loss = np.array(_at_the_end(reached, arm, data))
    try:
        return speedup(DATA, baseline, data, loss, generator=np.random.default_rng(0))
    except ValueError:
        return None


def _inverse(found: Speedup) -> Speedup:
    """Of the baseline over the other."""
    high = 1 / found.low if found.low else math.inf
    return Speedup(1 / found.estimate, 1 / found.high, high, found.extrapolated)


def _times(name: str, found: Speedup | None, *, paper: str) -> Measurement:
    if found is None:
        return Measurement(name, None, unit="times", paper=paper)
    high = found.high if math.isfinite(found.high) else None
    return Measurement(name, found.estimate, found.low, high, "times", paper)


def _settings(chosen: Mapping[tuple[str, int], Setting]) -> str:
    said = (
        f"{arm} at ratio {data} {', '.join(f'{name} {value:g}' for name, value in setting.config.items())}"
        for (arm, data), setting in sorted(chosen.items())
    )
    return "; ".join(said) + "."


def _beyond(found: Mapping[str, Speedup | None]) -> str:
    names = [arm for arm, each in found.items() if each and each.extrapolated]
    return f" Outside of AdamW's own amounts of data, so extrapolated: {', '.join(names)}." if names else ""


def descend(arm: str) -> Search:
    """One round of coordinate descent at ratio 1, on the validation text of the first tuning seed."""

    def objective(config: Config) -> float:
        return losses(Run(Setting(arm, DATA[0], config), FIRST_TUNING_SEED, "validation"))[STEPS * DATA[0]]

    return coordinate_descent(objective, GRIDS[arm], STARTS[arm], max_rounds=1)


def losses(run: Run[Setting]) -> dict[int, float]:
    """Train, and give the loss at the end, at ratio 2 on test text also at half time; guessing's where it diverged."""
    steps, streams = STEPS * run.setting.data, Streams(run.seed)
    looks = {steps, steps // 2} if run.split == "test" and run.setting.data == COMPARED else {steps}
    division = divide(documentation(), text.validation, text.scale, streams)
    with streams.globally("model"):
        model = ByteTransformer(WIDTH)
    optimizer = optimizer_of(run.setting, model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=0.2, cycle_momentum=False)
    found = dict.fromkeys(looks, GUESSING)

    def look(step: int) -> None:
        if step in looks:
            found[step] = cross_entropy(*predict(model, getattr(division, run.split)))

    with suppress(Diverged):
        fit(model, optimizer, division.training, streams, steps=steps, batch_size=BATCH, schedule=schedule, after=look)
    return found


@cache
def documentation() -> Samples:
    """The task's text, cut into windows once for each process."""
    return samples()


def optimizer_of(setting: Setting, model: nn.Module) -> Optimizer:
    params, config = model.parameters(), setting.config
    lr, decay = config["lr"], config["weight_decay"]
    package = "pytorch_optimizer"
    optimizer: Any
    match setting.optimizer:
        case "AdamW":
            optimizer = torch.optim.AdamW(params, lr, (0.9, config["beta2"]), weight_decay=decay)
        case "NAdamW":
            betas = 0.9, config["beta2"]
            optimizer = torch.optim.NAdam(params, lr, betas, weight_decay=decay, decoupled_weight_decay=True)
        case "Cautious AdamW":  # AdamP that never projects is AdamW
            make, betas = of_package(package, "AdamP"), (0.9, config["beta2"])
            optimizer = make(params, lr, betas, decay, delta=0.0, cautious=True, foreach=True)
        case "Lion":
            optimizer = of_package(package, "Lion")(params, lr, (0.9, config["beta2"]), decay)
        case "MARS":
            make, gamma = of_package(package, "MARS"), config["gamma"]
            optimizer = make(params, lr, gamma=gamma, weight_decay=decay, lr_1d=lr, weight_decay_1d=decay)
        case "Muon":
            momentum = config["momentum"]
            optimizer = Muon(muon_param_groups(model), lr, weight_decay=decay, momentum=momentum)
        case _:  # a side of the tables of embeddings is as long as there are bytes: left without a preconditioner
            make, betas = of_package(package, "SOAP"), (0.95, config["beta2"])
            optimizer = make(params, lr, betas, weight_decay=decay, max_precondition_dim=128)
    return optimizer  # type: ignore[no-any-return]
