import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime, minimize
from scipy.special import logsumexp, softmax
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.optimizers import (
    GNSNewton,
    fisher_logistic,
    fisher_term,
    gauss_newton,
    grad_norm_smooth_newton,
    softmax_ggn,
)
from fairtrial.methods.optimizers.gradient_normalized_smoothness import EPS


def log_sum_exp(A, b, mu):
    """μ log Σ exp((a_iᵀx - b_i) / μ), shifted to have its minimum at 0."""
    A = A - softmax(-b / mu) @ A
    return SimpleNamespace(
        fun=lambda x: mu * logsumexp((A @ x - b) / mu),
        jac=lambda x: softmax((A @ x - b) / mu) @ A,
        hess=lambda x: (
            softmax_ggn(A, b, mu)(x) - np.outer(softmax((A @ x - b) / mu) @ A, softmax((A @ x - b) / mu) @ A) / mu
        ),
        ggn=softmax_ggn(A, b, mu),
    )


SMALL = log_sum_exp(np.array([[1.0, 0, 2], [0, 1, -1], [-1, 1, 0], [2, -1, 1]]), np.array([0.5, -0.2, 0.1, 0.3]), 0.5)


def quadratic(d=3):
    weights = np.arange(1.0, d + 1)
    return {
        "fun": lambda x: 0.5 * weights @ x**2,
        "jac": lambda x: weights * x,
        "hess": lambda x: np.diag(weights),
    }


def run(f, hess, steps, **options):
    return grad_norm_smooth_newton(f.fun, np.ones(3), jac=f.jac, hess=hess, max_iter=steps, gtol=0.0, **options)


def test_a_golden_path_with_the_exact_hessian():
    f_star = SMALL.fun(np.zeros(3))
    assert f_star == pytest.approx(0.585814653, abs=1e-9)
    found = run(SMALL, SMALL.hess, 6)
    values = [1.91629879, 0.67063319, 0.61700060, 0.58786091, 0.58583145, 0.58581466, 0.58581465]
    np.testing.assert_allclose(found.fun_history, values, atol=6e-9)
    assert found.gamma_history.tolist() == [1, 2, 4, 8, 16, 32, 64]
    norms = []
    grad_norm_smooth_newton(
        SMALL.fun,
        np.ones(3),
        jac=SMALL.jac,
        hess=SMALL.hess,
        f_star=f_star,
        ftol=0.0,
        max_iter=6,
        callback=lambda at: norms.append(np.linalg.norm(at.jac)),
    )
    np.testing.assert_allclose(norms[:4], [0.29239949, 0.10578299, 0.02860988, 0.00732932], atol=6e-9)
    assert norms[4] == pytest.approx(6.165e-5, rel=1e-3)
    assert norms[5] == pytest.approx(1.2e-8, rel=0.05)
    assert np.linalg.norm(SMALL.jac(np.ones(3))) == pytest.approx(2.20544551, abs=1e-8)
    np.testing.assert_allclose(run(SMALL, SMALL.hess, 1).x, (0.608608679, 1.288828192, 0.244514258), atol=1e-9)


def test_a_golden_path_with_the_gauss_newton_matrix():
    found = run(SMALL, SMALL.ggn, 6)
    values = [1.91629879, 1.52312022, 1.16034223, 0.84934971, 0.68194266, 0.61396566, 0.58871684]
    np.testing.assert_allclose(found.fun_history, values, atol=6e-9)
    assert found.gamma_history.tolist() == [1, 2, 2, 4, 8, 16, 16]
    np.testing.assert_allclose(run(SMALL, SMALL.ggn, 1).x, (0.921141312, 1.058193963, 0.847782485), atol=1e-9)


def test_the_approximation_and_the_hessian_differ_by_rank_one():
    x = np.array([0.3, -0.2, 0.9])
    numeric = approx_fprime(x, SMALL.jac)
    np.testing.assert_allclose(SMALL.hess(x), numeric, atol=1e-6)
    assert np.linalg.matrix_rank(SMALL.ggn(x) - SMALL.hess(x), tol=1e-9) == 1


def test_on_a_quadratic_every_first_trial_is_taken():
    found = grad_norm_smooth_newton(x0=np.ones(3), f_star=0.0, **quadratic())
    assert (found.nit, found.n_factorizations, found.nhev) == (5, 5, 5)
    assert found.gamma_history.tolist() == [1, 2, 4, 8, 16, 32]
    assert found.success
    assert found.status == 0


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), mu=st.sampled_from([0.1, 0.5]), kind=st.sampled_from(["hess", "ggn"]))
@example(seed=4623, mu=0.1, kind="hess")  # the gradient becomes exactly 0
@example(seed=67, mu=0.1, kind="hess")  # the Hessian is 3e-9 times the gradient: the step is longer than γ
def test_steps_are_no_longer_than_gamma_and_lower_the_function(seed, mu, kind):
    generator = np.random.default_rng(seed)
    f = log_sum_exp(generator.uniform(-1, 1, (12, 3)), generator.uniform(-1, 1, 12), mu)
    points = [np.ones(3)]
    found = run(f, getattr(f, kind), 15, callback=lambda at: points.append(at.x))
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    # γ as it was accepted is half of the γ after the step, and the step divides by γ + EPS
    assert (lengths <= (found.gamma_history[1:] / 2 + EPS) * (1 + 1e-12)).all()
    changes = np.diff(found.fun_history)
    if not found.jac.any():  # the last step found the minimum itself, which need not lie lower in float64
        assert found.status == 0
        assert changes[-1] <= 0
        changes = changes[:-1]
    assert (changes < 0).all() or found.status == 2


def test_it_is_invariant_under_what_it_should_be():
    plain = run(SMALL, SMALL.hess, 5)
    shifted = grad_norm_smooth_newton(
        lambda x: SMALL.fun(x) + 7, np.ones(3), jac=SMALL.jac, hess=SMALL.hess, max_iter=5, gtol=0.0
    )
    scaled = grad_norm_smooth_newton(
        lambda x: 8 * SMALL.fun(x),
        np.ones(3),
        jac=lambda x: 8 * SMALL.jac(x),
        hess=lambda x: 8 * SMALL.hess(x),
        max_iter=5,
        gtol=0.0,
    )
    T = np.array([[2.0, 1, 0], [0, 1, -1], [1, 0, 3]])  # x = T y
    affine = grad_norm_smooth_newton(
        lambda y: SMALL.fun(T @ y),
        np.linalg.solve(T, np.ones(3)),
        jac=lambda y: T.T @ SMALL.jac(T @ y),
        hess=lambda y: T.T @ SMALL.hess(T @ y) @ T,
        B=T.T @ T,
        max_iter=5,
        gtol=0.0,
    )
    for other in (shifted.x, scaled.x, T @ affine.x):
        np.testing.assert_allclose(other, plain.x, rtol=1e-8, atol=1e-8)


def test_without_a_hessian_it_is_the_normalised_gradient_method():
    found = run(SMALL, lambda x: np.zeros((3, 3)), 1)
    g = SMALL.jac(np.ones(3))
    accepted = found.gamma_history[1] / 2
    np.testing.assert_allclose(found.x, 1 - accepted * g / np.linalg.norm(g), atol=1e-7)


def test_scipys_minimize_takes_it_as_a_method():
    f = quadratic()
    found = minimize(
        f["fun"],
        np.ones(3),
        jac=f["jac"],
        hess=f["hess"],
        method=grad_norm_smooth_newton,
        options={"gamma0": 2.0, "f_star": 0.0},
    )
    assert found.success
    np.testing.assert_allclose(found.x, 0, atol=1e-4)
    with pytest.raises(ValueError, match="options must be none but"):
        minimize(
            f["fun"], np.ones(3), jac=f["jac"], hess=f["hess"], method=grad_norm_smooth_newton, bounds=[(0, 1)] * 3
        )


def chebyshev(n):
    def residual(x):
        return np.append(0.5 * (1 - x[0]), x[1:] - (2 * x[:-1] ** 2 - 1))

    def jacobian(x):
        J = np.eye(n)
        J[0, 0] = -0.5
        J[np.arange(1, n), np.arange(n - 1)] = -4 * x[:-1]
        return J

    return residual, jacobian


@pytest.mark.parametrize("p", [2.0, 3.0, 4.0])
def test_gauss_newton_is_the_hessian_less_the_curvature_of_the_residuals(p):
    u, J = chebyshev(4)
    x = np.array([-0.9, 0.8, 0.9, 0.7])

    def gradient(x):
        return np.linalg.norm(u(x)) ** (p - 2) * J(x).T @ u(x)

    curvature = np.diag(np.append(-4 * u(x)[1:], 0))
    expected = approx_fprime(x, gradient) - np.linalg.norm(u(x)) ** (p - 2) * curvature
    np.testing.assert_allclose(gauss_newton(u, J, p)(x), expected, rtol=1e-4, atol=1e-4)
    g = J(x).T @ u(x)
    term = (p - 2) * np.linalg.norm(u(x)) ** (p - 4) * np.outer(g, g)
    np.testing.assert_allclose(fisher_term(u, J, p)(x), term, rtol=1e-12)
    assert (fisher_term(u, J, p)(np.ones(4)) == 0).all()


@pytest.mark.parametrize(("p", "steps"), [(2.0, 316), (4.0, 145)])
def test_the_chebyshev_rosenbrock_function(p, steps):
    u, J = chebyshev(4)
    found = grad_norm_smooth_newton(
        lambda x: np.linalg.norm(u(x)) ** p / p,
        0.9 * np.array([-1.0, 1, 1, 1]),
        jac=lambda x: np.linalg.norm(u(x)) ** (p - 2) * J(x).T @ u(x),
        hess=gauss_newton(u, J, p),
        f_star=0.0,
        gtol=0.0,
    )
    assert found.nit == steps


def test_the_fisher_matrix_of_logistic_regression():
    generator = np.random.default_rng(0)
    X, y, w = generator.standard_normal((9, 3)), np.sign(generator.standard_normal(9)), generator.standard_normal(3)
    rows = [approx_fprime(w, lambda w, i=i: np.logaddexp(0, -y[i] * X[i] @ w)) for i in range(9)]
    np.testing.assert_allclose(fisher_logistic(X, y)(w), np.mean([np.outer(g, g) for g in rows], 0), atol=1e-6)


def test_a_negative_curvature_halves_gamma_and_ends_in_a_minimum():
    found = grad_norm_smooth_newton(
        lambda x: float((x**4 / 4 - x**2 / 2).sum()),
        np.array([0.1, -0.2]),
        jac=lambda x: x**3 - x,
        hess=lambda x: np.diag(3 * x**2 - 1),
    )
    assert found.success
    np.testing.assert_allclose(np.abs(found.x), 1, atol=1e-6)


def test_trouble_ends_without_success():
    f = quadratic()
    for change, status in (
        ({"fun": lambda x: math.nan}, 3),
        ({"hess": lambda x: np.full((3, 3), np.nan)}, 3),
        ({"hess": lambda x: -1e30 * np.eye(3)}, 2),
        ({"max_iter": 2}, 1),
    ):
        found = grad_norm_smooth_newton(x0=np.ones(3), **f | change)
        assert (found.success, found.status) == (False, status)

    def stop(at):
        raise StopIteration

    assert grad_norm_smooth_newton(x0=np.ones(3), **f, callback=stop).status == 4
    assert grad_norm_smooth_newton(x0=np.ones(3), **f, adaptive=False, max_iter=3).gamma_history.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x0", {"x0": np.ones((2, 2))}),
        ("x0", {"x0": np.full(3, np.nan)}),
        ("gamma0", {"gamma0": 0.0}),
        ("gamma0", {"gamma0": math.nan}),
        ("max_iter", {"max_iter": -1}),
        ("gtol", {"gtol": math.nan}),
        ("max_search", {"max_search": 0}),
        ("jac", {"jac": lambda x: np.ones(2)}),
        ("hess", {"hess": lambda x: np.ones((2, 2))}),
        ("hess", {"hess": lambda x: np.triu(np.ones((3, 3)))}),
        ("B", {"B": np.ones((2, 2))}),
        ("B", {"B": -np.eye(3)}),
    ],
)
def test_misuse_is_refused_with_the_argument_named(name, change, monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        grad_norm_smooth_newton(**{"x0": np.ones(3), **quadratic(), **change})


def test_the_torch_front_end_goes_the_same_way():
    A = torch.tensor([[1.0, 0, 2], [0, 1, -1], [-1, 1, 0], [2, -1, 1]], dtype=torch.float64)
    b = torch.tensor([0.5, -0.2, 0.1, 0.3], dtype=torch.float64)
    A = A - (-b / 0.5).softmax(0) @ A
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = GNSNewton([x])
    losses = [optimizer.step(lambda: 0.5 * torch.logsumexp((A @ x - b) / 0.5, 0)).item() for _ in range(6)]
    np.testing.assert_allclose(losses, run(SMALL, SMALL.hess, 5).fun_history, rtol=1e-9)
    np.testing.assert_allclose(x.detach(), run(SMALL, SMALL.hess, 6).x, atol=1e-7)


def classifier(dtype=torch.float64):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5, generator=generator)
    x = torch.randn(30, 4, generator=generator).to(dtype)
    y = torch.randint(3, (30,), generator=generator)
    return model, x, y


@pytest.mark.parametrize(("hessian", "reduction"), [("exact", "mean"), ("fisher", "none")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_trains_a_small_network_and_resumes_bit_for_bit(hessian, reduction, dtype):
    def closure():
        return F.cross_entropy(model(x), y, reduction=reduction)

    ends = []
    for interrupted in (False, True):
        model, x, y = classifier(dtype)
        first, optimizer = closure().mean().item(), GNSNewton(model.parameters(), gamma0=0.3, hessian=hessian)
        for step in range(10):
            if interrupted and step == 5:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = GNSNewton(model.parameters(), hessian=hessian)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            optimizer.step(closure)
        ends.append([p.detach() for p in model.parameters()])
    assert closure().mean().item() < 0.7 * first
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_the_front_end_refuses_misuse(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    w = nn.Parameter(torch.ones(2))
    for name, arguments in (
        ("gamma0", {"gamma0": 0.0}),
        ("hessian", {"hessian": "none"}),
        ("max_search", {"max_search": 0}),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            GNSNewton([w], **arguments)
    with pytest.raises(ValueError, match="^params must be one group"):
        GNSNewton([{"params": [w]}, {"params": [nn.Parameter(torch.ones(1))]}])
    with pytest.raises(ValueError, match="^params must be at most 5000"):
        GNSNewton([nn.Parameter(torch.ones(5001))])
    with pytest.raises(RuntimeError, match="finite"):
        GNSNewton([w]).step(lambda: (w / 0).sum())
    with pytest.raises(ValueError, match="^state_dict must be"):
        GNSNewton([w]).load_state_dict(torch.optim.SGD([w], lr=0.1).state_dict())
    with pytest.raises(ValueError, match="^closure must be"):
        GNSNewton([w], hessian="fisher").step(lambda: w.sum())
