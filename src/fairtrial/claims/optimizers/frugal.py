"""The claims of the FRUGAL paper: loss at a quarter of AdamW's state and without any, and the state's size.

MNIST-1D instead of C4, one pass over 60,000 curves, so that as in pre-training no sample is seen twice; a perceptron
40-128-128-128-128-10, whose hidden matrices are split and whose output layer is AdamW's. Every arm gets the best of
five learning rates by the loss on validation data, over two tuning seeds, and a cosine schedule. The split is drawn
anew every 50 of the 600 steps.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fairtrial.catalog import Finding, Measurement, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured, single
from fairtrial.claims.paired import above_zero, gaps, relative_gaps, surely_below
from fairtrial.claims.training import fit
from fairtrial.contract import Diverged
from fairtrial.methods.optimizers.frugal import FRUGAL, frugal_param_groups
from fairtrial.methods.optimizers.state_size import optimizer_state_bytes
from fairtrial.tasks.measures import accuracy, cross_entropy
from fairtrial.tasks.mnist1d import POINTS, samples
from fairtrial.tasks.samples import divide
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import predict

CURVES, TRAINING = 80_000, 60_000  # a fifth is for the test, and 4000 for validation
CLASSES, WIDTH, BATCH, GAP, DENSITY = 10, 128, 100, 50, 0.25
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)
TUNING_SEEDS, SEEDS = 2, 10
GUESSING = math.log(CLASSES)  # the loss that a run which diverges counts with
DRAWS = 100

ADAMW, COLUMNS, NO_STATE, GALORE, BADAM = "AdamW", "FRUGAL", "FRUGAL without state", "GaLore", "BAdam's principle"
SPLITS: dict[str, dict[str, Any]] = {
    COLUMNS: {"projection": "columns", "density": DENSITY},
    NO_STATE: {"projection": "columns", "density": 0.0},
    GALORE: {"projection": "svd", "density": DENSITY, "state_free": "none", "reset_state": False},
    BADAM: {"projection": "columns", "density": DENSITY, "state_free": "none"},
}
ARMS = (ADAMW, *SPLITS)


def check(measure: Measure) -> list[Finding]:
    return [*_losses(measure), _state_memory(measure)]


@dataclass(frozen=True)
class Setting:
    """An arm with its learning rate."""

    arm: str
    lr: float


def _losses(measure: Measure) -> list[Finding]:
    grids = {arm: [Setting(arm, lr) for lr in RATES] for arm in ARMS}
    chosen = tune(measure, loss_and_accuracy, grids, seeds=TUNING_SEEDS, score=lambda found: -found[0])
    results = evaluate(measure, loss_and_accuracy, chosen, seeds=SEEDS)
    losses, accuracies = ({arm: [run[place] for run in found] for arm, found in results.items()} for place in (0, 1))
    note = "Learning rates: " + ", ".join(f"{arm} {setting.lr:g}" for arm, setting in chosen.items()) + "."
    return [_same_budget(losses, accuracies, note), _close_to_adamw(losses, note), _no_state(losses, note)]


def _same_budget(losses: dict[str, list[float]], accuracies: dict[str, list[float]], note: str) -> Finding:
    paper = {COLUMNS: "18.6", BADAM: "20 to 21", GALORE: "21.1"}
    arms = (COLUMNS, GALORE, BADAM)
    return Finding(
        claim="same-budget",
        verdict=_below_both(losses, COLUMNS),
        criterion="The test loss of FRUGAL at density 0.25, by columns, is significantly below those of GaLore and of "
        "columns without a stateless part (paired sign-flip test, Holm over the two); partly if below one.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"test loss, {arm}", losses[arm], "nats", paper=f"perplexity {paper[arm]} on C4")
                for arm in arms
            ),
            *_distances(losses, COLUMNS),
            *(measured(f"test accuracy, {arm}", accuracies[arm], "fraction") for arm in arms),
        ),
        note=f"{note} {BADAM} is columns without a stateless part, for which BAdam takes whole tensors; GaLore is SVD "
        "without a stateless part and without reset.",
    )


def _close_to_adamw(losses: dict[str, list[float]], note: str) -> Finding:
    above = relative_gaps(losses[COLUMNS], losses[ADAMW])
    says: Verdict = (
        "reproduced" if surely_below(above, 0.1) else "partly" if surely_below(above, 0.25) else "not reproduced"
    )
    return Finding(
        claim="close-to-adamw",
        verdict=says,
        criterion="The test loss at density 0.25 is at most 10 % above AdamW's, by the upper end of the 95 % interval "
        "of the mean; partly if at most 25 %.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured(
                "test loss of FRUGAL above AdamW's", above, "part of AdamW's", paper="0.009 of the log perplexity on C4"
            ),
            measured(f"test loss, {ADAMW}", losses[ADAMW], "nats", paper="perplexity 18.13 on C4"),
            measured(f"test loss, {COLUMNS}", losses[COLUMNS], "nats", paper="perplexity 18.6 on C4"),
        ),
        note=note,
    )


def _no_state(losses: dict[str, list[float]], note: str) -> Finding:
    return Finding(
        claim="no-state",
        verdict=_below_both(losses, NO_STATE),
        criterion="The test loss of FRUGAL at density 0 is significantly below those of GaLore and of columns without "
        "a stateless part at density 0.25 (paired sign-flip test, Holm over the two); partly if below one.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(measured(f"test loss, {arm}", losses[arm], "nats") for arm in (NO_STATE, GALORE, BADAM)),
            *_distances(losses, NO_STATE),
        ),
        note=note,
    )


def _below_both(losses: dict[str, list[float]], arm: str) -> Verdict:
    below = above_zero(*(gaps(losses[other], losses[arm]) for other in (GALORE, BADAM)))
    return "reproduced" if all(below) else "partly" if any(below) else "not reproduced"


def _distances(losses: dict[str, list[float]], arm: str) -> list[Measurement]:
    return [
        measured(f"test loss, {other} above {arm}", gaps(losses[other], losses[arm]), "nats")
        for other in (GALORE, BADAM)
    ]


def perceptron() -> nn.Module:
    """40-128-128-128-128-10."""
    sizes = (POINTS, *[WIDTH] * 4)
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES))


def loss_and_accuracy(run: Run[Setting]) -> tuple[float, float]:
    """Train in one pass, and give loss and accuracy on held-out curves; those of guessing where training diverged."""
    setting, streams = run.setting, Streams(run.seed)
    division = divide(samples(CURVES), 1 / 16, "all", streams)
    with streams.globally("model"):
        model = perceptron()
    optimizer: Optimizer
    if setting.arm == ADAMW:
        optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.0)
    else:
        optimizer = FRUGAL(
            frugal_param_groups(model),
            lr=setting.lr,
            update_gap=GAP,
            generator=streams("method"),
            **SPLITS[setting.arm],
        )
    try:
        fit(model, optimizer, division.training, streams, steps=TRAINING // BATCH, batch_size=BATCH)
        outputs, targets = predict(model, getattr(division, run.split))
    except Diverged:
        return GUESSING, 1 / CLASSES
    return cross_entropy(outputs, targets), accuracy(outputs, targets)


def _state_memory(measure: Measure) -> Finding:
    measure.say("counting bytes of optimizer state")
    matrices = hidden_matrices()
    whole = _bytes_after_a_step(torch.optim.AdamW(matrices))
    blocks = [_share("block", draw, matrices) / whole for draw in range(DRAWS)]
    shares = {"blocks": fmean(blocks), "columns": _share("columns", 0, matrices) / whole}
    within = [0.23 <= share <= 0.27 for share in shares.values()]
    says: Verdict = "reproduced" if all(within) else "partly" if any(within) else "not reproduced"
    return Finding(
        claim="state-memory",
        verdict=says,
        criterion="Relative to AdamW's, the bytes of state for the hidden matrices lie within 0.23 and 0.27 for "
        f"blocks, on average over {DRAWS} draws of the split, and for columns; partly if for one of them.",
        seeds=tuple(range(DRAWS)),
        measurements=(
            measured("state relative to AdamW's, blocks", blocks, "ratio", paper="0.25"),
            single("state relative to AdamW's, blocks, largest draw", max(blocks), "ratio"),
            single("state relative to AdamW's, columns", shares["columns"], "ratio", paper="0.25"),
        ),
        note="Density 0.25, float32, 28 matrices: of a Llama-like model of 4 layers, width 256 and inner width 688. "
        "They are of unequal size, so that seven blocks may hold more than a quarter: there must be memory for the "
        "largest draw.",
    )


def hidden_matrices() -> list[nn.Parameter]:
    """Query, key, value and output, gate, up and down of each layer, with gradients."""
    shapes = [*[(256, 256)] * 4, (688, 256), (688, 256), (256, 688)] * 4
    matrices = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for matrix in matrices:
        matrix.grad = torch.ones_like(matrix)
    return matrices


def _share(projection: str, draw: int, matrices: list[nn.Parameter]) -> int:
    group: dict[str, Any] = {"params": matrices, "projectable": True}
    generator = torch.Generator().manual_seed(draw)
    return _bytes_after_a_step(FRUGAL([group], density=DENSITY, projection=projection, generator=generator))


def _bytes_after_a_step(optimizer: Optimizer) -> int:
    optimizer.step()
    return optimizer_state_bytes(optimizer)
