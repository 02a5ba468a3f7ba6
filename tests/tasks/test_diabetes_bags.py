"""Bags of diabetes patients: what is known of them, how they are judged, and that the loss matters."""

from dataclasses import replace

import pytest
import torch
from sklearn.metrics import r2_score

from fairtrial.contract import Choice
from fairtrial.methods.losses import InterpolatedBagLoss
from fairtrial.tasks import load
from fairtrial.tasks.bags import BagTask
from fairtrial.tasks.diabetes_bags import BAG_SIZE, OfBags, bagged, explained, laid_into_bags
from fairtrial.tasks.samples import Division, Part
from fairtrial.tasks.streams import Streams


def task() -> BagTask:
    found = load("diabetes-bags")
    assert isinstance(found, BagTask)
    return found


def numbered(n: int) -> Part:
    return Part(torch.arange(float(n))[:, None], torch.arange(float(n)))


def test_bags_hold_each_sample_once_and_its_response_in_their_mean() -> None:
    part = laid_into_bags(numbered(14), 4, Streams(0)("bags"))
    assert part.x.shape == (3, 4, 1)
    assert len(part.x.unique()) == 12
    torch.testing.assert_close(part.y, part.x[:, :, 0].mean(1))
    other = laid_into_bags(numbered(14), 4, Streams(1)("bags"))
    assert not torch.equal(part.x, other.x)


def test_responses_are_standardised_by_bag_means_alone() -> None:
    generator = Streams(0)("responses")
    parts = [Part(torch.zeros(n, 1), 3 + 5 * torch.randn(n, generator=generator)) for n in (4000, 50, 50)]
    training, validation, test = bagged(Division(*parts), Streams(0)("bags"))
    assert training.y.mean().item() == pytest.approx(0, abs=1e-5)
    assert training.y.std(correction=0).item() == pytest.approx(BAG_SIZE**-0.5, abs=1e-5)
    assert validation.x.shape == (10, BAG_SIZE, 1)
    assert test.x.shape == (50, 1, 1)
    assert ((parts[2].y - 3) / 5 - test.y).abs().max() < 0.3


def test_parts_are_of_different_patients() -> None:
    division = task()._divide(Streams(0))
    assert [len(part.x) for part in division] == [41, 20, 132]
    rows = [{row.numpy().tobytes() for row in part.x.flatten(0, 1)} for part in division]
    assert not rows[0] & rows[1]
    assert not rows[0] & rows[2]
    assert not rows[1] & rows[2]


def test_what_is_explained_is_r2_of_the_bags_and_bounded_below() -> None:
    generator = Streams(0)("output")
    output, target = torch.randn(20, 3, generator=generator), torch.randn(20, generator=generator)
    mixed = 0.2 * output + target[:, None]
    assert explained(mixed, target) == pytest.approx(r2_score(target, mixed.mean(1)))
    assert explained(100 * output, target) == -1.0


def test_a_loss_is_called_with_every_predictions_bag() -> None:
    output, target = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([2.0, 1.0])
    assert OfBags(InterpolatedBagLoss(0.5))(output, target) == (0.5 * 1.0 + 1.0) / 2


def test_losses_differ_and_leave_room() -> None:
    found = {}
    for loss in task().slots["loss"].options.names():
        short = replace(task(), total_steps=3)
        first, second = (short.run({"loss": Choice(loss)}, 1) for _ in range(2))
        assert (first.value, first.curve) == (second.value, second.curve)
        found[loss] = task().run({"loss": Choice(loss)}, 0, split="test").value
    assert {"BagLoss", "InstanceLoss", "InterpolatedBagLoss"} <= set(found)
    assert 0.05 < found["InstanceLoss"] < found["InterpolatedBagLoss"] < found["BagLoss"] < 0.5
