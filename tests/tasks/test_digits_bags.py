"""Bags of digits: what is in them, what losses are called with, and that methods can differ."""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import f1_score
from torch import nn
from torch.nn import functional as F

from fairtrial.contract import BadInput, Choice
from fairtrial.methods.losses import SCMILLoss
from fairtrial.tasks import load
from fairtrial.tasks.bags import BagTask
from fairtrial.tasks.digits_bags import (
    CLASSES,
    EMBEDDING,
    INSTANCES,
    JUDGED,
    SIZES,
    FocalLoss,
    OfLogits,
    OfLogitsAndEmbeddings,
    balanced_accuracy_of_bags,
    macro_f1,
)
from fairtrial.tasks.streams import Streams


def short(steps: int = 3) -> BagTask:
    task = load("digits-bags")
    assert isinstance(task, BagTask)
    return replace(task, total_steps=steps)


def images(bags: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in bags.flatten(0, 1)}


def test_bags_are_imbalanced_in_training_alone_and_share_no_image_between_parts() -> None:
    division = short()._divide(Streams(0))
    for part, sizes in zip(division, (SIZES, (JUDGED,) * CLASSES, (JUDGED,) * CLASSES), strict=True):
        assert part.x.shape == (sum(sizes), INSTANCES, 64)
        assert torch.bincount(part.y).tolist() == list(sizes)
    seen = [images(part.x) for part in division]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_test_bags_are_the_same_for_every_seed_and_the_others_are_not() -> None:
    first, second = (short()._divide(Streams(seed)) for seed in (0, 1))
    torch.testing.assert_close(
        *(division.test.x * division.training.x.std() for division in (first, second)), rtol=0, atol=0.2
    )  # up to the scale, which is that of the training images
    assert not torch.equal(first.training.x, second.training.x)
    assert not torch.equal(first.validation.x, second.validation.x)


def test_measures_look_at_logits_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(30, CLASSES + 5, generator=generator), torch.arange(30) % CLASSES
    output[:, CLASSES:] += 100
    predicted = output[:, :CLASSES].argmax(1)
    assert macro_f1(output, target) == pytest.approx(f1_score(target, predicted, average="macro"))
    assert balanced_accuracy_of_bags(output, target) == pytest.approx((predicted == target).double().mean().item())


def test_losses_take_what_they_are_for() -> None:
    output, target = torch.randn(6, CLASSES + EMBEDDING, generator=Streams(0)("output")), torch.arange(6) % CLASSES
    plain = OfLogits(nn.CrossEntropyLoss())(output, target, torch.arange(6))
    torch.testing.assert_close(plain, F.cross_entropy(output[:, :CLASSES], target))
    joint = OfLogitsAndEmbeddings(SCMILLoss(4, 1))(output, target)
    torch.testing.assert_close(joint, SCMILLoss(4, 1)(output[:, :CLASSES], output[:, CLASSES:], target))


def test_focal_loss_looks_away_from_what_is_known() -> None:
    scores = torch.tensor([[2.0, 0.0, 0.0], [1e4, 0.0, 0.0]], requires_grad=True)
    target = torch.tensor([0, 0])
    p = scores[0].softmax(0)[0]
    torch.testing.assert_close(FocalLoss(2.0)(scores, target), -((1 - p) ** 2) * p.log() / 2)
    torch.testing.assert_close(FocalLoss(0.0)(scores, target), F.cross_entropy(scores, target))
    loss = FocalLoss(0.5)(scores, target)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.isfinite().all()
    with pytest.raises(ValueError, match="gamma must be at least 0"):
        FocalLoss(-1.0)


def test_every_loss_of_the_slot_can_be_chosen_and_repeats_itself() -> None:
    task = short()
    names = task.slots["loss"].options.names()
    assert {"CrossEntropyLoss", "WeightedCrossEntropyLoss", "FocalLoss", "SCMILLoss", "LDRLoss"} <= set(names)
    for name in names:
        task.check({"loss": Choice(name)})
    for name in ("SCMILLoss", "ALDRLoss"):
        first, second = (task.run({"loss": Choice(name)}, 1) for _ in range(2))
        assert (first.value, first.metrics, first.curve) == (second.value, second.metrics, second.curve)
    with pytest.raises(BadInput, match="no method 'BagLoss' here"):
        task.check({"loss": Choice("BagLoss")})


def test_batches_are_balanced_by_default_and_the_epoch_is_counted() -> None:
    task = short()
    made: list[SCMILLoss] = []
    slot = task.slots["schedule"]

    def bind(setting):  # type: ignore[no-untyped-def]
        made.append(setting)
        return {"optimizer": setting.optimizer}

    replace(task, slots={**task.slots, "schedule": replace(slot, bind=bind)}).run({}, 0)
    assert made[0].steps_per_epoch == sum(SIZES) // 60
    assert task.slots["sampler"].default == Choice("ClassBalancedSampler")


def test_training_leaves_room_and_rare_classes_need_balance() -> None:
    task = load("digits-bags")
    fast = {"optimizer": Choice("AdamW", {"lr": 0.005})}
    found = {
        sampler: task.run(fast | {"sampler": Choice(sampler)}, 0, split="test", progress=lambda *point: None).value
        for sampler in ("ClassBalancedSampler", "RandomSampler")
    }
    assert 0.6 < found["ClassBalancedSampler"] < 0.97
    assert 0.3 < found["RandomSampler"] < found["ClassBalancedSampler"]
