"""Tasks with a worse training part: what is altered, what stays, and that methods can differ on them."""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score

from fairtrial.contract import BadInput, Choice
from fairtrial.tasks import load
from fairtrial.tasks.altered import AlteredTask
from fairtrial.tasks.digits_noisy import LOOKALIKE, any_other, lookalike
from fairtrial.tasks.samples import Division, divide
from fairtrial.tasks.screening import BCEWithLogitsLoss, area_under_the_roc_curve
from fairtrial.tasks.streams import Streams

NAMES = ("digits-longtail", "digits-noisy", "digits-noisy-pairs", "tabular-screening")
LOSSES = [(name, loss) for name in NAMES for loss in load(name).slots["loss"].options.names()]


def altered(name: str) -> AlteredTask:
    task = load(name)
    assert isinstance(task, AlteredTask)
    return task


def divisions(name: str, seed: int) -> tuple[Division, Division]:
    """Before and after the alteration."""
    task = altered(name)
    return divide(task.samples(), task.validation, task.scale, Streams(seed)), task._divide(Streams(seed))


@pytest.mark.parametrize("name", NAMES)
def test_only_the_training_part_is_altered_and_the_seed_decides_how(name: str) -> None:
    before, after = divisions(name, 3)
    for part in ("validation", "test"):
        for then, now in zip(getattr(before, part), getattr(after, part), strict=True):
            assert torch.equal(then, now)
    assert not torch.equal(before.training.y, after.training.y)
    again, other = divisions(name, 3)[1], divisions(name, 4)[1]
    assert torch.equal(again.training.x, after.training.x)
    assert torch.equal(again.training.y, after.training.y)
    assert not torch.equal(other.training.y, after.training.y)


def test_the_long_tail_has_another_order_of_the_classes_for_each_seed() -> None:
    rarest = set()
    for seed in range(8):
        before, after = divisions("digits-longtail", seed)
        sizes = torch.bincount(after.training.y, minlength=10)
        assert sorted(sizes.tolist()) == [1, 2, 3, 5, 8, 13, 22, 36, 60, 100]
        assert torch.bincount(after.validation.y).min() >= 27
        known = {tuple(x.tolist()) for x in before.training.x}
        assert all(tuple(x.tolist()) in known for x in after.training.x)
        rarest.add(int(sizes.argmin()))
    assert len(rarest) > 3


@pytest.mark.parametrize(("name", "rate"), [("digits-noisy", 0.4), ("digits-noisy-pairs", 0.3)])
def test_so_many_labels_are_wrong(name: str, rate: float) -> None:
    before, after = divisions(name, 0)
    assert torch.equal(before.training.x, after.training.x)
    wrong = before.training.y != after.training.y
    assert wrong.double().mean().item() == pytest.approx(rate, abs=0.05)
    partners = torch.tensor(LOOKALIKE)[before.training.y[wrong]]
    assert torch.equal(partners, after.training.y[wrong]) == (name == "digits-noisy-pairs")


def test_wrong_labels_are_others() -> None:
    y = torch.arange(10).repeat(200)
    drawn = any_other(y, torch.Generator().manual_seed(0))
    assert ((drawn - y) % 10).bincount(minlength=10)[0] == 0
    assert ((drawn - y) % 10).bincount()[1:].min() > 150
    assert torch.equal(lookalike(lookalike(y, torch.Generator()), torch.Generator()), y)
    assert (lookalike(y, torch.Generator()) != y).all()


def test_screening_has_few_positives_to_learn_from_and_many_to_be_judged_by() -> None:
    _, after = divisions("tabular-screening", 0)
    assert torch.bincount(after.training.y).tolist() == [200, 10]
    assert torch.bincount(after.validation.y)[1] > 25
    assert torch.bincount(after.test.y)[1] > 60


@pytest.mark.parametrize(("name", "loss"), LOSSES)
def test_every_loss_runs(name: str, loss: str) -> None:
    task = replace(altered(name), total_steps=3)
    choices = {"loss": Choice(loss)}
    task.check(choices)
    first, second = (task.run(choices, 1) for _ in range(2))
    assert (first.value, first.metrics) == (second.value, second.metrics)
    assert 0 <= first.value <= 1


def test_losses_of_each_kind_are_offered_where_they_fit() -> None:
    assert {"WeightedCrossEntropyLoss", "LDRLoss", "CompSumLoss", "AnyLoss"} <= {
        loss for name, loss in LOSSES if name == "digits-longtail"
    }
    binary = {loss for name, loss in LOSSES if name == "tabular-screening"}
    assert {"BCEWithLogitsLoss", "WeightedBCEWithLogitsLoss", "EnsLoss", "MarginLoss", "AnyLoss"} <= binary
    assert not {"CrossEntropyLoss", "CompSumLoss"} & binary
    with pytest.raises(BadInput, match="no method 'CrossEntropyLoss' here"):
        load("tabular-screening").slots["loss"].options["CrossEntropyLoss"]


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("digits-longtail", Choice("WeightedCrossEntropyLoss")),
        ("digits-noisy", Choice("CompSumLoss", {"tau": 1.8})),
        ("tabular-screening", Choice("WeightedBCEWithLogitsLoss", {"pos_weight": 20.0})),
    ],
)
def test_a_loss_made_for_it_helps_and_leaves_room(name: str, better: Choice) -> None:
    task, optimizer = load(name), {"optimizer": Choice("AdamW", {"lr": 3e-3})}
    plain, helped = task.run(optimizer, 0).value, task.run({**optimizer, "loss": better}, 0).value
    assert 0.6 < plain < helped - 0.005 < 0.97


def test_the_weighted_loss_weighs_classes_alike() -> None:
    task = altered("digits-longtail")
    slot = task.slots["loss"]
    _, after = divisions("digits-longtail", 0)

    class Told:
        num_samples, num_classes = len(after.training.y), 10

        def score_batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
            return [(after.training.x, after.training.y)]

    weight = slot.build(Choice("WeightedCrossEntropyLoss"), Told()).weight
    torch.testing.assert_close(weight * torch.bincount(after.training.y), torch.full((10,), 25.0))


def test_binary_cross_entropy_takes_integers() -> None:
    logits, target = torch.tensor([0.3, -0.2, 1.0]), torch.tensor([1, 0, 1])
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float())
    torch.testing.assert_close(BCEWithLogitsLoss()(logits, target), plain)
    weight = torch.tensor(3.0)
    weighted = torch.nn.functional.binary_cross_entropy_with_logits(logits, target.float(), pos_weight=weight)
    torch.testing.assert_close(BCEWithLogitsLoss(3.0)(logits, target), weighted)
    assert area_under_the_roc_curve(logits, target) == roc_auc_score(target, logits)
