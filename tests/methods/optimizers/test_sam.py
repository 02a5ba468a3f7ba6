import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.optimizers import SAM, AdamP

F64 = torch.float64


def model(dtype=F64):
    net = nn.Sequential(nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 4, 2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return net.to(dtype)


def closure_of(net, optimizer, number):
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(10, 9, generator=generator, dtype=F64).to(net[1].weight.dtype)
    y = torch.randint(3, (10,), generator=generator)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


def run(net, optimizer, steps, start=0):
    for number in range(start, start + steps):
        optimizer.step(closure_of(net, optimizer, number))
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_step_is_the_formula(adaptive):
    net, other = model(), model()
    optimizer = SAM(net.parameters(), lr=0.1, momentum=0.9, rho=0.2, adaptive=adaptive)
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for number in range(3):
        loss = optimizer.step(closure_of(net, optimizer, number))
        closure = closure_of(other, plain, number)
        assert loss.item() == pytest.approx(closure().item(), rel=1e-12)
        start = [p.detach().clone() for p in other.parameters()]
        T = [p.abs() if adaptive else torch.ones_like(p) for p in start]
        scaled = [t * p.grad for t, p in zip(T, other.parameters(), strict=True)]
        norm = math.sqrt(sum(float(s.square().sum()) for s in scaled))
        with torch.no_grad():
            for p, t, s in zip(other.parameters(), T, scaled, strict=True):
                p += 0.2 * t * s / norm
        closure()
        with torch.no_grad():
            for p, w in zip(other.parameters(), start, strict=True):
                p.copy_(w)
        plain.step()
        torch.testing.assert_close(list(net.parameters()), list(other.parameters()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW, AdamP])
def test_a_radius_of_zero_leaves_the_base_optimizer(base):
    net, other = model(), model()
    ends = run(net, SAM(net.parameters(), base, rho=0.0, lr=0.01), 4), run(other, base(other.parameters(), lr=0.01), 4)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("base", [torch.optim.AdamW, AdamP])
def test_a_resumed_run_is_the_same_bit_for_bit(base, dtype):
    whole, net = model(dtype), model(dtype)
    run(whole, SAM(whole.parameters(), base, lr=0.01), 6)
    for number in range(6):
        optimizer = SAM(net.parameters(), base, lr=0.5, rho=0.5)
        if number:
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        else:
            optimizer.param_groups[0].update(lr=0.01, rho=0.05)
        run(net, optimizer, 1, start=number)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_go_the_same_way(duplicate):
    net = model()
    optimizer = SAM(net.parameters(), torch.optim.AdamW, lr=0.01)
    run(net, optimizer, 2)
    other_net, other = duplicate((net, optimizer))
    ends = run(net, optimizer, 3), run(other_net, other, 3)
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))
    assert repr(other) == repr(optimizer)


def test_schedules_and_groups_reach_the_base_optimizer():
    net = model()
    head, rest = list(net[4].parameters()), list(net[1].parameters())
    optimizer = SAM([{"params": rest, "lr": 0.0}], lr=0.1)
    optimizer.add_param_group({"params": head, "rho": 0.0})
    before = [p.detach().clone() for p in net.parameters()]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    run(net, optimizer, 1)
    schedule.step()
    assert torch.equal(net[1].weight, before[0])
    assert not torch.equal(net[4].weight, before[2])
    after = [p.detach().clone() for p in net.parameters()]
    run(net, optimizer, 1)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), after, strict=True))
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert [group["rho"] for group in optimizer.param_groups] == [0.05, 0.0]


def test_weights_come_back_when_the_second_loss_raises():
    net = model()
    optimizer = SAM(net.parameters(), lr=0.1)
    before, calls = [p.detach().clone() for p in net.parameters()], []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("no loss today")
        return closure_of(net, optimizer, 0)()

    with pytest.raises(RuntimeError, match="no loss today"):
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_parameters_without_gradient_stay():
    net = model()
    net[1].weight.requires_grad_(False)
    before = net[1].weight.clone()
    run(net, SAM(net.parameters(), lr=0.1), 2)
    assert torch.equal(net[1].weight, before)
    SAM(net.parameters(), lr=0.1).step(lambda: torch.zeros(()))


def test_its_step_can_be_compiled():
    ends = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend="eager")):
        net = model()
        optimizer = SAM(net.parameters(), lr=0.1)
        step = wrap(optimizer.step)
        for number in range(2):
            step(closure_of(net, optimizer, number))
        ends.append(list(net.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True))


def test_misuse_is_refused():
    net = model()
    for rho in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="rho"):
            SAM(net.parameters(), rho=rho)
        with pytest.raises(ValueError, match="rho"):
            SAM([{"params": net.parameters(), "rho": rho}])
    optimizer = SAM(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict(torch.optim.SGD(net.parameters(), lr=0.1).state_dict())
    number = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = SAM([number], lr=0.1)
    with pytest.raises(RuntimeError, match="complex"):
        optimizer.step(lambda: number.abs().sum().backward())
