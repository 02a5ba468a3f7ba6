import copy
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from fairtrial.methods.schedules import (
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    WeightDistance,
    adapt_regime,
    convert_ghost_batchnorm,
    linear_lr,
    sqrt_lr,
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(layer, x):
    """Output, buffers and gradients of a layer in training on x, against a fixed random direction."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * noise(*y.shape, seed=9)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


def test_ghosts_are_normalised_by_themselves():
    layer = GhostBatchNorm1d(1, 2).double()
    y = layer(torch.tensor([[1.0], [3.0], [10.0], [14.0]], dtype=torch.float64))
    expected = torch.tensor([-0.999995, 0.999995, -0.9999988, 0.9999988], dtype=torch.float64)
    torch.testing.assert_close(y.flatten(), expected, atol=5e-7, rtol=0)
    assert layer.running_mean.item() == pytest.approx(1.38)
    assert layer.running_var.item() == pytest.approx(1.79)


def test_plain_batch_normalisation_differs():
    layer = GhostBatchNorm1d(1, 4).double()
    y = layer(torch.tensor([[1.0], [3.0], [10.0], [14.0]], dtype=torch.float64))
    expected = torch.tensor([-1.144155, -0.762770, 0.572077, 1.334847], dtype=torch.float64)
    torch.testing.assert_close(y.flatten(), expected, atol=5e-7, rtol=0)
    assert layer.running_mean.item() == pytest.approx(0.7)
    assert layer.running_var.item() == pytest.approx(4.566667, abs=1e-6)


LAYERS = [
    (GhostBatchNorm1d, nn.BatchNorm1d, (3,)),
    (GhostBatchNorm1d, nn.BatchNorm1d, (3, 5)),
    (GhostBatchNorm2d, nn.BatchNorm2d, (3, 4, 4)),
]


@pytest.mark.parametrize(("ghost", "plain", "shape"), LAYERS)
@pytest.mark.parametrize(
    "options", [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}], ids=str
)
def test_one_ghost_is_the_whole_batch(ghost, plain, shape, options):
    x = 2 * noise(7, *shape) + 1
    for a, b in zip(run(ghost(3, 4, **options).double(), x), run(plain(3, **options).double(), x), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("ghost", "plain", "shape"), LAYERS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_ghosts_are_as_many_forward_passes(ghost, plain, shape, momentum):
    x = 2 * noise(12, *shape) + 1
    layer, reference = ghost(3, 4, momentum=momentum).double(), plain(3, momentum=momentum).double()
    found = run(layer, x)
    whole = run(plain(3).double(), x)
    part = x.clone().requires_grad_()
    outputs = torch.cat([reference(chunk) for chunk in part.chunk(3)])
    (outputs * noise(*outputs.shape, seed=9)).sum().backward()
    expected = [outputs.detach(), part.grad, *(p.grad for p in reference.parameters()), *reference.buffers()]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    assert not torch.allclose(found[0], whole[0])


def test_the_gradient_of_the_mean_loss_is_the_average_over_ghosts():
    torch_model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(torch_model.parameters()):
            p.copy_(noise(*p.shape, seed=i))
    model = convert_ghost_batchnorm(copy.deepcopy(torch_model), 5)
    x, y = noise(20, 4), torch.arange(20) % 3
    nn.functional.cross_entropy(model(x), y).backward()
    for part, target in zip(x.chunk(4), y.chunk(4), strict=True):
        (nn.functional.cross_entropy(torch_model(part), target) / 4).backward()
    for p, q in zip(model.parameters(), torch_model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-12, rtol=1e-10)
    for a, b in zip(model.buffers(), torch_model.buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("batch", "ghost", "sizes"), [(10, 4, [5, 5]), (13, 3, [4, 3, 3, 3]), (7, 4, [7]), (9, 2, [3, 2, 2, 2])]
)
def test_no_ghost_is_smaller_than_it_should_be(batch, ghost, sizes):
    x = noise(batch, 2)
    y = GhostBatchNorm1d(2, ghost, eps=1e-12).double()(x)
    for part in y.split(sizes):
        torch.testing.assert_close(part.mean(0), torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
        torch.testing.assert_close(part.var(0, correction=0), torch.ones(2, dtype=torch.float64))


def test_evaluation_is_ordinary():
    layer, plain = GhostBatchNorm2d(3, 2).double(), nn.BatchNorm2d(3).double()
    layer(noise(8, 3, 4, 4))
    plain.load_state_dict(layer.state_dict())
    x = noise(8, 3, 4, 4, seed=1)
    assert torch.equal(layer.eval()(x), plain.eval()(x))
    assert torch.equal(layer(x[:1]), plain(x[:1]))


def test_order_matters_between_ghosts_only():
    layer, x = GhostBatchNorm1d(2, 4, momentum=0.0).double(), noise(8, 2)
    y = layer(x)
    within, across = torch.tensor([2, 0, 1, 3, 7, 4, 5, 6]), torch.tensor([4, 1, 2, 3, 0, 5, 6, 7])
    torch.testing.assert_close(layer(x[within]), y[within])
    assert not torch.allclose(layer(x[across]), y[across])


def test_a_model_is_converted_with_its_tensors_and_modes():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, eps=1e-3), nn.Flatten(), nn.ModuleDict({"norm": nn.BatchNorm1d(8)})
    )
    model[1].eval()
    model[3]["norm"].weight.requires_grad_(False)
    before, names = dict(model.named_parameters()), list(model.state_dict())
    assert convert_ghost_batchnorm(model, 4) is model
    assert type(model[1]) is GhostBatchNorm2d
    assert type(model[3]["norm"]) is GhostBatchNorm1d
    assert not model[1].training
    assert model[1].eps == 1e-3
    assert "ghost_batch_size=4" in repr(model)
    assert list(model.state_dict()) == names
    assert all(p is before[name] for name, p in model.named_parameters())
    assert not model[3]["norm"].weight.requires_grad
    assert convert_ghost_batchnorm(model, 6)[1].ghost_batch_size == 6
    assert type(convert_ghost_batchnorm(nn.BatchNorm1d(3), 4)) is GhostBatchNorm1d


def test_a_model_without_batch_normalisation_stays():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    layers = list(model)
    assert list(convert_ghost_batchnorm(model)) == layers


def test_ghosts_are_smaller_than_a_tasks_batches():
    from fairtrial.methods.registry import index

    entry = next(entry for entry in index() if entry.name == "convert_ghost_batchnorm")
    assert entry.load().bind(SimpleNamespace(batch_size=64)) == {"ghost_batch_size": 16}


def test_a_layer_is_saved_like_any_other():
    layer, x = GhostBatchNorm1d(2, 2).double(), noise(6, 2)
    other = GhostBatchNorm1d(2, 2).double()
    file = io.BytesIO()
    layer(x)
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), layer(x))
    assert all(map(torch.equal, other.buffers(), layer.buffers()))


def test_rules_are_golden():
    assert sqrt_lr(0.1, 2048) == pytest.approx(0.4)
    assert linear_lr(0.1, 1024) == pytest.approx(0.8)
    assert adapt_regime([80, 120], 160, 2048, 128) == ([1280, 1920], 2560)
    assert adapt_regime([], 3, 100, 32) == ([], 12)


def recorded(function, last=999):
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    distance = WeightDistance(model)
    for step in range(1, last + 1):
        nn.init.constant_(model.weight, function(step))
        distance.update(step)
    return distance


def test_a_logarithm_is_found():
    distance = recorded(lambda t: 0.3 * math.log(t) + 1)
    slope, intercept, r2 = distance.fit_log()
    assert (slope, intercept, r2) == pytest.approx((0.3, 1.0, 1.0))
    assert distance.fit_power().r2 < 0.999
    assert distance.steps == list(range(1, 1000))


def test_a_power_is_found():
    distance = recorded(lambda t: 0.2 * t**0.6, 300)
    exponent, factor, r2 = distance.fit_power()
    assert (exponent, factor, r2) == pytest.approx((0.6, 0.2, 1.0), rel=1e-5)
    assert distance.fit_log().r2 < 0.95


def test_the_distance_is_that_of_all_trainable_weights():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    model[1].bias.requires_grad_(False)
    distance = WeightDistance(model)
    start = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(noise(*p.shape))
    distance.update(1)
    pairs = zip(list(model.parameters())[:3], list(start.parameters())[:3], strict=True)
    expected = torch.cat([(p - q).detach().flatten() for p, q in pairs]).norm().item()
    np.testing.assert_allclose(distance.distances, [expected], rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: GhostBatchNorm1d(2, 1), "ghost_batch_size"),
        (lambda: GhostBatchNorm2d(2, 0), "ghost_batch_size"),
        (lambda: convert_ghost_batchnorm(nn.BatchNorm1d(2), 1), "ghost_batch_size"),
        (lambda: sqrt_lr(-0.1, 128), "base_lr"),
        (lambda: sqrt_lr(math.nan, 128), "base_lr"),
        (lambda: sqrt_lr(0.1, 0), "batch"),
        (lambda: linear_lr(0.1, 128, 0), "base_batch"),
        (lambda: adapt_regime([-1], 3, 128), "milestones"),
        (lambda: adapt_regime([1], 0, 128), "epochs"),
        (lambda: WeightDistance(nn.ReLU()), "model"),
        (lambda: WeightDistance(nn.Linear(1, 1)).update(0), "step"),
        (lambda: WeightDistance(nn.Linear(1, 1)).fit_log(), "steps"),
    ],
)
def test_misuse_is_refused_with_the_argument_named(call, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        call()


def test_a_single_value_for_a_feature_is_refused_in_training():
    with pytest.raises(ValueError, match="more than 1 value"):
        GhostBatchNorm1d(2, 2)(torch.ones(1, 2))
