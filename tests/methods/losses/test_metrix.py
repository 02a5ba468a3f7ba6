import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import GenericPairLoss, MetricMix, utilization
from fairtrial.methods.losses.metrix import (
    PRESETS,
    Mixture,
    contrastive,
    lifted_structure,
    multi_similarity,
    nca,
    proxy_anchor,
)


def batch(seed=0, n=12, d=5, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64), torch.arange(n) % classes


def seeded(*arguments, seed=0, **options):
    """A loss with draws of its own."""
    return MetricMix(*arguments, generator=torch.Generator().manual_seed(seed), **options)


def with_proxies(**options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return seeded("proxy_anchor", num_classes=5, embedding_dim=5, **options)


def soft(s, y, preset):
    return preset(torch.tensor([s], dtype=torch.float64), torch.tensor([y], dtype=torch.float64)).item()


@pytest.mark.parametrize(
    ("preset", "expected"),
    [(contrastive(0.5), -0.223607), (contrastive(0.2), -0.100000), (multi_similarity(2.0, 50.0, 0.5), 0.221656)],
)
def test_golden_values(preset, expected):
    v = F.normalize(torch.tensor([[0.4, 0.8]], dtype=torch.float64))
    assert v[0, 0].item() == pytest.approx(0.447214, abs=1e-6)
    assert soft([v[0, 0].item()], [0.5], preset) == pytest.approx(expected, abs=1e-6)


def test_the_golden_mixture_is_formed_inside_the_loss():
    x = torch.tensor([[1.0, 0], [0.8, 0.6], [0, 1]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    half = torch.full((3, 1), 0.5, dtype=torch.float64)
    mixture = Mixture(
        torch.tensor([[1], [0], [2]]), torch.tensor([[2], [2], [0]]), half, torch.tensor([[True], [False], [False]])
    )
    clean = MetricMix("contrastive", weight=0.0)(x, labels)
    mixed = F.normalize(torch.lerp(x[mixture.second[:, 0]], x[mixture.first[:, 0]], 0.5))
    total = MetricMix("contrastive", mode="input", weight=1.0)(x, labels, 3.0 * mixed, mixture)
    assert (3 * (total - clean)).item() == pytest.approx(-0.223607, abs=1e-6)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_hard_labels_give_the_loss_by_its_definition(preset):
    generator = torch.Generator().manual_seed(0)
    s = 2 * torch.rand(4, 7, generator=generator, dtype=torch.float64) - 1
    y = torch.tensor([1, 0, 0, 1, 1, 0, 0]).expand(4, 7)
    p, n = s[:, y[0] == 1], s[:, y[0] == 0]
    expected = {
        "contrastive": -p.sum(1) + (n - 0.5).clamp(min=0).sum(1),
        "lifted_structure": (torch.exp(-p).sum(1).log() + torch.exp(n - 0.5).sum(1).log()).clamp(min=0),
        "binomial_deviance": torch.log1p(torch.exp(-2 * (p - 0.5))).sum(1)
        + torch.log1p(torch.exp(50 * (n - 0.5))).sum(1),
        "multi_similarity": torch.log1p(torch.exp(-2 * (p - 0.5)).sum(1)) / 2
        + torch.log1p(torch.exp(50 * (n - 0.5)).sum(1)) / 50,
        "proxy_anchor": torch.log1p(torch.exp(-32 * (p - 0.1)).sum(1)) / 32
        + torch.log1p(torch.exp(32 * (n - 0.1)).sum(1)) / 32,
        "nca": -torch.exp(p).sum(1).log() + torch.exp(n).sum(1).log(),
    }
    (name,) = (name for name, make in PRESETS.items() if make is preset)
    for hard in (y, y.double(), y.bool()):
        torch.testing.assert_close(preset()(s, hard), expected[name], rtol=1e-7, atol=1e-7)


def test_of_one_side_only_the_other_part_is_left():
    s = torch.tensor([[0.3, 0.7, -0.2]], dtype=torch.float64)
    ones, zeros = torch.ones_like(s), torch.zeros_like(s)
    assert contrastive()(s, ones).item() == pytest.approx(-0.8)
    assert contrastive()(s, zeros).item() == pytest.approx(0.2)
    positive = torch.log1p(torch.exp(-2 * (s - 0.5)).sum()) / 2
    negative = torch.log1p(torch.exp(50 * (s - 0.5)).sum()) / 50
    torch.testing.assert_close(multi_similarity()(s, ones)[0], positive)
    torch.testing.assert_close(multi_similarity()(s, zeros)[0], negative)
    for undefined in (lifted_structure(), nca()):
        assert undefined(s, ones) == undefined(s, zeros) == 0


def test_contrastive_is_linear_in_the_weights():
    generator = torch.Generator().manual_seed(1)
    s = 2 * torch.rand(3, 6, generator=generator, dtype=torch.float64) - 1
    lam = torch.rand(3, 6, generator=generator, dtype=torch.float64)
    expected = (-lam * s + (1 - lam) * (s - 0.5).clamp(min=0)).sum(1)
    torch.testing.assert_close(contrastive()(s, lam), expected)
    mask = s > 0
    expected = ((-lam * s + (1 - lam) * (s - 0.5).clamp(min=0)) * mask).sum(1)
    torch.testing.assert_close(contrastive()(s, lam, mask), expected)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_differentiable_and_can_be_pickled(preset):
    generator = torch.Generator().manual_seed(2)
    s = (2 * torch.rand(3, 5, generator=generator, dtype=torch.float64) - 1).requires_grad_()
    y = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    loss = pickle.loads(pickle.dumps(preset()))
    assert torch.autograd.gradcheck(lambda s: loss(s, y), s)
    assert repr(loss) == repr(preset())
    assert "rho_neg=" in repr(loss)
    huge = (1e4 * s.detach()).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(huge, y).sum(), huge)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["contrastive", "multi_similarity", "binomial_deviance", "lifted_structure"])
@pytest.mark.parametrize("pairs", ["posneg", "ancneg", "random"])
def test_embeddings_mixed_inside_are_those_mixed_outside(name, pairs):
    x, labels = batch(1)
    inside = seeded(name, pairs=pairs, weight=0.7)
    outside = copy.deepcopy(inside)
    unit = F.normalize(x)
    for _ in range(4):
        mixed, mixture = outside.mix_inputs(unit, x, labels)
        torch.testing.assert_close(inside(x, labels), outside(x, labels, mixed, mixture))
        inside.generator.set_state(outside.generator.get_state())


def test_what_is_mixed():
    x, labels = batch(2)
    loss = seeded(mode="input", pairs="posneg", negatives=3)
    mixed, mixture = loss.mix_inputs(x.view(12, 5, 1), x, labels)
    assert mixed.shape == (36, 5, 1)
    assert mixture.valid.all()
    assert (labels[mixture.first] == labels[:, None]).all()
    assert (mixture.first != torch.arange(12)[:, None]).all()
    assert (labels[mixture.second] != labels[:, None]).all()
    s = F.normalize(x) @ F.normalize(x).T
    hardest = s.masked_fill(labels[:, None] == labels, -torch.inf).topk(3, 1).indices
    assert torch.equal(mixture.second, hardest)
    expected = mixture.lam[:, :, None] * x[mixture.first] + (1 - mixture.lam[:, :, None]) * x[mixture.second]
    torch.testing.assert_close(mixed.view(12, 3, 5), expected)

    _, mixture = seeded(mode="input", pairs="ancneg").mix_inputs(x, x, labels)
    assert mixture.first is None
    assert mixture.second.shape == (12, 1)
    _, mixture = seeded(mode="feature", pairs="posneg").mix_inputs(x, x, labels)
    assert mixture.second.shape == (12, 12)
    assert (mixture.valid.sum(1) == 8).all()


def test_every_positive_is_drawn_and_one_without_any_stands_in_itself():
    x, _ = batch(3, n=6)
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    loss = seeded(pairs="posneg")
    seen = set()
    for _ in range(40):
        _, mixture = loss.mix_inputs(x, x, labels)
        seen |= set(mixture.first[0][mixture.valid[0]].tolist())
        assert (mixture.first[3] == 3).all()
    assert seen == {1, 2}


def test_both_kinds_of_pairs_come_up_and_lambdas_are_beta_distributed():
    x, labels = batch(4, n=100)
    for alpha, tolerance in ((2.0, 0.01), (0.5, 0.01)):
        loss = seeded(alpha=alpha, negatives=1)
        found = [loss.mix_inputs(x, x, labels)[1] for _ in range(100)]
        lam = torch.cat([mixture.lam for mixture in found])
        assert lam.mean().item() == pytest.approx(0.5, abs=tolerance)
        assert lam.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=tolerance)
        assert 30 < sum(mixture.first is None for mixture in found) < 70


def test_without_weight_in_eval_mode_or_without_negatives_nothing_is_mixed():
    x, labels = batch(5)
    for name in ("contrastive", "multi_similarity", "lifted_structure"):
        s = F.normalize(x) @ F.normalize(x).T
        others = ~torch.eye(12, dtype=torch.bool)
        clean = PRESETS[name]()(s, labels[:, None] == labels, others).mean()
        torch.testing.assert_close(seeded(name, weight=0.0)(x, labels), clean)
        torch.testing.assert_close(seeded(name).eval()(x, labels), clean)
        assert not torch.allclose(seeded(name)(x, labels), clean)
        alone = torch.zeros(12, dtype=torch.long)
        torch.testing.assert_close(seeded(name)(x, alone), seeded(name, weight=0.0)(x, alone))


def test_proxies_are_anchors():
    x, labels = batch(6, classes=3)
    loss = with_proxies(weight=0.0)
    s = F.normalize(loss.proxies) @ F.normalize(x.float()).T
    y = torch.arange(5)[:, None] == labels
    torch.testing.assert_close(loss(x.float(), labels), proxy_anchor()(s, y)[:3].mean())
    for pairs in ("posneg", "ancneg"):
        mixing = with_proxies(pairs=pairs)
        mixing(x.float(), labels).backward()
        assert mixing.proxies.grad[:3].abs().sum() > 0
        assert mixing.proxies.grad[3:].abs().sum() == 0
    mixed, mixture = with_proxies(mode="input", pairs="posneg").mix_inputs(x, x, labels)
    assert mixed.shape == (5, 5)
    assert mixture.valid[:3].all()


def test_the_mixed_loss_is_differentiable():
    x, labels = batch(7, n=6)
    for name in ("contrastive", "multi_similarity"):
        for pairs in ("posneg", "ancneg"):
            assert torch.autograd.gradcheck(
                lambda x, name=name, pairs=pairs: seeded(name, pairs=pairs)(x, labels), x.requires_grad_()
            )


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_lengths_and_rotations_do_not_matter(seed):
    x, labels = batch(seed)
    turn, _ = torch.linalg.qr(batch(seed + 1, n=5)[0])
    torch.testing.assert_close(seeded(seed=seed)(3.0 * x @ turn, labels), seeded(seed=seed)(x, labels))


def test_a_generator_of_its_own_touches_no_other():
    x, labels = batch(8)
    before = torch.get_rng_state()
    first, second = MetricMix(), MetricMix()
    torch.testing.assert_close(first(x, labels), second(x, labels))
    assert torch.equal(torch.get_rng_state(), before)


def test_utilization():
    x = batch(9)[0]
    queries = batch(10)[0]
    assert utilization(x[:4], x) == 0
    expected = sum(min((q - e).square().sum() for e in x) for q in queries) / len(queries)
    torch.testing.assert_close(utilization(queries, x), expected)
    assert utilization(queries, x) <= utilization(queries, x[:6])


def test_misuse_is_refused_with_the_argument_named(monkeypatch):
    for arguments in (
        {"loss": "triplet"},
        {"mode": "output"},
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"weight": -0.1},
        {"weight": float("nan")},
        {"pairs": "all"},
        {"negatives": 0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
            MetricMix(**arguments)
    with pytest.raises(ValueError, match="num_classes must be"):
        MetricMix("proxy_anchor", embedding_dim=3)
    with pytest.raises(ValueError, match="embedding_dim must be"):
        MetricMix("proxy_anchor", num_classes=3)
    with pytest.raises(ValueError, match="pairs must be 'posneg'"):
        MetricMix("proxy_anchor", "input", num_classes=3, embedding_dim=2)
    x, labels = batch()
    with pytest.raises(ValueError, match="mixed must be given in mode 'input'"):
        MetricMix(mode="input")(x, labels)
    loss = seeded(mode="input")
    mixed, mixture = loss.mix_inputs(x, x, labels)
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(ValueError, match="mixture must be given just where mixed is"):
        loss(x, labels, mixed)
    with pytest.raises(ValueError, match="mixed must be 12 embeddings"):
        loss(x, labels, mixed[:-1], mixture)
    with pytest.raises(ValueError, match="labels must be within 0..4"):
        with_proxies()(x, labels + 3)
    with pytest.raises(ValueError, match="x must be 12 rows"):
        loss.mix_inputs(x[:-1], x, labels)
    for y, message in (
        (torch.full((1, 3), 1.5), "within"),
        (torch.ones(1, 2), "of shape"),
        (-torch.ones(1, 3), "within"),
    ):
        with pytest.raises(ValueError, match=f"y must be {message}"):
            contrastive()(torch.zeros(1, 3), y)
    with pytest.raises(ValueError, match="queries must be"):
        utilization(x[0], x)
    with pytest.raises(ValueError, match="examples must be"):
        utilization(x, x[:, :2])


def test_a_loss_of_ones_own_can_be_mixed():
    x, labels = batch(11)
    own = GenericPairLoss(torch.neg, torch.relu)
    assert seeded(own)(x, labels).isfinite()
    torch.testing.assert_close(seeded(own)(x, labels), seeded(contrastive(0.0))(x, labels))
