"""Tasks of trained models to be quantised, and of decoders."""

import math
from dataclasses import replace

import pytest
import torch

from fairtrial.contract import Choice
from fairtrial.tasks import load
from fairtrial.tasks.generation import BEGINNING, NEW, PARAGRAPHS, distinct, generation, lengths, top_k, top_p
from fairtrial.tasks.models import Loaded
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.trained import TrainedTask, Trial


def task(name: str, **changes: int) -> TrainedTask:
    found = load(name)
    assert isinstance(found, TrainedTask)
    return replace(found, **changes)


def test_fewer_bits_cost_more_and_take_less(small_gpt: Loaded) -> None:
    before = {name: p.clone() for name, p in small_gpt.model.named_parameters()}
    outcomes = []
    for name in ("small-lm-ptq-2", "small-lm-ptq", "small-lm-ptq-4"):
        each = task(name, passages=16)
        each.check({"quantizer": Choice("RoundToNearest")})
        outcomes.append(each.run({}, 1))
    outcomes.append(each.run({"quantizer": Choice("NotQuantised")}, 1))
    values, sizes = [o.value for o in outcomes], [o.costs.peak_memory for o in outcomes]
    assert values == sorted(values, reverse=True)
    assert sizes == sorted(sizes)
    assert all(o.costs.step_time is not None and o.costs.step_time > 0 for o in outcomes)
    assert [o.metrics["bits per weight"] for o in outcomes] == [2.5, 3.5, 4.5, 32.0]
    assert all(torch.equal(before[name], p) for name, p in small_gpt.model.named_parameters())


def test_text_that_judges_was_not_trained_on(small_gpt: Loaded) -> None:
    each = task("small-lm-ptq")
    rows = {
        part: {tuple(row.tolist()) for row in each.text("small-gpt", part, 10**6, 256, torch.Generator())}
        for part in ("calibration", "validation", "test")
    }
    assert not rows["calibration"] & rows["validation"]
    assert not rows["validation"] & rows["test"]
    assert not rows["calibration"] & rows["test"]


def test_an_encoder_keeps_its_vectors(minilm: Loaded) -> None:
    each = task("encoder-ptq", passages=4)
    assert each.run({"quantizer": Choice("NotQuantised")}, 0).value == pytest.approx(1)
    assert 0.8 < each.run({"quantizer": Choice("RoundToNearest", {"bits": 8})}, 0).value < 1


@pytest.mark.parametrize("decoder", ["TopP", "Greedy"])
def test_what_is_written_depends_on_the_seed_alone(smollm2: Loaded, decoder: str) -> None:
    each = task("smollm2-generation", passages=4)
    choice = {"decoder": Choice(decoder)}
    each.check(choice)
    a, b, c = (each.run(choice, seed) for seed in (0, 0, 1))
    assert a.metrics == b.metrics
    assert (a.metrics == c.metrics) == (decoder == "Greedy")
    assert a.metrics["people's nats per token"] > 2


def test_paragraphs_are_long_enough_to_judge_by(smollm2: Loaded) -> None:
    assert min(len(smollm2.tokenizer(text).input_ids) for text in PARAGRAPHS) >= BEGINNING + NEW


def test_runs_that_are_different_are_counted() -> None:
    ids, sizes = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]]), torch.tensor([5, 5])
    assert distinct(ids, sizes, 2) == pytest.approx((2 / 4 + 4 / 4) / 2)
    assert distinct(ids, sizes, 4) == 1.0
    assert distinct(ids, torch.tensor([2, 1]), 2) == 1.0


def test_what_follows_the_end_of_a_text_is_not_judged(smollm2: Loaded) -> None:
    end = smollm2.tokenizer.eos_token_id
    assert lengths(torch.tensor([[5, end, 7], [5, 6, 7], [end, end, 7]]), torch.tensor([end])).tolist() == [2, 3, 1]
    each = task("smollm2-generation", passages=4)

    def ending(followed_by: int) -> dict[str, float]:
        def decoder(model, input_ids, **options):
            tail = torch.full((len(input_ids), NEW - 3), followed_by)
            return torch.cat([input_ids, torch.tensor([[30, 281, end]]).expand(len(input_ids), 3), tail], 1)

        setting, passages = each.given(0, "validation")
        with torch.no_grad():
            return generation(Trial(each, setting, {"decoder": decoder}, passages, Streams(0)))[1]

    assert ending(0) == ending(5)


def test_numbers_that_transformers_lets_pass_are_refused() -> None:
    with pytest.raises(ValueError, match="p must be within"):
        top_p(math.nan)
    for wrong in (True, 2.5, 0):
        with pytest.raises(ValueError, match="k must be"):
            top_k(wrong)  # type: ignore[arg-type]


def test_training_with_few_bits_has_a_baseline() -> None:
    each = replace(load("small-lm-qat"), total_steps=40)
    assert each.run({"layer": Choice("StraightThrough", {"weight_bits": 8, "act_bits": 8})}, 0).value < 7


@pytest.mark.parametrize("name", ["small-lm-qat", "digits-vit"])
def test_a_task_to_train_in_learns(name: str) -> None:
    each = replace(load(name), total_steps=40)
    each.check({"layer": Choice("NoSurgery")})
    outcome = each.run({}, 0)
    assert outcome.value < 7 if name == "small-lm-qat" else outcome.value > 0.3
