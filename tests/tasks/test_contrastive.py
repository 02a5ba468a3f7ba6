"""Tasks of two views: what a loss is called with, and that weights of its own are trained."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from fairtrial.contract import BadInput, Choice
from fairtrial.methods.registry import Method, index
from fairtrial.tasks import load
from fairtrial.tasks.contrastive import OfViews, contrastive_slots
from fairtrial.tasks.supervised import SupervisedTask

TASKS = ("digits-ssl", "docs-retrieval")
LOSSES = [entry.name for entry in index() if entry.slot == "contrastive_loss"]


def short(name: str, steps: int = 3) -> SupervisedTask:
    task = load(name)
    assert isinstance(task, SupervisedTask)
    return replace(task, total_steps=steps)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_runs_and_repeats_itself(name: str, loss: str) -> None:
    task, choices = short(name), {"loss": Choice(loss)}
    task.check(choices)
    first, second = (task.run(choices, 1, split="test") for _ in range(2))
    assert (first.value, first.metrics, first.curve) == (second.value, second.metrics, second.curve)
    assert 0 <= first.value <= 1


@pytest.mark.parametrize("name", TASKS)
def test_only_losses_of_views_are_offered(name: str) -> None:
    assert load(name).slots["loss"].options.names() == LOSSES
    with pytest.raises(BadInput, match="no method 'CrossEntropyLoss' here"):
        short(name).check({"loss": Choice("CrossEntropyLoss")})


def test_a_loss_is_called_with_both_views() -> None:
    output = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0))
    found = OfViews(nn.PairwiseDistance())(output, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(found, nn.PairwiseDistance()(output[:, 0], output[:, 1]))


def test_weights_of_the_loss_are_trained_along_with_the_model() -> None:
    made: list[nn.Module] = []

    class Scaled(nn.Module):
        def __init__(self, embedding_dim: int) -> None:
            super().__init__()
            made.append(self)
            self.scale = nn.Parameter(torch.ones(embedding_dim))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return ((a - b) * self.scale).square().mean()

    task = short("digits-ssl")
    slot = task.slots["loss"]
    own = Method("Scaled", "loss", Scaled, bind=lambda setting: {"embedding_dim": setting.embedding_dim})

    class Only:
        def names(self) -> list[str]:
            return ["Scaled"]

        def aliases(self) -> dict[str, str]:
            return {}

        def __getitem__(self, name: str) -> Method:
            return own

    replace(task, slots={**task.slots, "loss": replace(slot, options=Only())}).run({"loss": Choice("Scaled")}, 0)
    scale = made[0].scale
    assert scale.shape == (32,)
    assert (scale != 1).all()


def test_the_first_way_to_make_views_is_the_default() -> None:
    made = Method("Same", "batch", lambda: None)
    slots = contrastive_slots(Choice("NTXentLoss"), 4, [made], optimizer=Choice("SGD"))
    assert slots["batch"].default == Choice("Same")
    assert slots["optimizer"].default == Choice("SGD")
