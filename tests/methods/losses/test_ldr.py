import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import ALDRLoss, CSLoss, LDRLoss, WWLoss
from fairtrial.methods.losses.ldr import margins

SCORES = torch.tensor([[2.0, 1, 0, -1], [0.5, 0.2, 1.5, 0]], dtype=torch.float64)
TARGETS = torch.tensor([0, 1])
BOTH = torch.tensor([0, 1])


def random_batch(seed, n=6, classes=5):
    generator = torch.Generator().manual_seed(seed)
    scores = 3.0 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return scores, torch.randint(classes, (n,), generator=generator)


def gradient(loss, scores, *arguments):
    scores = scores.clone().requires_grad_()
    return torch.autograd.grad(loss(scores, *arguments).sum(), scores)[0]


@pytest.mark.parametrize(
    ("lam", "margin", "expected"),
    [(0.1, 0.1, 0.345074), (1.0, 0.1, -0.136180), (10.0, 0.1, -0.252314), (1.0, 1.0, 0.540502)],
)
def test_ldr_golden_values(lam, margin, expected):
    assert LDRLoss(lam, margin)(SCORES, TARGETS).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("lam", "expected"),
    [
        (1e-3, [-0.001386, 1.398614]),
        (1.0, [-0.909339, 0.622170]),
        (10.0, [-1.366351, 0.442882]),
        (1e4, [-1.424941, 0.425018]),
    ],
)
def test_ldr_golden_values_without_normalisation(lam, expected):
    loss = LDRLoss(lam, normalize=None, reduction="none")(SCORES, TARGETS)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_unit_temperature_without_margin_is_cross_entropy_less_log_k():
    loss = LDRLoss(1.0, 0.0, normalize=None, reduction="none")(SCORES, TARGETS)
    torch.testing.assert_close(loss, F.cross_entropy(SCORES, TARGETS, reduction="none") - math.log(4))
    torch.testing.assert_close(loss, torch.tensor([-0.946105, 0.536184], dtype=torch.float64), atol=1e-6, rtol=0)


def test_limits_in_the_temperature():
    worst = CSLoss(0.1, reduction="none")(SCORES, TARGETS)
    torch.testing.assert_close(worst, torch.tensor([0.0, 1.4], dtype=torch.float64))
    cold = LDRLoss(1e-9, normalize=None, reduction="none")(SCORES, TARGETS)
    torch.testing.assert_close(cold, worst, atol=1e-8, rtol=0)
    mean = torch.tensor([-1.425, 0.425], dtype=torch.float64)
    torch.testing.assert_close(margins(SCORES, TARGETS, 0.1).mean(1), mean)
    hot = LDRLoss(1e7, normalize=None, reduction="none")(SCORES, TARGETS)
    torch.testing.assert_close(hot, mean, atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), lam=st.floats(0.1, 10.0))
def test_ldr_is_the_maximum_over_label_distributions(seed, lam):
    scores, target = random_batch(seed)
    delta = margins(scores, target, 0.1)

    def objective(p):
        return (p * delta).sum(1) - lam * (p * (5 * p).log()).sum(1)

    loss = LDRLoss(lam, normalize=None, reduction="none")
    value = loss(scores, target)
    worst = (delta / lam).softmax(1)
    torch.testing.assert_close(objective(worst.clamp(min=1e-300)), value, rtol=1e-9, atol=1e-9)
    other = torch.rand(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)
    assert (objective(other) <= value + 1e-9).all()
    torch.testing.assert_close(gradient(loss, scores, target), worst - F.one_hot(target, 5))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), lam=st.floats(0.1, 10.0), shift=st.floats(-50, 50), more=st.floats(0, 5))
def test_shift_does_not_matter_and_the_loss_rises_with_the_margin(seed, lam, shift, more):
    scores, target = random_batch(seed)
    plain = LDRLoss(lam, 0.1, normalize=None, reduction="none")
    torch.testing.assert_close(plain(scores + shift, target), plain(scores, target), rtol=1e-9, atol=1e-9)
    for normalize in ("softplus_mean", "l1", None):
        low = LDRLoss(lam, 0.1, normalize=normalize, reduction="none")(scores, target)
        high = LDRLoss(lam, 0.1 + more, normalize=normalize, reduction="none")(scores, target)
        assert (high >= low - 1e-12).all()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3))
def test_positive_scale_does_not_matter_to_scores_of_mean_size_one(seed, scale):
    scores, target = random_batch(seed)
    loss = LDRLoss(normalize="l1")
    torch.testing.assert_close(loss(scale * scores, target), loss(scores, target), rtol=1e-9, atol=1e-9)


def test_only_the_linear_limit_is_symmetric():
    scores, _ = random_batch(3)

    def over_all_labels(lam):
        loss = LDRLoss(lam, 0.1, normalize=None, reduction="none")
        return sum(loss(scores, torch.full((6,), label)) for label in range(5))

    linear = sum(margins(scores, torch.full((6,), label), 0.1).mean(1) for label in range(5))
    torch.testing.assert_close(linear, torch.full((6,), 0.1 * 4, dtype=torch.float64))
    torch.testing.assert_close(over_all_labels(1e8), linear, atol=1e-5, rtol=0)
    assert over_all_labels(1.0).std() > 0.1


def test_scores_far_below_zero_have_the_limit_of_the_softplus_quotient():
    low = SCORES - 1000.0
    loss = LDRLoss(reduction="none")(low, TARGETS)
    expected = LDRLoss(normalize=None, reduction="none")(4 * SCORES.softmax(1), TARGETS)
    torch.testing.assert_close(loss, expected)
    assert gradient(LDRLoss(), low, TARGETS).isfinite().all()
    assert gradient(LDRLoss(), low, TARGETS).abs().max() > 0.01


def test_rows_of_zeros_are_left_as_they_are():
    zeros = torch.zeros(2, 4, dtype=torch.float64)
    for normalize in ("l1", None):
        loss = LDRLoss(1.0, 0.0, normalize=normalize)
        torch.testing.assert_close(loss(zeros, TARGETS), torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(gradient(loss, zeros, TARGETS), (0.25 - F.one_hot(TARGETS, 4).double()) / 2)


@pytest.mark.parametrize("normalize", ["softplus_mean", "l1", None])
def test_derivatives_under_every_normalisation(normalize):
    scores, target = random_batch(0, n=3)
    index = torch.arange(3)
    adaptive = ALDRLoss(3, normalize=normalize).double().eval()
    adaptive.lambdas.copy_(torch.tensor([0.6, 0.8, 1.0]))
    for loss in (LDRLoss(0.5, normalize=normalize), lambda s, t: adaptive(s, t, index)):
        assert torch.autograd.gradcheck(lambda s, f=loss: f(s, target), scores.clone().requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_aldr_golden_values_of_repeated_visits(dtype):
    loss = ALDRLoss(2).to(dtype)
    visits = [
        (0.281777, [0.841766, 0.790516]),
        (0.289535, [0.800996, 0.710050]),
        (0.291098, [0.788459, 0.672592]),
        (0.291487, [0.784416, 0.654254]),
    ]
    for value, lambdas in visits:
        assert loss(SCORES, TARGETS, BOTH).item() == pytest.approx(value, abs=1e-6)
        torch.testing.assert_close(loss.lambdas, torch.tensor(lambdas, dtype=dtype), atol=1e-6, rtol=0)


@pytest.mark.parametrize("level", [0.0, 2.5])
def test_equal_scores_keep_the_temperature(level):
    loss = ALDRLoss(2, 3.0)
    loss(torch.full((2, 4), level), TARGETS, BOTH)
    torch.testing.assert_close(loss.lambdas, torch.full((2,), 3.0))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), lam0=st.floats(0.1, 10.0), alpha=st.floats(1.01, 4.0))
def test_temperatures_stay_within_their_bounds(seed, lam0, alpha):
    scores, target = random_batch(seed)
    loss = ALDRLoss(6, lam0, alpha=alpha, normalize=None).double()
    for _ in range(3):
        loss(scores, target, torch.arange(6))
    assert (loss.lambdas <= lam0 + 1e-9).all()
    assert (loss.lambdas >= lam0 * (1 - 1 / alpha) - 1e-9).all()


def test_visits_lead_to_the_maximum_over_the_temperature():
    scores, target = random_batch(1)
    loss = ALDRLoss(6, 2.0, alpha=2.0, normalize=None, margin_in_p=True, reduction="none").double()
    for _ in range(100):
        value = loss(scores, target, torch.arange(6))
    loss.eval()
    for lam in torch.linspace(0.2, 3.0, 57).tolist():
        loss.lambdas.fill_(lam)
        assert (loss(scores, target, torch.arange(6)) <= value + 1e-3).all()


def test_the_gradient_is_that_of_ldr_at_the_new_temperatures():
    scores, target = random_batch(2, n=3)
    adaptive = ALDRLoss(3, normalize="l1", reduction="none").double()
    moving = gradient(lambda s: adaptive(s, target, torch.arange(3)), scores)
    rows = [
        gradient(LDRLoss(float(lam), normalize="l1"), scores[i : i + 1], target[i : i + 1])
        for i, lam in enumerate(adaptive.lambdas)
    ]
    torch.testing.assert_close(moving, torch.cat(rows))


def test_confident_samples_get_lower_temperatures_than_undecided_ones():
    loss = ALDRLoss(2)
    loss(torch.tensor([[9.0, 0, 0, 0], [1.0, 1.1, 0.9, 1.0]]), TARGETS, BOTH)
    assert loss.lambdas[0] < 0.8
    assert loss.lambdas[1] > 0.99


def test_only_visited_samples_move_and_only_in_training_mode():
    loss = ALDRLoss(4)
    loss(SCORES, TARGETS, torch.tensor([3, 1]))
    moved = loss.lambdas.clone()
    assert moved[0] == moved[2] == 1.0
    assert (moved[[1, 3]] < 1.0).all()
    first, second = loss.eval()(SCORES, TARGETS, torch.tensor([3, 1])), loss(SCORES, TARGETS, torch.tensor([3, 1]))
    assert torch.equal(first, second)
    assert torch.equal(loss.lambdas, moved)


def test_a_sample_that_comes_twice_uses_each_row_and_keeps_one():
    twice = ALDRLoss(1, reduction="none").double()
    apart = ALDRLoss(2, reduction="none").double()
    torch.testing.assert_close(twice(SCORES, TARGETS, torch.tensor([0, 0])), apart(SCORES, TARGETS, BOTH))
    assert twice.lambdas[0] in apart.lambdas


def test_temperatures_are_saved_in_float32():
    loss = ALDRLoss(2)
    loss(SCORES, TARGETS, BOTH)
    state = loss.state_dict()
    assert state["lambdas"].dtype == torch.float32
    resumed = ALDRLoss(2)
    resumed.load_state_dict(state)
    assert torch.equal(resumed(SCORES, TARGETS, BOTH), loss(SCORES, TARGETS, BOTH))


def test_hinges_are_their_definitions():
    scores, target = random_batch(4)
    ww = F.multi_margin_loss(scores, target, margin=0.7, reduction="none")
    torch.testing.assert_close(WWLoss(0.7, reduction="none")(scores, target), ww)
    rival = scores.scatter(1, target[:, None], -math.inf).amax(1) - scores.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(CSLoss(0.7, reduction="none")(scores, target), (rival + 0.7).relu())


def test_misuse_is_refused_with_the_argument_named():
    nan, inf = float("nan"), float("inf")
    for arguments in ({"lam": 0.0}, {"lam": nan}, {"lam": inf}, {"margin": -0.1}, {"margin": nan}):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            LDRLoss(**arguments)
    for arguments in ({"lam0": 0.0}, {"lam0": nan}, {"margin": nan}, {"alpha": 0.99}, {"alpha": nan}, {"alpha": inf}):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            ALDRLoss(2, **arguments)
    for family in (LDRLoss, lambda **options: ALDRLoss(2, **options)):
        for arguments in ({"normalize": "l2"}, {"reduction": "avg"}):
            with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
                family(**arguments)
    for family in (CSLoss, WWLoss):
        for arguments in ({"margin": -1.0}, {"margin": nan}, {"reduction": "avg"}):
            with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
                family(**arguments)
    with pytest.raises(ValueError, match="num_samples must be at least 1"):
        ALDRLoss(0)
    loss = ALDRLoss(2)
    with pytest.raises(ValueError, match="index must be within 0..1, got '0..2'"):
        loss(SCORES, TARGETS, torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="index must be within 0..1, got '-1..0'"):
        loss(SCORES, TARGETS, torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="target must be within 0..3"):
        loss(SCORES, torch.tensor([0, 4]), BOTH)
    assert torch.equal(loss.lambdas, torch.ones(2))


def test_an_index_of_another_kind_is_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    loss = ALDRLoss(2)
    for index in (torch.tensor([0]), torch.tensor([[0], [1]]), torch.tensor([0.0, 1.0]), torch.tensor([False, True])):
        with pytest.raises(ValueError, match="^index must be"):
            loss(SCORES, TARGETS, index)


def test_alpha_of_one_warns():
    with pytest.warns(UserWarning, match="alpha"):
        loss = ALDRLoss(2, alpha=1.0, normalize=None)
    for _ in range(50):
        value = loss(100 * SCORES, TARGETS, BOTH)
    assert value.isfinite()
    assert (loss.lambdas > 0).all()
