import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.base import clone
from sklearn.linear_model import LinearRegression, Ridge
from torch.nn import functional as F

from fairtrial.methods.losses import (
    AggregateLinearRegressor,
    BagLoss,
    InstanceLoss,
    InterpolatedBagLoss,
    asymptotic_risk,
    laplace_bag_means,
    make_bags,
)

RISKS = [  # psi, k, rho, sigma², bias², variance for |θ0| = 1
    (4.0, 2, 0.0, 1.0, 0.0, 1.000000),
    (4.0, 2, 0.3, 1.0, 0.140787, 0.362319),
    (4.0, 2, 1.0, 1.0, 0.333333, 0.166667),
    (6.0, 3, 0.2, 1.0, 0.174329, 0.277843),
    (6.0, 3, 1.0, 0.25, 0.488889, 0.016667),
    (6.0, 4, 0.1, 1.0, 0.175758, 0.436364),
    (3.0, 4, 0.3, 1.0, 0.517370, 0.356039),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bags(n: int = 24, k: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = generator(seed)
    index = make_bags(n, k, draws)
    predictions = torch.randn(n, generator=draws, dtype=torch.float64)
    return predictions, torch.randn(n // k, generator=draws, dtype=torch.float64), index


def linear_data(d: int, psi: float, k: int, sigma2: float, seed: int):
    """Inputs, bag means, bags and the true θ, of unit length."""
    rng = np.random.default_rng(seed)
    n = int(psi * d) // k * k
    theta = rng.standard_normal(d)
    theta /= np.linalg.norm(theta)
    x = rng.standard_normal((n, d))
    y = x @ theta + math.sqrt(sigma2) * rng.standard_normal(n)
    index = np.arange(n) // k
    return x, y.reshape(-1, k).mean(1), index, theta


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 999), k=st.integers(2, 6))
def test_the_instance_loss_is_the_bag_loss_and_the_spread_within_bags(seed, k):
    predictions, targets, index = bags(30 * k, k, seed)
    in_bags = predictions[index.argsort(stable=True)].view(-1, k)
    spread = in_bags.var(1, correction=0).mean()
    pairs = (in_bags[:, :, None] - in_bags[:, None]).square().triu().sum() / (30 * k * k)
    assert spread > 0.1
    torch.testing.assert_close(pairs, spread, rtol=0, atol=1e-12)
    bag, instance = BagLoss()(predictions, targets, index), InstanceLoss()(predictions, targets, index)
    torch.testing.assert_close(instance, bag + spread, rtol=0, atol=1e-12)
    for rho in (0.0, 0.3, 1.0):
        interpolated = InterpolatedBagLoss(rho)(predictions, targets, index)
        torch.testing.assert_close(interpolated, bag + rho * spread, rtol=0, atol=1e-12)


def test_bags_of_one_make_all_losses_equal():
    predictions, targets, index = bags(8, 1)
    plain = F.mse_loss(predictions[index.argsort()], targets)
    for loss in (BagLoss(), InstanceLoss(), InterpolatedBagLoss(0.4), BagLoss(squared), InstanceLoss(squared)):
        torch.testing.assert_close(loss(predictions, targets, index), plain)
    probabilities = targets.sigmoid()
    crossed = F.binary_cross_entropy_with_logits(predictions[index.argsort()], probabilities)
    for loss in (BagLoss("bce"), InstanceLoss("bce")):
        torch.testing.assert_close(loss(predictions, probabilities, index), crossed)


def squared(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(prediction, target, reduction="none")


def absolute(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction - target).abs()


@pytest.mark.parametrize("loss", ["mse", "bce", absolute])
def test_a_convex_bag_loss_is_at_most_the_instance_loss(loss):
    for seed in range(20):
        predictions, targets, index = bags(seed=seed)
        arguments = 3 * predictions, targets.sigmoid(), index
        every = BagLoss(loss, reduction="none")(*arguments) <= InstanceLoss(loss, reduction="none")(*arguments) + 1e-12
        assert every.all()


def test_the_spread_bounds_the_gap_where_the_second_derivative_is_bounded():
    def smooth(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (1 + (prediction - target).square()).sqrt()  # |l''| ≤ 1

    for seed in range(20):
        predictions, targets, index = bags(seed=seed)
        spread = InstanceLoss()(predictions, targets, index) - BagLoss()(predictions, targets, index)
        bag, instance = (family(smooth)(predictions, targets, index) for family in (BagLoss, InstanceLoss))
        assert bag <= instance <= bag + 0.5 * spread


def test_every_bag_counts_the_same_whatever_its_size():
    predictions = torch.tensor([1.0, 2.0, 6.0, 5.0], dtype=torch.float64)
    targets, index = torch.tensor([2.0, 4.0], dtype=torch.float64), torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(BagLoss(reduction="none")(predictions, targets, index), double([1.0, 1.0]))
    single = InstanceLoss(reduction="none")(predictions, targets, index)
    torch.testing.assert_close(single, double([17 / 3, 1.0]))
    spread = InterpolatedBagLoss(0.5, reduction="none")(predictions, targets, index)
    torch.testing.assert_close(spread, double([1 + 7 / 3, 1.0]))


def double(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_cross_entropy_is_that_of_the_mean_probability_and_survives_extreme_logits():
    predictions, targets, index = bags()
    targets = targets.sigmoid()
    probability = torch.stack([predictions[index == bag].sigmoid().mean() for bag in range(len(targets))])
    expected = F.binary_cross_entropy(probability, targets)
    torch.testing.assert_close(BagLoss("bce")(predictions, targets, index), expected)
    for scale in (1e4, -1e4):
        extreme = (scale * predictions).requires_grad_()
        loss = BagLoss("bce")(extreme, targets, index)
        loss.backward()
        assert loss.isfinite()
        assert extreme.grad.isfinite().all()


@pytest.mark.parametrize("family", [BagLoss, InstanceLoss])
def test_cross_entropy_has_both_derivatives(family):
    predictions, targets, index = bags(9, 3)
    arguments = (predictions.requires_grad_(),)
    loss = family("bce")
    assert torch.autograd.gradcheck(lambda f: loss(f, targets.sigmoid(), index), arguments)
    assert torch.autograd.gradgradcheck(lambda f: loss(f, targets.sigmoid(), index), arguments)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_the_closed_form_is_where_the_gradient_vanishes(rho):
    x, means, index, _ = linear_data(6, 10, 3, 1.0, seed=1)
    theta = AggregateLinearRegressor(rho, fit_intercept=False).fit(x, means, index).coef_
    weights = torch.from_numpy(theta).requires_grad_()
    arguments = torch.from_numpy(x) @ weights, torch.from_numpy(means), torch.from_numpy(index)
    losses = [InterpolatedBagLoss(rho), *{0.0: [BagLoss()], 1.0: [InstanceLoss()]}.get(rho, [])]
    values = [loss(*arguments) for loss in losses]
    for value in values:
        (gradient,) = torch.autograd.grad(value, weights, retain_graph=True)
        assert gradient.abs().max() < 1e-10
        torch.testing.assert_close(value, values[0])
    projected = np.repeat(x.reshape(-1, 3, 6).mean(1), 3, axis=0)
    normal = x.T @ projected + rho * x.T @ (x - projected)
    np.testing.assert_allclose(theta, np.linalg.solve(normal, projected.T @ np.repeat(means, 3)), rtol=1e-9)


def test_the_ends_are_ordinary_least_squares_and_the_constant_is_free():
    x, means, index, _ = linear_data(5, 12, 2, 1.0, seed=2)
    x, means = x + 3.0, means - 7.0
    of_bags = x.reshape(-1, 2, 5).mean(1)
    for rho, peer in (
        (0.0, LinearRegression().fit(of_bags, means)),
        (1.0, LinearRegression().fit(x, np.repeat(means, 2))),
    ):
        model = AggregateLinearRegressor(rho).fit(x, means, index)
        np.testing.assert_allclose(model.coef_, peer.coef_, rtol=1e-9)
        np.testing.assert_allclose(model.predict(x), peer.predict(x), rtol=1e-9)
    ridge = AggregateLinearRegressor(1.0, alpha=0.1).fit(x, means, index)
    np.testing.assert_allclose(ridge.coef_, Ridge(0.1 * len(x)).fit(x, np.repeat(means, 2)).coef_, rtol=1e-9)


def test_fewer_bags_than_features_give_the_shortest_of_the_exact_ones():
    x, means, index, _ = linear_data(12, 2, 3, 1.0, seed=3)
    model = AggregateLinearRegressor(0.0, fit_intercept=False).fit(x, means, index)
    of_bags = x.reshape(-1, 3, 12).mean(1)
    np.testing.assert_allclose(of_bags @ model.coef_, means, atol=1e-10)
    np.testing.assert_allclose(model.coef_, np.linalg.pinv(of_bags) @ means, atol=1e-10)


def test_cross_validation_looks_at_held_out_bags_alone():
    x, means, index, _ = linear_data(10, 6, 3, 1.0, seed=4)
    model = AggregateLinearRegressor(cv=4).fit(x, means, index)
    by_hand = []
    for rho in (np.arange(11) / 10).tolist():
        losses = []
        for held_out in np.array_split(np.arange(len(means)), 4):
            out = np.isin(index, held_out)
            kept = np.unique(index[~out], return_inverse=True)[1]
            part = AggregateLinearRegressor(rho).fit(x[~out], np.delete(means, held_out), kept)
            losses.append(np.square(part.predict(x[out]).reshape(-1, 3).mean(1) - means[held_out]).mean())
        by_hand.append(np.mean(losses))
    np.testing.assert_allclose(model.cv_losses_, by_hand)
    assert model.rho_ == np.argmin(by_hand) / 10
    again = clone(model).set_params(rho=model.rho_).fit(x, means, index)
    np.testing.assert_array_equal(again.coef_, model.coef_)


@pytest.mark.parametrize(("psi", "k", "rho", "sigma2", "bias2", "variance"), RISKS)
def test_golden_risks(psi, k, rho, sigma2, bias2, variance):
    risk = asymptotic_risk(psi, k, rho, sigma2)
    assert risk.bias2 == pytest.approx(bias2, abs=1e-6)
    assert risk.variance == pytest.approx(variance, abs=1e-6)
    assert risk.total == risk.bias2 + risk.variance
    longer = asymptotic_risk(psi, k, rho, sigma2, theta_norm2=3.0)
    assert longer.bias2 == pytest.approx(3 * risk.bias2)
    assert longer.variance == risk.variance


@pytest.mark.parametrize(("psi", "k", "rho", "sigma2", "bias2", "variance"), RISKS)
def test_simulation_has_the_asymptotic_risk(psi, k, rho, sigma2, bias2, variance):
    found = []
    for seed in range(10):
        x, means, index, theta = linear_data(120, psi, k, sigma2, seed)
        model = AggregateLinearRegressor(rho, fit_intercept=False).fit(x, means, index)
        found.append(np.square(model.coef_ - theta).sum())
    assert np.mean(found) == pytest.approx(bias2 + variance, rel=0.12)


@pytest.mark.parametrize(
    ("psi", "k", "sigma2", "rho", "best", "bag", "instance"),
    [
        (6.0, 2, 1.0, 0.32, 0.3279, 0.5000, 0.4000),
        (6.0, 3, 1.0, 0.27, 0.4461, 1.0, 0.5556),
        (6.0, 4, 1.0, 0.26, 0.5357, 2.0, 0.65),
        (6.0, 3, 0.1, 0.02, 0.0869, 0.1, 0.4956),
    ],
)
def test_the_best_weight_is_between_the_ends(psi, k, sigma2, rho, best, bag, instance):
    found = minimize_scalar(lambda w: asymptotic_risk(psi, k, float(w), sigma2).total, bounds=(0, 1), method="bounded")
    assert found.x == pytest.approx(rho, abs=0.01)
    assert found.fun == pytest.approx(best, abs=1e-4)
    assert asymptotic_risk(psi, k, 0.0, sigma2).total == pytest.approx(bag, abs=1e-4)
    assert asymptotic_risk(psi, k, 1.0, sigma2).total == pytest.approx(instance, abs=1e-4)


def test_risks_of_single_samples_and_of_pure_losses_have_their_short_forms():
    for rho in (0.0, 0.5, 1.0):
        bias2, variance = asymptotic_risk(5.0, 1, rho, 0.7)
        assert bias2 == pytest.approx(0.0, abs=1e-12)
        assert variance == pytest.approx(0.7 / 4)
    assert asymptotic_risk(5.0, 2, 0.0, 0.7).variance == pytest.approx(0.7 / 1.5)


def test_bags_are_random_disjoint_and_of_equal_size():
    index = make_bags(12, 4, generator())
    assert torch.bincount(index).tolist() == [4, 4, 4]
    assert torch.equal(index, make_bags(12, 4, generator()))
    assert not torch.equal(index, make_bags(12, 4, generator(1)))
    assert sorted(torch.bincount(make_bags(14, 4, generator())).tolist()) == [4, 5, 5]


def test_released_means_are_unbiased_with_the_noise_that_privacy_asks_for():
    k, epsilon, clip = 5, 0.7, 2.0
    index = torch.arange(20_000) // k
    y = 0.3 * torch.randn(20_000, generator=generator(), dtype=torch.float64)
    means = y.view(-1, k).mean(1)
    for factor in (2.0, 1.0):
        released = laplace_bag_means(y, index, epsilon, clip, sensitivity_factor=factor, generator=generator(1))
        noise, scale = released - means, factor * clip / (k * epsilon)
        assert noise.mean().abs() < 4 * scale * math.sqrt(2 / len(noise))
        assert noise.abs().mean().item() == pytest.approx(scale, rel=0.05)
        assert noise.var().item() == pytest.approx(2 * scale**2, rel=0.1)


def test_one_response_moves_its_mean_by_at_most_half_of_what_the_noise_is_for():
    index = torch.tensor([0, 1, 0, 1, 1])
    low, high = torch.tensor([-9.0, 0, 1, 0, 0]), torch.tensor([9.0, 0, 1, 0, 0])
    first, second = (laplace_bag_means(y, index, 1e9, 2.0, generator=generator()) for y in (low, high))
    torch.testing.assert_close(second - first, torch.tensor([2 * 2.0 / 2, 0.0]))


def test_private_means_have_the_risk_of_noisier_responses():
    psi, k, rho, epsilon, clip, risks = 6.0, 3, 0.3, 4.0, 3.0, []
    b = 2 * clip / (k * epsilon)
    for seed in range(10):
        x, means, index, theta = linear_data(100, psi, k, 0.1, seed)
        nothing, bag = torch.zeros(len(x), dtype=torch.float64), torch.from_numpy(index)
        noise = laplace_bag_means(nothing, bag, epsilon, clip, generator=generator(seed)).numpy()
        model = AggregateLinearRegressor(rho, fit_intercept=False).fit(x, means + noise, index)
        risks.append(np.square(model.coef_ - theta).sum())
    assert np.mean(risks) == pytest.approx(asymptotic_risk(psi, k, rho, 0.1 + 2 * k * b * b).total, rel=0.12)


def test_more_than_the_instance_losss_weight_warns():
    for make in (
        lambda: InterpolatedBagLoss(1.5),
        lambda: AggregateLinearRegressor(1.5).fit([[1.0], [2.0]], [1.0], [0, 0]),
    ):
        with pytest.warns(UserWarning, match="rho = 1.5 penalises the spread"):
            make()


def test_misuse_is_refused_with_the_argument_named():
    for name, make in (
        ("rho", lambda: InterpolatedBagLoss(-0.1)),
        ("rho", lambda: InterpolatedBagLoss(math.nan)),
        ("loss", lambda: BagLoss("mae")),
        ("loss", lambda: InstanceLoss("mae")),
        ("psi", lambda: asymptotic_risk(1.0, 2, 0.5, 1.0)),
        ("psi", lambda: asymptotic_risk(3.0, 4, 0.0, 1.0)),
        ("k", lambda: asymptotic_risk(3.0, 0, 0.5, 1.0)),
        ("sigma2", lambda: asymptotic_risk(3.0, 2, 0.5, -1.0)),
        ("n", lambda: make_bags(3, 4, generator())),
        ("k", lambda: make_bags(3, 0, generator())),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            make()
    y, index = torch.zeros(4), torch.tensor([0, 0, 1, 1])
    for epsilon, clip, name in ((0.0, 1.0, "epsilon"), (math.nan, 1.0, "epsilon"), (1.0, 0.0, "clip")):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            laplace_bag_means(y, index, epsilon, clip, generator=generator())
    with pytest.raises(ValueError, match="^bag_index must be 0..2, each at least once"):
        laplace_bag_means(y, 2 * index, 1.0, 1.0, generator=generator())


def test_what_cannot_be_fitted_is_refused():
    x, means, index = np.ones((4, 2)), np.zeros(2), np.array([0, 0, 1, 1])
    for name, options, arguments in (
        ("X", {}, (x[0], means, index)),
        ("X", {}, (x * np.nan, means, index)),
        ("bag_means", {}, (x, means + np.inf, index)),
        ("bag_index", {}, (x, means, index[:-1])),
        ("bag_index", {}, (x, means, index.astype(float))),
        ("bag_index", {}, (x, np.zeros(3), index)),
        ("rho", {"rho": -1.0}, (x, means, index)),
        ("alpha", {"alpha": -1.0}, (x, means, index)),
        ("cv", {"cv": 3}, (x, means, index)),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            AggregateLinearRegressor(**options).fit(*arguments)
    with pytest.raises(ValueError, match=r"^X must be of shape \(n, 2\)"):
        AggregateLinearRegressor(0.5).fit(x, means, index).predict(x[:, :1])
