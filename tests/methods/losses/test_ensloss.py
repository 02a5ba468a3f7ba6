import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import EnsLoss, EnsLossScheduler, MarginLoss

OUT, TARGET = torch.tensor([2.0, -1, 0.5, 0.1, -0.3]), torch.tensor([1, 1, 0, 1, 0])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_batch(seed, n=16, scale=2.0):
    logits = scale * torch.randn(n, generator=seeded(seed), dtype=torch.float64)
    return logits, torch.randint(2, (n,), generator=seeded(seed + 1))


def margins(logits, target):
    return (2 * target - 1) * logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("lam", "value", "gradient"),
    [
        (0.0, 0.242166, [-0.011318, -0.2, 0.2, -0.149141, 0.067613]),
        (0.5, 0.272866, [-2e-7, -0.2, 0.2, -0.145619, 0.041905]),
        (-0.5, 0.213752, [-0.022907, -0.2, 0.2, -0.152097, 0.084084]),
        (1.0, 0.285868, [-2e-7, -0.2, 0.2, -0.141314, 0.0]),
    ],
)
def test_golden_values_of_the_authors_code(lam, value, gradient, dtype):
    """The generator's first draws are 1.540996, -0.293429, -2.178789, 0.568431 and -1.084522."""
    out = OUT.clone().to(dtype).requires_grad_()
    loss = EnsLoss(lam, generator=seeded())(out, TARGET)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(out.grad, torch.tensor(gradient, dtype=dtype), atol=1e-6, rtol=0)
    if gradient[0] == -2e-7:
        assert out.grad[0].item() == pytest.approx(-2e-7)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), lam=st.floats(-1.0, 1.0))
def test_derivatives_are_those_of_a_convex_calibrated_loss(seed, lam):
    logits, target = random_batch(seed)
    logits.requires_grad_()
    loss = EnsLoss(lam, tail=None, generator=seeded(seed))
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    g = loss.last_derivatives
    assert (g < 0).all()
    assert (g >= -1 - 1e-6).all()
    assert (g[margins(logits, target).argsort()].diff() >= 0).all()
    assert (gradient * (2 * target - 1) < 0).all()  # every margin is pushed up
    torch.testing.assert_close(gradient, (2 * target - 1) * g / 16)
    with_tail = EnsLoss(lam, generator=seeded(seed))
    with_tail(logits, target)
    z = margins(logits, target)
    torch.testing.assert_close(with_tail.last_derivatives, (g + 1e-6) / z.clamp(min=1) - 1e-6)


@pytest.mark.parametrize(("lam", "clip"), [(0.0, 1.0), (0.0, 0.5), (1.0, 1.0), (-0.7, 1.0)])
def test_the_share_of_clipped_derivatives(lam, clip):
    n = 100_000
    loss = EnsLoss(lam, clip=clip, generator=seeded(1))
    loss(torch.zeros(n), torch.zeros(n))
    share = (loss.last_derivatives == -clip - 1e-6).double().mean().item()
    reached = math.log(clip) if lam == 0 else (clip**lam - 1) / lam
    expected = 0.5 * math.erfc(reached / math.sqrt(2))
    assert share == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / n))


def test_expected_derivatives_of_two_margins():
    loss = EnsLoss(generator=seeded(2))
    out, target = torch.tensor([0.5, 0.2]), torch.tensor([1, 1])
    drawn = []
    for _ in range(4000):
        loss(out, target)
        drawn.append(loss.last_derivatives)
    error, mean = torch.std_mean(torch.stack(drawn), 0)
    expected = torch.tensor([-0.606347, -0.916810]) - 1e-6
    assert ((mean - expected).abs() < 3 * error / 4000**0.5).all()


def test_a_single_derivative():
    for seed in range(5):
        loss = EnsLoss(generator=seeded(seed))
        loss(torch.tensor([-0.5]), torch.tensor([0]))
        e = torch.randn((), generator=seeded(seed)).item()
        assert loss.last_derivatives.item() == pytest.approx(max(-math.exp(e), -1) - 1e-6, abs=1e-7)


def test_equal_seeds_give_equal_losses_and_global_draws_follow_the_global_seed():
    logits, target = random_batch(0)
    first, second, other = (EnsLoss(generator=seeded(seed)) for seed in (3, 3, 4))
    for _ in range(3):
        value = first(logits, target)
        assert torch.equal(value, second(logits, target))
        assert not torch.equal(value, other(logits, target))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(EnsLoss()(logits, target), EnsLoss(generator=seeded(3))(logits, target))


def test_columns_and_targets_of_any_type():
    logits, target = random_batch(1)
    expected = EnsLoss(generator=seeded())(logits, target)
    for out, y in (
        (logits[:, None], target[:, None]),
        (logits[:, None], target),
        (logits, target.bool()),
        (logits, target.float()),
    ):
        assert torch.equal(EnsLoss(generator=seeded())(out, y), expected)


def test_in_evaluation_mode_it_is_the_logistic_loss():
    logits, target = random_batch(2)
    loss = EnsLoss(generator=seeded()).eval()
    expected = F.binary_cross_entropy_with_logits(logits, target.double())
    torch.testing.assert_close(loss(logits, target), expected)
    assert loss.last_derivatives is None
    assert torch.equal(loss.generator.get_state(), seeded().get_state())


def test_lambda_is_drawn_within_its_range_and_kept_in_the_state():
    loss = EnsLoss(lam_range=(0.25, 0.75), generator=seeded())
    drawn = []
    for _ in range(50):
        loss.resample_lambda()
        drawn.append(loss.lam)
    assert min(drawn) >= 0.25
    assert max(drawn) <= 0.75
    assert len(set(drawn)) == 50
    resumed = EnsLoss()
    resumed.load_state_dict(loss.state_dict())
    assert resumed.lam == loss.lam
    assert f"lam={loss.lam}" in repr(pickle.loads(pickle.dumps(loss)))


def test_the_scheduler_draws_in_every_period_th_epoch_and_resumes():
    loss = EnsLoss(generator=seeded())
    scheduler = EnsLossScheduler(loss, 3)
    lambdas = []
    for _ in range(7):
        scheduler.step()
        lambdas.append(loss.lam)
    assert lambdas[:2] == [0.0, 0.0]
    assert len(set(lambdas)) == 3
    assert lambdas[2] == lambdas[4] != lambdas[5] == lambdas[6]
    again = EnsLoss(generator=seeded())
    resumed = EnsLossScheduler(again, 3)
    resumed.load_state_dict(scheduler.state_dict())
    resumed.step()
    assert again.lam == 0.0
    resumed.step()
    assert again.lam != 0.0


def test_compiled_whole_it_is_the_same_where_it_draws_globally(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    logits, target = random_batch(3)
    torch.compiler.reset()
    compiled = torch.compile(EnsLoss(0.5), fullgraph=True, backend="aot_eager")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = compiled(logits, target)
        torch.manual_seed(0)
        torch.testing.assert_close(found, EnsLoss(0.5)(logits, target))


def test_fixed_losses_are_their_definitions():
    logits, target = random_batch(4)
    z = margins(logits, target)
    for kind, expected in [
        ("logistic", (1 + (-z).exp()).log()),
        ("hinge", (1 - z).clamp(min=0)),
        ("exponential", (-z).exp()),
    ]:
        torch.testing.assert_close(MarginLoss(kind, reduction="none")(logits, target), expected)
        assert torch.autograd.gradcheck(MarginLoss(kind), (logits.clone().requires_grad_(), target))
        for dtype in (torch.float32, torch.bfloat16):
            extreme = torch.tensor([1e4, -1e4], dtype=dtype, requires_grad=True)
            loss = MarginLoss(kind)(extreme, torch.tensor([0, 0]))
            loss.backward()
            assert loss.isfinite()
            assert extreme.grad.isfinite().all()
            assert extreme.grad[0] > 0


def test_misuse_is_refused_with_the_argument_named():
    nan, inf = float("nan"), float("inf")
    for arguments in (
        {"lam": nan},
        {"lam": inf},
        {"lam_range": (1.0, -1.0)},
        {"lam_range": (nan, 1.0)},
        {"lam_range": (0.0, inf)},
        {"clip": 0.0},
        {"clip": nan},
        {"tail": "linear"},
        {"reduction": "avg"},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            EnsLoss(**arguments)
    with pytest.raises(ValueError, match="^kind must be"):
        MarginLoss("focal")
    with pytest.raises(ValueError, match="^period must be at least 1"):
        EnsLossScheduler(EnsLoss(), 0)
    for target in (torch.tensor([0, 2]), torch.tensor([-1, 1]), torch.tensor([nan, 1.0])):
        with pytest.raises(ValueError, match="^target must be 0 or 1 everywhere"):
            EnsLoss()(torch.zeros(2), target)


def test_shapes_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    for loss in (EnsLoss(), MarginLoss()):
        for out in (torch.zeros(0), torch.zeros(0, 1), torch.zeros(2, 2), torch.zeros(2, 1, 1), torch.zeros(2).long()):
            with pytest.raises(ValueError, match="^input must be"):
                loss(out, torch.zeros(len(out)))
        with pytest.raises(ValueError, match="^target must be of shape"):
            loss(torch.zeros(2), torch.zeros(3))
