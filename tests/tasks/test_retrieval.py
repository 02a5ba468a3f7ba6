"""Retrieval of unseen classes: which classes go where, how batches are made up, and what the optimizer is handed."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from fairtrial.contract import BadInput, Choice, Diverged
from fairtrial.tasks import load
from fairtrial.tasks.retrieval import BalancedSampler, RetrievalTask
from fairtrial.tasks.retrieval_measures import map_at_r, recall_at_k
from fairtrial.tasks.streams import Streams


def short(**changed: Any) -> RetrievalTask:
    task = load("digits-retrieval")
    assert isinstance(task, RetrievalTask)
    return replace(task, **{"total_steps": 4} | changed)


def test_no_class_is_in_two_parts_and_validation_classes_change_with_the_seed() -> None:
    task, seen = short(), set()
    data = task.samples()
    training_and_validation, test = set(data.y.tolist()), set(data.y_test.tolist())
    assert len(training_and_validation) == 30
    assert len(test) == 10
    assert not training_and_validation & test
    assert {label // 4 for label in test} == set(range(10))  # one turn of each digit
    for seed in range(3):
        division = task._divide(Streams(seed))
        validation = set(division.validation.y.tolist())
        assert len(validation) == 10
        assert validation < training_and_validation
        assert len(division.training.x) == sum(int((data.y == c).sum()) for c in training_and_validation - validation)
        assert division.training.y.unique().tolist() == list(range(20))
        seen.add(tuple(sorted(validation)))
    assert len(seen) == 3


def test_every_image_is_in_one_class_only() -> None:
    data = load("digits-retrieval").samples()  # type: ignore[attr-defined]
    assert len(data.x) + len(data.x_test) == 1797
    assert data.x.shape[1:] == (14, 14)


def test_pixels_alone_retrieve_little() -> None:
    division = short()._divide(Streams(0))
    pixels = division.test.x.flatten(1)
    assert 0.55 < recall_at_k(pixels, division.test.y) < 0.7
    assert map_at_r(pixels, division.test.y) < 0.1


def test_the_baseline_learns_what_carries_over_to_unseen_classes() -> None:
    task = load("digits-retrieval")
    outcome = task.run({"optimizer": Choice("AdamW", {"lr": 0.003})}, 0, split="test", progress=lambda *point: None)
    assert 0.75 < outcome.value < 0.95
    assert outcome.metrics["MAP@R"] > 0.35


@pytest.mark.parametrize("loss", ["NormalizedSoftmaxLoss", "UNPGLoss", "MetricMix"])
def test_losses_with_weights_or_draws_repeat_bit_for_bit(loss: str) -> None:
    first, second = (short().run({"loss": Choice(loss)}, 3) for _ in range(2))
    assert (first.value, first.metrics, first.curve) == (second.value, second.metrics, second.curve)


def test_the_weights_of_a_loss_are_trained() -> None:
    made = []
    task = short()
    slot = task.slots["schedule"]

    def bind(setting: Any) -> dict[str, Any]:
        made.append((setting.loss, [p.detach().clone() for p in setting.loss.parameters()]))
        return {"optimizer": setting.optimizer}

    task = replace(task, slots={**task.slots, "schedule": replace(slot, bind=bind)})
    for name in ("UNPGLoss", "NormalizedSoftmaxLoss"):
        task.run({"loss": Choice(name)}, 0)
        loss, before = made[-1]
        assert [p.shape for p in loss.parameters()] == [(20, 32)]
        assert not torch.equal(next(loss.parameters()), before[0])
    task.run({"loss": Choice("MetricMix", {"loss": "proxy_anchor"})}, 0)
    assert not torch.equal(made[-1][0].proxies, made[-1][1][0])


def test_every_loss_of_the_slot_can_be_chosen() -> None:
    task = short()
    for name in task.slots["loss"].options.names():
        task.check({"loss": Choice(name)})
    assert task.slots["loss"].default.name in task.slots["loss"].options.names()
    assert {"LOOKLoss", "MetricMix", "MultiSimilarityLoss", "UNPGLoss"} <= set(task.slots["loss"].options.names())
    with pytest.raises(BadInput, match="no method 'CrossEntropyLoss' here"):
        task.check({"loss": Choice("CrossEntropyLoss")})


def test_a_run_beyond_all_bounds_diverges() -> None:
    with pytest.raises(Diverged, match="no longer finite"):
        short(total_steps=30).run({"optimizer": Choice("SGD", {"lr": 1e30})}, 0)


def test_batches_are_balanced() -> None:
    labels = torch.tensor([0] * 5 + [1] * 30 + [2] * 9 + [3] * 12)[torch.randperm(56, generator=Streams(1)("order"))]
    sampler = BalancedSampler(labels, 12, 4, Streams(0)("order"))
    for _ in range(3):
        epoch = torch.tensor(list(sampler))
        assert len(epoch) == len(sampler) == 48
        for drawn in epoch.split(12):
            assert len(set(drawn.tolist())) == 12
            assert sorted(torch.bincount(labels[drawn]).tolist())[-3:] == [4, 4, 4]
    again = [list(BalancedSampler(labels, 12, 4, Streams(0)("order"))) for _ in range(2)]
    assert again[0] == again[1]
    assert again[0] != list(BalancedSampler(labels, 12, 4, Streams(1)("order")))


def test_a_class_that_is_too_small_repeats_itself() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    epoch = list(BalancedSampler(labels, 6, 3, Streams(0)("order")))
    assert {epoch.count(i) for i in (0, 1)} == {1, 2}


@pytest.mark.parametrize(("batch_size", "per_class"), [(4, 0), (4, 8), (4, 3), (6, 2)])
def test_batches_that_cannot_be(batch_size: int, per_class: int) -> None:
    with pytest.raises(ValueError, match="per_class must be"):
        BalancedSampler(torch.tensor([0, 0, 1, 1]), batch_size, per_class, Streams(0)("order"))
