"""The claims of the GaLore paper: loss near full AdamW's and below that of adapters, and the state's size.

The bench's byte transformer on Python's documentation text instead of LLaMA on C4, trained from scratch with the best
of three rates for each arm. State on LLaMA's own shapes is counted, not measured.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.adapters import with_adapters
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.byte_transformer import trained_bits
from fairtrial.claims.llama import SIZES, saved
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, surely_below
from fairtrial.methods.optimizers.galore import GaLoreAdamW, galore_param_groups
from fairtrial.tasks.streams import Streams

STEPS, GAP, RANK, TUNING_SEEDS, SEEDS = 300, 30, 16, 1, 6  # a quarter of the width of 64
ADAMW, GALORE, LORA = "AdamW", "GaLore", "LoRA"
RATES = {ADAMW: (1e-3, 3e-3, 1e-2), GALORE: (4e-3, 1.2e-2, 4e-2), LORA: (1e-3, 3e-3, 1e-2)}
RANKS = {"60M": 128, "130M": 256, "350M": 256, "1B": 512, "7B": 1024}  # the authors'
NEAR = 0.01


def check(measure: Measure) -> list[Finding]:
    return [_loss(measure), _state_memory(measure)]


@dataclass(frozen=True)
class Setting:
    """An arm with its peak rate."""

    arm: str
    lr: float


def _loss(measure: Measure) -> Finding:
    grids = {arm: [Setting(arm, lr) for lr in rates] for arm, rates in RATES.items()}
    chosen = tune(measure, bits_per_byte, grids, seeds=TUNING_SEEDS, score=lambda found: -found)
    reached = evaluate(measure, bits_per_byte, chosen, seeds=SEEDS)
    below = gaps(reached[LORA], reached[GALORE])
    perplexity = [2**gap - 1 for gap in gaps(reached[GALORE], reached[ADAMW])]
    better, near = above_zero(below)[0], surely_below(perplexity, 0.05)
    says: Verdict = "reproduced" if better and near else "partly" if better else "not reproduced"
    paper = {ADAMW: "34.06", GALORE: "34.88", LORA: "34.99"}
    rates = ", ".join(f"{arm} {setting.lr:g}" for arm, setting in chosen.items())
    return Finding(
        claim="perplexity-order",
        verdict=says,
        criterion="The test loss is significantly below LoRA's (paired sign-flip test), and the perplexity of a byte "
        "less than 5 % above AdamW's (95 % interval of the mean paired difference); partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"test loss, {arm}", found, "bits per byte", paper=f"perplexity {paper[arm]} on C4, 60M")
                for arm, found in reached.items()
            ),
            measured(f"test loss, {LORA} above {GALORE}", below, "bits per byte"),
            measured(f"perplexity of a byte, {GALORE} above {ADAMW}", perplexity, "fraction of the latter"),
        ),
        note=f"{STEPS} steps, rank {RANK} of width 64 for GaLore and LoRA alike. Peak rates: {rates}.",
    )


def _state_memory(measure: Measure) -> Finding:
    measure.say("counting bytes of optimizer state")
    less = {
        size: [saved(GaLoreAdamW.state_shapes, _form(rank), size, width=width) for width in (2, 1)]
        for size, rank in RANKS.items()
    }
    figures = dict(zip((2, 1), (0.655, 0.825), strict=True))
    near = [abs(found - figure) <= NEAR for found, figure in zip(less["7B"], figures.values(), strict=True)]
    halved = [found >= 0.5 for found in less["7B"]]
    says: Verdict = "reproduced" if all(near) else "partly" if all(halved) else "not reproduced"
    return Finding(
        claim="state-memory",
        verdict=says,
        criterion="For LLaMA-7B at rank 1024 the state is smaller than AdamW's of 16 bits by 65.5 % with 16 bits and "
        "by 82.5 % with 8, each within one percentage point; partly if by at least 50 %.",
        seeds=(),
        measurements=tuple(
            single(
                f"state less than AdamW's, {size} at rank {RANKS[size]}, {8 * width} bits",
                found,
                "part of AdamW's",
                paper=f"{figures[width]}" if size == "7B" else "",
            )
            for size in SIZES
            for width, found in zip((2, 1), less[size], strict=True)
        ),
        note="Counted by shapes: moments and subspaces of the layers' matrices, moments of embedding, output layer and "
        "norms. With 8 bits all of them take a byte a number, subspaces too, and scales of blocks are left out.",
    )


def _form(rank: int) -> dict[str, Any]:
    return {"rank": rank, "proj_type": "std"}


def bits_per_byte(run: Run[Setting]) -> float:
    setting = run.setting

    def prepare(model: nn.Module, streams: Streams) -> tuple[nn.Module, Optimizer]:
        if setting.arm == LORA:
            model = with_adapters(model, RANK, train_the_rest=True)
        if setting.arm == GALORE:
            return model, GaLoreAdamW(galore_param_groups(model, RANK), lr=setting.lr, update_proj_gap=GAP)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=setting.lr, weight_decay=0.0)

    return trained_bits(prepare, run.seed, run.split, lr=setting.lr, steps=STEPS)
