"""The claims of AMCL: several heads with temperatures of pairs gain in linear probe accuracy, most with augmentation.

Digits in two views instead of CIFAR and ImageNet, the task `digits-ssl` with batches of 128 and five augmentations
unless said otherwise. All arms have the same convolutions and heads 128-128-32; the wide head has the hidden layer that
makes its weights as many as three heads' with their temperatures. Every arm has six settings to choose among on
validation data, by linear probe: three learning rates, and two temperatures where those are fixed, or numbers of
negatives where they are predicted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from fairtrial.catalog import Finding, Verdict
from fairtrial.claims.arms import Run, evaluate, tune
from fairtrial.claims.measure import Measure, measured
from fairtrial.claims.paired import above_zero, gaps
from fairtrial.claims.pretraining import Worth, pretrained_worth
from fairtrial.methods.losses.amcl import AMCLLoss, MultiHeadProjector, PairTemperature
from fairtrial.methods.losses.decoupled_contrastive import NTXentLoss
from fairtrial.tasks.digits_ssl import AUGMENTATIONS, EMBEDDING, Encoder

FEATURES, HIDDEN, HEADS = 128, 128, 3
WIDE = 436
TEMPERATURES, NEGATIVES, RATES = (0.1, 0.3), (1, 16), (1e-3, 3e-3, 1e-2)
STEPS, BATCH, TUNING_SEEDS, SEEDS = 120, 128, 1, 9

Form = Literal["NT-Xent", "NT-Xent, wide head", "one head, fixed", "one head", "three heads, fixed", "three heads"]
FORMS: tuple[Form, ...] = (
    "NT-Xent",
    "NT-Xent, wide head",
    "one head, fixed",
    "one head",
    "three heads, fixed",
    "three heads",
)
Arm = tuple[Form, int]


def check(measure: Measure) -> list[Finding]:
    every = len(AUGMENTATIONS)
    arms: list[Arm] = [(form, every) for form in FORMS] + [("NT-Xent", 1), ("three heads", 1)]
    grids = {arm: _grid(*arm) for arm in arms}
    chosen = tune(measure, features_worth, grids, seeds=TUNING_SEEDS, score=lambda found: found.probe)
    found = evaluate(measure, features_worth, chosen, seeds=SEEDS)
    probe = {arm: [of_seed.probe for of_seed in worths] for arm, worths in found.items()}
    of_form = {form: probe[form, every] for form in FORMS}
    neighbours = {form: [of_seed.neighbours for of_seed in found[form, every]] for form in FORMS}
    return [_gain(of_form, neighbours), _heads(of_form), _augmentations(probe, every)]


@dataclass(frozen=True)
class Setting:
    """A form, how many augmentations, the learning rate, and a fixed temperature or the number of negatives."""

    form: Form
    augmentations: int
    lr: float
    value: float


def _grid(form: Form, augmentations: int) -> list[Setting]:
    values: Sequence[float] = NEGATIVES if form in ("one head", "three heads") else TEMPERATURES
    return [Setting(form, augmentations, lr, value) for lr in RATES for value in values]


def _gain(probe: dict[Form, list[float]], neighbours: dict[Form, list[float]]) -> Finding:
    gain = {form: gaps(probe["three heads"], probe[form]) for form in FORMS[:2]}
    better = above_zero(*gain.values())
    ahead = all(sum(values) > 0 for values in gain.values())
    says: Verdict = "reproduced" if all(better) else "partly" if ahead else "not reproduced"
    return Finding(
        claim="linear-probe-gain",
        verdict=says,
        criterion="Three heads with predicted temperatures have a significantly higher linear probe accuracy than "
        "NT-Xent with one head and than NT-Xent with one head of as many weights (paired sign-flip tests, Holm over "
        "the two); partly if the mean is above both.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("linear probe accuracy, NT-Xent", probe["NT-Xent"], "fraction", paper="0.899 on CIFAR-10"),
            measured("linear probe accuracy, three heads", probe["three heads"], "fraction", paper="0.922 on CIFAR-10"),
            measured("linear probe accuracy, NT-Xent, wide head", probe["NT-Xent, wide head"], "fraction"),
            *(measured(f"gain of three heads over {form}", values, "fraction") for form, values in gain.items()),
            *(measured(f"k-NN accuracy, {form}", neighbours[form], "fraction") for form in (*FORMS[:2], FORMS[-1])),
        ),
        note="Three heads are equation 2.1 with β = 0.1.",
    )


def _heads(probe: dict[Form, list[float]]) -> Finding:
    of_temperature = gaps(probe["one head"], probe["one head, fixed"])
    of_heads = gaps(probe["three heads"], probe["one head"])
    worth_more, heads_better = above_zero(of_temperature, of_heads)
    says: Verdict = "not reproduced" if worth_more else "reproduced" if heads_better else "partly"
    return Finding(
        claim="heads-over-temperature",
        verdict=says,
        criterion="With one head, predicted temperatures are not significantly better in linear probe accuracy than a "
        "fixed one, while three heads are significantly better than one, both with predicted temperatures (paired "
        "sign-flip tests, Holm over the two); partly if only the first holds.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("gain of predicted temperatures, one head", of_temperature, "fraction"),
            measured(
                "gain of predicted temperatures, three heads",
                gaps(probe["three heads"], probe["three heads, fixed"]),
                "fraction",
            ),
            measured("gain of three heads, predicted temperatures", of_heads, "fraction"),
            measured(
                "gain of three heads, fixed temperatures",
                gaps(probe["three heads, fixed"], probe["one head, fixed"]),
                "fraction",
            ),
            *(measured(f"linear probe accuracy, {form}", probe[form], "fraction") for form in FORMS[2:]),
        ),
        note="All four are equation 2.1; with a fixed temperature its regulariser is a constant.",
    )


def _augmentations(probe: dict[Arm, list[float]], every: int) -> Finding:
    gain = {count: gaps(probe["three heads", count], probe["NT-Xent", count]) for count in (1, every)}
    growth = gaps(gain[every], gain[1])
    ahead = sum(growth) > 0 and sum(gain[every]) > 0
    says: Verdict = "reproduced" if all(above_zero(growth, gain[every])) else "partly" if ahead else "not reproduced"
    names = list(AUGMENTATIONS)
    return Finding(
        claim="augmentation-count",
        verdict=says,
        criterion="With five augmentations three heads have a significantly higher linear probe accuracy than NT-Xent, "
        "and this gain is significantly larger than with one (paired sign-flip tests, Holm over the two); partly if "
        "both are so in the mean.",
        seeds=tuple(range(SEEDS)),
        measurements=(
            measured("gain, one augmentation", gain[1], "fraction", paper="about 0.01"),
            measured("gain, five augmentations", gain[every], "fraction", paper="0.046"),
            measured("gain with five above gain with one", growth, "fraction"),
            *(
                measured(f"linear probe accuracy, {form}, augmentations: {count}", values, "fraction")
                for (form, count), values in probe.items()
                if form in ("NT-Xent", "three heads")
            ),
        ),
        note=f"One: {names[0]}; five: {', '.join(names)}.",
    )


class SideBySide(MultiHeadProjector):
    """Heads whose projections stand in one row."""

    def forward(self, x: Float[Tensor, "n i"]) -> Float[Tensor, "n co"]:
        return super().forward(x).transpose(0, 1).flatten(1)


class OfHeads(nn.Module):
    """A loss of projections by head, of such rows."""

    def __init__(self, loss: AMCLLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, z1: Float[Tensor, "n co"], z2: Float[Tensor, "n co"]) -> Float[Tensor, ""]:
        value: Tensor = self.loss(*(z.view(len(z), -1, EMBEDDING).transpose(0, 1) for z in (z1, z2)))
        return value


def model_and_loss(setting: Setting) -> tuple[Encoder, nn.Module]:
    """The encoder with the form's heads in the place of its projector, and the form's loss."""
    encoder = Encoder()
    match setting.form:
        case "NT-Xent":
            return encoder, NTXentLoss(setting.value)
        case "NT-Xent, wide head":
            encoder.projector = SideBySide(FEATURES, WIDE, EMBEDDING, 1)
            return encoder, NTXentLoss(setting.value)
    heads = HEADS if setting.form.startswith("three") else 1
    encoder.projector = SideBySide(FEATURES, HIDDEN, EMBEDDING, heads)
    if setting.form.endswith("fixed"):
        return encoder, OfHeads(AMCLLoss(setting.value))
    return encoder, OfHeads(AMCLLoss(PairTemperature(EMBEDDING), top_k=int(setting.value)))


def features_worth(run: Run[Setting]) -> Worth:
    """Pre-train with the form, and judge the features."""
    setting = run.setting
    return pretrained_worth(
        lambda: model_and_loss(setting),
        run.seed,
        run.split,
        lr=setting.lr,
        steps=STEPS,
        batch_size=BATCH,
        augmentations=tuple(AUGMENTATIONS)[: setting.augmentations],
    )
