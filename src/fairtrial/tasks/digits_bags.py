"""Bags of sixteen handwritten digits, of which two give a bag's class away; classes are imbalanced while training.

In a bag of class 1 two digits are a 9, in one of class 2 a 7, and all others are any but these. There are 120, 12 and 6
bags of the classes to train on, and as many of each to validate with and for the test.

The network's output is its logits and, beside them, an embedding of the bag. Losses of scores take the former, joint
losses both. Batches are balanced by class unless the slot `sampler` says otherwise: the contrast of a joint loss needs
several bags of each class, and cross entropy does far better with them, too. Weights of classes come on top of that.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.contract import Choice, Metric, Slot
from fairtrial.methods import registry
from fairtrial.methods.arguments import require
from fairtrial.methods.losses.sc_mil import SCMIL, make_imbalanced_bags
from fairtrial.methods.registry import Method, Uniform
from fairtrial.tasks import digits, standard
from fairtrial.tasks.bags import BagTask
from fairtrial.tasks.digits_longtail import inverse_frequencies
from fairtrial.tasks.imbalance import balanced_accuracy
from fairtrial.tasks.retrieval import BalancedSampler
from fairtrial.tasks.samples import Division, Part, Samples
from fairtrial.tasks.slots import CROSS_ENTROPY, Options, layer_slot, optimizer_slot, schedule_slot
from fairtrial.tasks.streams import Streams

BACKGROUND, KEYS = (0, 1, 2, 3, 4, 5, 6, 8), (9, 7)
CLASSES = 1 + len(KEYS)
INSTANCES, KEY_SHARE = 16, 0.125
SIZES, JUDGED = (120, 12, 6), 80  # bags of each class to train on, and in each of the other parts
EMBEDDING = 32


def samples() -> Samples:
    """The images of `digits`, to be laid into bags of three classes."""
    return replace(digits.samples(), num_classes=CLASSES)


def bags_of(part: Part, sizes: tuple[int, ...], generator: torch.Generator) -> Part:
    """Bags (m, instances, 64) with their classes."""
    made = make_imbalanced_bags(
        *part,
        sizes,
        background=BACKGROUND,
        keys=KEYS,
        instances=INSTANCES,
        key_share=KEY_SHARE,
        generator=generator,
    )
    return Part(*made)


def bagged(division: Division, generator: torch.Generator, sizes: tuple[int, ...] = SIZES) -> Division:
    """Imbalanced bags to train on, balanced ones to judge by; those of the test are the same for every seed."""
    return Division(
        bags_of(division.training, sizes, generator),
        bags_of(division.validation, (JUDGED,) * CLASSES, generator),
        bags_of(division.test, (JUDGED,) * CLASSES, Streams(1)("test bags")),
    )


class BagNetwork(nn.Module):
    """Digits encoded one by one, pooled by gated attention: logits and embeddings side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.network = SCMIL(64, CLASSES, width=64, hidden=64, embedding_dim=EMBEDDING)

    def forward(self, bags: Float[Tensor, "m r d"]) -> Float[Tensor, "m o"]:
        found = self.network(bags)
        return torch.cat([found.logits, found.z], 1)


def logits_of(output: Float[Tensor, "m o"]) -> Float[Tensor, "m c"]:
    return output[:, :CLASSES]


def macro_f1(output: Float[Tensor, "m o"], target: Int[Tensor, " m"]) -> float:
    """Mean over classes of the harmonic mean of precision and recall."""
    return float(f1_score(target, logits_of(output).argmax(1), average="macro", zero_division=0.0))


def balanced_accuracy_of_bags(output: Float[Tensor, "m o"], target: Int[Tensor, " m"]) -> float:
    """Mean over classes of the part of their bags that is recognised."""
    return balanced_accuracy(logits_of(output), target)


class FocalLoss(nn.Module):
    """Mean of (1 - p)^gamma · -log p of scores (n, classes), p being the target's probability (Lin et al. 2017).

    Args:
        gamma: at least 0, which is cross entropy.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        require(0 <= gamma < float("inf"), "gamma", gamma, "at least 0 and finite")
        self.gamma = gamma

    def forward(self, input: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        surprise = F.cross_entropy(input, target, reduction="none")
        missing = -torch.expm1(-surprise)
        return (missing.clamp(min=1e-8) ** self.gamma * surprise).mean()  # roots of 0 have no gradient


CLASSIFICATION_LOSSES = (
    *standard.CLASSIFICATION_LOSSES,
    Method("WeightedCrossEntropyLoss", "loss", nn.CrossEntropyLoss, bind=inverse_frequencies),
    Method("FocalLoss", "loss", FocalLoss, {"gamma": Uniform(0.5, 5.0)}),
)


class OfLogits(nn.Module):
    """A loss of scores, of the network's output."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.takes_index = "index" in inspect.signature(loss.forward).parameters

    def forward(
        self, output: Float[Tensor, "m o"], target: Int[Tensor, " m"], index: Int[Tensor, " m"]
    ) -> Float[Tensor, ""]:
        own = {"index": index} if self.takes_index else {}
        value: Tensor = self.loss(logits_of(output), target, **own)
        return value


class OfLogitsAndEmbeddings(nn.Module):
    """A joint loss, of the network's output."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Float[Tensor, "m o"], target: Int[Tensor, " m"]) -> Float[Tensor, ""]:
        value: Tensor = self.loss(logits_of(output), output[:, CLASSES:], target)
        return value


class BagLossOptions(Options):
    """Losses of scores, and joint losses."""

    def _entries(self) -> list[registry.Entry]:
        return [entry for entry in registry.index() if entry.slot in ("loss", "joint_loss")]


@dataclass(frozen=True)
class BagLossSlot(Slot):
    """Losses of logits (m, classes), or of those and embeddings (m, d), and class indices (m,)."""

    def build(self, choice: Choice, setting: Any) -> nn.Module:
        loss = super().build(choice, setting)
        joint = self.options[choice.name].slot == "joint_loss"  # type: ignore[attr-defined]
        return OfLogitsAndEmbeddings(loss) if joint else OfLogits(loss)


CLASS_BALANCED = Method(
    "ClassBalancedSampler",
    "class_sampler",
    BalancedSampler,
    bind=lambda setting: {
        "labels": torch.cat([labels for _, labels in setting.score_batches()]),
        "batch_size": setting.batch_size,
        "per_class": setting.batch_size // setting.num_classes,
    },
)


def slots() -> dict[str, Slot]:
    """Those of a classification task, without batch transforms, which know nothing of bags."""
    loss = BagLossSlot("loss", CROSS_ENTROPY, BagLossOptions(CLASSIFICATION_LOSSES, "joint_loss"))
    sampler = Slot(
        "sampler",
        Choice(CLASS_BALANCED.name),
        Options((CLASS_BALANCED, *standard.SAMPLERS), "class_sampler"),
        lambda setting: {"generator": setting.order},
    )
    return {slot.name: slot for slot in (optimizer_slot(), loss, schedule_slot(), sampler, layer_slot())}


digits_bags = BagTask(
    name="digits-bags",
    version=1,
    metric=Metric("macro F1", "maximize", "fraction", margin=0.01, worst=0.0),
    measure=macro_f1,
    also={"balanced accuracy": balanced_accuracy_of_bags},
    samples=samples,
    model=BagNetwork,
    total_steps=180,
    batch_size=60,
    slots=slots(),
    scale="all",
    bagged=bagged,
)
