import math

import numpy as np
import pytest
import torch
from torch import nn

from fairtrial.methods.schedules import (
    batch_hessian_edges,
    effective_batch,
    estimate_noise_sigma,
    heavy_ball,
    hessian_products,
    knee_batch,
    lanczos_extremes,
    max_adaptive_lr,
    max_sgd_lr,
    scale_lr,
    slq_density,
    spiked_wigner,
)


def symmetric(n, seed=0):
    matrix = np.random.default_rng(seed).standard_normal((n, n))
    return (matrix + matrix.T) / 2


def products_of(matrix):
    return lambda v: matrix @ v


SPIKES = (0.3, 0.6, 1.0, 2.0, 4.0)
EDGES = (1.131371, 1.133333, 1.32, 2.16, 4.08)


def test_the_additive_formula_is_golden():
    found = batch_hessian_edges(SPIKES, 0.02, 800, 1)
    np.testing.assert_allclose(found.edge, EDGES, atol=5e-7)
    np.testing.assert_array_equal(found.is_outlier, [False, True, True, True, True])
    np.testing.assert_allclose(found.overlap[1:], 1 - 800 * 0.02**2 / np.square(SPIKES[1:]))
    mirrored = batch_hessian_edges(np.negative(SPIKES), 0.02, 800, 1)
    np.testing.assert_allclose(mirrored.edge, np.negative(EDGES), atol=5e-7)
    np.testing.assert_array_equal(mirrored.overlap, found.overlap)


@pytest.mark.parametrize(("spike", "edge"), list(zip(SPIKES, EDGES, strict=True)))
def test_simulated_matrices_obey_it(spike, edge):
    matrix = spiked_wigner(800, [spike], 0.2, 100.0, np.random.default_rng(0))
    smallest, largest = lanczos_extremes(products_of(matrix), 800, 60)
    assert largest == pytest.approx(edge, rel=0.03)
    assert smallest == pytest.approx(-1.131371, rel=0.03)


def test_simulated_eigenvectors_have_the_overlap():
    P, spike = 600, 2.0
    additive = spiked_wigner(P, [spike], 1.0, 300.0, np.random.default_rng(1))
    expected = batch_hessian_edges(spike, 1.0, P, 300)
    assert np.linalg.eigh(additive)[1][0, -1] ** 2 == pytest.approx(float(expected.overlap), rel=0.1)
    samples = np.random.default_rng(2).standard_normal((1200, P))
    samples[:, 0] *= math.sqrt(4.0)
    multiplicative = batch_hessian_edges(4.0, 1.0, P, 1200, noise="multiplicative")
    vector = np.linalg.svd(samples, full_matrices=False)[2][0]
    assert vector[0] ** 2 == pytest.approx(float(multiplicative.overlap), rel=0.1)


MULTIPLICATIVE = [
    (0.25, (2.0, 10.0, 1.0), (2.5, 10.277778, 2.25)),
    (0.5, (2.414214, 10.0, 1.0), (3.267767, 10.555556, 2.914214)),
    (2.0, (3.828427, 10.0, 1.0), (6.535534, 12.222222, 5.828427)),
]


@pytest.mark.parametrize(("q", "lam", "expected"), MULTIPLICATIVE)
def test_the_multiplicative_formula_is_golden(q, lam, expected):
    found = batch_hessian_edges(lam, 1.0, 400, int(400 / q), noise="multiplicative")
    np.testing.assert_allclose(found.edge, expected, atol=1e-6)
    np.testing.assert_array_equal(found.is_outlier, [True, True, False])


@pytest.mark.parametrize(("q", "lam", "expected"), MULTIPLICATIVE)
def test_simulated_covariances_obey_it(q, lam, expected):
    rng, b = np.random.default_rng(0), int(400 / q)
    for spike, edge in zip(lam, expected, strict=True):
        tops = []
        for _ in range(3):
            samples = rng.standard_normal((b, 400))
            samples[:, 0] *= math.sqrt(spike)
            tops.append(lanczos_extremes(lambda v, s=samples: s.T @ (s @ v) / b, 400)[1])
        assert np.mean(tops) == pytest.approx(edge, rel=0.05)


def test_limits_of_the_multiplicative_formula():
    assert batch_hessian_edges(3.0, 0.5, 100, 50, 50, noise="multiplicative").edge == 3.0
    far = batch_hessian_edges(1e6, 2.0, 100, 50, noise="multiplicative").edge
    assert far == pytest.approx(1e6 + 2 * 4.0, rel=1e-9)


BATCHES = (10, 30, 100, 300, 1000, 10_000)


def test_the_additive_table_is_golden():
    b = effective_batch(BATCHES, 10_000)
    assert b[0] == pytest.approx(10.010010, abs=1e-6)
    assert b[-1] == math.inf
    found = batch_hessian_edges(4.0, 1.0, 1000, BATCHES, 10_000)
    np.testing.assert_allclose(found.edge, (19.989997, 11.529672, 6.475, 4.808333, 4.225, 4), atol=5e-7)
    rates = max_sgd_lr(BATCHES, 4.0, 1.0, 1000, 10_000)
    np.testing.assert_allclose(rates, (0.100050, 0.173465, 0.308880, 0.415945, 0.473373, 0.5), atol=5e-7)
    assert knee_batch(4.0, 1.0, 1000) == 62.5
    assert max_sgd_lr(62.5, 4.0, 1.0, 1000) == 0.25


def test_the_formula_is_continuous_at_the_knee():
    knee = knee_batch(4.0, 1.0, 1000)
    below, above = (batch_hessian_edges(4.0, 1.0, 1000, knee * (1 + shift)) for shift in (-1e-9, 1e-9))
    assert not below.is_outlier
    assert above.is_outlier
    assert below.edge == pytest.approx(above.edge, rel=1e-8)
    assert above.overlap == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("b", [1.0, 10.0, 60.0, 70.0, 200.0, 1e4])
def test_the_rate_grows_like_a_root_below_the_knee_and_ever_less_above(b):
    low, high = max_sgd_lr([b * (1 - 1e-5), b * (1 + 1e-5)] if b > 1 else [b, b * (1 + 1e-5)], 4.0, 1.0, 1000)
    slope = math.log(high / low) / math.log((1 + 1e-5) / (1 - 1e-5 if b > 1 else 1))
    assert slope == pytest.approx(0.5 if b < 62.5 else 1000 / (16 * b + 1000), rel=1e-4)


def test_adaptive_methods_follow_the_root():
    rates = max_adaptive_lr([1, 4, 100], 2.0, 25, damping=0.1)
    np.testing.assert_allclose(rates, [0.01, 0.02, 0.1])
    assert max_adaptive_lr(4, 2.0, 25, damping=0.1, learned=0.4) == pytest.approx(0.1)
    assert max_adaptive_lr(7, 2.0, 25, 7, damping=0.1) == math.inf


def test_arguments_broadcast():
    found = batch_hessian_edges(np.array([[1.0], [-5.0]]), 0.1, 50, [1, 10, 100])
    assert found.edge.shape == found.is_outlier.shape == found.overlap.shape == (2, 3)


def test_scaling_rules_are_golden():
    assert scale_lr(0.1, 128, 1024) == pytest.approx(0.8)
    assert scale_lr(0.1, 128, 1024, "sqrt") == pytest.approx(0.282843, abs=5e-7)
    assert scale_lr(0.1, 128, 1024, knee=256) == pytest.approx(0.2)
    assert scale_lr(0.1, 128, 1024, knee=64) == pytest.approx(0.1)
    assert scale_lr(0.1, 128, 32, knee=64) == pytest.approx(0.05)


def test_extremes_are_those_of_the_dense_matrix():
    matrix = symmetric(200)
    values = np.linalg.eigvalsh(matrix)
    assert lanczos_extremes(products_of(matrix), 200) == pytest.approx((values[0], values[-1]), rel=1e-6)
    assert lanczos_extremes(products_of(matrix[:3, :3]), 3) == pytest.approx(
        tuple(np.linalg.eigvalsh(matrix[:3, :3])[[0, -1]]), rel=1e-6
    )


def test_hessian_products_are_those_of_the_dense_hessian():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    y = torch.arange(9) % 3
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    params = list(model.parameters())
    with torch.no_grad():
        for p in params:
            p.copy_(torch.randn(p.shape, generator=generator))
    sizes = [p.numel() for p in params]

    def loss(flat):
        parts = [part.view_as(p) for part, p in zip(flat.split(sizes), params, strict=True)]
        named = dict(zip([name for name, _ in model.named_parameters()], parts, strict=True))
        return nn.functional.cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in params])
    dense = torch.autograd.functional.hessian(loss, flat).numpy()
    products = hessian_products(nn.functional.cross_entropy(model(x), y), params)
    found = np.stack([products(axis) for axis in np.eye(sum(sizes))])
    np.testing.assert_allclose(found, dense, atol=1e-12)
    ends = np.linalg.eigvalsh(dense)[[0, -1]]
    assert lanczos_extremes(products, sum(sizes)) == pytest.approx(tuple(ends), rel=1e-6)


def test_all_lanczos_steps_give_all_moments():
    matrix = symmetric(40)
    found = slq_density(products_of(matrix), 40, 40, 3)
    assert found.weights.sum() == pytest.approx(1)
    values = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(np.sort(found.values[:40]), values, atol=1e-8)
    few = slq_density(products_of(matrix), 40, 6, 400, seed=1)
    for power in (1, 2, 3, 4):
        assert few.weights @ few.values**power == pytest.approx(np.mean(values**power), abs=0.1 * 4.5**power)
    grid = np.linspace(-20, 20, 4001)
    density = few.density(grid, 0.3)
    assert density.sum() * (grid[1] - grid[0]) == pytest.approx(1, abs=1e-6)


def test_a_density_ends_where_the_start_reaches_no_further():
    found = slq_density(lambda v: 3.0 * v, 10, 5, 2)
    np.testing.assert_allclose(found.values, 3.0)
    np.testing.assert_allclose(found.weights, 0.5)


def test_the_noise_is_found():
    P, sigma, b = 300, 0.7, 20
    full = np.diag(np.linspace(0, 3, P))
    noisy = [full + spiked_wigner(P, [], sigma, b, np.random.default_rng(seed)) for seed in range(1, 6)]
    found = estimate_noise_sigma([products_of(matrix) for matrix in noisy], products_of(full), P, b)
    assert found == pytest.approx(sigma, rel=0.03)
    of_all = estimate_noise_sigma([products_of(matrix) for matrix in noisy], products_of(full), P, b, 40)
    assert of_all == pytest.approx(found * math.sqrt(2))


def test_heavy_ball_is_optimal_on_the_edges():
    ritz = [-0.5, 0.2, 1.0, 9.0]
    found = heavy_ball(ritz, 0.1, 4, 1)  # noise up to 0.4
    assert found == pytest.approx((4 / 16, 0.25))
    assert heavy_ball(ritz, 0.1, 4, 1, select="positive") == pytest.approx(
        (4 / (3 + 0.2**0.5) ** 2, ((3 - 0.2**0.5) / (3 + 0.2**0.5)) ** 2)
    )
    hidden = heavy_ball([0.1, 0.3], 0.1, 4, 1)
    assert hidden.lr == pytest.approx(4 / (0.3**0.5 + 0.4**0.5) ** 2)


def test_a_simulation_repeats_itself():
    first, second = (spiked_wigner(20, [1.0], 0.1, 2.0, np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, first.T)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: batch_hessian_edges(1.0, 1.0, 10, 0), "B"),
        (lambda: batch_hessian_edges(1.0, 1.0, 10, 11, 10), "B"),
        (lambda: batch_hessian_edges(1.0, 1.0, 10, math.nan), "B"),
        (lambda: batch_hessian_edges(1.0, 0.0, 10, 1), "sigma"),
        (lambda: batch_hessian_edges(1.0, math.nan, 10, 1), "sigma"),
        (lambda: batch_hessian_edges(math.nan, 1.0, 10, 1), "lam"),
        (lambda: batch_hessian_edges(-1.0, 1.0, 10, 1, noise="multiplicative"), "lam"),
        (lambda: batch_hessian_edges(1.0, 1.0, 0, 1), "P"),
        (lambda: max_sgd_lr(1, 0.0, 1.0, 10), "lam1"),
        (lambda: max_sgd_lr(1, 1.0, -1.0, 10), "sigma"),
        (lambda: max_adaptive_lr(1, 1.0, 10, damping=0.0), "damping"),
        (lambda: knee_batch(-1.0, 1.0, 10), "lam1"),
        (lambda: scale_lr(0.1, 0, 10), "base_batch"),
        (lambda: scale_lr(0.1, 10, 10, knee=0), "knee"),
        (lambda: estimate_noise_sigma([], np.abs, 3, 1), "batch_products"),
        (lambda: estimate_noise_sigma([np.abs], np.abs, 3, 5, 5), "B"),
        (lambda: lanczos_extremes(np.abs, 2), "dim"),
        (lambda: slq_density(np.abs, 2, 0), "steps"),
        (lambda: heavy_ball([-1.0], 1.0, 10, 1), "ritz"),
        (lambda: spiked_wigner(1, [1.0, 2.0], 1.0, 1.0, np.random.default_rng(0)), "spikes"),
    ],
)
def test_misuse_is_refused_with_the_argument_named(call, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        call()
