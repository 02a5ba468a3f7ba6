import math
import warnings

import pytest
import torch

from fairtrial.methods.optimizers import (
    KFAC,
    DeepHedger,
    black_scholes_call,
    cvar,
    entropic,
    hedging_pnl,
    heston_paths,
    mean_variance,
    quadratic,
)

F64 = torch.float64
MONTH = 30 / 365


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def black_scholes_paths(n, steps, seed=0):
    return heston_paths(n, steps, MONTH / steps, xi=0.0, dtype=F64, generator=generator(seed))


def mean_and_error(values):
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


def test_without_noise_of_the_variance_calls_cost_what_black_and_scholes_say():
    S, V = black_scholes_paths(50_000, 30)
    price, delta = black_scholes_call(torch.tensor(100.0, dtype=F64), 100.0, 0.2, MONTH)
    assert price.item() == pytest.approx(2.287151, abs=1e-6)
    mean, error = mean_and_error((S[:, -1] - 100).clamp(min=0))
    assert abs(mean - price.item()) < 3 * error
    torch.testing.assert_close(V, torch.full_like(V, 0.04))
    slope = black_scholes_call(torch.tensor([99.999, 100.001], dtype=F64), 100.0, 0.2, MONTH).price.diff() / 0.002
    assert delta.item() == pytest.approx(slope.item(), abs=1e-6)


def test_heston_prices_are_a_martingale_and_variances_keep_their_mean():
    with pytest.warns(UserWarning, match="reaches 0"):
        S, V = heston_paths(50_000, 30, xi=0.5, kappa=1.0, dtype=F64, generator=generator())
    for values, expected in ((S[:, -1], 100.0), (V[:, -1], 0.04)):
        mean, error = mean_and_error(values)
        assert abs(mean - expected) < 3 * error
    mean, error = mean_and_error((S[:, -1] - 100).clamp(min=0))
    assert abs(mean - 2.233) < 3 * error + 0.005  # whose own error is as large
    assert torch.corrcoef(torch.stack([S.log().diff()[:, 0], V.diff()[:, 0]]))[0, 1].item() == pytest.approx(
        -0.7, abs=0.02
    )


def test_the_scheme_is_its_formula():
    S, V = heston_paths(4, 3, 0.1, mu=0.3, rho=0.5, dtype=F64, generator=generator(5))
    z1, z2 = torch.randn(2, 3, 4, dtype=F64, generator=generator(5))
    s, v = torch.full((4,), 100.0, dtype=F64), torch.full((4,), 0.04, dtype=F64)
    for t in range(3):
        plus = v.clamp(min=0)
        s = s * ((0.3 - plus / 2) * 0.1 + (plus * 0.1).sqrt() * z1[t]).exp()
        v = v + 2 * (0.04 - plus) * 0.1 + 0.3 * (plus * 0.1).sqrt() * (0.5 * z1[t] + 0.75**0.5 * z2[t])
        torch.testing.assert_close((S[:, t + 1], V[:, t + 1]), (s, v))


def test_nothing_is_warned_of_under_fellers_condition_and_global_randomness_is_left():
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heston_paths(2, 2, generator=generator())
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_position_there_are_the_premium_and_the_payoff():
    S, _ = black_scholes_paths(100, 5)
    pnl, cost = hedging_pnl(S, torch.zeros(100, 5, dtype=F64), 100.0, 0.01, 2.0)
    torch.testing.assert_close(pnl, 2.0 - (S[:, -1] - 100).clamp(min=0))
    assert not cost.any()


def test_profit_and_cost_of_a_small_case():
    S = torch.tensor([[100.0, 110.0, 105.0]], dtype=F64)
    delta = torch.tensor([[0.5, -0.25]], dtype=F64)
    pnl, cost = hedging_pnl(S, delta, 100.0, 0.01, 3.0)
    assert cost.item() == pytest.approx(0.01 * (100 * 0.5 + 110 * 0.75))
    assert pnl.item() == pytest.approx(3 - 5 + 0.5 * 10 + 0.25 * 5 - cost.item())
    closing = hedging_pnl(S, delta, 100.0, 0.01, 3.0, close=True)
    assert (closing.cost - cost).item() == pytest.approx(0.01 * 105 * 0.25)
    assert (pnl - closing.pnl).item() == pytest.approx(0.01 * 105 * 0.25)
    assert hedging_pnl(S, delta, 100.0, 0.02, 3.0).cost.item() == pytest.approx(2 * cost.item())


def test_the_black_scholes_delta_leaves_a_variance_inverse_to_the_steps():
    variances = []
    for steps in (10, 40):
        S, _ = black_scholes_paths(4000, steps)
        left = MONTH * (1 - torch.arange(steps, dtype=F64) / steps)
        delta = black_scholes_call(S[:, :-1], 100.0, 0.2, left.expand(len(S), -1)).delta
        pnl, _ = hedging_pnl(S, delta, 100.0, 0.0, 2.287151)
        mean, error = mean_and_error(pnl)
        assert abs(mean) < 3 * error
        variances.append(pnl.var().item())
    assert variances[0] / variances[1] == pytest.approx(4, rel=0.15)


def test_objectives_are_their_formulas():
    pnl, cost = torch.randn(1000, dtype=F64, generator=generator()), torch.full((1000,), 0.5, dtype=F64)
    torch.testing.assert_close(mean_variance(pnl, cost, 2.0), pnl.var(correction=0) + 1.0)
    torch.testing.assert_close(quadratic(pnl), (pnl**2).mean())
    torch.testing.assert_close(entropic(pnl, 2.0), (-2 * pnl).exp().mean().log() / 2)
    torch.testing.assert_close(entropic(1000 * pnl, 1.0), -1000 * pnl.min() - math.log(1000), rtol=1e-6, atol=1e-3)
    threshold = -pnl.quantile(0.05)
    worst = -pnl.sort().values[:50].mean()
    torch.testing.assert_close(cvar(pnl, threshold), worst)
    assert cvar(pnl, threshold + 0.1) > worst
    assert cvar(pnl, threshold - 0.1) > worst


def test_the_detached_mean_gives_the_variances_gradient():
    pnl = torch.randn(50, dtype=F64, generator=generator(), requires_grad=True)
    (whole,) = torch.autograd.grad(mean_variance(pnl, torch.zeros(50, dtype=F64)), pnl)
    (single,) = torch.autograd.grad((pnl - pnl.mean().detach()).square().mean(), pnl)
    torch.testing.assert_close(single, whole)


def test_the_policy_looks_at_the_past_only_and_stays_within_bounds():
    policy = DeepHedger(4, 2).double()
    S, V = black_scholes_paths(6, 5)
    delta = policy(S, V)
    assert delta.shape == (6, 5)
    assert delta.abs().max() < 1
    later = S.clone()
    later[:, 3:] *= 1.1
    changed = policy(later, V)
    torch.testing.assert_close(changed[:, :3], delta[:, :3])
    assert not torch.allclose(changed[:, 3], delta[:, 3])


@pytest.mark.parametrize("curvature", ["empirical", "ggn"])
def test_kfac_learns_to_hedge(curvature):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = DeepHedger(8, maturity=10 / 365)
    S, V = heston_paths(256, 10, generator=generator())
    optimizer = KFAC(policy, lr=0.3, kl_clip=0.03, curvature=curvature)
    variances = []
    for _ in range(40):
        optimizer.zero_grad()
        pnl, _ = hedging_pnl(S, policy(S, V), 100.0, 0.0)
        losses = (pnl - pnl.mean().detach()).square()
        if curvature == "ggn":
            optimizer.observe(pnl, losses)
        losses.mean().backward()
        optimizer.step()
        variances.append(losses.mean().item())
    assert variances[-1] < 0.2 * variances[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"n": 0},
        {"steps": 0},
        {"dt": 0.0},
        {"s0": math.nan},
        {"v0": -0.1},
        {"mu": math.inf},
        {"kappa": -1.0},
        {"theta": -0.1},
        {"xi": -0.1},
        {"rho": 1.1},
        {"rho": math.nan},
    ],
)
def test_markets_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        heston_paths(**{"n": 2, "steps": 2, **arguments})


def test_other_misuse_is_refused():
    S, delta = torch.ones(3, 5), torch.zeros(3, 4)
    for name, call in (
        ("strike", lambda: hedging_pnl(S, delta, 0.0)),
        ("cost", lambda: hedging_pnl(S, delta, 1.0, -1.0)),
        ("premium", lambda: hedging_pnl(S, delta, 1.0, premium=math.nan)),
        ("cost_weight", lambda: mean_variance(S[:, 0], S[:, 0], -1.0)),
        ("risk_aversion", lambda: entropic(S[:, 0], 0.0)),
        ("level", lambda: cvar(S[:, 0], S[0, 0], 1.0)),
        ("volatility", lambda: black_scholes_call(S[0], 1.0, 0.0, 1.0)),
        ("maturity", lambda: DeepHedger(maturity=0.0)),
        ("delta", lambda: hedging_pnl(S, delta[:, :3], 1.0)),
    ):
        with pytest.raises(ValueError, match=name):
            call()
