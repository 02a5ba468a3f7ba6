"""The claims of the Q-GaLore paper: loss near GaLore's, stochastic rounding of 8-bit weights, fewer decompositions.

The bench's byte transformer on Python's documentation text instead of LLaMA on C4, trained from scratch. Rates are
GaLore's; each arm has the better of two, those of the rounding excepted, which are compared at given rates.
"""

from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.byte_transformer import trained_bits
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps, relative_gaps, surely_above, surely_below
from fairtrial.methods.optimizers.galore import GaLoreAdamW
from fairtrial.methods.optimizers.q_galore import QGaLoreAdamW, q_galore_param_groups, with_int8_weights
from fairtrial.tasks.streams import Streams

STEPS, GAP, RANK, TUNING_SEEDS, SEEDS = 150, 3, 16, 1, 6  # a quarter of the width of 64
ADAMW, GALORE, BITS, LAZY, ALL = "AdamW", "GaLore", "4-bit bases", "lazy subspaces", "Q-GaLore"
RATES = {ADAMW: (2e-3, 6e-3), **dict.fromkeys((GALORE, BITS, LAZY, ALL), (8e-3, 2.4e-2))}
NEAREST, STOCHASTIC = "rounded to the nearest", "rounded stochastically"
SMALL, USUAL = 1e-3, 1.2e-2  # rates for 8-bit weights
SAVINGS: dict[str, dict[str, Any]] = {
    BITS: {"cos_threshold": None},
    LAZY: {"proj_bits": None},
    ALL: {},
    **{arm: {"proj_bits": None, "cos_threshold": None} for arm in (NEAREST, STOCHASTIC)},
}


def check(measure: Measure) -> list[Finding]:
    grids = {arm: [Setting(arm, lr) for lr in rates] for arm, rates in RATES.items()}
    chosen = tune(measure, trained, grids, seeds=TUNING_SEEDS, score=lambda found: -found.bits)
    reached = evaluate(measure, trained, chosen, seeds=SEEDS)
    rates = "Peak rates: " + ", ".join(f"{arm} {setting.lr:g}" for arm, setting in chosen.items()) + "."
    return [_near_galore(reached, rates), _rounding(measure), _decompositions(reached, rates)]


@dataclass(frozen=True)
class Setting:
    """An arm with its peak rate."""

    arm: str
    lr: float


@dataclass(frozen=True)
class Result:
    """Bits per byte, and decompositions per matrix."""

    bits: float
    decompositions: float


def _bits(found: list[Result]) -> list[float]:
    return [result.bits for result in found]


def _within(found: list[float], share: float) -> bool:
    return surely_below(found, share) and surely_above(found, -share)


def _near_galore(reached: dict[str, list[Result]], rates: str) -> Finding:
    over = {arm: relative_gaps(_bits(reached[arm]), _bits(reached[GALORE])) for arm in (BITS, ALL)}
    bases, everything = _within(over[BITS], 0.01), surely_below(over[ALL], 0.05)
    says: Verdict = "reproduced" if bases and everything else "partly" if bases else "not reproduced"
    paper = {ALL: "perplexity 34.88 on C4, 60M"}
    return Finding(
        claim="near-galore-loss",
        verdict=says,
        criterion="4-bit bases change GaLore's test loss by less than 1 %, and with all three savings it is less than "
        "5 % above GaLore's (95 % intervals of the mean paired difference); partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"test loss, {arm}", _bits(reached[arm]), "bits per byte", paper=paper.get(arm, ""))
                for arm in (ADAMW, GALORE, BITS, ALL)
            ),
            *(measured(f"test loss, {arm} above {GALORE}", found, "fraction") for arm, found in over.items()),
        ),
        note=f"{STEPS} steps, rank {RANK} of width 64. {rates}",
    )


def _rounding(measure: Measure) -> Finding:
    settings = {(arm, lr): Setting(arm, lr) for lr in (SMALL, USUAL) for arm in (NEAREST, STOCHASTIC)}
    reached = {key: _bits(found) for key, found in evaluate(measure, trained, settings, seeds=SEEDS).items()}
    below = {lr: gaps(reached[NEAREST, lr], reached[STOCHASTIC, lr]) for lr in (SMALL, USUAL)}
    lower = above_zero(below[SMALL])[0]
    no_worse = surely_above(below[USUAL], -0.01 * fmean(reached[NEAREST, USUAL]))
    says: Verdict = "reproduced" if lower and no_worse else "partly" if fmean(below[SMALL]) > 0 else "not reproduced"
    return Finding(
        claim="stochastic-rounding",
        verdict=says,
        criterion=f"At the peak rate {SMALL:g} the test loss is significantly lower with stochastic rounding (paired "
        f"sign-flip test), and at {USUAL:g} less than 1 % higher (95 % interval of the mean paired difference); partly "
        "if lower in the mean at the small rate.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"test loss at rate {lr:g}, {arm}", found, "bits per byte")
                for (arm, lr), found in reached.items()
            ),
            *(
                measured(f"test loss at rate {lr:g}, {NEAREST} above {STOCHASTIC}", found, "bits per byte")
                for lr, found in below.items()
            ),
        ),
        note="Weights of 8 bits, bases as they are, a new subspace at every interval. Rates are multiplied by the "
        "scale 0.25.",
    )


def _decompositions(reached: dict[str, list[Result]], rates: str) -> Finding:
    counted = {arm: [result.decompositions for result in reached[arm]] for arm in (GALORE, LAZY)}
    saved = [1 - lazy / full for lazy, full in zip(counted[LAZY], counted[GALORE], strict=True)]
    over = relative_gaps(_bits(reached[LAZY]), _bits(reached[GALORE]))
    says: Verdict = (
        "reproduced"
        if surely_above(saved, 0.4) and surely_below(over, 0.01)
        else "partly"
        if surely_above(saved, 0.2)
        else "not reproduced"
    )
    return Finding(
        claim="fewer-decompositions",
        verdict=says,
        criterion="At least 40 % of the decompositions are saved, with less than 1 % more test loss than GaLore's "
        "(95 % intervals of the means); partly if at least 20 % are saved.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("decompositions saved", saved, "fraction", paper="more than 0.6"),
            *(measured(f"decompositions per matrix, {arm}", found, "") for arm, found in counted.items()),
            measured(f"test loss, {LAZY} above {GALORE}", over, "fraction"),
        ),
        note=f"First interval {GAP} of {STEPS} steps. {rates}",
    )


def trained(run: Run[Setting]) -> Result:
    arm, lr = run.setting.arm, run.setting.lr
    made: list[Optimizer] = []

    def prepare(model: nn.Module, streams: Streams) -> tuple[nn.Module, Optimizer]:
        if arm in (NEAREST, STOCHASTIC, ALL):
            model = with_int8_weights(model, stochastic_round=arm != NEAREST)
        if arm == ADAMW:
            made.append(torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0))
        elif arm == GALORE:
            made.append(GaLoreAdamW(q_galore_param_groups(model, RANK), lr=lr, update_proj_gap=GAP))
        else:
            options = {"update_proj_gap": GAP, "generator": streams("method"), **SAVINGS[arm]}
            made.append(QGaLoreAdamW(q_galore_param_groups(model, RANK), lr=lr, **options))
        return model, made[0]

    bits = trained_bits(prepare, run.seed, run.split, lr=lr, steps=STEPS)
    (optimizer,) = made
    counts = [int(state["svd_count"]) for state in optimizer.state.values() if "svd_count" in state]
    return Result(bits, fmean(counts) if counts else -(-STEPS // GAP))
