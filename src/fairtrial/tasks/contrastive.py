"""What the contrastive tasks share: slots for losses of two views, which may have weights of their own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from fairtrial.contract import Choice, Slot
from fairtrial.methods.registry import Method
from fairtrial.tasks.retrieval import EmbeddingLossSlot
from fairtrial.tasks.slots import COSINE, Options, layer_slot, optimizer_slot, sampler_slot, schedule_slot


class OfViews(nn.Module):
    """A loss of two views, of a model's output for both."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Float[Tensor, "n 2 d"], target: Int[Tensor, " n"]) -> Float[Tensor, ""]:
        value: Tensor = self.loss(*output.unbind(1))
        return value


@dataclass(frozen=True)
class ViewsLossSlot(EmbeddingLossSlot):
    """Losses of two views of n samples, (n, d) and (n, d). They may have weights, which the optimizer is handed."""

    def build(self, choice: Choice, setting: Any) -> Any:
        setting.loss = OfViews(super().build(choice, setting))
        return setting.loss


def weights_of_model_and_loss(setting: Any) -> dict[str, Any]:
    """What there is to train: the model, and the loss if it has weights of its own."""
    return {"params": [p for module in (setting.model, setting.loss) for p in module.parameters() if p.requires_grad]}


def contrastive_slots(
    loss: Choice, embedding_dim: int, views: Sequence[Method], *, optimizer: Choice, schedule: Choice = COSINE
) -> dict[str, Slot]:
    """The slots of a task whose model maps samples to two views' embeddings (n, 2, d).

    Args:
        loss: what fills the slot `loss` by default.
        embedding_dim: d.
        views: what may fill the slot `batch`: makes two views of each sample. The first does by default.
        optimizer, schedule: what fills these slots by default.
    """
    slots = (
        replace(optimizer_slot(optimizer), bind=weights_of_model_and_loss),
        ViewsLossSlot("loss", loss, Options((), "contrastive_loss"), embedding_dim=embedding_dim),
        schedule_slot(schedule),
        Slot("batch", Choice(views[0].name), Options(views, "views")),
        sampler_slot(),
        layer_slot(),
    )
    return {slot.name: slot for slot in slots}
