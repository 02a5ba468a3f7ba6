import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.optimizers import (
    GaLoreAdamW,
    WeightNormGaLoreAdamW,
    gradnorm_lorp_model,
    optimizer_state_bytes,
)
from fairtrial.methods.optimizers.gradnorm_lorp import split

F64 = torch.float64
W = torch.tensor([[3.0, 0, 4], [0, 2, 0]], dtype=F64)
GRADIENTS = [
    torch.tensor(rows, dtype=F64)
    for rows in ([[1, 1, 0], [0.5, 1, -0.5]], [[0, 1, 1], [0.2, -1, 0.5]], [[0.3, -0.2, 1], [1, 0.4, 0.5]])
]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def after(gradients, start=W, **options):
    """The weights after each step along given gradients, and the state."""
    w = nn.Parameter(start.clone())
    optimizer = WeightNormGaLoreAdamW([w], **{"lr": 0.1, "update_proj_gap": 2, "weight_norm": True, **options})
    path = []
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
        path.append(w.detach().clone())
    return path, optimizer.state[w]


@pytest.mark.parametrize(
    ("reference", "rank", "step", "expected"),
    [
        (True, None, 1, [[2.875557, -0.099154, 3.966282], [-0.099718, 1.894762, 0.099718]]),
        (True, None, 2, [[2.831046, -0.199857, 3.922881], [-0.189108, 1.897856, 0.094362]]),
        (True, None, 3, [[2.768674, -0.267932, 3.844816], [-0.277976, 1.884773, 0.054309]]),
        (True, 1, 1, [[2.855536, -0.074521, 3.981258], [-0.063384, 1.897888, 0.063380]]),
        (True, 1, 3, [[2.793348, -0.171552, 3.964303], [-0.182773, 1.870997, -0.025717]]),
        (False, None, 1, [[2.829026, -0.097549, 3.999644], [-0.094758, 1.895271, 0.094758]]),
        (False, None, 2, [[2.756899, -0.190901, 3.924988], [-0.168907, 1.894987, 0.084730]]),
        (False, None, 3, [[2.709275, -0.252208, 3.832961], [-0.251880, 1.875460, 0.050386]]),
        (False, 1, 1, [[2.837364, -0.090322, 3.993902], [-0.036645, 1.899296, 0.036645]]),
        (False, 1, 2, [[2.757638, -0.177271, 3.925110], [-0.048951, 1.903916, 0.039628]]),
        (False, 1, 3, [[2.701030, -0.184185, 3.842639], [-0.078470, 1.890198, 0.005073]]),
    ],
)
def test_golden_steps(reference, rank, step, expected):
    path, _ = after(GRADIENTS, rank=rank, reference=reference)
    torch.testing.assert_close(path[step - 1], torch.tensor(expected, dtype=F64), atol=2e-6, rtol=0)


def norms(weight):
    return weight.norm(dim=1, keepdim=True)


def test_the_gradients_of_direction_and_length():
    state = {"g": norms(W), "v_norm": norms(W)}
    found = split(W, GRADIENTS[0], state, False)
    expected = torch.tensor([[0.64, 1, -0.48], [0.5, 0, -0.5]], dtype=F64)
    torch.testing.assert_close(found.grad_v, expected)
    torch.testing.assert_close(found.grad_g, torch.tensor([[0.6], [1.0]], dtype=F64))
    torch.testing.assert_close((found.grad_v * W).sum(1), torch.zeros(2, dtype=F64), atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 7.0]))
def test_they_are_those_of_autograd_and_scale_with_the_direction(seed, scale):
    v, g, gradient = random(4, 5, seed=seed), random(4, 1, seed=seed + 1), random(4, 5, seed=seed + 2)
    v.requires_grad_(), g.requires_grad_()
    weight = g * v / norms(v)
    weight.backward(gradient)
    state = {"g": g.detach(), "v_norm": scale * norms(v).detach()}
    found = split(weight.detach(), gradient, state, False)
    torch.testing.assert_close(found.v, scale * v.detach())
    torch.testing.assert_close(found.grad_v, v.grad / scale)
    torch.testing.assert_close(found.grad_g, g.grad)
    before = norms(v.detach())
    torch.testing.assert_close(found.g * found.v / norms(found.v), weight.detach())
    assert before.shape == found.g.shape


@pytest.mark.parametrize("rank", [None, 2])
def test_the_row_norms_are_the_lengths_after_every_step(rank):
    gradients = [random(4, 6, seed=i) for i in range(8)]
    for count in range(1, 9):
        path, state = after(gradients[:count], random(4, 6, seed=99), rank=rank, lr=0.3, weight_decay=0.1)
        torch.testing.assert_close(norms(path[-1]), state["g"].abs())


def test_a_length_may_go_through_zero():
    start = torch.tensor([[0.05, 0.0], [0.0, 1.0]], dtype=F64)
    gradient = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64)
    path, state = after([gradient] * 2, start)
    assert path[-1][0, 0] < 0
    assert state["g"][0] < 0
    assert state["v_norm"][0] > 0
    torch.testing.assert_close(path[-1][1], start[1])


def test_a_row_of_zeros_stays_and_spoils_nothing():
    start = W.clone()
    start[1] = 0
    path, _ = after(GRADIENTS, start)
    assert torch.equal(path[-1][1], torch.zeros(3, dtype=F64))
    alone, _ = after([g[:1] for g in GRADIENTS], W[:1])
    torch.testing.assert_close(path[-1][:1], alone[-1])


def test_the_state_has_the_size_of_the_formula():
    p = nn.Parameter(torch.ones(96, 64))
    optimizer = WeightNormGaLoreAdamW([p], rank=8)
    p.grad = random(96, 64).float()
    optimizer.step()
    numbers = 2 * 8 * 96 + 8 * 64 + 4 * 96
    assert optimizer_state_bytes(optimizer) == 4 * numbers + 4


def test_a_group_that_is_not_split_is_plain_adamw():
    plain, normed = nn.Parameter(W.clone()), nn.Parameter(W.clone())
    ours = WeightNormGaLoreAdamW([{"params": [plain]}, {"params": [normed], "rank": 1}], lr=0.1)
    same = nn.Parameter(W.clone())
    with pytest.warns(UserWarning, match="no parameter group has a rank"):
        theirs = GaLoreAdamW([same], lr=0.1)
    for gradient in GRADIENTS:
        for p in (plain, normed, same):
            p.grad = gradient.clone()
        ours.step()
        theirs.step()
    assert torch.equal(plain, same)
    assert not torch.equal(normed, same)


@pytest.mark.parametrize("option", [{"rank": 1}, {"weight_norm": True}])
def test_only_matrices_are_split(option):
    with pytest.raises(ValueError, match="params"):
        WeightNormGaLoreAdamW([nn.Parameter(torch.ones(2, 2, 2))], **option)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3))


def test_a_model_with_adapters_starts_as_it_was_and_is_trained_through_them():
    plain = network()
    model, groups = gradnorm_lorp_model(network(), r=4, alpha=8, rank=2, modules_to_save=["4"])
    x = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    model.eval()
    torch.testing.assert_close(model(x), plain(x), atol=1e-6, rtol=1e-6)
    others, projected = groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)].split(".")[-3] for p in projected["params"]} == {"lora_A", "lora_B"}
    assert sum("lora_magnitude_vector" in names[id(p)] for p in others["params"]) == 2
    assert sum("modules_to_save" in names[id(p)] for p in others["params"]) == 2
    assert len(projected["params"]) == 4
    optimizer = GaLoreAdamW(groups, lr=0.05)
    y = torch.randint(3, (6,), generator=torch.Generator().manual_seed(2))
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    merged = model.merge_and_unload()
    assert not torch.allclose(merged[0].weight, plain[0].weight)


def test_adapters_can_be_given_by_name():
    _, groups = gradnorm_lorp_model(network(), targets=["2"])
    assert len(groups[1]["params"]) == 2


@pytest.mark.parametrize(("name", "options"), [("rank", {"rank": 8}), ("rank", {"rank": 0}), ("r", {"r": 1})])
def test_adapters_out_of_range_are_refused_with_the_argument_named(name, options):
    with pytest.raises(ValueError, match=f"^{name} "):
        gradnorm_lorp_model(network(), **options)


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"fairtrial\[adapters\]"):
        gradnorm_lorp_model(network())
