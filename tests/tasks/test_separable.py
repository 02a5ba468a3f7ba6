import torch

from fairtrial.contract import Choice
from fairtrial.tasks import SupervisedTask, load
from fairtrial.tasks.separable import LARGEST, RARE, samples


def test_a_plane_separates_the_classes() -> None:
    data = samples()
    x, y = torch.cat([data.x, data.x_test]).double(), torch.cat([data.y, data.y_test])
    assert abs(y.double().mean().item() - RARE) < 0.01
    deviations = x.std(0)
    torch.testing.assert_close(deviations[-1] / deviations[0], torch.tensor(LARGEST).double(), rtol=0.1, atol=0)
    design = torch.cat([x / deviations, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    weights = torch.zeros(design.shape[1], dtype=torch.float64)
    signs = 2.0 * y - 1
    for _ in range(50_000):  # the perceptron, on the worst sample
        margins = signs * (design @ weights)
        worst = int(margins.argmin())
        if margins[worst] > 0:
            break
        weights += signs[worst] * design[worst]
    assert (signs * (design @ weights)).min() > 0


def test_better_optimizers_come_nearer_in_the_same_steps() -> None:
    task = load("separable")
    assert isinstance(task, SupervisedTask)
    entropies = {}
    for choice in (Choice("SGD", {"lr": 0.1}), Choice("AdamW", {"lr": 0.1})):
        choices = {"optimizer": choice, "schedule": Choice("Constant")}
        task.check(choices)
        entropies[choice.name] = task.run(choices, 0, split="test").metrics["cross entropy"]
    assert entropies["AdamW"] < entropies["SGD"] < 0.6931
