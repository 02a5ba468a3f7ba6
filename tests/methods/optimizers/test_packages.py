"""Optimizers of other packages: each learns as it is offered, and what is missing is said."""

import copy
import importlib
import io
import pickle
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fairtrial.contract import Choice
from fairtrial.methods.optimizers import packages
from fairtrial.methods.optimizers.packages import AdamWScheduleFree, Muon, muon_param_groups
from fairtrial.methods.registry import index
from fairtrial.tasks import SupervisedTask, load

OFFERED = [entry.name for entry in index() if entry.module == packages.__name__]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.hidden = nn.Linear(6, 8)
        self.gain = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.gain * torch.tanh(self.hidden(self.embedding(x))))
        return scores


def small() -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    x = torch.arange(7)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), x % 3)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("name", OFFERED)
def test_it_learns_in_a_task(name: str) -> None:
    task = load("separable")
    assert isinstance(task, SupervisedTask)
    task = replace(task, total_steps=60)
    lr = {"DAdaptAdam": 1.0, "SCION": 1.0, "Lion": 0.1}.get(name, 0.3)
    choices = {"optimizer": Choice(name, {"lr": lr}), "schedule": Choice("Constant")}
    task.check(choices)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages about torch
        run = task.run(choices, 0)
    assert run.metrics["cross entropy"] < 0.1985  # the entropy of classes with 5 and 95 %
    assert run.costs.optimizer_state_bytes
    with torch.random.fork_rng():
        assert task.run(choices, 0).value == run.value


@pytest.mark.parametrize("name", OFFERED)
def test_a_checkpoint_continues_in_another_optimizer(name: str) -> None:
    make = next(entry for entry in index() if entry.name == name).load().factory
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = small()
        groups = muon_param_groups if name == "Muon" else nn.Module.parameters
        optimizer = make(groups(model))
        if name == "AdamWScheduleFree":
            optimizer.train()
        run(model, optimizer, 5)
        other = copy.deepcopy(model)
        again = make(groups(other))
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        # what packages keep beside tensors is their own affair
        again.load_state_dict(torch.load(saved, weights_only=False))
        torch.manual_seed(1)
        run(model, optimizer, 3)
        torch.manual_seed(1)
        run(other, again, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_muon_is_torchs_muon_on_hidden_matrices_and_adamw_elsewhere() -> None:
    ours, theirs = small(), small()
    optimizer = Muon(muon_param_groups(ours), lr=0.01)
    assert [group["muon"] for group in optimizer.param_groups] == [True, False]
    muon = torch.optim.Muon([theirs.hidden.weight], lr=0.01, adjust_lr_fn="match_rms_adamw")
    others = [theirs.gain, theirs.embedding.weight, theirs.hidden.bias, theirs.head.weight]
    adamw = torch.optim.AdamW(others, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    x = torch.arange(7)
    for _ in range(5):
        run(ours, optimizer, 1)
        theirs.zero_grad()
        F.cross_entropy(theirs(x), x % 3).backward()
        muon.step()
        adamw.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"])
def test_a_copied_muon_goes_on_alone(how) -> None:
    model = small()
    optimizer = Muon(muon_param_groups(model), lr=0.01)
    run(model, optimizer, 2)
    other, again = how((model, optimizer))
    assert run(model, optimizer, 3) == run(other, again, 3)
    again.param_groups[0]["lr"] = 0.0
    before = other.hidden.weight.detach().clone()
    run(other, again, 1)
    assert torch.equal(other.hidden.weight, before)


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match="2D"):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "muon": True}])


def test_a_schedule_free_optimizer_follows_the_mode_of_its_model() -> None:
    model = small()
    optimizer = AdamWScheduleFree(model.parameters(), lr=0.1, model=model)
    run(model.train(), optimizer, 10)
    trained = model.hidden.weight.detach().clone()
    model.eval()(torch.arange(7))
    averaged = model.hidden.weight.detach().clone()
    assert not torch.equal(trained, averaged)
    model.train()(torch.arange(7))
    torch.testing.assert_close(model.hidden.weight.detach(), trained)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install 'fairtrial\[optimizers\]'"):
        packages.of_package("pytorch_optimizer", "SOAP")
