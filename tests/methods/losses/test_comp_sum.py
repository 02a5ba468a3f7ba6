import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.losses import (
    CompSumLoss,
    SmoothAdversarialCompSumLoss,
    TRADESLoss,
    comp_sum_bound,
    comp_sum_loss,
    comp_sum_transform,
    margin_comp_sum_loss,
)
from fairtrial.methods.losses.adversarial import worst_inputs

SCORES = torch.tensor([[2.0, 1, 0, -1]], dtype=torch.float64)
PERTURBED = torch.tensor([[1.5, 1.4, 0.2, -1.2]], dtype=torch.float64)
TARGET = torch.tensor([0])
TAUS = [0.0, 0.5, 1.0, 1.3, 1.5, 1.8, 2.0, 3.0]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_batch(seed, n=6, classes=5):
    scores = 3.0 * torch.randn(n, classes, generator=seeded(seed), dtype=torch.float64)
    return scores, torch.randint(classes, (n,), generator=seeded(seed + 1))


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (0.0, 0.553002),
        (0.5, 0.492390),
        (1.0, 0.440190),
        (1.5, 0.395115),
        (1.7, 0.378832),
        (2.0, 0.356086),
        (3.0, 0.292687),
    ],
)
def test_golden_values(tau, expected):
    assert CompSumLoss(tau)(SCORES, TARGET).item() == pytest.approx(expected, abs=1e-6)


def test_members_of_the_family_under_their_own_names():
    scores, target = random_batch(0)
    p = scores.softmax(1).gather(1, target[:, None])[:, 0]
    for tau, expected in [(0.0, 1 / p - 1), (1.0, -p.log()), (1.7, (1 - p**0.7) / 0.7), (2.0, 1 - p)]:
        torch.testing.assert_close(CompSumLoss(tau, reduction="none")(scores, target), expected)
    torch.testing.assert_close(comp_sum_loss(scores, target), F.cross_entropy(scores, target))


@pytest.mark.parametrize("tau", [1 - 1e-6, 1 + 1e-6, 1 - 1e-12, 1 + 1e-15])
def test_it_is_continuous_at_cross_entropy(tau):
    scores, target = random_batch(1)
    near, at = (CompSumLoss(t, reduction="none")(scores, target) for t in (tau, 1.0))
    torch.testing.assert_close(near, at, rtol=1e-5, atol=1e-6)
    assert CompSumLoss(tau)(SCORES, TARGET).item() == pytest.approx(0.440190, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), tau=st.floats(0.0, 3.0))
def test_gradient_formula_bound_and_order(seed, tau):
    scores, target = random_batch(seed)
    leaf = scores.clone().requires_grad_()
    loss = CompSumLoss(tau, reduction="none")(leaf, target)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    softmax = scores.softmax(1)
    p = softmax.gather(1, target[:, None])
    torch.testing.assert_close(gradient, p ** (tau - 1) * (softmax - F.one_hot(target, 5)))
    assert (loss >= CompSumLoss(tau + 0.1, reduction="none")(scores, target) - 1e-12).all()
    if tau > 1:
        assert (loss <= 1 / (tau - 1)).all()


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.9, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_member_is_finite_at_extreme_scores(tau, dtype):
    scores = torch.tensor([[1e4, -1e4, 0], [-1e4, 1e4, 0]], dtype=dtype, requires_grad=True)
    loss = CompSumLoss(tau)(scores, torch.tensor([0, 0]))
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()
    if tau < 1:
        assert (scores.grad[1, 0] < 0).all()  # large, but there


@pytest.mark.parametrize("tau", [0.0, 1.5, 2.0])
def test_first_and_second_derivatives(tau):
    scores, target = random_batch(2, n=3)
    loss = CompSumLoss(tau)
    leaf = (0.5 * scores).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, target), leaf)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, target), leaf)


@pytest.mark.parametrize(
    ("tau", "n", "fifth", "most"),
    [
        (0.0, 2, 0.020204, 0.2),
        (0.5, 2, 0.019034, 0.186963),
        (1.0, 2, 0.020136, 0.192745),
        (1.3, 2, 0.023235, 0.211742),
        (1.5, 2, 0.028007, 0.235029),
        (1.8, 2, 0.050851, 0.282259),
        (2.0, 2, 0.1, 0.3),
        (0.0, 7, 0.020204, 0.2),
        (1.0, 7, 0.020136, 0.192745),
    ],
)
def test_golden_transforms(tau, n, fifth, most):
    assert comp_sum_transform(0.2, tau, n).item() == pytest.approx(fifth, abs=1e-6)
    assert comp_sum_transform(0.6, tau, n).item() == pytest.approx(most, abs=1e-6)


def test_beyond_cross_entropy_the_transform_falls_with_the_classes():
    assert comp_sum_transform(0.4, 1.5, 4).item() == pytest.approx(0.0770, abs=5e-5)
    assert comp_sum_transform(0.4, 1.5, 2).item() == pytest.approx(0.1089, abs=5e-5)
    assert comp_sum_transform(0.6, 3.0, 4).item() == pytest.approx(0.6 / (2 * 4**2))


@pytest.mark.parametrize("tau", [*TAUS, 1.999, 1.999999])
@pytest.mark.parametrize("n", [2, 5])
def test_transforms_are_zero_at_zero_increasing_and_convex(tau, n):
    beta = torch.linspace(0, 1, 201, dtype=torch.float64)
    transform = comp_sum_transform(beta, tau, n)
    assert transform[0].item() == pytest.approx(0.0, abs=1e-12)
    assert (transform.diff() > 0).all()
    assert (transform.diff().diff() > -1e-12).all()


def test_the_transform_is_continuous_in_tau_and_above_pinskers_bound():
    beta = torch.linspace(0, 1, 51, dtype=torch.float64)
    for tau in (1.0, 2.0):
        for near in (tau - 1e-6, tau + 1e-6):
            torch.testing.assert_close(
                comp_sum_transform(beta, near, 3), comp_sum_transform(beta, tau, 3), atol=1e-5, rtol=0
            )
    assert (comp_sum_transform(beta, 1.0, 2) >= beta**2 / 2).all()


@pytest.mark.parametrize("tau", TAUS)
def test_the_bound_is_the_inverse(tau):
    beta = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = comp_sum_transform(beta, tau, 5)
    torch.testing.assert_close(comp_sum_bound(t, tau, 5), beta, atol=1e-7, rtol=0)
    assert comp_sum_bound(2 * t[-1], tau, 5) == 1
    assert comp_sum_bound(0.0, tau, 5).item() == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("tau", TAUS)
def test_small_regrets_are_bounded_by_a_root_below_two_and_linearly_from_there(tau):
    n, beta = 5, torch.linspace(0.001, 1, 100, dtype=torch.float64)
    t = comp_sum_transform(beta, tau, n)
    if tau >= 2:
        torch.testing.assert_close((tau - 1) * n ** (tau - 1) * t, beta)
        return
    root = ((2**tau if tau < 1 else 2 * n ** (tau - 1)) * (2 - tau) * t).sqrt()
    assert root[0].item() == pytest.approx(0.001, rel=1e-4)
    if tau <= 1:  # and then not only small ones
        assert (beta <= root + 1e-12).all()


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_no_distribution_breaks_the_bound(tau, classes):
    """With all measurable scores the regrets are those of the conditional risks, whose least values are known."""
    p = torch.distributions.Dirichlet(torch.ones(classes, dtype=torch.float64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        p = p.sample((2000,))
        scores = (
            torch.randn(2000, classes, dtype=torch.float64) * torch.logspace(-3, 1, 2000, dtype=torch.float64)[:, None]
        )
    by_label = torch.stack(
        [comp_sum_loss(scores, torch.full((2000,), k), tau=tau, reduction="none") for k in range(classes)], 1
    )
    if tau == 1:
        least = -torch.special.xlogy(p, p).sum(1)
    elif tau >= 2:
        least = (1 - p.amax(1)) / (tau - 1)
    else:
        power = 1 / (2 - tau)
        least = (1 - (p**power).sum(1) ** (1 / power)) / (tau - 1)
    regret = (p * by_label).sum(1) - least
    zero_one = p.amax(1) - p.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    assert (regret >= -1e-12).all()
    assert (zero_one <= comp_sum_bound(regret.clamp(min=0), tau, classes) + 1e-7).all()


def test_margin_loss_and_the_change_of_the_margins():
    loss = SmoothAdversarialCompSumLoss(epsilon=0.1)
    assert margin_comp_sum_loss(PERTURBED, TARGET).item() == pytest.approx(0.641854, abs=1e-6)
    assert loss.change(SCORES, PERTURBED, TARGET).item() == pytest.approx(1.178983, abs=1e-6)
    for order, expected in [(1.0, 1.9), (math.inf, 0.9)]:
        other = SmoothAdversarialCompSumLoss(epsilon=0.1, regularizer_norm=order)
        assert other.change(SCORES, PERTURBED, TARGET).item() == pytest.approx(expected)
    bound = CompSumLoss()(SCORES, TARGET) + 3**0.5 * loss.change(SCORES, PERTURBED, TARGET)
    assert bound.item() == pytest.approx(2.482247, abs=1e-6)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 9999), tau=st.floats(0.0, 3.0), rho=st.floats(0.2, 5.0))
def test_the_smooth_loss_bounds_the_adversarial_margin_loss(seed, tau, rho):
    scores, target = random_batch(seed)
    moved = scores + torch.randn(scores.shape, generator=seeded(seed + 2), dtype=torch.float64)
    change = SmoothAdversarialCompSumLoss(epsilon=0.1).change(scores, moved, target)
    smooth = comp_sum_loss(scores / rho, target, tau=tau, reduction="none") + 2 / rho * change  # sqrt(n - 1) = 2
    assert (margin_comp_sum_loss(moved, target, tau=tau, rho=rho, reduction="none") <= smooth + 1e-9).all()


@pytest.mark.parametrize(("tau", "expected"), [(0.0, 1.197540), (1.0, 0.787339), (2.0, 0.544946)])
@pytest.mark.parametrize("without", [{"epsilon": 0.0}, {"epsilon": 0.1, "nu": 0.0}])
def test_without_perturbation_it_is_the_comp_sum_loss_at_the_temperature(tau, expected, without):
    loss = SmoothAdversarialCompSumLoss(tau, rho=2.0, **without)
    assert loss(nn.Identity(), SCORES, TARGET).item() == pytest.approx(expected, abs=1e-6)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4)
        ).double()


def images(n=8):
    return torch.rand(n, 6, generator=seeded(3), dtype=torch.float64), torch.arange(n) % 4


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_model_the_worst_perturbation_is_found(norm):
    """There the change of the margins is the same wherever x is, and known: that of the largest singular direction."""
    weight = torch.randn(2, 6, generator=seeded(0), dtype=torch.float64)
    model = nn.Linear(6, 2, bias=False).double()
    model.weight.data.copy_(weight)
    x, _ = images()
    y = torch.arange(8) % 2
    loss = SmoothAdversarialCompSumLoss(epsilon=0.1, steps=30, norm=norm, reduction="none", generator=seeded())
    found = loss(model, x, y) - comp_sum_loss(model(x), y, reduction="none")
    direction = weight[0] - weight[1]
    best = 0.1 * (direction.abs().sum() if norm == "linf" else direction.norm())
    torch.testing.assert_close(found, best.expand(8), rtol=1e-2, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_search_stays_within_the_ball_gains_and_leaves_model_and_inputs_as_they_were(norm):
    model, (x, _) = network(), images()
    model[3].eval()
    kept, state = x.clone(), {name: value.clone() for name, value in model.state_dict().items()}
    clean = model.eval()(x).detach()
    model.train()
    model[3].eval()

    def objective(output):
        return (output - clean).square().sum(1)

    before = torch.get_rng_state()
    found = worst_inputs(model, objective, x, epsilon=0.2, steps=10, norm=norm, generator=seeded())
    start = worst_inputs(model, objective, x, epsilon=0.2, steps=1, step_size=1e-9, norm=norm, generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert not model[3].training
    assert torch.equal(x, kept)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    lengths = torch.linalg.vector_norm(found - x, math.inf if norm == "linf" else 2, dim=1)
    assert (lengths <= 0.2 + 1e-12).all()
    model.eval()
    assert (objective(model(found)) > objective(model(start))).all()


@pytest.mark.parametrize("family", [SmoothAdversarialCompSumLoss, TRADESLoss])
def test_adversarial_losses_draw_from_their_generator_and_train_the_model(family):
    x, y = images()
    values, gradients = [], []
    for seed in (0, 0, 1):
        model = network()
        torch.manual_seed(5)  # of the dropout
        value = family(epsilon=0.3, steps=3, generator=seeded(seed))(model, x, y)
        value.backward()
        values.append(value.item())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert values[0] == values[1] != values[2]
    assert torch.equal(gradients[0], gradients[1])
    assert gradients[0].isfinite().all()
    plain = CompSumLoss()(network()(x), y)
    assert value > 0
    assert plain.ndim == value.ndim == 0


@pytest.mark.parametrize("family", [SmoothAdversarialCompSumLoss, TRADESLoss])
def test_reductions_repr_and_pickles_of_adversarial_losses(family):
    model, (x, y) = network().eval(), images()

    def value(reduction):
        return family(epsilon=0.3, steps=2, generator=seeded(), reduction=reduction)(model, x, y)

    torch.testing.assert_close(value("mean"), value("none").mean())
    torch.testing.assert_close(value("sum"), value("none").sum())
    loss = family(epsilon=0.3, steps=2, generator=seeded())
    copy = pickle.loads(pickle.dumps(loss))
    assert "epsilon=0.3" in repr(copy) == repr(loss)
    assert torch.equal(copy(model, x, y), loss(model, x, y))


def test_trades_is_its_definition():
    model, (x, y) = network().eval(), images()
    loss = TRADESLoss(2.0, epsilon=0.3, steps=2, generator=seeded(), reduction="none")
    clean = model(x)

    def divergence(output):
        p, q = clean.detach().softmax(1), output.softmax(1)
        return (p * (p / q).log()).sum(1)

    moved = worst_inputs(model, divergence, x, epsilon=0.3, steps=2, generator=seeded())
    expected = F.cross_entropy(clean, y, reduction="none") + 2.0 * divergence(model(moved))
    torch.testing.assert_close(loss(model, x, y), expected)
    without = TRADESLoss(epsilon=0.0)(model, x, y)
    torch.testing.assert_close(without, F.cross_entropy(clean, y))


def test_misuse_is_refused_with_the_argument_named():
    nan, inf = float("nan"), float("inf")
    for tau in (-0.1, nan, inf):
        with pytest.raises(ValueError, match="^tau must be"):
            CompSumLoss(tau)
        with pytest.raises(ValueError, match="^tau must be"):
            comp_sum_transform(0.5, tau, 2)
    for beta in (-0.1, 1.1, nan, torch.tensor([0.5, nan]), torch.tensor([0.5, 1.5])):
        with pytest.raises(ValueError, match=r"^beta must be within 0\.\.1"):
            comp_sum_transform(beta, 1.0, 2)
    with pytest.raises(ValueError, match="^n must be"):
        comp_sum_transform(0.5, 1.0, 1)
    with pytest.raises(ValueError, match="^t must be at least 0"):
        comp_sum_bound(-1.0, 1.0, 2)
    with pytest.raises(ValueError, match="^rho must be"):
        margin_comp_sum_loss(SCORES, TARGET, rho=0.0)
    for arguments in (
        {"tau": -1.0},
        {"rho": 0.0},
        {"rho": nan},
        {"nu": -1.0},
        {"nu": inf},
        {"regularizer_norm": 0.5},
        {"steps": 0},
        {"step_size": 0.0},
        {"norm": "l1"},
        {"reduction": "avg"},
        {"epsilon": -0.1},
        {"epsilon": nan},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            SmoothAdversarialCompSumLoss(**({"epsilon": 0.1} | arguments))
    for arguments in ({"beta": -1.0}, {"beta": nan}, {"epsilon": inf}, {"steps": 0}, {"reduction": "avg"}):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            TRADESLoss(**({"epsilon": 0.1} | arguments))
    with pytest.raises(ValueError, match=r"^target must be within 0\.\.3"):
        SmoothAdversarialCompSumLoss(epsilon=0.1)(nn.Identity(), SCORES, torch.tensor([4]))
