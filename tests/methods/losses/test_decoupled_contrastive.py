import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import DCLLoss, DCLWLoss, NTXentLoss, npc_multiplier
from fairtrial.methods.losses.decoupled_contrastive import decoupled_terms, negative_von_mises_fisher

Z1 = torch.tensor([[1, 0], [0, 1], [0.6, 0.8]], dtype=torch.float64)
Z2 = torch.tensor([[0.8, 0.6], [0.28, 0.96], [1, 0]], dtype=torch.float64)


def views(seed, n=5, d=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, d, generator=generator, dtype=torch.float64).unbind()


@pytest.mark.parametrize(
    ("temperature", "first", "second", "both"),
    [(0.1, 1.615829, 2.025596, 1.820713), (0.5, 1.093908, 1.232464, 1.163186)],
)
def test_golden_values(temperature, first, second, both):
    positive, log_sum = decoupled_terms(Z1, Z2, temperature)
    assert (log_sum - positive).mean(1).tolist() == pytest.approx([first, second], abs=1e-6)
    assert DCLLoss(temperature)(Z1, Z2).item() == pytest.approx(both, abs=1e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 2.237156), (0.5, 1.246475)])
def test_golden_values_of_the_weighted_loss(temperature, expected):
    weights = negative_von_mises_fisher(Z1, Z2)
    assert weights.tolist() == pytest.approx([1.015570, 0.644314, 1.340117], abs=1e-6)
    assert weights.mean().item() == pytest.approx(1.0)
    assert DCLWLoss(temperature)(Z1, Z2).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 2.264528), (0.5, 1.456674)])
def test_golden_values_of_nt_xent(temperature, expected):
    assert NTXentLoss(temperature)(Z1, Z2).item() == pytest.approx(expected, abs=1e-6)


def test_nt_xent_is_cross_entropy_over_all_other_embeddings():
    z1, z2 = (F.normalize(z, dim=1) for z in views(0))
    z = torch.cat([z1, z2])
    logits = (z @ z.T / 0.2).fill_diagonal_(-torch.inf)
    target = torch.arange(10).roll(5)
    torch.testing.assert_close(NTXentLoss(0.2)(z1, z2), F.cross_entropy(logits, target))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), temperature=st.floats(0.03, 3.0))
def test_nt_xent_is_softplus_of_dcl_and_its_gradient_that_of_dcl_times_the_factor(seed, temperature):
    z1, z2 = views(seed)
    positive, log_sum = decoupled_terms(z1, z2, temperature)
    decoupled, q = log_sum - positive, npc_multiplier(z1, z2, temperature)
    torch.testing.assert_close(NTXentLoss(temperature)(z1, z2), F.softplus(decoupled).mean())
    torch.testing.assert_close(q, decoupled.sigmoid())
    torch.testing.assert_close(q, 1 - positive.exp() / (positive.exp() + log_sum.exp()))
    leaf = z1.clone().requires_grad_()
    terms = [x[0, 0] for x in decoupled_terms(leaf, z2, temperature)]
    (of_dcl,) = torch.autograd.grad(terms[1] - terms[0], leaf, retain_graph=True)
    (of_nt_xent,) = torch.autograd.grad(F.softplus(terms[1] - terms[0]), leaf)
    torch.testing.assert_close(of_nt_xent, q[0, 0] * of_dcl)


def test_the_factor_rises_with_the_batch_towards_one():
    generator = torch.Generator().manual_seed(0)
    factors = []
    for n in (4, 16, 64, 256):
        z1 = F.normalize(torch.randn(n, 8, generator=generator), dim=1)
        factors.append(npc_multiplier(z1, z1 + 0.1 * torch.randn(n, 8, generator=generator), 0.5).mean().item())
    assert factors == sorted(factors)
    assert factors[0] < 0.7
    assert factors[-1] > 0.97


def test_wide_weights_are_all_one():
    z1, z2 = views(1)
    torch.testing.assert_close(DCLWLoss(0.2, 1e9)(z1, z2), DCLLoss(0.2)(z1, z2))


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999))
def test_swapping_the_views_does_not_matter(seed):
    z1, z2 = views(seed)
    for loss in (DCLLoss(0.2), DCLWLoss(0.2), NTXentLoss(0.2)):
        torch.testing.assert_close(loss(z1, z2), loss(z2, z1))


def test_weights_see_views_of_length_one():
    seen = []
    loss = DCLLoss(weight_fn=lambda *views: seen.extend(views) or torch.ones(len(views[0])))
    loss(*(5 * z for z in views(0)))
    assert [z.norm(dim=1).tolist() for z in seen] == [pytest.approx([1.0] * 5)] * 2


def test_no_gradient_goes_through_weights():
    z1, z2 = (view.requires_grad_() for view in views(2))
    fixed = negative_von_mises_fisher(z1, z2).detach()
    assert torch.autograd.gradcheck(DCLLoss(0.3, lambda *_: fixed), (z1, z2))
    ours = torch.autograd.grad(DCLWLoss(0.3)(z1, z2), (z1, z2))
    torch.testing.assert_close(ours, torch.autograd.grad(DCLLoss(0.3, lambda *_: fixed)(z1, z2), (z1, z2)))
    free = torch.autograd.grad(DCLLoss(0.3, lambda a, b: (a * b).sum(1))(z1, z2), (z1, z2))
    same = torch.autograd.grad(DCLLoss(0.3, lambda a, b: (a * b).sum(1).detach())(z1, z2), (z1, z2))
    torch.testing.assert_close(free, same)


def test_misuse_is_refused_with_the_argument_named():
    for family in (DCLLoss, DCLWLoss, NTXentLoss):
        for arguments in ({"temperature": 0.0}, {"temperature": float("nan")}, {"reduction": "avg"}):
            with pytest.raises(ValueError, match=f"^{next(iter(arguments))} must be"):
                family(**arguments)
    with pytest.raises(ValueError, match="^sigma must be"):
        DCLWLoss(sigma=0.0)
    with pytest.raises(ValueError, match="^temperature must be"):
        npc_multiplier(Z1, Z2, -1.0)
    with pytest.raises(ValueError, match=r"^z1 must be embeddings of at least 2 samples, got \(1, 2\)"):
        DCLLoss()(Z1[:1], Z2[:1])
