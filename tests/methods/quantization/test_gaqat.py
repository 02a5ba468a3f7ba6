"""Learned quantisers, the disorder of their gradients, and the optimizer that freezes them."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.quantization import (
    GAQAT,
    GradientDisorder,
    LSQLayer,
    LSQQuantizer,
    gradient_disorder,
    lsq_layers,
    quantizers_of,
    running_statistics_kept,
)
from fairtrial.methods.quantization.gaqat import first_and_last

FLIPPING = torch.tensor([1.0, -2, 3, 1, -1, -1, 2, 2])
OTHER = torch.tensor([1.0, 2, 3, -1, -1, 1, 2, -2])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return lsq_layers(model, 3, 3, skip=first_and_last(model))


def closure_of(model, optimizer, seed=0):
    x, y = normal(20, 6, seed=seed), torch.arange(20) % 3

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def run(make, steps=8):
    """A model after some steps, and its optimizer."""
    model = network()
    model(normal(20, 6))
    optimizer = make(model)
    for step in range(steps):
        optimizer.step(closure_of(model, optimizer, step))
    return model, optimizer


def gaqat(model, **options):
    options = {"quantizers": quantizers_of(model), "window": 3, "lr": 0.05, **options}
    return GAQAT(model.parameters(), torch.optim.SGD, **options)


def test_disorder_golden():
    assert gradient_disorder(FLIPPING).item() == pytest.approx(4 / 7)
    assert gradient_disorder(FLIPPING, OTHER).item() == 0.5
    assert gradient_disorder(torch.ones(5)).item() == 0
    assert gradient_disorder(torch.tensor([1.0, -1, 1, -1])).item() == 1
    assert gradient_disorder(torch.tensor([1.0, 0, 0, -1])).item() == pytest.approx(2 / 3)


@settings(max_examples=30, deadline=None)
@given(values=st.lists(st.integers(-2, 2), min_size=2, max_size=12), window=st.integers(2, 6), c=st.floats(1e-3, 1e3))
def test_a_window_gives_the_disorder_of_the_last_gradients_whatever_their_size(values, window, c):
    tracker, sequence = GradientDisorder(window), torch.tensor(values, dtype=torch.float32)
    for value in c * sequence:
        tracker.update(value)
    assert tracker.value() == gradient_disorder(sequence[-window:]).item() == gradient_disorder(c * sequence[-window:])


def test_entries_of_a_vector_count_alike():
    tracker = GradientDisorder(8)
    for pair in torch.stack([FLIPPING, OTHER], 1):
        tracker.update(pair)
    torch.testing.assert_close(tracker.each(), torch.tensor([4 / 7, 3 / 7]))
    assert tracker.value() == pytest.approx(0.5)


def test_lsq_golden():
    quantizer = LSQQuantizer(3)
    quantizer.started = True
    x = torch.tensor([0.3, -0.9, 2.4, 1.2])
    with torch.no_grad():
        quantizer.step.fill_(0.5)
    found = quantizer(x)
    assert found.tolist() == [0.5, -1, 1.5, 1]
    found.sum().backward()
    assert quantizer.step.grad.item() == pytest.approx(0.808290, abs=1e-6)
    assert quantizer.step.grad.item() * math.sqrt(12) == pytest.approx(2.8, abs=1e-6)


@pytest.mark.parametrize(("signed", "highest"), [(True, 3), (False, 7)])
def test_the_first_input_decides_step_and_sign(signed, highest):
    x = normal(50) if signed else normal(50).abs()
    for given_sign in (signed, None):
        quantizer = LSQQuantizer(3, given_sign)
        found = quantizer(x)
        assert (quantizer.signed, quantizer.highest) == (signed, highest)
        assert quantizer.step.item() == pytest.approx(2 * x.abs().mean().item() / math.sqrt(highest))
        again = LSQQuantizer(3, None)
        again.load_state_dict(quantizer.state_dict())
        assert torch.equal(again(x), found)


def test_layers_of_all_kinds_are_wrapped_and_learn():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    assert first_and_last(model) == ("0", "4")
    skipped = lsq_layers(copy.deepcopy(model), skip=first_and_last(model))
    assert [isinstance(m, LSQLayer) for m in skipped] == [False, False, True, False, False]
    lsq_layers(model, 8, 8, per_channel=True)
    assert model[2].weight_quantizer.step.shape == (4,)
    x = normal(5, 1, 6, 6)
    exact = F.conv2d(x, model[0].layer.weight, model[0].layer.bias)
    assert (model[0](x) - exact).abs().max() < 0.2
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert isinstance(lsq_layers(nn.Linear(3, 2)), LSQLayer)


def test_layers_are_wrapped_once_wherever_they_are_and_skipped_by_their_last_name():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "deep": nn.ModuleDict({"head": nn.Linear(4, 4)})})
    lsq_layers(model, skip=("head",))
    assert isinstance(model["a"], LSQLayer)
    assert model["a"] is model["b"]
    assert type(model["deep"]["head"]) is nn.Linear
    with pytest.raises(ValueError, match="not skipped"):
        lsq_layers(model, skip=("head",))


def test_the_sign_is_not_decided_by_an_input_of_zeros():
    quantizer = LSQQuantizer(3, None)
    for nothing in (torch.zeros(0), torch.zeros(50)):
        assert torch.equal(quantizer(nothing), nothing)
    assert torch.equal(quantizer(normal(50)), LSQQuantizer(3, None)(normal(50)))
    assert quantizer.signed


def test_sagm_golden():
    theta = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    optimizer = GAQAT([theta], torch.optim.SGD, lr=0.1)

    def gradient():
        theta.grad = torch.tensor([1.0, 10], dtype=torch.float64) * theta.detach()

    gradient()
    optimizer.first_step()
    expected = torch.tensor([1.003975186, 1.039751860], dtype=torch.float64)
    torch.testing.assert_close(theta.detach(), expected, atol=1e-9, rtol=0)
    gradient()
    optimizer.second_step()
    expected = torch.tensor([1.001987593, 10.198759299], dtype=torch.float64)
    torch.testing.assert_close(theta.grad, expected, atol=2e-9, rtol=0)
    expected = torch.tensor([0.899801241, -0.019875930], dtype=torch.float64)
    torch.testing.assert_close(theta.detach(), expected, atol=1e-9, rtol=0)


def weights(model):
    return [p.detach() for p in model.parameters()]


def test_without_freezing_it_is_sagm_and_without_perturbation_the_base_optimizer():
    sagm = weights(run(lambda model: gaqat(model, mode="none"))[0])
    assert all(map(torch.equal, sagm, weights(run(lambda model: gaqat(model, threshold=0.0))[0])))
    plain = weights(run(lambda model: torch.optim.SGD(model.parameters(), lr=0.05))[0])
    assert all(map(torch.equal, plain, weights(run(lambda model: gaqat(model, rho=0, alpha=0, mode="none"))[0])))
    assert not all(map(torch.equal, plain, sagm))


@pytest.mark.parametrize("mode", ["freeze_task", "freeze_smooth"])
def test_only_scales_lose_a_gradient_and_only_where_disorder_is_low(mode):
    stepped = []
    for frozen in (False, True):
        model, optimizer = run(lambda m: gaqat(m, mode=mode, lr=0.0, threshold=0.0), 2)
        optimizer.frozen[:] = frozen
        closure = closure_of(model, optimizer, 5)
        closure()
        task = [scale.grad.clone() for scale in optimizer.scales]
        optimizer.first_step()
        closure()
        smooth = [scale.grad.clone() for scale in optimizer.scales]
        optimizer.second_step()
        stepped.append({name: p.grad for name, p in model.named_parameters()})
        for scale, a, b in zip(optimizer.scales, task, smooth, strict=True):
            left = a + b if not frozen else b if mode == "freeze_task" else a
            torch.testing.assert_close(scale.grad, left / 2)
    for name in stepped[0]:
        assert torch.equal(stepped[0][name], stepped[1][name]) == (not name.endswith(".step"))


def test_constant_signs_freeze_and_flips_thaw():
    quantizer = LSQQuantizer(3)
    optimizer = GAQAT([quantizer.step], torch.optim.SGD, [quantizer], window=4, threshold=0.5, lr=0.0)
    seen = []
    for sign in [1, 1, 1, 1, 1, -1, 1, -1, 1, 1, 1, 1, 1]:
        quantizer.step.grad = torch.full((1,), float(sign))
        optimizer.first_step()
        quantizer.step.grad = torch.full((1,), 0.5)
        optimizer.second_step()
        seen.append(quantizer.step.grad.item())
    assert seen == [0.75] * 4 + [0.25] * 4 + [0.75] * 4 + [0.25]


def test_the_other_reading_compares_the_two_gradients():
    quantizer = LSQQuantizer(3)
    options = {"window": 2, "threshold": 0.5, "lr": 0.0, "disorder": "task_vs_smooth"}
    optimizer = GAQAT([quantizer.step], torch.optim.SGD, [quantizer], **options)
    for smooth, frozen in ((-1.0, False), (1.0, True)):
        for task in (1.0, 1.0):
            quantizer.step.grad = torch.tensor([task])
            optimizer.first_step()
            quantizer.step.grad = torch.tensor([smooth])
            optimizer.second_step()
        assert optimizer.frozen.tolist() == [frozen]


def test_scales_may_stay_where_they_are():
    model, optimizer = run(lambda m: gaqat(m, perturb_scales=False), 1)
    closure_of(model, optimizer)()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.first_step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not name.endswith(".step")}


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_saved_state_goes_on_bit_for_bit(base):
    def make(model):
        return GAQAT(model.parameters(), base, quantizers_of(model), window=3, threshold=0.9, lr=0.01)

    model, optimizer = run(make, 5)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    other = network()
    resumed = make(other)
    states = torch.load(file, weights_only=True)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    assert torch.equal(resumed.frozen, optimizer.frozen)
    for step in range(5):
        for m, o in ((model, optimizer), (other, resumed)):
            o.step(closure_of(m, o, step))
    assert all(map(torch.equal, weights(model), weights(other)))
    assert torch.equal(resumed.frozen, optimizer.frozen)


@pytest.mark.parametrize("dup", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_bit_for_bit(dup):
    model, optimizer = run(gaqat, 5)
    other, copied = dup((model, optimizer))
    for step in range(5):
        for m, o in ((model, optimizer), (other, copied)):
            o.step(closure_of(m, o, step))
    assert all(map(torch.equal, weights(model), weights(other)))
    assert torch.equal(copied.frozen, optimizer.frozen)


def test_a_refused_state_changes_nothing():
    model, optimizer = run(gaqat, 3)
    parts = GAQAT([{"params": [p]} for p in model.parameters()], torch.optim.SGD, quantizers_of(model), lr=0.1)
    wrong = optimizer.state_dict() | {"param_groups": parts.state_dict()["param_groups"]}
    wrong["gaqat"] = wrong["gaqat"] | {"task": wrong["gaqat"]["task"] | {"seen": 100}}
    with pytest.raises(ValueError, match="parameter groups"):
        optimizer.load_state_dict(wrong)
    assert optimizer.task.seen == 3


def test_a_failing_closure_leaves_the_weights_where_they_were():
    model, optimizer = run(gaqat, 1)
    before, calls = [p.clone() for p in weights(model)], []

    def closure():
        if calls:
            raise RuntimeError("no more data")
        calls.append(1)
        return closure_of(model, optimizer)()

    with pytest.raises(RuntimeError, match="no more data"):
        optimizer.step(closure)
    assert all(map(torch.equal, before, weights(model)))
    optimizer.step(closure_of(model, optimizer))


def test_batch_norm_need_not_remember_the_second_pass():
    norm = nn.BatchNorm1d(4)
    norm(normal(8, 4))
    mean = norm.running_mean.clone()
    with running_statistics_kept(norm):
        y = norm(normal(8, 4, seed=1))
    assert y.mean(0).abs().max() < 1e-5
    assert torch.equal(norm.running_mean, mean)
    assert norm.momentum == 0.1


def test_misuse_is_refused_with_the_argument_named():
    quantizer = LSQQuantizer(3)
    wrong = [
        {"window": 1},
        {"threshold": 1.1},
        {"threshold": math.nan},
        {"rho": -1.0},
        {"rho": math.nan},
        {"alpha": math.inf},
        {"mode": "freeze"},
        {"disorder": "sign"},
        {"quantizers": [LSQQuantizer(3)]},
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match=next(iter(arguments))):
            GAQAT([quantizer.step], torch.optim.SGD, lr=0.1, **arguments)
    optimizer = GAQAT([quantizer.step], torch.optim.SGD, [quantizer], lr=0.1)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step()
    with pytest.raises(ValueError, match="second_step"):
        optimizer.second_step()
    with pytest.raises(ValueError, match="of GAQAT"):
        optimizer.load_state_dict(torch.optim.SGD([quantizer.step], lr=0.1).state_dict())
    with pytest.raises(ValueError, match="window"):
        optimizer.load_state_dict(
            GAQAT([quantizer.step], torch.optim.SGD, [quantizer], window=5, lr=0.1).state_dict()
            | {"gaqat": {"task": {"signs": torch.zeros(5, 1), "seen": 1}, "smooth": {}, "frozen": torch.zeros(1)}}
        )
    optimizer.first_step()
    with pytest.raises(ValueError, match="first_step"):
        optimizer.first_step()
    with pytest.raises(ValueError, match="bits"):
        LSQQuantizer(0)
    with pytest.raises(ValueError, match="not skipped"):
        lsq_layers(nn.Sequential(nn.Linear(2, 2)), skip=("0",))
    with pytest.raises(ValueError, match="at least two"):
        gradient_disorder(torch.ones(1))
    with pytest.raises(ValueError, match="a must be numbers"):
        gradient_disorder(torch.tensor([1.0, math.nan]))
    tracker = GradientDisorder(2)
    tracker.update(torch.ones(2))
    with pytest.raises(ValueError, match="of 2 entries"):
        tracker.update(torch.ones(3))
    with pytest.raises(ValueError, match="at least twice"):
        tracker.value()
