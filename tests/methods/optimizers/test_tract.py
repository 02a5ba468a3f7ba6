import copy
import importlib.util
import inspect
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.gradcheck import GradcheckError

from fairtrial.methods.optimizers import TrActConv2d, TrActLinear, tract, tract_first_layer

X = torch.tensor([[1.0, 2], [0, 1], [3, -1]], dtype=torch.float64)
WEIGHT = torch.tensor([[0.5, -0.5], [1, 0]], dtype=torch.float64)
BIAS = torch.tensor([0.1, -0.2], dtype=torch.float64)
TARGET = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype), atol=atol, rtol=0)


def with_parameters(layer, weight, bias):
    layer.weight.data, layer.bias.data = weight, bias
    return layer


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(layer, x, loss=lambda z: (z.sin() * z).mean()):
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    loss(layer(x)).backward()
    return layer.weight.grad.clone(), x.grad, layer.bias.grad.clone()


def ridge_solution(rows, grads, lam):
    """argmin_M Σ_i ‖b G_i - M x_i‖² + λ b ‖M‖², as a least-squares problem of its own."""
    b, n = rows.shape
    stacked = torch.cat([rows, math.sqrt(lam * b) * torch.eye(n, dtype=rows.dtype)])
    wanted = torch.cat([b * grads, torch.zeros(n, grads.shape[1], dtype=rows.dtype)])
    return torch.linalg.lstsq(stacked, wanted, driver="gelsd").solution.T


def test_linear_golden_values():
    layer = with_parameters(TrActLinear(2, 2, dtype=torch.float64), WEIGHT, BIAS)
    loss = (layer(X) - TARGET).square().mean()
    assert loss.item() == pytest.approx(1.441667, abs=1e-6)
    loss.backward()
    close(layer.weight.grad, [[0.120050, -0.663484], [0.589451, -0.128659]])
    close(layer.bias.grad, [-0.233333, 0.466667])
    plain = torch.tensor([[0.633333, -1.433333], [2.066667, -0.466667]], dtype=torch.float64)
    P = torch.tensor([[0.295821, 0.046956], [0.046956, 0.483644]], dtype=torch.float64)
    torch.testing.assert_close(plain @ P, layer.weight.grad, atol=2e-6, rtol=0)


def test_wide_golden_values_and_step_of_the_pre_activation():
    weight = torch.tensor([[0.5, -0.5, 0, 1], [1, 0, 1, 0]], dtype=torch.float64)
    layer = with_parameters(TrActLinear(4, 2, dtype=torch.float64), weight, BIAS)
    x = torch.tensor([[1.0, 2, 0, 1]], dtype=torch.float64)
    z = layer(x)
    z.retain_grad()
    (z - TARGET[:1]).square().mean().backward()
    close(layer.weight.grad, [[-0.065574, -0.131148, 0, -0.065574], [0.131148, 0.262295, 0, 0.131148]])
    torch.testing.assert_close(layer.weight.grad @ x[0], 0.983607 * z.grad[0], atol=1e-6, rtol=0)


def test_convolution_golden_values():
    layer = TrActConv2d(1, 1, 2, dtype=torch.float64)
    with_parameters(layer, torch.tensor([[[[1.0, -1], [0.5, 0]]]]).double(), torch.zeros(1).double())
    loss = layer((torch.arange(18) / 10 - 0.5).double().reshape(2, 1, 3, 3)).square().mean()
    assert loss.item() == pytest.approx(0.0725, abs=1e-6)
    loss.backward()
    close(layer.weight.grad, [[[[0.268725, 0.242430], [0.189841, 0.163546]]]])
    close(layer.bias.grad, [0.25])


def test_published_values_of_the_reference_code():
    x, y, layer = torch.randn(30, 8), torch.randn(30, 5), TrActLinear(8, 5, 0.1)
    torch.manual_seed(0)
    images, maps, convolution = torch.randn(30, 2, 6, 4), torch.randn(30, 5, 4, 2), TrActConv2d(2, 5, 3, lam=0.1)
    (layer(x) - y).square().mean().backward()
    close(layer.weight.grad[0], [0.0741, 0.0949, -0.0559, -0.0398, -0.1364, 0.0013, 0.1603, -0.0468], atol=6e-5)
    close(layer.bias.grad, [-0.1162, 0.1062, -0.1275, -0.0206, -0.1149], atol=6e-5)
    (convolution(images) - maps).square().mean().backward()
    first = [[-0.0501, -0.0166, 0.0214], [-0.0230, 0.0324, 0.0655], [0.0010, 0.0600, 0.0290]]
    close(convolution.weight.grad[0, 0], first, atol=6e-5)
    close(convolution.bias.grad, [0.0052, -0.0397, 0.1093, 0.0464, -0.1079], atol=6e-5)


@settings(deadline=None)
@given(b=st.integers(1, 12), n=st.integers(1, 12), lam=st.floats(1e-3, 1e3), seed=st.integers(0, 999))
def test_the_gradient_solves_the_ridge_regression(b, n, lam, seed):
    x, grads = randn(b, n, seed=seed), randn(b, 3, seed=seed + 1)
    layer = TrActLinear(n, 3, lam, dtype=torch.float64)
    grad, _, _ = gradients(layer, x, lambda z: (z * grads).sum())
    torch.testing.assert_close(grad, ridge_solution(x, grads, lam), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("images", [1, 5])  # 12 rows of 18 features, and 60
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": (1, 2)},
        {"padding": 1, "dilation": 2, "kernel_size": (3, 3)},
        {"padding": "same", "kernel_size": (3, 3), "dilation": (2, 1)},
        {"padding": "valid", "kernel_size": (2, 3)},
        {"kernel_size": 3, "stride": (1, 2), "bias": False},
    ],
)
def test_convolution_is_the_linear_layer_on_its_patches(images, options):
    options = {"kernel_size": 3} | options
    plain = nn.Conv2d(2, 4, **options, dtype=torch.float64)
    layer = tract(plain, 0.3)
    x, weight = randn(images, 2, 6, 5), plain.weight.detach()
    z = plain(x)
    assert torch.equal(layer(x), z)
    # every column of the plain weight gradient's linear map: row i of the patches is d z_i / d w
    single = lambda w: nn.functional.conv2d(x, w, None, plain.stride, plain.padding, plain.dilation)  # noqa: E731
    rows = torch.autograd.functional.jacobian(single, torch.zeros_like(weight[:1]))[:, 0].reshape(-1, weight[0].numel())
    grads = randn(*z.shape, seed=1)
    (layer(x) * grads).sum().backward()
    expected = ridge_solution(rows, grads.permute(0, 2, 3, 1).reshape(-1, 4), 0.3)
    torch.testing.assert_close(layer.weight.grad.flatten(1), expected, rtol=1e-8, atol=1e-10)


def test_both_forms_agree():
    x, grads, lam = randn(7, 5), randn(7, 3, seed=1), 0.1
    narrow = gradients(TrActLinear(5, 3, lam, dtype=torch.float64), x, lambda z: (z * grads).sum())[0]
    wide_x = torch.cat([x, torch.zeros(7, 20).double()], 1)
    wide = gradients(TrActLinear(25, 3, lam, dtype=torch.float64), wide_x, lambda z: (z * grads).sum())[0]
    torch.testing.assert_close(wide[:, :5], narrow, rtol=1e-10, atol=1e-10)
    assert torch.equal(wide[:, 5:], torch.zeros(3, 20).double())


@pytest.mark.parametrize("b", [3, 30])
def test_large_lam_gives_the_plain_gradient(b):
    plain = nn.Linear(8, 4, dtype=torch.float64)
    x = randn(b, 8)
    expected, expected_x, expected_bias = gradients(copy.deepcopy(plain), x)
    grad, grad_x, grad_bias = gradients(tract(plain, 1e8), x)
    assert (1e8 * grad - expected).norm() < 1e-6 * expected.norm()
    torch.testing.assert_close(grad_x, expected_x, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_bias, expected_bias, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("b", [3, 30])
@pytest.mark.parametrize("c", [0.1, 10.0])
def test_scaled_inputs_with_scaled_lam_give_the_inversely_scaled_gradient(b, c):
    grads, x = randn(b, 4, seed=1), randn(b, 8)
    base = gradients(TrActLinear(8, 4, 0.1, dtype=torch.float64), x, lambda z: (z * grads).sum())[0]
    scaled = gradients(TrActLinear(8, 4, 0.1 * c * c, dtype=torch.float64), c * x, lambda z: (z * grads).sum())[0]
    torch.testing.assert_close(c * scaled, base, rtol=1e-10, atol=1e-12)


def test_gradcheck_passes_for_the_input_and_fails_for_the_weight():
    for layer, x in [
        (TrActLinear(4, 3, dtype=torch.float64), randn(5, 4)),
        (TrActConv2d(2, 3, 2, padding=1, dtype=torch.float64), randn(2, 2, 3, 4)),
    ]:
        x.requires_grad_()
        weight, bias = layer.weight.detach(), layer.bias.detach()
        run = lambda x, w, b, layer=layer: torch.func.functional_call(layer, {"weight": w, "bias": b}, (x,))  # noqa: E731
        assert torch.autograd.gradcheck(run, (x, weight, bias.requires_grad_()))
        with pytest.raises(GradcheckError):
            torch.autograd.gradcheck(run, (x, weight.requires_grad_(), bias))


def test_leading_dimensions_and_memory_layouts_do_not_matter():
    layer, grads = TrActLinear(4, 3, dtype=torch.float64), randn(2, 5, 3, seed=1)
    tokens = randn(2, 5, 4)
    grad, grad_x, _ = gradients(layer, tokens, lambda z: (z * grads).sum())
    flat, flat_x, _ = gradients(layer, tokens.flatten(0, 1), lambda z: (z * grads.flatten(0, 1)).sum())
    torch.testing.assert_close((grad, grad_x.flatten(0, 1)), (flat, flat_x))
    strided = tokens.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(gradients(layer, strided, lambda z: (z * grads).sum())[0], grad)
    vector = gradients(layer, tokens[0, 0], lambda z: (z * grads[0, 0]).sum())
    torch.testing.assert_close(vector[0], gradients(layer, tokens[:1, 0], lambda z: (z * grads[0, :1]).sum())[0])

    convolution, images = TrActConv2d(2, 3, 2, dtype=torch.float64), randn(4, 2, 5, 6)
    expected = gradients(convolution, images)
    torch.testing.assert_close(gradients(convolution, images.to(memory_format=torch.channels_last)), expected)
    torch.testing.assert_close(gradients(convolution, images.mT.contiguous().mT), expected)
    single, batched = gradients(convolution, images[0]), gradients(convolution, images[:1])
    torch.testing.assert_close(single, (batched[0], batched[1][0], batched[2]))


def test_an_empty_batch_gives_no_gradient():
    for layer, x in [(TrActLinear(4, 3), torch.zeros(0, 4)), (TrActConv2d(2, 3, 2), torch.zeros(0, 2, 4, 4))]:
        layer(x).sum().backward()
        assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))


@pytest.mark.parametrize("make", [lambda: TrActLinear(6, 3), lambda: TrActConv2d(6, 3, 1)])
def test_autocast_and_half_precision_solve_in_float32(make):
    layer = make()
    shape = (64, 6) if isinstance(layer, nn.Linear) else (4, 6, 4, 4)
    x = randn(*shape).float()
    expected = gradients(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        mixed = gradients(layer, x, lambda z: (z.float().sin() * z.float()).mean())  # backward within autocast
    half = gradients(layer.bfloat16(), x.bfloat16(), lambda z: (z.float().sin() * z.float()).mean())
    for actual, precise in zip(mixed, expected, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - precise).norm() < 0.02 * precise.norm()
    for actual, precise in zip(half, expected, strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual.float() - precise).norm() < 0.03 * precise.norm()


def test_it_is_differentiable_once():
    layer = TrActLinear(4, 3)
    (grad,) = torch.autograd.grad(layer(torch.ones(2, 4)).square().sum(), layer.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_frozen_weights_are_left_alone():
    for layer, x in [(TrActLinear(4, 3), torch.ones(2, 4)), (TrActConv2d(2, 3, 2), torch.ones(1, 2, 4, 4))]:
        layer.weight.requires_grad_(False)
        layer(x).sum().backward()
        assert layer.weight.grad is None
        assert layer.bias.grad is not None


def test_lam_lost_in_rounding_gives_nan_and_not_a_wrong_direction():
    layer = TrActLinear(300, 2)
    layer(torch.full((400, 300), 255.0)).sum().backward()
    assert layer.weight.grad.isnan().all()


def test_compiled_layers_have_the_same_gradients(monkeypatch):
    # loaded once more, without the test run's checks of shapes at every call, which cannot be compiled
    source = importlib.util.spec_from_file_location("unchecked_tract", inspect.getsourcefile(TrActLinear))
    unchecked = importlib.util.module_from_spec(source)
    monkeypatch.setitem(sys.modules, "unchecked_tract", unchecked)
    source.loader.exec_module(unchecked)
    images = torch.randn(3, 2, 4, 4)
    convolution, linear = unchecked.TrActConv2d(2, 3, 3, padding=1), unchecked.TrActLinear(16, 2)
    model = nn.Sequential(convolution, nn.Flatten(2), linear)
    model(images).square().mean().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(images).square().mean().backward()
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


@pytest.mark.parametrize(
    "plain",
    [
        nn.Linear(4, 3, bias=False),
        nn.Linear(4, 3).double().eval(),
        nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False),
        nn.Conv2d(2, 3, 3, padding="same"),
    ],
    ids=str,
)
def test_the_twin_shares_the_parameters_and_keeps_the_settings(plain):
    before = torch.get_rng_state()
    twin = tract(plain, 0.5)
    assert torch.equal(torch.get_rng_state(), before)
    assert twin.weight is plain.weight
    assert twin.bias is plain.bias
    assert twin.training == plain.training
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert twin.extra_repr() == plain.extra_repr() + ", lam=0.5"
    assert copy.deepcopy(twin).lam == 0.5


def test_the_first_layer_is_replaced_wherever_it_stands():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"norm": nn.LayerNorm(4), "body": nn.Sequential(shared, nn.Tanh(), nn.Linear(4, 2))})
    model["head"] = nn.Sequential(shared)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    assert tract_first_layer(model, 0.2) is model
    assert isinstance(model["body"][0], TrActLinear)
    assert model["head"][0] is model["body"][0]
    assert model["body"][0].lam == 0.2
    assert type(model["body"][2]) is nn.Linear
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert isinstance(tract_first_layer(nn.Conv2d(1, 1, 1)), TrActConv2d)


def test_misuse_is_refused():
    for lam in (0.0, -1.0, math.nan, math.inf):
        for make in (
            lambda lam=lam: TrActLinear(2, 2, lam),
            lambda lam=lam: TrActConv2d(2, 2, 1, lam=lam),
            lambda lam=lam: tract(nn.Linear(2, 2), lam),
        ):
            with pytest.raises(ValueError, match="lam must be above 0 and finite"):
                make()
    for options in ({"groups": 2}, {"padding_mode": "reflect"}, {"padding": "same"}):
        with pytest.raises(NotImplementedError, match=f"{next(iter(options))}="):
            tract(nn.Conv2d(2, 2, 2, **options))
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    for layer in (nn.Conv1d(2, 2, 1), nn.ReLU(), TrActLinear(2, 2), nn.LazyLinear(2), parametrised):
        with pytest.raises(TypeError, match="layer must be an nn.Linear or nn.Conv2d itself"):
            tract(layer)
    with pytest.raises(ValueError, match="model must contain an nn.Linear or nn.Conv2d"):
        tract_first_layer(nn.Sequential(nn.Conv1d(1, 1, 1), nn.ReLU()))
