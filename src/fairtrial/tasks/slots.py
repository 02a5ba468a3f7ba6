"""The slots that the shipped tasks have, and what may fill them: PyTorch's own, and every registered method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fairtrial.contract import BadInput, Choice, Slot
from fairtrial.methods import registry
from fairtrial.methods.registry import Method
from fairtrial.tasks import standard

ADAMW = Choice("AdamW")
CROSS_ENTROPY = Choice("CrossEntropyLoss")
SQUARED_ERROR = Choice("MSELoss")
COSINE = Choice("CosineAnnealingLR")
NO_TRANSFORM = Choice("NoTransform")
RANDOM_ORDER = Choice("RandomSampler")
NO_SURGERY = Choice("NoSurgery")


@dataclass(frozen=True)
class Options:
    """What may fill a slot: the standard methods, then the registered ones, which are imported when asked for.

    Attributes:
        standard: PyTorch's own.
        announced: the slot's name in `@method(slot=…)`.
    """

    standard: Sequence[Method]
    announced: str

    def names(self) -> list[str]:
        return [*(method.name for method in self.standard), *(entry.name for entry in self._entries())]

    def aliases(self) -> Mapping[str, str]:
        """A paper's slug stands for its headline method: its namesake, else the first in its file."""
        found: dict[str, str] = {}
        for entry in self._entries():
            if entry.paper not in found or _plain(entry.name) == _plain(entry.paper):
                found[entry.paper] = entry.name
        return found

    def __getitem__(self, name: str) -> Method:
        for method in self.standard:
            if method.name == name:
                return method
        for entry in self._entries():
            if entry.name == name:
                return entry.load()
        raise BadInput(f"no method {name!r} here; there is: {', '.join(self.names())}")

    def _entries(self) -> list[registry.Entry]:
        return [entry for entry in registry.index() if entry.slot == self.announced]


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def optimizer_slot(default: Choice = ADAMW) -> Slot:
    """`torch.optim.Optimizer`s over the model's trainable parameters."""
    return Slot(
        "optimizer",
        default,
        Options(standard.OPTIMIZERS, "optimizer"),
        lambda setting: {"params": [p for p in setting.model.parameters() if p.requires_grad]},
    )


def loss_slot(default: Choice = CROSS_ENTROPY) -> Slot:
    """Losses of scores (n, classes) and class indices (n,)."""
    return Slot("loss", default, Options(standard.CLASSIFICATION_LOSSES, "loss"))


def regression_loss_slot(default: Choice = SQUARED_ERROR) -> Slot:
    """Losses of predictions (n,) and targets (n,)."""
    return Slot("loss", default, Options(standard.REGRESSION_LOSSES, "regression_loss"))


def schedule_slot(default: Choice = COSINE) -> Slot:
    """`LRScheduler`s, stepped after every training step."""
    return Slot(
        "schedule",
        default,
        Options(standard.SCHEDULES, "schedule"),
        lambda setting: {"optimizer": setting.optimizer},
    )


def batch_slot(default: Choice = NO_TRANSFORM) -> Slot:
    """Callables `(x, y, generator) -> (x, y)` that change a batch before the model sees it."""
    return Slot("batch", default, Options(standard.BATCH_TRANSFORMS, "batch"))


def sampler_slot(default: Choice = RANDOM_ORDER) -> Slot:
    """`torch.utils.data.Sampler`s of indices into the training set, drawn anew in every epoch."""
    return Slot(
        "sampler",
        default,
        Options(standard.SAMPLERS, "sampler"),
        lambda setting: {"generator": setting.order},
    )


def layer_slot(default: Choice = NO_SURGERY) -> Slot:
    """Functions that take the freshly initialised model and return the changed one."""
    return Slot("layer", default, Options(standard.LAYERS, "layer"), lambda setting: {"model": setting.model})


def classification_slots() -> dict[str, Slot]:
    """The slots of a task whose targets are class indices."""
    slots = optimizer_slot(), loss_slot(), schedule_slot(), batch_slot(), sampler_slot(), layer_slot()
    return {slot.name: slot for slot in slots}


def regression_slots() -> dict[str, Slot]:
    """The slots of a task whose targets are numbers. Batch transforms and samplers are of classification."""
    slots = optimizer_slot(), regression_loss_slot(), schedule_slot(), layer_slot()
    return {slot.name: slot for slot in slots}
