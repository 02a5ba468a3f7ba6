"""Few-shot classification of unseen classes: what an episode is made of, and runs."""

from dataclasses import replace

import pytest
import torch

from fairtrial.contract import BadInput, Choice, Diverged
from fairtrial.tasks import load
from fairtrial.tasks.episodes import QUERIES, WAYS, OfEpisode, drawn_episodes, episode_slots, few_shot_accuracy
from fairtrial.tasks.retrieval import RetrievalTask
from fairtrial.tasks.streams import Streams


def task() -> RetrievalTask:
    found = load("digits-fewshot")
    assert isinstance(found, RetrievalTask)
    return found


def test_no_class_is_in_two_parts_and_validation_classes_change_with_the_seed() -> None:
    data = task().samples()
    assert len(data.x) + len(data.x_test) == 1797
    others, test = set(data.y.tolist()), set(data.y_test.tolist())
    assert (len(others), len(test), len(others & test)) == (30, 10, 0)
    assert {label // 4 for label in test} == set(range(10))
    seen = set()
    for seed in range(3):
        division = task()._divide(Streams(seed))
        validation = set(division.validation.y.tolist())
        assert len(validation) == 10
        assert division.training.y.unique().tolist() == list(range(20))
        assert len(division.training.x) == sum(int((data.y == c).sum()) for c in others - validation)
        seen.add(tuple(sorted(validation)))
    assert len(seen) == 3


def test_a_batch_is_an_episode_of_different_classes_and_images() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    data = Streams(0)("order")

    class Told:
        order = data

        def score_batches(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
            return [(torch.empty(400, 1), torch.arange(400) % 8)]

    sampler = episode_slots(2)["sampler"].build(Choice("EpisodeSampler"), Told())
    for episode in torch.tensor(list(sampler)).split(WAYS * (2 + QUERIES)):
        assert len(set(episode.tolist())) == len(episode)
        loss = OfEpisode(lambda *arguments: seen.append(arguments) or arguments[0].sum(), 2, QUERIES)
        loss((episode % 8)[:, None].float(), episode % 8)
        support, queries = seen[-1]
        assert (support.shape, queries.shape) == ((WAYS, 2, 1), (WAYS, QUERIES, 1))
        assert (queries == support[:, :1]).all()
        assert len(set(support[:, 0, 0].tolist())) == WAYS


def test_what_measures_are_episodes_without_repetition() -> None:
    labels = torch.arange(260) % 13
    episodes = drawn_episodes(labels, 4, Streams(0)("episodes"))
    assert (labels[episodes] == labels[episodes[:, :, :1]]).all()
    for episode in episodes[:20]:
        assert len(episode.unique()) == episode.numel()
        assert len(labels[episode[:, 0]].unique()) == WAYS
    with pytest.raises(ValueError, match="^labels must be at least 14 of each class"):
        drawn_episodes(torch.arange(60) % 5, 4, Streams(0)("episodes"))


def test_accuracy_is_that_of_the_nearest_prototype() -> None:
    labels = torch.arange(120) % 6
    assert few_shot_accuracy(torch.eye(6)[labels], labels, 1) == 1.0
    noise = torch.randn(120, 4, generator=Streams(0)("noise"))
    assert few_shot_accuracy(noise, 7 * labels, 5) == pytest.approx(1 / WAYS, abs=0.05)
    assert few_shot_accuracy(noise, labels, 5) == few_shot_accuracy(noise, labels, 5)


def test_pixels_alone_tell_some_apart() -> None:
    data = task().samples()
    one, five = (few_shot_accuracy(data.x_test, data.y_test, shots) for shots in (1, 5))
    assert 0.48 < one < 0.58 < five < 0.72


def test_the_baseline_learns_what_carries_over_to_unseen_classes() -> None:
    outcome = task().run({}, 0, split="test")
    assert 0.59 < outcome.value < 0.7 < outcome.metrics["5-way 5-shot accuracy"] < 0.8


def test_every_loss_of_the_slot_can_be_chosen_and_repeats_bit_for_bit() -> None:
    short = replace(task(), total_steps=4)
    names = short.slots["loss"].options.names()
    assert {"PrototypeCrossEntropy", "EpisodeLoss"} <= set(names)
    for name in names:
        choices = {"loss": Choice(name)}
        short.check(choices)
        first, second = (short.run(choices, 2) for _ in range(2))
        assert (first.value, first.metrics, first.curve) == (second.value, second.metrics, second.curve)
        with pytest.raises(Diverged):
            short.run(choices | {"optimizer": Choice("SGD", {"lr": 1e30})}, 0)
    with pytest.raises(BadInput, match="no method 'CrossEntropyLoss' here"):
        short.check({"loss": Choice("CrossEntropyLoss")})
