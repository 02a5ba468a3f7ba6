"""The claims of the decoupled contrastive loss: a gain in small batches, and the factor that it removes.

Digits in two views instead of CIFAR and ImageNet, the task `digits-ssl`. NT-Xent and DCL have temperature 0.1 and the
same number of steps at every batch size; the learning rate of each is the best of four on validation data, for every
batch size and optimizer.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.pretraining import Worth, images, pretrain, pretrained_worth
from fairtrial.methods.losses.decoupled_contrastive import DCLLoss, NTXentLoss, npc_multiplier
from fairtrial.tasks.digits_ssl import Encoder, TwoViews
from fairtrial.tasks.streams import Streams

LOSSES: dict[str, type[nn.Module]] = {"NT-Xent": NTXentLoss, "DCL": DCLLoss}
SMALL, LARGE = 8, 256
BATCHES = (SMALL, 32, LARGE)
RATES: dict[str, tuple[float, ...]] = {"SGD": (0.003, 0.01, 0.03, 0.1), "AdamW": (3e-4, 1e-3, 3e-3, 1e-2)}
STEPS, TUNING_SEEDS, SEEDS = 150, 1, 8
FACTOR_BATCHES, FACTOR_TEMPERATURES, FACTOR_STEPS, FACTOR_DRAWS = (4, 16, 64, 256), (0.1, 0.5), (0, 50, 150), 8


def check(measure: Measure) -> list[Finding]:
    return [_gain(measure), _factor(measure)]


@dataclass(frozen=True)
class Setting:
    """A loss, the batch size, the optimizer and its learning rate."""

    loss: str
    batch: int
    optimizer: Literal["SGD", "AdamW"]
    lr: float


Arm = tuple[str, int, str]


def _gain(measure: Measure) -> Finding:
    optimizers: tuple[Literal["SGD", "AdamW"], ...] = ("SGD", "AdamW")
    grids: dict[Arm, list[Setting]] = {
        (loss, batch, optimizer): [Setting(loss, batch, optimizer, lr) for lr in RATES[optimizer]]
        for optimizer in optimizers
        for batch in BATCHES
        for loss in LOSSES
    }
    chosen = tune(measure, features_worth, grids, seeds=TUNING_SEEDS, score=lambda found: found.neighbours)
    found = evaluate(measure, features_worth, chosen, seeds=SEEDS)
    accuracy = {arm: [of_seed.neighbours for of_seed in worths] for arm, worths in found.items()}
    probe = {arm: [of_seed.probe for of_seed in worths] for arm, worths in found.items()}
    gain = {
        (batch, optimizer): gaps(accuracy["DCL", batch, optimizer], accuracy["NT-Xent", batch, optimizer])
        for optimizer in optimizers
        for batch in BATCHES
    }
    closing = gaps(gain[SMALL, "SGD"], gain[LARGE, "SGD"])
    better, closes = above_zero(gain[SMALL, "SGD"], closing)
    says: Verdict = "reproduced" if better and closes else "partly" if better else "not reproduced"
    return Finding(
        claim="small-batch-gain",
        verdict=says,
        criterion="With SGD the k-NN accuracy of DCL is significantly above NT-Xent's at batch 8, and significantly "
        "further above it than at batch 256 (paired sign-flip tests, Holm over the two); partly if only the first "
        "holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            *(
                measured(f"gain of DCL in k-NN accuracy, batch {batch}, {optimizer}", values, "fraction")
                for (batch, optimizer), values in gain.items()
            ),
            measured("gain at batch 8 above that at 256, SGD", closing, "fraction"),
            *(measured(f"k-NN accuracy, {_name(arm)}", values, "fraction") for arm, values in accuracy.items()),
            *(measured(f"linear probe accuracy, {_name(arm)}", values, "fraction") for arm, values in probe.items()),
        ),
        note=f"{STEPS} steps at every batch size, so that larger batches see more images. The coupling acts as a "
        "learning rate of each anchor, which AdamW can make up for; SGD has momentum 0.9.",
    )


def _name(arm: Arm) -> str:
    loss, batch, optimizer = arm
    return f"{loss}, batch {batch}, {optimizer}"


def features_worth(run: Run[Setting]) -> Worth:
    """Pre-train with the loss, and judge the features."""
    setting = run.setting
    return pretrained_worth(
        lambda: (Encoder(), LOSSES[setting.loss](temperature=0.1)),
        run.seed,
        run.split,
        lr=setting.lr,
        steps=STEPS,
        batch_size=setting.batch,
        optimizer=setting.optimizer,
    )


Factors = dict[str, list[float]]  # by case: the mean coupling factor for each batch size


def _factor(measure: Measure) -> Finding:
    found = measure.map(factors, range(SEEDS))
    rises = {case: [of_seed[case] for of_seed in found] for case in found[0]}
    rising = {case: all(_increases(values) for values in of_case) for case, of_case in rises.items()}
    on_vectors = all(value for case, value in rising.items() if case.startswith("random"))
    says: Verdict = "reproduced" if all(rising.values()) else "partly" if on_vectors else "not reproduced"
    return Finding(
        claim="coupling-factor",
        verdict=says,
        criterion="In every seed the mean factor increases from each batch size to the next, 4, 16, 64 and 256, at "
        "temperature 0.1 and 0.5, on noisy copies of random vectors and on views of digits before, during and after "
        "training; partly if on the random vectors only.",
        seeds=tuple(range(SEEDS)),
        measurements=tuple(
            measured(f"mean coupling factor, {case}, batch {batch}", [values[place] for values in of_case], "fraction")
            for case, of_case in rises.items()
            for place, batch in enumerate(FACTOR_BATCHES)
        ),
        note="Trained with NT-Xent at temperature 0.1 and batch 64; the factor is that of training images' views.",
    )


def _increases(values: list[float]) -> bool:
    return all(low < high for low, high in pairwise(values))


def factors(seed: int) -> Factors:
    """The mean coupling factor for each batch size, in every case."""
    streams = Streams(seed)
    generator = streams("vectors")
    most = max(FACTOR_BATCHES) * FACTOR_DRAWS
    vectors = nn.functional.normalize(torch.randn(most, 8, generator=generator), dim=1)
    copies = vectors + 0.1 * torch.randn(vectors.shape, generator=generator)
    cases = {"random vectors": (vectors, copies)}
    division = images(seed)
    drawn, count = streams("drawn"), len(division.training.x)
    orders = [torch.randperm(count, generator=drawn) for _ in range(FACTOR_DRAWS)]  # no image twice in a batch
    for steps in FACTOR_STEPS:
        with streams.globally("model"):
            model = Encoder()
        if steps:
            pretrain(model, NTXentLoss(), division, streams, lr=3e-3, steps=steps, batch_size=64)
        place = torch.cat([order[: max(FACTOR_BATCHES)] for order in orders])
        views, _ = TwoViews()(division.training.x[place], place, streams("views"))
        with torch.no_grad():
            first, second = model.eval()(views).unbind(1)
        cases[f"views after {steps} steps"] = (first, second)
    return {
        f"{case}, temperature {temperature:g}": [mean_factor(*both, batch, temperature) for batch in FACTOR_BATCHES]
        for case, both in cases.items()
        for temperature in FACTOR_TEMPERATURES
    }


def mean_factor(first: Tensor, second: Tensor, batch: int, temperature: float) -> float:
    """Over all batches of that size."""
    batches = zip(torch.split(first, batch), torch.split(second, batch), strict=True)
    return torch.stack([npc_multiplier(a, b, temperature).mean() for a, b in batches]).mean().item()
