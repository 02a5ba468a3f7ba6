import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import (
    HardContrastiveLoss,
    HardSimpleLoss,
    InfoNCELoss,
    SimpleContrastiveLoss,
    negative_penalty,
    penalty_entropy,
    tolerance,
    uniformity,
)

S = torch.tensor([[0.8, 0.5, 0.3, -0.2, 0.1]], dtype=torch.float64)
VIOLATING = torch.tensor([[0.2, 0.5, 0.3, -0.2, 0.1]], dtype=torch.float64)
Z = torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [-1, 0]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])


def gradient(loss, s=S):
    s = s.clone().requires_grad_()
    return torch.autograd.grad(loss(s), s)[0][0]


def rows(seed, n=4, k=5):
    return 2 * torch.rand(n, k + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


@pytest.mark.parametrize(
    ("temperature", "value", "of_s", "penalty", "entropy"),
    [
        (
            0.07,
            0.014495,
            [-0.205574, 0.193796, 0.011130, 0.000009, 0.000639],
            [0.942706, 0.054142, 0.000043, 0.003110],
            0.231889,
        ),
        (
            0.3,
            0.524374,
            [-1.360247, 0.725858, 0.372668, 0.070388, 0.191334],
            [0.533622, 0.273971, 0.051746, 0.140661],
            1.119005,
        ),
    ],
)
def test_golden_values(temperature, value, of_s, penalty, entropy):
    loss = InfoNCELoss(temperature)
    assert loss(S).item() == pytest.approx(value, abs=1e-6)
    assert gradient(loss).tolist() == pytest.approx(of_s, abs=1e-6)
    assert negative_penalty(S, temperature=temperature)[0].tolist() == pytest.approx(penalty, abs=1e-6)
    assert penalty_entropy(S, temperature=temperature).item() == pytest.approx(entropy, abs=1e-6)


@pytest.mark.parametrize(("temperature", "value", "entropy"), [(1.0, 1.166836, 1.354891), (10.0, 1.560018, 1.385961)])
def test_golden_values_at_high_temperatures(temperature, value, entropy):
    assert InfoNCELoss(temperature)(S).item() == pytest.approx(value, abs=1e-6)
    assert penalty_entropy(S, temperature=temperature).item() == pytest.approx(entropy, abs=1e-6)


def test_golden_values_of_the_variants():
    assert HardContrastiveLoss(0.3, 0.5)(S).item() == pytest.approx(0.442604, abs=1e-6)
    assert HardContrastiveLoss(0.07, 0.5)(S).item() == pytest.approx(0.014449, abs=1e-6)
    assert SimpleContrastiveLoss()(S).item() == pytest.approx(-0.625, abs=1e-12)
    assert SimpleContrastiveLoss(0.25)(S).item() == pytest.approx(-0.625, abs=1e-12)
    assert HardSimpleLoss(0.5)(S).item() == pytest.approx(-0.4, abs=1e-12)
    assert HardSimpleLoss(0.5, 0.5)(S).item() == pytest.approx(-0.4, abs=1e-12)


def test_golden_values_of_the_measures():
    assert uniformity(Z).item() == pytest.approx(-2.164362, abs=1e-6)
    assert tolerance(Z, LABELS).item() == pytest.approx(0.4, abs=1e-12)
    assert tolerance(Z, LABELS, normalize=False).item() == pytest.approx(0.133333, abs=1e-6)
    assert uniformity(Z[:1].expand(3, 2)).item() == pytest.approx(0.0, abs=1e-12)


def test_two_views_are_their_cosines_with_the_diagonal_as_positives():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64).unbind()
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.2
    torch.testing.assert_close(InfoNCELoss(0.2)(a, b), F.cross_entropy(logits, torch.arange(5)))
    assert negative_penalty(a, b, temperature=0.2).shape == (5, 4)
    assert penalty_entropy(a, b, temperature=0.2).shape == (5,)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), temperature=st.floats(0.03, 3.0))
def test_positive_and_negatives_balance_and_the_entropy_rises(seed, temperature):
    s = rows(seed)
    for loss in (InfoNCELoss(temperature), HardContrastiveLoss(temperature, 0.4), SimpleContrastiveLoss()):
        assert abs(gradient(loss, s).sum()) < 1e-12
    torch.testing.assert_close(HardContrastiveLoss(temperature, 1.0)(s), InfoNCELoss(temperature)(s))
    torch.testing.assert_close(HardSimpleLoss(1.0)(s), SimpleContrastiveLoss()(s))
    low, high = (penalty_entropy(s, temperature=t) for t in (temperature, 1.1 * temperature))
    assert (low < high).all()


def test_the_share_that_is_kept_is_rounded_up_and_never_none():
    s = torch.zeros(1, 101, dtype=torch.float64)
    s[0, 1:] = torch.arange(100)
    for top_fraction, kept in ((0.07, 7), (0.071, 8), (1e-9, 1), (1.0, 100)):
        assert HardSimpleLoss(top_fraction)(s).item() == pytest.approx(
            (99 + 100 - kept) / 2
        )  # mean of the largest `kept`


def test_limits_in_the_temperature():
    for s, hinge in ((S, 0.0), (VIOLATING, 0.3)):
        assert 1e-3 * InfoNCELoss(1e-3)(s).item() == pytest.approx(hinge, abs=1e-3 * math.log(5))
        linear = math.log(5) - (s[0, 0] - s.mean()) / 1e3
        assert InfoNCELoss(1e3)(s).item() == pytest.approx(linear.item(), abs=1e-6)
    direction = gradient(InfoNCELoss(1e4))
    simple = gradient(SimpleContrastiveLoss())
    torch.testing.assert_close(direction / direction.norm(), simple / simple.norm(), atol=1e-3, rtol=0)


def test_misuse_is_refused_with_the_argument_named():
    nan = float("nan")
    for family, arguments in (
        (InfoNCELoss, {"temperature": 0.0}),
        (HardContrastiveLoss, {"temperature": nan}),
        (HardContrastiveLoss, {"top_fraction": 0.0}),
        (HardSimpleLoss, {"top_fraction": 1.1}),
        (HardSimpleLoss, {"weight": nan}),
        (SimpleContrastiveLoss, {"weight": 0.0}),
        (SimpleContrastiveLoss, {"reduction": "avg"}),
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            family(**arguments)
    with pytest.raises(ValueError, match="^input must be similarities to a positive and at least one negative"):
        InfoNCELoss()(S[:, :1])
    with pytest.raises(ValueError, match="^input must be finite"):
        InfoNCELoss()(nan * S)
    with pytest.raises(ValueError, match="^temperature must be"):
        penalty_entropy(S, temperature=0.0)
    with pytest.raises(ValueError, match="^t must be"):
        uniformity(Z, 0.0)
    with pytest.raises(ValueError, match="^labels must be such that at least two rows have the same class"):
        tolerance(Z, torch.arange(4))
