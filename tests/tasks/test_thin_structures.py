"""Segmentation of thin structures: what is measured, what is learnt from, and that losses run and differ."""

import sys
from dataclasses import replace

import pytest
import torch

from fairtrial.contract import BadInput, Choice, Diverged
from fairtrial.tasks import load
from fairtrial.tasks.segmentation import (
    CrossEntropyLoss,
    OfMaps,
    UNet,
    betti_dissimilarity,
    component_error,
    dice,
    hole_error,
)
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.thin_structures import WallsTask

NAMES = ("thin-structures", "thin-structures-noisy")
LOSSES = load(NAMES[0]).slots["loss"].options.names()


def walls(name: str) -> WallsTask:
    task = load(name)
    assert isinstance(task, WallsTask)
    return task


def ring(*missing: tuple[int, int]) -> torch.Tensor:
    """A square of 5 pixels without its inside."""
    drawn = torch.zeros(8, 8, dtype=torch.long)
    drawn[1:6, 1:6] = 1
    drawn[2:5, 2:5] = 0
    for pixel in missing:
        drawn[pixel] = 0
    return drawn


def scores(*masks: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.stack(masks), 2).movedim(-1, 1).double()


def test_measures() -> None:
    nothing, torn = torch.zeros(8, 8, dtype=torch.long), ring((1, 3), (5, 3))
    target = torch.stack([ring()] * 4).flatten()
    output = scores(ring(), ring((1, 3)), torn, nothing)
    assert component_error(output, target) == (0 + 0 + 1 + 1) / 4
    assert hole_error(output, target) == (0 + 1 + 1 + 1) / 4
    assert betti_dissimilarity(output, target) == pytest.approx((0 + 1 / 3 + 2 / 4 + 1) / 4)
    assert dice(output, target) == pytest.approx((1 + 30 / 31 + 28 / 30 + 0) / 4)
    assert betti_dissimilarity(scores(nothing), nothing.flatten()) == 0


def test_labels_to_learn_from_are_worse_in_one_task_and_those_that_judge_in_none() -> None:
    plain, noisy = (walls(name)._divide(Streams(3)) for name in NAMES)
    for part in ("training", "validation", "test"):
        assert torch.equal(getattr(plain, part).x, getattr(noisy, part).x)
        assert torch.equal(getattr(plain, part).y, getattr(noisy, part).y) == (part != "training")
        assert getattr(noisy, part).y.shape == (len(getattr(noisy, part).x), 1, 64, 64)
    assert [len(part.x) for part in plain] == [40, 24, 64]
    assert noisy.training.y.sum() < 0.9 * plain.training.y.sum()


def test_losses_are_given_maps() -> None:
    output, target = torch.randn(3, 2, 4, 5), torch.randint(2, (3, 1, 4, 5))
    seen = OfMaps(lambda logits, maps: torch.tensor(float(torch.equal(maps, target) and torch.equal(logits, output))))
    assert seen(output, target.flatten()) == 1


def test_weighted_cross_entropy() -> None:
    output, target = torch.randn(3, 2, 4, 5), torch.randint(2, (3, 1, 4, 5))
    plain = torch.nn.functional.cross_entropy(output, target[:, 0], reduction="none")
    torch.testing.assert_close(CrossEntropyLoss()(output, target), plain.mean())
    weight = 1.0 + 2.0 * target[:, 0]
    torch.testing.assert_close(CrossEntropyLoss(3.0)(output, target), (weight * plain).sum() / weight.sum())
    with pytest.raises(ValueError, match="^foreground_weight must be"):
        CrossEntropyLoss(0.0)


def test_the_u_net_sees_far_and_keeps_the_size() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = UNet().eval(), torch.randn(1, 3, 64, 48)
    changed = x.clone()
    changed[0, :, 32, 24] += 10.0
    difference = (model(x) - model(changed)).detach().abs().sum((0, 1))
    assert difference.shape == (64, 48)
    reach = (difference > 0).nonzero()
    assert (reach.amax(0) - reach.amin(0)).min() > 15


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_runs(loss: str) -> None:
    task = replace(walls(NAMES[1]), total_steps=2)
    choices = {"loss": Choice(loss)}
    task.check(choices)
    first, second = (task.run(choices, 1) for _ in range(2))
    assert (first.value, first.metrics) == (second.value, second.metrics)
    assert 0 <= first.value <= 1


def test_losses_are_offered_and_one_that_needs_an_extra_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"CrossEntropyLoss", "WeightedCrossEntropyLoss", "CEDiceLoss", "SoftCLDiceLoss"} <= set(LOSSES)
    monkeypatch.setitem(sys.modules, "skimage.morphology", None)
    with pytest.raises(BadInput, match=r"pip install 'fairtrial\[vision\]'"):
        walls(NAMES[0]).check({"loss": Choice("SkeletonRecallLoss")})


def test_a_run_whose_outputs_are_lost_diverges() -> None:
    with pytest.raises(Diverged):
        walls(NAMES[0]).run({"optimizer": Choice("AdamW", {"lr": 1e25})}, 0, split="test")


def test_it_can_be_learnt_and_leaves_room() -> None:
    task = replace(walls(NAMES[0]), total_steps=40)
    found = task.run({"optimizer": Choice("AdamW", {"lr": 1e-2})}, 0, split="test")
    assert 0.1 < found.value < 0.9  # nothing found has 1, everything 0.8
    assert found.metrics["Dice"] > 0.6
