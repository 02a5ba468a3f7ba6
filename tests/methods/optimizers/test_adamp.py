import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.optimizers import SGDP, AdamP
from fairtrial.methods.optimizers.adamp import scale_invariance

F64 = torch.float64
W = torch.tensor([[3.0, 0, 4], [0, 2, 0]], dtype=F64)
ORTHOGONAL = torch.tensor([[0.0, 1, 0], [0.5, 0, -0.5]], dtype=F64)
OBLIQUE = torch.tensor([[1.0, 1, 0], [0.5, 1, -0.5]], dtype=F64)


def after(make, start, gradients):
    """The weights after each step of an optimizer along given gradients."""
    w = nn.Parameter(start.clone())
    optimizer = make([w])
    path = []
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
        path.append(w.detach().clone())
    return path


def adamp(params):
    return AdamP(params, lr=0.1, weight_decay=0.1)


def sgdp(params):
    return SGDP(params, lr=0.1, momentum=0.9, weight_decay=0.1)


@pytest.mark.parametrize(
    ("make", "gradient", "step", "expected"),
    [
        (adamp, ORTHOGONAL, 1, [[2.997, -0.1, 3.996], [-0.1, 1.998, 0.1]]),
        (adamp, ORTHOGONAL, 2, [[2.990900, -0.199796, 3.987866], [-0.199796, 1.993933, 0.199796]]),
        (sgdp, ORTHOGONAL, 1, [[2.97, -0.1, 3.96], [-0.05, 1.98, 0.05]]),
        (sgdp, ORTHOGONAL, 2, [[2.937998, -0.288922, 3.917331], [-0.144379, 1.955408, 0.144379]]),
        (adamp, OBLIQUE, 2, [[2.741300, -0.199000, 3.920400], [-0.199000, 1.761200, 0.199000]]),
        (sgdp, OBLIQUE, 1, [[2.6, -0.1, 3.6], [-0.05, 1.7, 0.05]]),
        (sgdp, OBLIQUE, 2, [[2.15, -0.28, 3.24], [-0.14, 1.34, 0.14]]),
    ],
)
def test_golden_steps(make, gradient, step, expected):
    path = after(make, W, [gradient] * step)
    torch.testing.assert_close(path[-1], torch.tensor(expected, dtype=F64), atol=1e-6, rtol=0)


def random_run(seed, shapes=((4, 5), (6,), (3, 2, 2, 2), ()), steps=6):
    generator = torch.Generator().manual_seed(seed)
    starts = [torch.randn(shape, generator=generator, dtype=F64) for shape in shapes]
    return starts, [[torch.randn(shape, generator=generator, dtype=F64) for shape in shapes] for _ in range(steps)]


def assert_same_run(ours, theirs, *, steps=6):
    starts, gradients = random_run(0, steps=steps)
    runs = []
    for make in (ours, theirs):
        params = [nn.Parameter(start.clone()) for start in starts]
        optimizer = make(params)
        for step in gradients:
            for p, gradient in zip(params, step, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
        runs.append([p.detach() for p in params])
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_delta_zero_leaves_adamw(decay):
    assert_same_run(
        lambda params: AdamP(params, lr=0.01, weight_decay=decay, delta=0.0),
        lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=decay),
    )


def test_delta_zero_without_decay_leaves_adam():
    assert_same_run(lambda params: AdamP(params, lr=0.01, delta=0.0), lambda params: torch.optim.Adam(params, lr=0.01))


@pytest.mark.parametrize("nesterov", [False, True])
def test_delta_zero_leaves_sgd_but_for_the_first_dampened_buffer(nesterov):
    assert_same_run(
        lambda params: SGDP(params, lr=0.01, momentum=0.9, nesterov=nesterov, delta=0.0),
        lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=nesterov),
    )
    with pytest.raises(AssertionError):
        assert_same_run(
            lambda params: SGDP(params, lr=0.01, momentum=0.9, dampening=0.5, delta=0.0),
            lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9, dampening=0.5),
            steps=1,
        )


def test_nesterov_is_its_formula():
    (path,) = after(lambda p: AdamP(p, lr=0.1, nesterov=True, delta=0.0), W, [OBLIQUE])
    m = 0.9 * 0.1 * OBLIQUE + 0.1 * OBLIQUE
    direction = m / 0.1 / (OBLIQUE.abs() + 1e-8)
    torch.testing.assert_close(path, W - 0.1 * direction, rtol=1e-12, atol=1e-12)


def tangential(gradient, weight, *, whole):
    g, w = (x.reshape(1, -1) if whole else x.flatten(1) for x in (gradient, weight))
    return (g - (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w).reshape(gradient.shape)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(5, 7), (1, 9), (4, 3, 3, 3), (6, 2, 2)]),
    whole=st.booleans(),
    optimizer=st.sampled_from([lambda p: AdamP(p, lr=0.1), lambda p: SGDP(p, lr=0.1, momentum=0.9, nesterov=True)]),
)
def test_a_projected_update_is_orthogonal_to_the_weight_and_the_norm_obeys_pythagoras(seed, shape, whole, optimizer):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator, dtype=F64)
    gradient = tangential(torch.randn(shape, generator=generator, dtype=F64), start, whole=whole)
    (end,) = after(optimizer, start, [gradient])
    u, w = (x.reshape(1, -1) if whole else x.flatten(1) for x in (end - start, start))
    assert ((u * w).sum(1) / w.norm(dim=1)).abs().max() < 1e-6
    torch.testing.assert_close(end.norm() ** 2, start.norm() ** 2 + (end - start).norm() ** 2, rtol=1e-7, atol=0)


def test_one_oblique_channel_sends_detection_to_the_whole_tensor():
    w = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=F64)
    g = torch.tensor([[1.0, 1.0], [1.0, -2.0]], dtype=F64)  # rows at ±45° and steeper, yet <g, w> = 0
    (end,) = after(lambda p: SGDP(p, lr=0.1, weight_decay=1.0, delta=0.1), w, [g])
    torch.testing.assert_close(end, 0.99 * w - 0.1 * g, rtol=1e-7, atol=0)  # nothing to remove, reduced decay
    (end,) = after(lambda p: SGDP(p, lr=0.1, weight_decay=1.0, delta=0.1), w, [g + 0.5 * w])
    torch.testing.assert_close(end, 0.9 * w - 0.1 * (g + 0.5 * w), rtol=1e-7, atol=0)


def test_a_zero_gradient_counts_as_orthogonal_and_vectors_are_never_projected():
    matrix, vector = torch.ones(2, 3, dtype=F64), torch.ones(3, dtype=F64)
    for start, share in ((matrix, 0.1), (vector, 1.0)):
        (end,) = after(lambda p: AdamP(p, lr=0.1, weight_decay=0.5), start, [torch.zeros_like(start)])
        torch.testing.assert_close(end, (1 - 0.05 * share) * start, rtol=1e-12, atol=0)


def test_zero_weights_can_be_trained():
    for eps in (1e-8, 0.0):
        (end,) = after(lambda p, eps=eps: SGDP(p, lr=0.1, eps=eps), torch.zeros(2, 3, dtype=F64), [ORTHOGONAL])
        torch.testing.assert_close(end, -0.1 * ORTHOGONAL)


def test_the_stored_momentum_is_not_projected():
    starts, gradients = random_run(1, shapes=((3, 4),), steps=5)
    w, buffer = nn.Parameter(starts[0]), torch.zeros(3, 4, dtype=F64)
    optimizer = SGDP([w], lr=0.1, momentum=0.9)
    for (gradient,) in gradients:
        w.grad = tangential(gradient, w.detach(), whole=False)
        buffer = 0.9 * buffer + w.grad
        optimizer.step()
    torch.testing.assert_close(optimizer.state[w]["momentum_buffer"], buffer, rtol=1e-12, atol=1e-12)


def test_decay_of_sgdp_is_divided_by_one_minus_momentum():
    (end,) = after(lambda p: SGDP(p, lr=0.1, momentum=0.75, weight_decay=0.5), W, [W])  # g along w: not projected
    torch.testing.assert_close(end, (1 - 0.1 * 0.5 / 0.25) * W - 0.1 * W)


@pytest.mark.parametrize(("beta", "theory"), [(0.9, 19.0), (0.5, 3.0)])
def test_momentum_grows_the_norm_by_the_predicted_factor(beta, theory):
    d, lr = 2000, 0.01
    growths = []
    for delta in (0.0, 0.1):
        generator = torch.Generator().manual_seed(0)
        w = nn.Parameter(torch.randn(1, d, generator=generator))
        optimizer, start = SGDP([w], lr=lr, momentum=beta, delta=delta), float(w.detach().norm()) ** 2
        for _ in range(2000):
            gradient, direction = torch.randn(d, generator=generator), w.detach()[0] / w.detach().norm()
            w.grad = (gradient - (gradient @ direction) * direction)[None]
            optimizer.step()
        growths.append(float(w.detach().norm()) ** 2 - start)
    assert growths[0] / growths[1] == pytest.approx(theory, rel=0.05)


def detected(weights, grads):
    products = [g * w for g, w in zip(grads, weights, strict=True)]
    return scale_invariance(products, weights, grads, {"delta": 0.1, "eps": 1e-8}).hits


def test_a_convolution_before_batch_norm_is_detected_and_a_linear_layer_is_not():
    generator = torch.Generator().manual_seed(0)
    conv, linear = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(288, 10)
    for p in (conv.weight, linear.weight):
        nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator)
    model = nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), linear)
    x = torch.randn(32, 3, 8, 8, generator=generator)
    y = torch.randint(10, (32,), generator=generator)
    nn.functional.cross_entropy(model(x), y).backward()
    weights = [conv.weight.detach(), linear.weight.detach()]
    grads = [conv.weight.grad, linear.weight.grad]
    assert detected(weights, grads) == [True, False]


def test_without_reading_values_the_steps_are_the_same(monkeypatch):
    runs = []
    for blind in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda blind=blind: blind)
        for make in (adamp, sgdp):
            starts, gradients = random_run(3, shapes=((4, 5), (6,), (3, 2, 2), (2, 8)), steps=4)
            params = [nn.Parameter(start.clone()) for start in starts]
            optimizer = make(params)
            for step in gradients:
                for p, gradient in zip(params, step, strict=True):
                    p.grad = gradient.clone()
                params[0].grad = tangential(step[0], params[0].detach(), whole=False)
                params[2].grad = tangential(step[2], params[2].detach(), whole=True)
                optimizer.step()
            runs.append([p.detach() for p in params])
    torch.testing.assert_close(runs[:2], runs[2:], rtol=1e-5, atol=1e-6)


def test_cosines_do_not_depend_on_the_scale_of_the_gradient():
    starts, gradients = random_run(2, shapes=((8, 6),), steps=1)
    for scale in (1e-6, 1.0, 1e6):
        oblique = scale * (gradients[0][0] + starts[0])
        orthogonal = tangential(oblique, starts[0], whole=False)
        for gradient, expected in ((oblique, False), (orthogonal, True)):
            assert detected(starts, [gradient]) == [expected]


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (AdamP, {"delta": -0.1}),
        (AdamP, {"delta": math.nan}),
        (AdamP, {"wd_ratio": 1.5}),
        (AdamP, {"betas": (0.9, 1.0)}),
        (SGDP, {"momentum": 1.0}),
        (SGDP, {"momentum": math.nan}),
        (SGDP, {"dampening": math.inf}),
        (SGDP, {"wd_ratio": -0.1}),
    ],
)
def test_misuse_is_refused_with_the_argument_named(optimizer, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        optimizer([nn.Parameter(torch.ones(2, 2))], lr=0.1, **arguments)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        optimizer([{"params": [nn.Parameter(torch.ones(2, 2))], **arguments}], lr=0.1)
