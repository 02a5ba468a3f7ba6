import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.estimator_checks import parametrize_with_checks

from fairtrial.methods.losses import (
    ConditionalCSDivergence,
    CSIBRegressor,
    CSInformationBottleneckLoss,
    CSQuadraticMI,
    gaussian_gram,
    median_bandwidth,
)
from fairtrial.methods.losses.cs_ib import DENOMINATORS


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


X = double([[0, 0], [1, 0], [0, 1], [1, 1]])  # row sums of the Gram matrix are equal
Y = double([[0], [1], [1], [2]])
PREDICTED = double([[0.1], [0.8], [1.3], [1.9]])
UNEVEN = double([[0, 0], [1, 0], [0, 2], [1.5, 1]])
OFF = double([[0.5], [0.6], [1.8], [1.5]])
CODES = double([[0.2, 0], [0.5, 1], [0.1, -0.3], [1, 0.7]])


def batch(seed: int, n: int = 12) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, t, y, noise = (
        torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in ((3,), (2,), (), ())
    )
    return x, t, y, y + 0.5 * noise


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_all_forms_agree_where_the_row_sums_are_equal(denominator):
    assert ConditionalCSDivergence(denominator=denominator)(X, Y, PREDICTED).item() == pytest.approx(0.011423, abs=1e-6)
    in_bits = ConditionalCSDivergence(denominator=denominator, log_base=2.0)(X, Y, PREDICTED)
    assert in_bits.item() == pytest.approx(0.016479, abs=1e-6)


@pytest.mark.parametrize(
    ("denominator", "base", "expected"),
    [
        ("squared_sum", math.e, 0.195622),
        ("sum_of_squares", math.e, 0.164862),
        ("sum_of_squares", 2.0, 0.237845),
        ("symmetric", math.e, 0.198137),
    ],
)
def test_golden_divergences(denominator, base, expected):
    loss = ConditionalCSDivergence(denominator=denominator, log_base=base)
    assert loss(UNEVEN, Y, OFF).item() == pytest.approx(expected, abs=1e-6)
    assert loss(UNEVEN, Y[:, 0], OFF[:, 0]).item() == pytest.approx(expected, abs=1e-6)  # (n,) is (n, 1)


def test_the_paper_form_is_negative_and_has_a_gradient_at_the_targets():
    predicted = Y.clone().requires_grad_()
    loss = ConditionalCSDivergence()
    (gradient,) = torch.autograd.grad(loss(UNEVEN, Y, predicted), predicted)
    expected = double([-0.002317, -0.001056, -0.004705, -0.003284])
    torch.testing.assert_close(gradient[:, 0], expected, atol=1e-6, rtol=0)
    below = double([[0.008569], [1.003777], [1.007986], [2.011759]])
    assert loss(UNEVEN, Y, below).item() == pytest.approx(-5.009e-05, abs=1e-8)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), sigma=st.floats(0.3, 5.0))
def test_the_symmetric_form_is_a_divergence_with_its_minimum_at_the_targets(seed, sigma):
    x, _, y, y_pred = batch(seed)
    loss = ConditionalCSDivergence(sigma, sigma, denominator="symmetric")
    assert loss(x, y, y_pred) >= -1e-12
    predicted = y.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, y, predicted), predicted)
    assert gradient.abs().max() < 1e-12


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), shift=st.floats(-20, 20), denominator=st.sampled_from(DENOMINATORS))
def test_targets_are_at_no_distance_from_themselves_and_a_joint_shift_is_none(seed, shift, denominator):
    x, _, y, y_pred = batch(seed)
    loss = ConditionalCSDivergence(denominator=denominator)
    assert loss(x, y, y).abs() < 1e-12
    torch.testing.assert_close(loss(x, y + shift, y_pred + shift), loss(x, y, y_pred), rtol=1e-9, atol=1e-12)


def test_wide_kernels_of_y_make_it_a_squared_error_averaged_over_neighbours():
    error, K = (PREDICTED - Y)[:, 0], gaussian_gram(X, X)
    expected = error @ K @ error / K.sum()
    assert expected.item() == pytest.approx(0.0095, abs=1e-4)
    for denominator in DENOMINATORS:
        value = 100.0**2 * ConditionalCSDivergence(sigma_y=100.0, denominator=denominator)(X, Y, PREDICTED)
        assert value.item() == pytest.approx(expected.item(), rel=1e-3)


def test_golden_information():
    plain = CSQuadraticMI(normalized=False)
    assert plain(X, CODES).item() == pytest.approx(0.086368, abs=1e-6)
    assert plain(X, CODES).item() / math.log(2) == pytest.approx(0.124603, abs=1e-6)
    assert plain(X, X).item() / math.log(2) == pytest.approx(0.168088, abs=1e-6)
    assert CSQuadraticMI()(X, CODES).item() == pytest.approx(0.784346, abs=1e-6)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 999), angle=st.floats(0, 6.3), shift=st.floats(-9, 9))
def test_information_is_symmetric_not_negative_and_blind_to_turning_and_moving(seed, angle, shift):
    x, t, _, _ = batch(seed)
    turn = double([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    information = CSQuadraticMI(1.3, 0.7, normalized=False)
    assert information(x, t) >= -1e-12
    torch.testing.assert_close(CSQuadraticMI(0.7, 1.3, normalized=False)(t, x), information(x, t))
    torch.testing.assert_close(information(x, t @ turn + shift), information(x, t), rtol=1e-8, atol=1e-12)
    assert CSQuadraticMI()(x, x).item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("normalized", [False, True])
def test_a_constant_code_has_no_information_and_no_gradient(normalized):
    t = torch.full((4, 2), 3.0, dtype=torch.float64, requires_grad=True)
    information = CSQuadraticMI(normalized=normalized)(X, t)
    information.backward()
    assert information == 0
    assert t.grad.count_nonzero() == 0


@pytest.mark.parametrize("size", [0.01, 0.03, 0.1])
def test_the_information_of_small_codes_is_right_in_single_precision(size):
    x, t, _, _ = batch(0, 64)
    exact = CSQuadraticMI()(x, size * t)
    single = CSQuadraticMI()(x.float(), (size * t).float())
    assert single.item() == pytest.approx(exact.item(), rel=2e-3)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_gradients(denominator):
    x, t, y, y_pred = batch(3, 5)
    loss = ConditionalCSDivergence(denominator=denominator)
    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), y.requires_grad_(), y_pred.requires_grad_()))
    assert torch.autograd.gradcheck(CSQuadraticMI(normalized=False), (x, t.requires_grad_()))
    assert torch.autograd.gradcheck(CSQuadraticMI(), (x, t))


def test_far_predictions_have_a_finite_value_and_gradient():
    predicted = (1e4 * Y.float() + 1e4).requires_grad_()
    value = ConditionalCSDivergence()(X.float(), Y.float(), predicted)
    value.backward()
    assert value.isfinite()
    assert predicted.grad.isfinite().all()
    assert predicted.grad.count_nonzero() > 0


def test_the_bottleneck_is_the_sum_of_its_parts():
    x, t, y, y_pred = batch(1)
    loss = CSInformationBottleneckLoss(0.3, sigma_x=2.0, sigma_y=0.5, sigma_t=1.5, denominator="symmetric")
    parts = loss.parts(x, t, y, y_pred)
    divergence = ConditionalCSDivergence(2.0, 0.5, denominator="symmetric")(x, y, y_pred)
    torch.testing.assert_close(parts.divergence, divergence)
    torch.testing.assert_close(parts.information, CSQuadraticMI(2.0, 1.5)(x, t))
    torch.testing.assert_close(loss(x, t, y, y_pred), divergence + 0.3 * parts.information)


def test_images_are_rows_and_bandwidths_are_median_distances():
    images = torch.arange(24.0).view(3, 2, 4).sqrt()
    torch.testing.assert_close(
        gaussian_gram(images, images, 2.0), gaussian_gram(images.flatten(1), images.flatten(1), 2.0)
    )
    assert median_bandwidth(double([0.0, 1.0, 5.0])) == 4.0
    assert median_bandwidth(torch.ones(4, 2)) == 0.01


def test_misuse_is_refused_with_the_argument_named():
    for make in (ConditionalCSDivergence, CSQuadraticMI, CSInformationBottleneckLoss):
        for sigma in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match="^sigma_x must be above 0"):
                make(sigma_x=sigma)
    for make in (ConditionalCSDivergence, CSInformationBottleneckLoss):
        with pytest.raises(ValueError, match="^denominator must be one of squared_sum, "):
            make(denominator="sum")
    with pytest.raises(ValueError, match="^beta must be"):
        CSInformationBottleneckLoss(math.nan)
    with pytest.raises(ValueError, match="^log_base must be"):
        ConditionalCSDivergence(log_base=1.0)
    with pytest.raises(ValueError, match="^a must be"):
        median_bandwidth(X[:1])
    with pytest.raises(ValueError, match="^x must be of at least 2 rows"):
        CSQuadraticMI()(X[:1], CODES[:1])
    for name, value in (("hidden", 0), ("batch_size", 1), ("lr", math.nan), ("beta", -1.0)):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            CSIBRegressor(**{name: value}).fit(X, Y[:, 0])


@parametrize_with_checks([CSIBRegressor(hidden=16, bottleneck=4, epochs=20, lr=0.05)])
def test_it_is_an_estimator(estimator, check, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # estimators refuse nothing before `fit`
    check(estimator)


def test_the_regressor_learns_repeats_itself_and_leaves_global_random_numbers():
    random = np.random.default_rng(0)
    X, noise = random.uniform(-2, 2, (200, 2)), 0.1 * random.standard_normal(200)
    y = 50 + 10 * (np.sin(X[:, 0]) + 0.5 * X[:, 1] + noise)
    before = torch.get_rng_state()
    model = CSIBRegressor(hidden=32, bottleneck=4, epochs=40, lr=1e-2, denominator="symmetric", random_state=0)
    model.fit(X[:150], y[:150])
    assert torch.equal(torch.get_rng_state(), before)
    assert model.score(X[150:], y[150:]) > 0.9
    again = CSIBRegressor(**model.get_params()).fit(X[:150], y[:150])
    for other in (again, pickle.loads(pickle.dumps(model))):
        assert np.array_equal(other.predict(X), model.predict(X))
