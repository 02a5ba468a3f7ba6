from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fairtrial.contract import Choice
from fairtrial.tasks import SupervisedTask, load
from fairtrial.tasks.arithmetic import (
    EQUALS,
    IGNORED,
    LENGTH,
    PLUS,
    VOCABULARY,
    Calculator,
    NextTokenCrossEntropyLoss,
    passed,
    samples,
)


def test_sums_are_right_and_no_question_is_in_both_parts() -> None:
    data = samples()
    x = torch.cat([data.x, data.x_test])
    tens = torch.tensor([10, 1])
    assert torch.equal(x[:, :2] @ tens + x[:, 3:5] @ tens, x[:, 6:] @ torch.tensor([100, 10, 1]))
    assert (x[:, 2] == PLUS).all()
    assert (x[:, 5] == EQUALS).all()
    assert len(torch.unique(x, dim=0)) == len(x)
    assert torch.equal(data.y[:, 6:], data.x[:, 6:])
    assert (data.y[:, :6] == IGNORED).all()


def test_pass_at_n_is_that_of_the_digits_product() -> None:
    logits = torch.zeros(2, LENGTH, VOCABULARY)
    data = samples()
    target = data.y[:2]
    uniform = VOCABULARY**-3
    assert passed(logits, target.flatten(), 1) == pytest.approx(uniform)
    assert passed(logits, target.flatten(), 64) == pytest.approx(1 - (1 - uniform) ** 64)
    sure = F.one_hot(data.x[:2], VOCABULARY).roll(-1, 1) * 1e3
    assert passed(sure.float(), target.flatten(), 1) == pytest.approx(1)


def test_the_calculator_cannot_look_ahead() -> None:
    x = samples().x[:4]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Calculator()
    changed = x.clone()
    changed[:, 7:] = 0
    assert torch.allclose(model(x)[:, :7], model(changed)[:, :7], atol=1e-6)
    assert not torch.allclose(model(x)[:, 7:], model(changed)[:, 7:])


def test_the_baseline_is_cross_entropy_of_the_answers_tokens() -> None:
    logits = torch.randn(2, LENGTH, VOCABULARY, generator=torch.Generator().manual_seed(0))
    target = samples().y[:2]
    answers = F.cross_entropy(logits[:, 5:8].flatten(0, 1), target[:, 6:].flatten())
    torch.testing.assert_close(NextTokenCrossEntropyLoss()(logits, target), answers)


def test_losses_of_sequences_learn() -> None:
    task = load("arithmetic")
    assert isinstance(task, SupervisedTask)
    task = replace(task, total_steps=120)
    for loss in ("NextTokenCrossEntropyLoss", "DirectCoverageLoss"):
        choices = {"loss": Choice(loss), "optimizer": Choice("AdamW", {"lr": 1e-2})}
        task.check(choices)
        found = task.run(choices, 0, split="test")
        assert 0.2 < found.value < 0.9  # uniform digits have 0.01
