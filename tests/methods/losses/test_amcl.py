import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.losses import (
    AMCL,
    AMCLLoss,
    BarlowAMCLLoss,
    MultiHeadProjector,
    NTXentLoss,
    PairTemperature,
    SimSiamAMCLLoss,
)
from fairtrial.methods.losses.amcl import adaptive_terms, omega

DOUBLE = torch.float64


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def heads(seed, c=2, n=5, d=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, c, n, d, generator=generator, dtype=DOUBLE).unbind()


@pytest.mark.parametrize(
    ("dim", "tau", "expected"),
    [(128, 0.1, -137.365446), (128, 1.0, 1.0), (128, 2.0, 44.861420), (2, 0.1, 7.697415), (2, 0.5, 1.306853)],
)
def test_golden_values_of_the_regulariser(dim, tau, expected):
    assert omega(torch.tensor(tau, dtype=DOUBLE), dim).item() == pytest.approx(expected, abs=1e-6)


def test_the_regulariser_is_lowest_at_two_over_dim():
    taus = torch.linspace(0.001, 0.1, 10_000, dtype=DOUBLE)
    assert taus[omega(taus, 128).argmin()].item() == pytest.approx(0.015625, abs=1e-5)


@pytest.mark.parametrize(
    ("top_k", "beta", "expected"),
    [(1, 0.0, -0.558333), (1, 0.1, -0.584899), (1, 1.0, -0.823988), (2, 0.0, -1.445833), (2, 0.1, -1.437723)],
)
def test_golden_values(top_k, beta, expected):
    loss = adaptive_terms(
        torch.tensor([[0.8], [0.6]], dtype=DOUBLE),
        torch.tensor([[0.5], [0.4]], dtype=DOUBLE),
        torch.tensor([[[0.1, 0.5, -0.2]], [[0.3, 0.7, 0.2]]], dtype=DOUBLE),
        torch.tensor([[[0.6, 0.3, 0.9]], [[0.5, 0.8, 0.7]]], dtype=DOUBLE),
        dim=2,
        beta=beta,
        top_k=top_k,
    )
    assert loss.tolist() == pytest.approx([expected], abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), tau=st.floats(0.05, 5.0))
def test_the_positive_part_is_a_gaussian_likelihood(seed, tau):
    (a, b), d = (F.normalize(x[0, 0], dim=0) for x in heads(seed)), 4
    gaussian = -torch.distributions.Normal(b, math.sqrt(tau)).log_prob(a).sum()
    positive = omega(torch.tensor(tau, dtype=DOUBLE), d) - a @ b / tau
    torch.testing.assert_close(positive, gaussian - 0.5 * d * math.log(2 * math.pi))


def test_the_stationary_temperature_of_a_positive():
    similarity, beta, d = 0.3, 0.8, 16
    tau = torch.tensor(2 * (beta - similarity) / (beta * d), dtype=DOUBLE, requires_grad=True)
    (gradient,) = torch.autograd.grad(beta * omega(tau, d) - similarity / tau, tau)
    assert gradient.item() == pytest.approx(0.0, abs=1e-9)


def test_one_head_without_regulariser_is_the_cold_limit_of_nt_xent():
    a, b = heads(0, 1)
    loss = AMCLLoss(0.7, 0.0)(a, b)
    z = F.normalize(torch.cat([a[0], b[0]]), dim=1)
    square = z @ z.T
    same = torch.eye(5, dtype=torch.bool).repeat(2, 2)
    rival = square.masked_fill(same, -torch.inf).amax(1)
    torch.testing.assert_close(loss, ((rival - square.diagonal(5).repeat(2)) / 0.7).mean())
    hinge = 1e-4 * NTXentLoss(1e-4, reduction="none")(a[0], b[0])
    torch.testing.assert_close(
        hinge, (rival - square.diagonal(5).repeat(2)).relu().view(2, 5).mean(0), atol=1e-3, rtol=0
    )


def test_logsumexp_at_a_fixed_temperature_is_nt_xent():
    a, b = heads(1, 1)
    loss = AMCLLoss(0.3, 0.0, negative="logsumexp", reduction="none")(a, b)
    torch.testing.assert_close(loss, NTXentLoss(0.3, reduction="none")(a[0], b[0]))
    constant = AMCLLoss(0.3, 5.0, negative="logsumexp", reduction="none")(a, b)
    torch.testing.assert_close(constant, loss)  # equal temperatures: their regularisers cancel


@pytest.mark.parametrize("mode", ["dot", "concat"])
def test_temperatures_stay_within_their_bounds_and_pairs_agree(mode):
    temperature = seeded(lambda: PairTemperature(4, 8, 0.1, 0.6, mode=mode, num_heads=2))
    a, b = heads(2)
    every = temperature.all_pairs(1e3 * a, 1e3 * b)
    assert ((every >= 0.1) & (every <= 0.6)).all()
    torch.testing.assert_close(temperature.all_pairs(a, b).diagonal(0, 1, 2), temperature(a, b))
    swapped = temperature(b, a)
    assert torch.allclose(swapped, temperature(a, b)) == (mode == "dot")


def test_the_concatenated_form_is_an_mlp_on_both_projections():
    temperature = seeded(lambda: PairTemperature(4, 8, mode="concat"))
    a, b = heads(3, 1)
    mlp = temperature.mlp
    both = torch.cat([a[0, 1], b[0, 3]])
    hidden = torch.relu(both @ mlp.hidden_weight[0] + mlp.hidden_bias[0, 0])
    phi = hidden @ mlp.out_weight[0] + mlp.out_bias[0, 0]
    torch.testing.assert_close(temperature.all_pairs(a, b)[0, 1, 3], 0.05 + 0.95 * phi.sigmoid()[0])


def test_duplicating_a_head_doubles_the_loss():
    a, b = heads(4, 1)
    loss = AMCLLoss(seeded(lambda: PairTemperature(4)), top_k=2)
    torch.testing.assert_close(loss(a.repeat(2, 1, 1), b.repeat(2, 1, 1)), 2 * loss(a, b))


def test_heads_may_come_one_by_one_and_views_in_either_order():
    a, b = heads(5, 3)
    loss = AMCLLoss(seeded(lambda: PairTemperature(4)), top_k=3)
    torch.testing.assert_close(loss(list(a), list(b)), loss(a, b))
    torch.testing.assert_close(loss(b, a), loss(a, b))


@pytest.mark.parametrize("negative", ["max", "logsumexp"])
@pytest.mark.parametrize("mode", ["dot", "concat"])
def test_derivatives(negative, mode):
    a, b = (x.requires_grad_() for x in heads(6, 2, 3))
    loss = AMCLLoss(seeded(lambda: PairTemperature(4, 6, mode=mode)), top_k=2, negative=negative)
    assert torch.autograd.gradcheck(loss, (a, b))
    loss(a, b).backward()
    assert all(parameter.grad is not None for parameter in loss.parameters())


def test_heads_have_weights_of_their_own_and_are_mlps():
    projector = seeded(lambda: MultiHeadProjector(4, 6, 3, 2))
    x = heads(7)[0][0]
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    with torch.no_grad():
        plain[0].weight.copy_(projector.hidden_weight[1].T)
        plain[0].bias.copy_(projector.hidden_bias[1, 0])
        plain[2].weight.copy_(projector.out_weight[1].T)
        plain[2].bias.copy_(projector.out_bias[1, 0])
    z = projector(x)
    assert z.shape == (2, 5, 3)
    torch.testing.assert_close(z[1], plain(x))
    assert not torch.allclose(z[0], z[1])


def test_the_form_for_a_single_output_is_its_parts():
    module = seeded(lambda: AMCL(4, 2, 0.3, hidden_dim=6, out_dim=3, top_k=2))
    a, b = (x[0] for x in heads(8))
    torch.testing.assert_close(module(a, b), module.loss(module.projector(a), module.projector(b)))
    assert module.loss.beta == 0.3
    assert module.loss.top_k == 2


def test_simsiam_is_its_definition_and_targets_get_no_gradient():
    p1, p2 = heads(9)
    t1, t2 = (x[0] for x in heads(10))
    loss = SimSiamAMCLLoss(0.4, 0.2)(p1, p2, t1, t2)
    similar = F.cosine_similarity(p1, t2[None], dim=-1) + F.cosine_similarity(p2, t1[None], dim=-1)
    regulariser = omega(torch.tensor(0.4, dtype=DOUBLE), 4)
    torch.testing.assert_close(loss, (-similar / 0.8 + 2 * 0.2 * regulariser).sum(0).mean())
    adaptive = SimSiamAMCLLoss(seeded(lambda: PairTemperature(4)), reduction="none")
    leaves = [x.requires_grad_() for x in (p1, p2, t1, t2)]
    value = adaptive(*leaves)
    assert value.shape == (5,)
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    assert [gradient is None for gradient in gradients] == [False, False, True, True]
    assert torch.autograd.gradcheck(lambda a: adaptive(a, p2, t1, t2), p1)


def test_barlow_twins_is_its_definition():
    a, b = heads(11)
    loss = BarlowAMCLLoss(0.4, 0.2, off_diagonal=0.05)(a, b)
    expected = torch.zeros((), dtype=DOUBLE)
    regulariser = omega(torch.tensor(0.4, dtype=DOUBLE), 4)
    for first, second in zip(a, b, strict=True):
        standard = [(x - x.mean(0)) / x.std(0, correction=0) for x in (first, second)]
        correlation = standard[0].T @ standard[1] / 5
        same = correlation.diagonal()
        expected += (1 - same / 0.4).square().sum() + 4 * 0.2 * regulariser
        expected += 0.05 * (correlation.square().sum() - same.square().sum()) / 0.4 - 12 * 0.2 * regulariser
    torch.testing.assert_close(loss, expected)
    adaptive = BarlowAMCLLoss(seeded(lambda: PairTemperature(5)))
    assert torch.autograd.gradcheck(adaptive, (a.requires_grad_(), b.requires_grad_()))


def test_a_fixed_temperature_has_no_weights():
    assert not list(AMCLLoss(0.2).parameters())
    assert "temperature=0.2" in repr(AMCLLoss(0.2))


def test_misuse_is_refused_with_the_argument_named():
    nan = float("nan")
    for make, name in (
        (lambda: AMCLLoss(0.0), "temperature"),
        (lambda: AMCLLoss(0.1, nan), "beta"),
        (lambda: AMCLLoss(0.1, top_k=0), "top_k"),
        (lambda: AMCLLoss(0.1, negative="mean"), "negative"),
        (lambda: AMCLLoss(0.1, reduction="avg"), "reduction"),
        (lambda: PairTemperature(4, low=0.0), "low"),
        (lambda: PairTemperature(4, low=0.5, high=0.5), "high"),
        (lambda: PairTemperature(4, mode="sum"), "mode"),
        (lambda: PairTemperature(4, hidden=0), "hidden_dim"),
        (lambda: MultiHeadProjector(4, 4, 4, 0), "num_heads"),
        (lambda: AMCL(0), "embedding_dim"),
        (lambda: BarlowAMCLLoss(0.1, off_diagonal=0.0), "off_diagonal"),
        (lambda: SimSiamAMCLLoss(-1.0), "temperature"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            make()
    a, b = heads(12)
    for arguments, name in (
        ((a[:, :1], b[:, :1]), "views1"),
        ((a, nan * b), "views2"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            AMCLLoss(0.1)(*arguments)


def test_another_number_of_heads_is_refused(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    a, b = heads(13, 3)
    with pytest.raises(ValueError, match=r"^views2 must be of shape \(3, 5, 4\), as views1"):
        AMCLLoss(0.1)(a, b[:2])
    with pytest.raises(ValueError, match="^targets1 must be of shape"):
        SimSiamAMCLLoss(0.1)(a, b, a[0, :3], a[0, :3])
