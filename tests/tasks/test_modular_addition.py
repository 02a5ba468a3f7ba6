from dataclasses import replace

import torch

from fairtrial.contract import Choice
from fairtrial.tasks import SupervisedTask, load
from fairtrial.tasks.modular_addition import MODULUS, OneHotPerceptron, samples


def test_samples_are_the_whole_table() -> None:
    data = samples()
    x, y = torch.cat([data.x, data.x_test]), torch.cat([data.y, data.y_test])
    assert len(torch.unique(x, dim=0)) == MODULUS**2
    assert torch.equal(y, x.sum(1) % MODULUS)
    assert data.num_classes == MODULUS


def test_the_network_is_homogeneous() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OneHotPerceptron()
    x = samples().x[:5]
    before = model(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    torch.testing.assert_close(model(x), 8 * before)


def test_orthogonal_gradients_generalise_and_plain_ones_memorise() -> None:
    task = load("modular-addition")
    assert isinstance(task, SupervisedTask)
    task = replace(task, total_steps=100)
    accuracies = {}
    for name in ("AdamW", "OrthoGrad"):
        choices = {"optimizer": Choice(name, {"lr": 0.01}), "schedule": Choice("Constant")}
        task.check(choices)
        accuracies[name] = task.run(choices, 0, split="test").value
    assert accuracies["AdamW"] < 0.1
    assert accuracies["OrthoGrad"] > 0.8
