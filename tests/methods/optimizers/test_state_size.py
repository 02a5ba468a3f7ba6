import torch
from torch import nn

from fairtrial.methods.optimizers import optimizer_state_bytes


def stepped(optimizer):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_adamw_keeps_two_moments_and_a_step_count_for_each_parameter():
    params = [nn.Parameter(torch.ones(3, 5)), nn.Parameter(torch.ones(7, dtype=torch.float64))]
    optimizer = torch.optim.AdamW(params)
    assert optimizer_state_bytes(optimizer) == 0
    assert optimizer_state_bytes(stepped(optimizer)) == 2 * (15 * 4 + 7 * 8) + 2 * 4


def test_plain_sgd_keeps_nothing():
    assert optimizer_state_bytes(stepped(torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1))) == 0


def test_nested_tensors_count_and_each_storage_once_and_in_full():
    p = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=0.1)
    storage = torch.zeros(10)
    optimizer.state[p] = {"history": [storage[:2], storage[5:]], "deep": {"pair": (torch.zeros(3), 4)}, "name": "x"}
    assert optimizer_state_bytes(optimizer) == 40 + 12
