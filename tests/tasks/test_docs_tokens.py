from dataclasses import replace

import torch

from fairtrial.contract import Choice
from fairtrial.tasks import SupervisedTask, load
from fairtrial.tasks.docs_tokens import (
    EMPHASIS,
    LITERAL,
    PLAIN,
    Tagger,
    f1,
    f1_of_emphasis,
    f1_of_literals,
    f1_of_rare_tags,
    samples,
    tagged_tokens,
)


def test_marks_become_tags() -> None:
    found = list(tagged_tokens('If *x* is a "dict.get()", 2**3 * 4 and **PEP 8** are not "marked'))
    words = [(word, tag) for word, tag in found if tag != PLAIN]
    assert words == [
        ("x", EMPHASIS),
        ("dict", LITERAL),
        (".", LITERAL),
        ("get", LITERAL),
        ("(", LITERAL),
        (")", LITERAL),
    ]
    assert [word for word, tag in found if tag == PLAIN][:5] == ["If", "is", "a", ",", "2"]


def test_rare_tags_are_rare_in_both_parts() -> None:
    data = samples()
    for tags in (data.y, data.y_test):
        shares = torch.bincount(tags.flatten(), minlength=3) / tags.numel()
        assert 0.04 < shares[LITERAL] < 0.15
        assert 0.003 < shares[EMPHASIS] < 0.02
    assert data.num_classes == 3


def test_f1() -> None:
    found, there = torch.tensor([1, 1, 0, 0]) == 1, torch.tensor([1, 0, 1, 0]) == 1
    assert f1(found, there) == 0.5
    assert f1(~there, there) == f1(torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)) == 0
    scores, tags = torch.eye(3)[[PLAIN, LITERAL, EMPHASIS, EMPHASIS]], torch.tensor([PLAIN, LITERAL, EMPHASIS, PLAIN])
    assert f1_of_literals(scores, tags) == 1
    assert f1_of_emphasis(scores, tags) == 2 / 3
    assert f1_of_rare_tags(scores, tags) == (1 + 2 / 3) / 2


def test_the_tagger_sees_two_tokens_on_either_side() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Tagger(), torch.randint(2048, (1, 32))
    changed = x.clone()
    changed[0, 10] = 7
    seen = (model(x) != model(changed)).any(1).nonzero()[:, 0]
    assert set(seen.tolist()) <= set(range(8, 13))
    assert len(seen) > 1


def test_losses_of_classes_learn() -> None:
    task = load("docs-tokens")
    assert isinstance(task, SupervisedTask)
    task = replace(task, total_steps=120)
    for loss in ("CrossEntropyLoss", "DiceLoss"):
        choices = {"loss": Choice(loss), "optimizer": Choice("AdamW", {"lr": 1e-2})}
        task.check(choices)
        found = task.run(choices, 0, split="test")
        assert 0.15 < found.value < 0.8  # all plain has 0
