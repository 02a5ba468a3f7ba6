import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import (
    DirectCoverageLoss,
    coverage_factor,
    optimal_pass_at_n_policy,
    pass_at_n,
    sequence_log_probability,
)

P = torch.tensor([1e-6, 1e-3, 1e-2, 0.1, 0.5, 0.9], dtype=torch.float64)
PI = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)


def near(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=tolerance, rtol=0)


def sequences(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (4, 6), generator=generator)
    labels[:, :2], labels[0, 4:] = -100, -100
    return logits.to(dtype), labels


def losses_and_gradients(log_p, n, form, dtype):
    leaf = torch.tensor(log_p, dtype=dtype, requires_grad=True)
    loss = DirectCoverageLoss(n, form=form, reduction="none").from_logprob(leaf)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (2, [0.999999, 0.9995, 0.994975, 0.947368, 0.666667, 0.181818]),
        (16, [0.999993, 0.992514, 0.926399, 0.404353, 0.000244, 0]),
        (256, [0.999873, 0.877836, 0.213644, 0, 0, 0]),
    ],
)
def test_golden_factors(n, expected):
    near(coverage_factor(P, n), expected, 6e-7)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (16, [11.042929, 4.142660, 1.906886, 0.204938, 0.000015, 0]),
        (256, [8.270461, 1.487410, 0.079384, 0, 0, 0]),
    ],
)
def test_golden_losses(n, expected):
    near(DirectCoverageLoss(n, reduction="none").from_logprob(P.log()), expected, 6e-7)


def test_one_sample_is_summed_cross_entropy():
    logits, labels = sequences()
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(4, 5).sum(1)
    for form in ("value", "weighted"):
        assert torch.equal(DirectCoverageLoss(1, form=form, reduction="none")(logits, labels), each)
    assert torch.equal(sequence_log_probability(logits, labels), -each)
    assert losses_and_gradients([0.0], 1, "value", torch.float64)[1] == -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [2, 16, 256, 10**6])
def test_both_forms_have_one_gradient(n, dtype):
    log_p = [-200.0, -80.0, -30.0, -12.0, -5.0, -2.0, -0.7, -0.1, -1e-3, -1e-30, 0.0]
    value, gradient = losses_and_gradients(log_p, n, "value", dtype)
    _, weighted = losses_and_gradients(log_p, n, "weighted", dtype)
    assert value.isfinite().all()
    torch.testing.assert_close(gradient, weighted, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(gradient, -coverage_factor(torch.tensor(log_p, dtype=dtype).exp(), n), atol=1e-6, rtol=0)
    assert (value[-1], gradient[-1]) == (0, 0)


def test_where_the_series_takes_over_nothing_jumps():
    for n in (2, 64, 10**6):
        p = torch.tensor([0.99999e-4 / n, 1.00001e-4 / n], dtype=torch.float64)
        below, above = coverage_factor(p, n)
        assert abs(below - above) < 2e-9
        loss = DirectCoverageLoss(n, reduction="none").from_logprob(p.log())
        assert loss.diff().item() == pytest.approx(-2e-5, rel=1e-3)


def test_derivatives_of_the_logits():
    logits, labels = sequences()
    for n in (1, 2, 16):
        loss = DirectCoverageLoss(n)
        leaf = logits.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, labels), leaf)
        assert torch.autograd.gradgradcheck(lambda x, loss=loss: loss(x, labels), leaf)


@settings(deadline=None, max_examples=50)
@given(p=st.floats(1e-12, 0.999), n=st.integers(1, 500))
def test_the_loss_falls_in_p_and_in_n_and_is_minus_the_logarithm_of_the_coverage(p, n):
    def loss(p, n):
        return DirectCoverageLoss(n).from_logprob(torch.tensor([p], dtype=torch.float64).log()).item()

    assert loss(p, n) == pytest.approx(-math.log(-math.expm1(n * math.log1p(-p))), rel=1e-9, abs=1e-12)
    assert loss(p, n + 1) <= loss(p, n)
    assert loss(min(1.0, 1.01 * p), n) <= loss(p, n)


def test_the_factor_at_one_nth():
    near(coverage_factor(torch.tensor([1e-6], dtype=torch.float64), 10**6), [math.exp(-1) / (1 - math.exp(-1))])


def test_tokens_that_do_not_count_have_no_say():
    logits, labels = sequences()
    ignored = torch.cat([labels[:, 1:] == -100, torch.ones(4, 1, dtype=torch.bool)], 1)
    moved = torch.where(ignored[..., None], 7.0, logits)
    loss = DirectCoverageLoss(8)
    assert torch.equal(loss(moved, labels), loss(logits, labels))
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, labels), leaf)
    assert not gradient[ignored].any()
    assert gradient[~ignored].any(1).all()


def test_two_questions():
    sure, spread = torch.tensor([1.0, 0.0]), torch.tensor([0.1, 0.1])
    coverage = {n: tuple((1 - (1 - p) ** n).mean().item() for p in (sure, spread)) for n in range(1, 12)}
    assert coverage[1] == pytest.approx((0.5, 0.1))
    for n, (first, second) in coverage.items():
        assert first == 0.5
        assert second == pytest.approx(1 - 0.9**n, abs=1e-6)
        assert (second > 0.5) == (n >= 7)


def test_pass_at_n_is_unbiased_and_exact():
    total, n = 10, 4
    found = pass_at_n(torch.arange(total + 1), total, n)
    expected = [1 - math.comb(total - c, n) / math.comb(total, n) for c in range(total + 1)]
    near(found, expected, 1e-12)
    p = 0.3
    chances = torch.tensor([math.comb(total, c) * p**c * (1 - p) ** (total - c) for c in range(total + 1)])
    assert (chances.double() * found).sum().item() == pytest.approx(1 - (1 - p) ** n, abs=1e-6)
    near(pass_at_n(torch.tensor([[0, 10_000], [1, 9_999]]), 10_000, 100), [[0, 1], [0.01, 1]], 1e-9)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, [1, 0, 0, 0]),
        (2, [0.625, 0.375, 0, 0]),
        (4, [0.456438, 0.355536, 0.188026, 0]),
        (16, [0.299741, 0.275483, 0.241218, 0.183558]),
    ],
)
def test_golden_policies(n, expected):
    near(optimal_pass_at_n_policy(PI, n), expected)
    near(optimal_pass_at_n_policy(torch.stack([PI.flip(0), PI]), n), [expected[::-1], expected])


def test_policies_spread_with_n_and_leave_out_impossible_answers():
    near(optimal_pass_at_n_policy(PI, 10**6), [0.25] * 4, 1e-5)
    largest = [optimal_pass_at_n_policy(PI, n).max().item() for n in range(1, 60)]
    assert largest == sorted(largest, reverse=True)
    near(optimal_pass_at_n_policy(torch.tensor([0.0, 1.0, 0.0]), 5), [0.0, 1, 0])
    assert optimal_pass_at_n_policy(torch.tensor([0.7, 0.3, 0.0]), 50)[2] == 0


def test_no_other_policy_covers_more():
    def covered(policy, n):
        return (PI * (1 - (1 - policy) ** n)).sum(-1)

    others = torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = others.sample((2000,))
    for n in (1, 2, 5, 30):
        assert (covered(drawn, n) <= covered(optimal_pass_at_n_policy(PI, n), n) + 1e-12).all()


def test_misuse_is_refused_with_the_argument_named():
    for n in (0, 2.0, True):
        with pytest.raises((ValueError, TypeError), match="n must be a whole number|check"):
            DirectCoverageLoss(n)
    with pytest.raises(ValueError, match="^form must be"):
        DirectCoverageLoss(form="both")
    with pytest.raises(ValueError, match="^log_p must be at most 0"):
        DirectCoverageLoss().from_logprob(torch.tensor([0.1]))
    with pytest.raises(ValueError, match=r"^p must be within 0\.\.1"):
        coverage_factor(torch.tensor([1.1]), 2)
    with pytest.raises(ValueError, match="^pi must be of sum 1"):
        optimal_pass_at_n_policy(torch.tensor([0.5, 0.6]), 2)
    with pytest.raises(ValueError, match="^total must be at least n = 3"):
        pass_at_n(torch.tensor([1]), 2, 3)
    with pytest.raises(ValueError, match=r"^correct must be within 0\.\.4"):
        pass_at_n(torch.tensor([5]), 4, 3)
    logits, labels = sequences()
    with pytest.raises(ValueError, match="^labels must be of some token after the first in every row"):
        DirectCoverageLoss()(logits, torch.full_like(labels, -100))
