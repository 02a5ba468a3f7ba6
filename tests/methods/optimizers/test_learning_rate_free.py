import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.optimizers import DoG, Prodigy, polynomial_average

F64 = torch.float64


def plain(params, **options):
    return Prodigy(params, d0=1e-3, **options)


def corrected(params, **options):
    return Prodigy(params, d0=1e-3, use_bias_correction=True, **options)


def dog(params, **options):
    return DoG(params, reps_rel=1e-3, **options)


def on_a_quadratic(make, *, scale=1.0, steps=200):
    """θ after each step on ½ (2 (x - 1)² + ½ (y + 2)²) from 0, and the numbers in the state."""
    w = nn.Parameter(torch.zeros(2, dtype=F64))
    optimizer = make([w])
    path, numbers = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * 0.5 * (2 * (w[0] - 1) ** 2 + 0.5 * (w[1] + 2) ** 2)).backward()
        optimizer.step()
        path.append(w.detach().clone())
        numbers.append({name: value.item() for name, value in optimizer.state[w].items() if value.ndim == 0})
    return torch.stack(path), numbers


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            plain,
            {
                1: (0.003162277, -0.003162277),
                2: (0.007411512, -0.007411690),
                10: (0.298464818, -3.569415413),
                200: (1.000014, -1.999956),
            },
        ),
        (
            corrected,
            {
                1: (0.001000000, -0.001000000),
                2: (0.001999974, -0.001999986),
                10: (0.032160184, -0.032135659),
                200: (1.000051794, -2.000051839),
            },
        ),
        (
            dog,
            {
                1: (0.000894427, -0.000447214),
                2: (0.001526557, -0.000763491),
                10: (0.023855381, -0.012019881),
                200: (1.000000, -2.000000),
            },
        ),
    ],
)
def test_golden_steps(make, expected):
    path, _ = on_a_quadratic(make)
    for step, values in expected.items():
        precision = 1e-6 if make is not corrected and step == 200 else 1e-9
        torch.testing.assert_close(path[step - 1], torch.tensor(values, dtype=F64), atol=precision, rtol=0)


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (plain, "d", {1: 1e-3, 2: 0.001579448, 10: 0.554910461}),
        (corrected, "d", {2: 1e-3, 10: 0.017281418, 200: 0.553585390}),
        (dog, "distance", {10: 0.020344391, 200: 2.236068}),
    ],
)
def test_golden_estimates(make, name, expected):
    _, numbers = on_a_quadratic(make)
    for step, value in expected.items():
        assert numbers[step - 1][name] == pytest.approx(value, abs=1e-6 if value > 1 else 1e-9)
    found = [number[name] for number in numbers]
    assert found == sorted(found)


@settings(deadline=None, max_examples=10)
@given(scale=st.floats(1e-3, 1e3), make=st.sampled_from([plain, corrected, dog]))
def test_the_scale_of_the_loss_does_not_matter(scale, make):
    ends = [on_a_quadratic(lambda p: make(p, eps=0.0), scale=by, steps=20)[0] for by in (1.0, scale)]
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-10)


SHAPES = ((3, 2), (4,), (), (2, 2, 2, 2))


def random_steps(make, *, steps=12, apart=False):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=F64)) for shape in SHAPES]
    optimizer = make([{"params": params[:2]}, {"params": params[2:]}] if apart else params)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator, dtype=F64)
        optimizer.step()
    return params, optimizer


def flat(tensors):
    return torch.cat([t.detach().flatten() for t in tensors])


def draws(steps=12):
    generator = torch.Generator().manual_seed(0)
    start = flat([torch.randn(shape, generator=generator, dtype=F64) for shape in SHAPES])
    grads = [flat([torch.randn(shape, generator=generator, dtype=F64) for shape in SHAPES]) for _ in range(steps)]
    return start, grads


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_dog_is_its_formula_over_all_tensors_and_groups(apart, decay):
    start, grads = draws()
    theta, longest, squares = start, 0.1 * (1 + start.norm()), 0.0
    for g in grads:
        g = g + decay * theta
        longest, squares = torch.maximum(longest, (theta - start).norm()), squares + g.square().sum()
        theta = theta - 0.5 * longest / (squares + 1e-8).sqrt() * g
    params, optimizer = random_steps(lambda p: DoG(p, lr=0.5, reps_rel=0.1, weight_decay=decay), apart=apart)
    torch.testing.assert_close(flat(params), theta, rtol=1e-12, atol=1e-12)
    assert len({state["distance"].item() for state in optimizer.state.values()}) == 1


@pytest.mark.parametrize("safeguard", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_prodigy_is_its_formula_over_all_tensors_and_groups(apart, safeguard):
    start, grads = draws()
    theta, d, numerator, s = start, 0.1, 0.0, torch.zeros_like(start)
    m, v = torch.zeros_like(start), torch.zeros_like(start)
    for g in grads:
        eta = 0.5 * d
        numerator = 0.7 * numerator + d / 0.1 * eta * (g @ (start - theta))
        s = 0.7 * s + d / 0.1 * (d if safeguard else eta) * g
        m, v = 0.9 * m + 0.1 * d * g, 0.99 * v + 0.01 * d**2 * g**2
        d = max(d, (2.0 * numerator / s.abs().sum()).item())
        theta = theta * (1 - 0.2 * eta) - eta * m / (v.sqrt() + d * 1e-8)

    def make(params):
        options = {"betas": (0.9, 0.99), "beta3": 0.7, "d_coef": 2.0, "d0": 0.1, "weight_decay": 0.2}
        return Prodigy(params, lr=0.5, safeguard_warmup=safeguard, **options)

    params, optimizer = random_steps(make, apart=apart)
    torch.testing.assert_close(flat(params), theta, rtol=1e-10, atol=1e-12)
    assert [state["d"].item() for state in optimizer.state.values()] == pytest.approx([d] * len(SHAPES), rel=1e-10)


def test_per_tensor_every_tensor_goes_as_if_it_were_alone():
    together, _ = random_steps(lambda p: DoG(p, reps_rel=0.1, per_tensor=True))
    start, grads = draws()
    sizes = [math.prod(shape) for shape in SHAPES]
    for place, p in enumerate(together):
        alone = nn.Parameter(start.split(sizes)[place].view(p.shape).clone())
        optimizer = DoG([alone], reps_rel=0.1)
        for g in grads:
            alone.grad = g.split(sizes)[place].view(p.shape)
            optimizer.step()
        torch.testing.assert_close(p, alone, rtol=1e-12, atol=1e-12)


def test_the_distance_counts_tensors_without_a_gradient_too():
    a, b = (nn.Parameter(torch.zeros(2, dtype=F64)) for _ in range(2))
    optimizer = DoG([a, b], reps_rel=1.0)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    with torch.no_grad():
        b += 3.0
    moved = torch.cat([a, b]).norm().item()
    b.grad = None
    optimizer.step()
    assert optimizer.state[a]["distance"].item() == optimizer.state[b]["distance"].item() == pytest.approx(moved)


def test_a_tensor_that_comes_later_takes_part_in_the_estimate():
    for make, name in ((dog, "distance"), (plain, "d")):
        a, b = (nn.Parameter(torch.ones(2, dtype=F64)) for _ in range(2))
        optimizer = make([a])
        for _ in range(20):
            a.grad = a.detach().clone()
            optimizer.step()
        before = optimizer.state[a][name].item()
        optimizer.add_param_group({"params": [b]})
        a.grad = b.grad = torch.ones_like(b)
        optimizer.step()
        assert optimizer.state[b][name].item() == optimizer.state[a][name].item() >= before > 1e-3


def test_a_group_at_rest_leaves_the_others_as_they_are():
    start, _ = draws()
    ends = []
    for resting in (False, True):
        a, b = nn.Parameter(start.clone()), nn.Parameter(torch.ones(3, dtype=F64))
        groups = [{"params": [a]}, *([{"params": [b], "lr": 0.0}] if resting else [])]
        optimizer = Prodigy(groups, d0=1e-2)
        for _ in range(10):
            a.grad, b.grad = a.detach().sign(), torch.ones_like(b)
            optimizer.step()
        ends.append(a.detach())
        assert torch.equal(b, torch.ones_like(b))
    assert torch.equal(*ends)


def test_prodigys_estimate_survives_gradients_of_zero_and_those_that_are_not_finite():
    a, b = (nn.Parameter(torch.ones(2, dtype=F64)) for _ in range(2))
    optimizer = plain([a, b])
    for value in (0.0, 1.0, 1.0, math.inf, 1.0, math.nan, 1.0):
        a.grad, b.grad = torch.full_like(a, value), torch.ones_like(b)
        optimizer.step()
    assert b.isfinite().all()
    assert math.isfinite(optimizer.state[b]["d"].item())
    assert optimizer.state[b]["d"].item() >= 1e-3
    assert not a.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 8.0])
def test_the_polynomial_average_is_its_weighted_sum(gamma):
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(2, 1, bias=False).double()
    averaged = torch.optim.swa_utils.AveragedModel(model, avg_fn=polynomial_average(gamma))
    expected = torch.zeros(1, 2, dtype=F64)
    for t in range(1, 8):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2, generator=generator, dtype=F64))
        w = (gamma + 1) / (gamma + t)
        expected = (1 - w) * expected + w * model.weight.detach()
        averaged.update_parameters(model)
        torch.testing.assert_close(averaged.module.weight.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("optimizer", "arguments"),
    [
        (Prodigy, {"d0": 0.0}),
        (Prodigy, {"d0": math.nan}),
        (Prodigy, {"d_coef": -1.0}),
        (Prodigy, {"beta3": 1.0}),
        (DoG, {"reps_rel": 0.0}),
        (DoG, {"reps_rel": math.nan}),
    ],
)
def test_misuse_is_refused_with_the_argument_named(optimizer, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        optimizer([nn.Parameter(torch.ones(2))], **arguments)
    with pytest.raises(ValueError, match=next(iter(arguments))):
        optimizer([{"params": [nn.Parameter(torch.ones(2))], **arguments}])


@pytest.mark.parametrize("gamma", [-1.0, math.nan, math.inf])
def test_an_impossible_average_is_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        polynomial_average(gamma)
