import pytest
import torch
from torch import nn

from fairtrial.contract import Choice, Diverged
from fairtrial.tasks import load
from fairtrial.tasks.unflattened import Unflattened


def test_each_row_of_outputs_has_its_row_of_targets() -> None:
    output, target = torch.randn(3, 4), torch.rand(3, 4)
    loss = nn.MSELoss()
    assert torch.equal(Unflattened(loss)(output, target.flatten()), loss(output, target))
    tokens, labels = torch.randn(3, 5, 4), torch.randint(4, (3, 5))
    seen = Unflattened(lambda logits, targets: torch.tensor(float(torch.equal(targets, labels))))
    assert seen(tokens, labels.flatten()) == 1


@pytest.mark.parametrize("name", ["docs-tags", "arithmetic"])
def test_a_run_whose_outputs_are_lost_diverges(name: str) -> None:
    for loss in load(name).slots["loss"].options.names():
        with pytest.raises(Diverged):
            load(name).run(
                {"loss": Choice(loss), "optimizer": Choice("AdamW", {"lr": 1e25})},
                0,
                split="test",
                progress=lambda *point: None,
            )
