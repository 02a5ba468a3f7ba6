import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.optimizers import QZO, MeZO, QuantizedLinear, direction_seed, quantize_linear_, scale_parameters
from fairtrial.methods.optimizers.mezo import directions

F64 = torch.float64
CODES = torch.tensor([[1, -2, 3, 0], [2, 1, -1, 4]], dtype=torch.int8)
X, Y = torch.tensor([1.0, 0.5, -1, 2], dtype=F64), torch.tensor([0.3, -0.4], dtype=F64)
Z = torch.tensor([[1.0], [-0.5]], dtype=F64)


def golden_layer():
    scales = torch.tensor([[0.1], [0.2]], dtype=F64)
    return QuantizedLinear(CODES, scales, None, None, 4)


def golden_loss(layer):
    return F.mse_loss(layer(X), Y)


def network(bits=4, group_size=8, symmetric=True, seed=0):
    model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return quantize_linear_(model, bits, group_size, symmetric)


def test_golden_slope():
    layer = golden_layer()
    assert golden_loss(layer).item() == pytest.approx(3.825, rel=1e-12)
    scales = layer.scales
    for eps in (1e-3, 0.1, 1.0):  # the loss is quadratic in the scales
        losses = []
        for side in (1, -1):
            scales.data += side * eps * Z
            losses.append(golden_loss(layer).item())
            scales.data -= side * eps * Z
        assert (losses[0] - losses[1]) / (2 * eps) == pytest.approx(-13.725, rel=1e-9)


@pytest.mark.parametrize(("clip", "expected"), [(100.0, (0.23725, 0.131375)), (1.0, (0.11, 0.195))])
def test_golden_step(clip, expected):
    layer = golden_layer()
    optimizer = QZO(scale_parameters(layer), lr=0.01, clip=clip)
    with torch.no_grad():
        optimizer._descend(layer.scales, Z, optimizer._followed(-13.725), optimizer.param_groups[0])
    torch.testing.assert_close(layer.scales.flatten(), torch.tensor(expected, dtype=F64), rtol=1e-12, atol=0)
    assert optimizer.clipped_steps == (clip == 1)


def test_the_slope_is_clipped_and_not_the_step():
    layer, lr, clip = golden_layer(), 0.001, 0.5
    optimizer = QZO(scale_parameters(layer), lr=lr, clip=clip, seed=4)
    for number in range(5):
        before = layer.scales.clone()
        optimizer.step(lambda: golden_loss(layer))
        (z,) = (z for _, z in directions([before], direction_seed(4, number)))
        d = optimizer.last_directional_derivative
        torch.testing.assert_close(layer.scales.detach(), before - lr * max(-clip, min(clip, d)) * z)
        assert ((layer.scales - before).abs() <= lr * clip * z.abs() + 1e-12).all()
    assert optimizer.clipped_steps > 0
    assert optimizer.clipped_fraction == optimizer.clipped_steps / 5


def test_only_scales_move_and_never_below_the_floor():
    model = network()
    codes = [module.codes.clone() for module in model if isinstance(module, QuantizedLinear)]
    biases = [module.bias.detach().clone() for module in model if isinstance(module, QuantizedLinear)]
    optimizer = QZO(scale_parameters(model), lr=1.0, floor=1e-7)
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        optimizer.step(lambda: 10 * model(x).square().mean())
        assert all((scales >= 1e-7).all() for scales in scale_parameters(model))
    layers = [module for module in model if isinstance(module, QuantizedLinear)]
    assert all(torch.equal(layer.codes, kept) for layer, kept in zip(layers, codes, strict=True))
    assert all(torch.equal(layer.bias, kept) for layer, kept in zip(layers, biases, strict=True))
    assert any((scales == 1e-7).any() for scales in scale_parameters(model))


def test_a_rate_of_zero_restores_float32_scales():
    model = network()
    before = [scales.clone() for scales in scale_parameters(model)]
    QZO(scale_parameters(model), lr=0.0).step(lambda: model(torch.ones(2, 12)).square().mean())
    torch.testing.assert_close(list(scale_parameters(model)), [nn.Parameter(p) for p in before], rtol=0, atol=1e-6)


def test_on_codes_of_one_it_is_mezo_on_the_weights():
    generator = torch.Generator().manual_seed(0)
    start, x = torch.randn(3, 4, generator=generator), torch.randn(5, 4, generator=generator)
    layer = QuantizedLinear(torch.ones(3, 4, dtype=torch.int8), start.clone(), None, None, 1)
    plain = start.clone()
    runs = [
        (QZO(scale_parameters(layer), lr=0.01, clip=math.inf, floor=None, seed=8), lambda: layer(x).square().mean()),
        (MeZO([plain], lr=0.01, seed=8), lambda: F.linear(x, plain).square().mean()),
    ]
    for optimizer, loss in runs:
        for _ in range(10):
            optimizer.step(loss)
    assert torch.equal(layer.scales, plain)
    assert not torch.equal(plain, start)


def test_other_parameters_are_trained_along_in_a_group_without_floor():
    model = network()
    biases = [module.bias.detach() for module in model if isinstance(module, QuantizedLinear)]
    before = [bias.clone() for bias in biases]
    groups = [{"params": list(scale_parameters(model))}, {"params": biases, "floor": None}]
    optimizer = QZO(groups, lr=0.01)
    optimizer.step(lambda: model(torch.ones(2, 12)).square().mean())
    assert all(not torch.equal(b, old) for b, old in zip(biases, before, strict=True))
    assert min(bias.min().item() for bias in biases) < 0


def test_lost_accuracy_comes_back():
    model = network(bits=2)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 12, generator=generator)
    y = x[:, :3].argmax(1)

    def loss():
        return F.cross_entropy(model(x), y)

    optimizer, before = QZO(scale_parameters(model), lr=0.01), loss().item()
    for _ in range(300):
        optimizer.step(loss)
    assert loss().item() < 0.9 * before


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(4, 24), (3, 20), (5, 3)])
def test_weights_are_rounded_to_the_nearest_code(bits, symmetric, shape):
    linear = nn.Linear(shape[1], shape[0])
    with torch.no_grad():
        linear.weight.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(bits)) + 0.2)
    layer = QuantizedLinear.of(linear, bits, 8, symmetric)
    half = layer.scales.repeat_interleave(layer.group_size, 1)[:, : shape[1]] / 2
    # a zero point is rounded as well, which can cost the end of the range another half code
    assert ((layer.weight - linear.weight).abs() <= (1 if symmetric else 2) * half * (1 + 1e-5)).all()
    assert layer.codes.dtype == torch.int8
    assert layer.codes.unique().numel() <= 2**bits
    assert layer.scales.dtype == torch.float32
    assert not layer.scales.requires_grad
    assert layer.bias is linear.bias


def test_symmetric_scales_give_the_largest_weight_exactly():
    linear = nn.Linear(6, 1)
    linear.weight.data = torch.tensor([[0.1, -0.8, 0.3, 0.0, 0.0, 0.0]])
    layer = QuantizedLinear.of(linear, 3, 3)
    assert layer.codes.tolist() == [[0, -3, 1, 0, 0, 0]]
    torch.testing.assert_close(layer.scales.detach(), torch.tensor([[0.8 / 3, 1.0]]))


def test_the_layer_computes_with_its_weight_and_its_scales_can_be_learned():
    model = network(symmetric=False)
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    layer = model[0]
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    layer.scales.requires_grad_()
    model(x).sum().backward()
    assert layer.scales.grad.abs().sum() > 0
    assert model.double()(x.double()).dtype == F64
    assert model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_a_quantised_model_is_saved_and_loaded():
    model, other = network(symmetric=False), network(symmetric=False, seed=1)
    other.load_state_dict(model.state_dict())
    x = torch.ones(2, 12)
    assert torch.equal(other(x), model(x))


def test_layers_are_found_wherever_they_are():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.LayerNorm(4)), "b": shared})
    assert quantize_linear_(model) is model
    assert model["a"][0] is model["b"]
    assert isinstance(model["b"], QuantizedLinear)
    assert isinstance(quantize_linear_(nn.Linear(3, 3)), QuantizedLinear)
    assert len(list(scale_parameters(model))) == 1


def test_misuse_is_refused_with_the_argument_named(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks of types would come first
    scales = [torch.ones(2)]
    for name, values in {"clip": (0.0, -1.0, math.nan), "floor": (-1e-7, math.nan, math.inf)}.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                QZO(scales, lr=0.1, **{name: value})
    with pytest.raises(ValueError, match="floor"):
        QZO([{"params": scales, "floor": -1.0}], lr=0.1)
    with pytest.raises(ValueError, match="empty"):
        QZO(scale_parameters(nn.Linear(2, 2)), lr=0.1)
    for name, value in (("bits", 1), ("bits", 9), ("bits", 2.5), ("group_size", 0), ("group_size", 1.5)):
        with pytest.raises(ValueError, match=name):
            quantize_linear_(nn.Linear(2, 2), **{name: value})
    with pytest.raises(ValueError, match="model"):
        quantize_linear_(nn.ReLU())
