import io
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.optimizers import (
    FRUGAL,
    AdamP,
    OrthoGrad,
    StableMaxCrossEntropyLoss,
    log_stablemax,
    modular_addition,
    nlm_alignment,
    softmax_collapse_fraction,
    sparse_parity,
    stablemax,
)

F64 = torch.float64
SCORES = torch.tensor([[2.0, -1.0, 0.5], [0.0, -3.0, 4.0]], dtype=F64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stepped(start, gradient, cls=torch.optim.SGD, **arguments):
    w = nn.Parameter(start.clone())
    w.grad = gradient.clone()
    OrthoGrad([w], cls, **arguments).step()
    assert torch.equal(w.grad, gradient)
    return w.detach()


def given_gradient(start, gradient, **arguments):
    """The gradient that the wrapped optimizer is given."""
    return start - stepped(start, gradient, lr=1.0, **arguments)


def test_probabilities_loss_and_gradient_of_stablemax():
    expected = torch.tensor([[0.6, 0.1, 0.3], [0.16, 0.04, 0.8]], dtype=F64)
    torch.testing.assert_close(stablemax(SCORES), expected, rtol=1e-12, atol=0)
    scores = SCORES.clone().requires_grad_()
    loss = StableMaxCrossEntropyLoss()(scores, torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(0.366984588, abs=1e-9)
    loss.backward()
    golden = torch.tensor([[-0.066667, 0.025, 0.1], [0.08, 0.005, -0.02]], dtype=F64)
    torch.testing.assert_close(scores.grad, golden, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 1.0, 100.0, 1e8]))
def test_stablemax_is_a_softmax_of_signed_logarithms(seed, scale):
    x = scale * torch.randn(4, 6, generator=generator(seed), dtype=F64)
    found = stablemax(x)
    torch.testing.assert_close(found, (x.sign() * x.abs().log1p()).softmax(1), rtol=1e-12, atol=0)
    s = torch.where(x < 0, 1 / (1 - x), x + 1)
    torch.testing.assert_close(found, s / s.sum(1, keepdim=True), rtol=1e-12, atol=0)
    assert torch.equal(found.argsort(1), x.argsort(1))
    torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=F64), rtol=1e-12, atol=0)


def test_stablemax_depends_on_a_shift_and_has_slope_one_at_zero():
    assert not torch.allclose(stablemax(SCORES), stablemax(SCORES + 1))
    x = torch.zeros(1, 2, dtype=F64, requires_grad=True)
    log_stablemax(x)[0, 0].backward()
    torch.testing.assert_close(x.grad, torch.tensor([[0.5, -0.5]], dtype=F64))


def test_where_softmax_collapses_and_stablemax_does_not():
    target = torch.zeros(1, dtype=torch.long)
    logits = torch.tensor([[20.0, 0, 0]], requires_grad=True)
    loss = F.cross_entropy(logits, target)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad[0, 0] == 0
    torch.testing.assert_close(logits.grad[0, 1:], torch.full((2,), 2.06e-9), rtol=2e-3, atol=0)
    assert 1e-7 < F.cross_entropy(torch.tensor([[16.0, 0, 0]]), target) < 4e-7
    assert StableMaxCrossEntropyLoss()(logits, target).item() == pytest.approx(0.090972, abs=1e-6)


def test_the_collapsed_fraction_begins_at_a_gap_of_about_16_64():
    logits = torch.tensor([[16.6, 0, 0], [16.7, 0, 0], [0, 30, 0], [0, 0, 1]], dtype=F64)
    assert softmax_collapse_fraction(logits, torch.tensor([0, 0, 1, 2])) == 0.5


def test_float32_loses_what_float64_keeps():
    scores, target = torch.tensor([[1e8, 0.0]]), torch.zeros(1, dtype=torch.long)
    assert StableMaxCrossEntropyLoss()(scores, target) > 0
    assert StableMaxCrossEntropyLoss(dtype=torch.float32)(scores, target) == 0


def test_a_golden_step():
    w = torch.tensor([[3.0, 0], [0, 4]], dtype=F64)
    g = torch.tensor([[1.0, 2], [0, 1]], dtype=F64)
    adjusted = torch.tensor([[0.194987, 2.437333], [0, -0.146240]], dtype=F64)
    torch.testing.assert_close(given_gradient(w, g), adjusted, rtol=0, atol=1e-6)
    end = torch.tensor([[2.980501, -0.243733], [0, 4.014624]], dtype=F64)
    torch.testing.assert_close(stepped(w, g, lr=0.1), end, rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(7,), (5, 3), (2, 3, 2, 2)]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    rescale=st.booleans(),
)
def test_what_is_given_is_orthogonal_and_of_the_gradients_length(seed, shape, scale, rescale):
    w, g = (torch.randn(shape, generator=generator(seed + i), dtype=F64) for i in (0, 1))
    found = given_gradient(w, scale * g, rescale=rescale)
    assert abs((w * found).sum()) <= 1e-6 * w.norm() * max(found.norm(), 1e-9)
    projected = scale * (g - (w * g).sum() / (w * w).sum() * w)
    wanted = scale * g.norm() / projected.norm() if rescale else 1.0
    torch.testing.assert_close(found, wanted * projected, rtol=1e-6, atol=1e-9)


def test_plain_descent_lets_squared_norms_grow_by_the_squared_step():
    w = nn.Parameter(torch.randn(6, 4, generator=generator(), dtype=F64))
    optimizer = OrthoGrad([w], lr=0.1)
    for step in range(10):
        w.grad = torch.randn(6, 4, generator=generator(step + 1), dtype=F64)
        before = w.detach().square().sum()
        optimizer.step()
        grown = w.detach().square().sum() - before
        torch.testing.assert_close(grown, 0.01 * w.grad.square().sum(), rtol=1e-10, atol=1e-10)


def test_weights_of_zero_single_elements_and_gradients_of_zero():
    g = torch.randn(3, 2, generator=generator(), dtype=F64)
    torch.testing.assert_close(given_gradient(torch.zeros(3, 2, dtype=F64), g), g)
    for shape in ((), (1,), (1, 1)):
        torch.testing.assert_close(stepped(torch.ones(shape), torch.full(shape, 0.7), lr=0.1), torch.full(shape, 0.93))
    assert torch.equal(given_gradient(g, torch.zeros_like(g)), torch.zeros_like(g))


def test_a_gradient_along_the_weights_leaves_round_off_of_full_length():
    w = torch.tensor([0.1, 0.7, -0.3])
    assert given_gradient(w, 3 * w, rescale=False).norm() < 1e-6
    assert given_gradient(w, 3 * w).norm() < 1.001 * 3 * w.norm()


def test_every_layer_of_a_homogeneous_network_has_the_same_radial_gradient():
    sizes = (5, 7, 6, 4)
    layers = [nn.Linear(a, b, bias=False, dtype=F64) for a, b in pairwise(sizes)]
    for number, layer in enumerate(layers):
        nn.init.normal_(layer.weight, generator=generator(number))
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    x = torch.randn(20, 5, generator=generator(9), dtype=F64)
    y = torch.randint(4, (20,), generator=generator(8))
    F.cross_entropy(model(x), y).backward()
    radial = [(layer.weight * layer.weight.grad).sum().item() for layer in layers]
    assert abs(radial[0]) > 1e-3
    assert radial == pytest.approx([radial[0]] * 3, rel=1e-10)
    weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
    gradient = torch.cat([layer.weight.grad.flatten() for layer in layers])
    assert nlm_alignment(model) == pytest.approx(F.cosine_similarity(-gradient, weights, dim=0).item())


def test_the_alignment_is_one_where_only_the_scale_is_missing():
    model = nn.Linear(3, 2)
    for p in model.parameters():
        p.grad = -2 * p.detach()
    assert nlm_alignment(model) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="model must be one with gradients"):
        nlm_alignment(nn.Linear(3, 2))


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True}),
        (torch.optim.RMSprop, {}),
        (torch.optim.Adagrad, {}),
        (AdamP, {}),
    ],
)
def test_any_optimizer_is_wrapped_resumed_and_scheduled(cls, arguments):
    gradients = torch.randn(8, 4, 3, generator=generator(), dtype=F64)

    def trained(interrupted):
        w = nn.Parameter(torch.ones(4, 3, dtype=F64))
        optimizer = OrthoGrad([w], cls, 0.1, **arguments)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        for number, gradient in enumerate(gradients):
            if interrupted and number == 4:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = OrthoGrad([w], cls, 0.1, **arguments)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
                schedule.optimizer = optimizer
            w.grad = gradient.clone()
            optimizer.step()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.8**8)
        assert optimizer.base_optimizer.param_groups is optimizer.param_groups
        return w.detach()

    assert torch.equal(trained(True), trained(False))


def test_groups_have_their_own_rule():
    w = torch.randn(3, 2, generator=generator(), dtype=F64)
    g = torch.randn(3, 2, generator=generator(1), dtype=F64)
    params = [nn.Parameter(w.clone()) for _ in range(3)]
    optimizer = OrthoGrad([{"params": params[:1]}, {"params": params[1:2], "rescale": False}], lr=0.1)
    optimizer.add_param_group({"params": params[2:], "lr": 0.2})
    for p in params:
        p.grad = g.clone()
    optimizer.step()
    expected = [stepped(w, g, lr=0.1), stepped(w, g, lr=0.1, rescale=False), stepped(w, g, lr=0.2)]
    torch.testing.assert_close([p.detach() for p in params], expected)


def test_modular_addition_is_the_whole_table_once():
    data = modular_addition(7, 0.4, generator())
    assert len(data.x) == 19
    x, y = torch.cat([data.x, data.x_test]), torch.cat([data.y, data.y_test])
    assert len(torch.unique(x, dim=0)) == 49
    assert torch.equal(y, (x[:, 0] + x[:, 1]) % 7)
    assert not torch.equal(data.x, modular_addition(7, 0.4, generator(1)).x)


def test_sparse_parity_is_of_the_first_bits():
    data = sparse_parity(generator())
    assert data.x.shape == data.x_test.shape == (1000, 43)
    assert torch.equal(data.y.bool(), data.x[:, 0].bool() ^ data.x[:, 1].bool() ^ data.x[:, 2].bool())
    assert set(data.x.unique().tolist()) == {0.0, 1.0}


def test_misuse_is_refused_with_the_argument_named(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    w = nn.Parameter(torch.ones(2, 2))
    for cls in (nn.Linear, "SGD", torch.optim.SGD([w], lr=0.1)):
        with pytest.raises(TypeError, match="^base_optimizer_cls must be"):
            OrthoGrad([w], cls)
    with pytest.raises(TypeError, match="base_optimizer_cls must have torch's own state_dict, got FRUGAL"):
        OrthoGrad([w], FRUGAL)
    for arguments in ({"lr": math.nan}, {"lr": -1.0}, {"rescale": 1.0}):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            OrthoGrad([w], **arguments)
    with pytest.raises(ValueError, match="^dtype must be"):
        StableMaxCrossEntropyLoss(dtype=torch.int32)
    for name, call in {
        "modulus": lambda: modular_addition(1, 0.5, generator()),
        "fraction": lambda: modular_addition(5, 1.0, generator()),
        "samples": lambda: sparse_parity(generator(), samples=1),
        "relevant": lambda: sparse_parity(generator(), relevant=0),
        "noise": lambda: sparse_parity(generator(), noise=-1),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} must be"):
            call()
