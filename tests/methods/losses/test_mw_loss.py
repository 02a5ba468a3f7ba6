import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import InBatchContrastiveLoss, InfoNCELoss, MannWhitneyLoss, mw_loss, pooled_auc
from fairtrial.methods.losses.mw_loss import comparisons

S = torch.tensor([[0.8, 0.3, 0.2], [0.5, 0.6, 0.1], [0.4, 0.7, 0.9]], dtype=torch.float64)
DIAGONAL = torch.eye(3, dtype=torch.bool)
OFFSETS = torch.tensor([[0.0], [-0.5], [0.5]], dtype=torch.float64)


def random_scores(seed, b=4, n=5):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(b, n, generator=generator) < 0.3
    mask[0, :2] = torch.tensor([True, False])
    return torch.randn(b, n, generator=generator, dtype=torch.float64), mask


def pairs(seed, b=5, d=4, h=0):
    generator = torch.Generator().manual_seed(seed)
    query, passage = torch.randn(2, b, d, generator=generator, dtype=torch.float64).unbind()
    return query, passage, torch.randn(b, h, d, generator=generator, dtype=torch.float64) if h else None


@pytest.mark.parametrize(
    ("temperature", "mean", "paper", "contrastive"),
    [
        (1.0, 0.519550, 3.117301, 0.858239),
        (0.1, 0.131807, 0.790840, 0.153398),
        (0.01, 0.555563, 3.333379, 1.513365e-05),
    ],
)
def test_golden_values(temperature, mean, paper, contrastive):
    assert MannWhitneyLoss(temperature).of_scores(S, DIAGONAL).item() == pytest.approx(mean, abs=1e-6)
    in_paper = MannWhitneyLoss(temperature, reduction="paper").of_scores(S, DIAGONAL)
    assert in_paper.item() == pytest.approx(paper, abs=1e-6)
    other = InBatchContrastiveLoss(temperature).of_scores(S, DIAGONAL)
    assert other.item() == pytest.approx(contrastive, rel=1e-6, abs=1e-6 * (temperature > 0.01))
    assert pooled_auc(S, DIAGONAL) == pytest.approx(0.944444, abs=1e-6)


def test_offsets_of_queries_are_seen():
    moved = S + OFFSETS
    assert InBatchContrastiveLoss(0.1).of_scores(moved, DIAGONAL).item() == pytest.approx(0.153398, abs=1e-6)
    assert MannWhitneyLoss(0.1).of_scores(moved, DIAGONAL).item() == pytest.approx(1.568618, abs=1e-6)
    assert pooled_auc(moved, DIAGONAL) == pytest.approx(0.666667, abs=1e-6)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 999), temperature=st.floats(1e-2, 1e2), ties=st.booleans())
def test_it_bounds_what_is_missing_from_the_area(seed, temperature, ties):
    scores, mask = random_scores(seed)
    scores = scores.round() if ties else scores
    loss = MannWhitneyLoss(temperature).of_scores(scores, mask).item()
    assert 1 - pooled_auc(scores, mask) <= loss / math.log(2) + 1e-12


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), shift=st.floats(-5, 5), order=st.permutations(range(4)))
def test_a_shift_of_all_and_the_order_of_queries_do_not_matter(seed, shift, order):
    scores, mask = random_scores(seed)
    loss = MannWhitneyLoss(0.2)
    value = loss.of_scores(scores, mask)
    torch.testing.assert_close(loss.of_scores(scores + shift, mask), value)
    torch.testing.assert_close(loss.of_scores(scores[order], mask[order]), value)


def test_two_queries_are_compared_within_and_across():
    query, passage, _ = pairs(0, 2)
    s = F.normalize(query, dim=1) @ F.normalize(passage, dim=1).T
    expected = torch.stack([F.softplus((s[j, 1 - j] - s[i, i]) / 0.1) for i in range(2) for j in range(2)]).mean()
    torch.testing.assert_close(MannWhitneyLoss(0.1)(query, passage), expected)


def test_a_single_query_is_ranked_against_its_hard_negatives():
    query, passage, hard = pairs(1, 1, h=3)
    s = F.normalize(torch.cat([passage, hard[0]]), dim=1) @ F.normalize(query[0], dim=0)
    torch.testing.assert_close(MannWhitneyLoss(0.1)(query, passage, hard), F.softplus((s[1:] - s[0]) / 0.1).mean())


def test_hard_negatives_are_those_of_all_queries():
    query, passage, hard = pairs(2, 4, h=2)
    q, p = F.normalize(query, dim=1), F.normalize(torch.cat([passage, hard.flatten(0, 1)]), dim=1)
    scores = q @ p.T
    mask = torch.eye(4, 12, dtype=torch.bool)
    for family in (MannWhitneyLoss(0.1), MannWhitneyLoss(0.1, reduction="paper"), InBatchContrastiveLoss(0.1)):
        torch.testing.assert_close(family(query, passage, hard), family.of_scores(scores, mask))
    negatives = scores[~mask]
    assert len(negatives) == 4 * (4 * 2 + 4 - 1)


def test_the_contrastive_loss_without_hard_negatives_is_infonce():
    query, passage, _ = pairs(3)
    torch.testing.assert_close(InBatchContrastiveLoss(0.2)(query, passage), InfoNCELoss(0.2)(query, passage))


def test_scores_that_do_not_count_are_left_out():
    scores, mask = random_scores(4)
    valid = torch.ones_like(mask)
    valid[:, -1] = False
    loss = MannWhitneyLoss(0.2)
    torch.testing.assert_close(loss.of_scores(scores, mask, valid), loss.of_scores(scores[:, :-1], mask[:, :-1]))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_cold_limit_is_the_mean_hinge(offset):
    scores = S + offset * OFFSETS
    expected = {0.0: 0.005556, 1.0: 0.15}[offset]
    assert 1e-4 * MannWhitneyLoss(1e-4).of_scores(scores, DIAGONAL).item() == pytest.approx(expected, abs=1e-6)
    positive, negative = scores[DIAGONAL], scores[~DIAGONAL]
    assert (negative - positive[:, None]).clamp(min=0).mean().item() == pytest.approx(expected, abs=1e-6)


def test_the_gradient_has_its_closed_form():
    s = S.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(MannWhitneyLoss(0.2).of_scores(s, DIAGONAL), s)
    positive, negative = S[DIAGONAL], S[~DIAGONAL]
    wrong = torch.sigmoid((negative - positive[:, None]) / 0.2) / (3 * 6 * 0.2)
    torch.testing.assert_close(gradient[DIAGONAL], -wrong.sum(1))
    torch.testing.assert_close(gradient[~DIAGONAL], wrong.sum(0))


@pytest.mark.parametrize("reduction", ["none", "mean", "paper"])
def test_chunks_change_nothing(reduction):
    query, passage, _ = pairs(5, 7)
    values = []
    for chunk_size in (None, 1, 3, 100):
        leaves = [x.clone().requires_grad_() for x in (query, passage)]
        loss = MannWhitneyLoss(0.1, chunk_size=chunk_size, reduction=reduction)(*leaves)
        values.append((loss.detach(), *torch.autograd.grad(loss.sum(), leaves)))
    for value in values[1:]:
        torch.testing.assert_close(value, values[0])


def test_large_batches_are_taken_in_chunks_by_themselves(monkeypatch):
    query, passage, _ = pairs(6, 9)
    whole = MannWhitneyLoss(0.1)(query, passage)
    monkeypatch.setattr("fairtrial.methods.losses.mw_loss.PAIRS_AT_ONCE", 100)
    torch.testing.assert_close(MannWhitneyLoss(0.1)(query, passage), whole)


@pytest.mark.parametrize("hard", [0, 2])
@pytest.mark.parametrize("temperature", [0.3, 2.0, 100.0])
def test_many_pairs_are_compared_through_a_grid(monkeypatch, temperature, hard):
    views = [x.requires_grad_() for x in pairs(8, 23, h=hard) if x is not None]
    direct = MannWhitneyLoss(temperature, chunk_size=5, reduction="none")(*views)
    compared = []
    monkeypatch.setattr(mw_loss, "PAIRS_AT_ONCE", 100)
    monkeypatch.setattr(mw_loss, "SCORES_AT_ONCE", 100)
    monkeypatch.setattr(mw_loss, "comparisons", lambda *x: (compared.append(x), comparisons(*x))[1])
    gridded = MannWhitneyLoss(temperature, reduction="none")(*views)
    assert all(weights is not None and len(points) < 23 * 22 for _, points, _, weights in compared)
    torch.testing.assert_close(gridded, direct, rtol=1e-12, atol=0)
    weights = torch.linspace(0, 1, 23, dtype=torch.float64)
    slopes = (torch.autograd.grad((weights * loss).sum(), views) for loss in (gridded, direct))
    for slope, expected in zip(*slopes, strict=True):
        torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), temperature=st.floats(0.05, 20.0), spread=st.sampled_from([0.0, 1e-3, 1.0, 5.0]))
def test_scores_are_compared_through_a_grid_too(seed, temperature, spread):
    scores, mask = random_scores(seed, 30, 40)
    scores = torch.where(mask, scores, spread * scores).requires_grad_()
    direct = MannWhitneyLoss(temperature, chunk_size=10**6).of_scores(scores, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mw_loss, "PAIRS_AT_ONCE", 100)
        gridded = MannWhitneyLoss(temperature).of_scores(scores, mask)
    torch.testing.assert_close(gridded, direct, rtol=1e-11, atol=0)
    slopes = [torch.autograd.grad(loss, scores)[0] for loss in (gridded, direct)]
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-10 * slopes[1].abs().max().item())


def test_the_grid_is_differentiable_twice_and_half_precision_enough(monkeypatch):
    monkeypatch.setattr(mw_loss, "PAIRS_AT_ONCE", 10)
    views = [x.requires_grad_() for x in pairs(9, 7)[:2]]
    loss = MannWhitneyLoss(1.0)
    assert loss._by_grid(7, 42, mw_loss.grid_between(-1.0, 1.0, 1.0))
    assert torch.autograd.gradcheck(loss, views)
    assert torch.autograd.gradgradcheck(loss, views)
    halves = [x.detach().bfloat16() for x in views]
    assert loss(*halves).dtype == torch.bfloat16
    torch.testing.assert_close(loss(*halves).double(), loss(*[x.double() for x in halves]), rtol=1e-2, atol=0)


def test_where_a_grid_would_not_be_smaller_pairs_are_compared_directly(monkeypatch):
    monkeypatch.setattr(mw_loss, "PAIRS_AT_ONCE", 10)
    direct = MannWhitneyLoss(1e-4, chunk_size=10**6).of_scores(S, DIAGONAL)
    torch.testing.assert_close(MannWhitneyLoss(1e-4).of_scores(1e4 * S, DIAGONAL), 1e4 * direct, rtol=1e-6, atol=0)


def test_misuse_is_refused_with_the_argument_named():
    for arguments in ({"temperature": 0.0}, {"temperature": float("nan")}, {"chunk_size": 0}, {"reduction": "avg"}):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
            MannWhitneyLoss(**arguments)
    loss = MannWhitneyLoss()
    nothing = torch.zeros(3, 3, dtype=torch.bool)
    for mask in (nothing, ~nothing):
        with pytest.raises(ValueError, match="^positive_mask must be such that there is a"):
            loss.of_scores(S, mask)
        with pytest.raises(ValueError, match="^positive_mask must be such that both kinds occur"):
            pooled_auc(S, mask)
    with pytest.raises(ValueError, match="^scores must be finite"):
        loss.of_scores(S.log().sqrt(), DIAGONAL)
    with pytest.raises(ValueError, match="^positive_mask must be true exactly once in each row"):
        InBatchContrastiveLoss().of_scores(S, DIAGONAL | DIAGONAL.roll(1, 1))
    query, passage, hard = pairs(7, 3, h=2)
    with pytest.raises(ValueError, match=r"^hard_negatives must be of shape \(3, h ≥ 1, 4\)"):
        loss(query, passage, hard[:, :0])
    with pytest.raises(ValueError, match="^query must be embeddings of at least 2 samples"):
        loss(query[:1], passage[:1])
