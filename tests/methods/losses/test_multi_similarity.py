import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import MultiSimilarityLoss, MultiSimilarityMiner, pair_weights
from fairtrial.methods.losses.metric_learning import cosine_similarities, pairs_of
from fairtrial.methods.losses.multi_similarity import mined, multi_similarity

X = F.normalize(
    torch.tensor([[1, 0], [0.9, 0.3], [0, 1], [0.4, 0.9], [-1, 0.2], [0.5, 0.5]], dtype=torch.float64), dim=1
)
LABELS = torch.tensor([0, 0, 1, 1, 2, 2])


def batch(seed, m=12, d=5, classes=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=generator, dtype=torch.float64), torch.arange(m) % classes


@pytest.mark.parametrize(
    ("beta", "mine", "expected"), [(40, True, 0.640345), (50, True, 0.639992), (40, False, 0.768095)]
)
def test_golden_values(beta, mine, expected):
    loss = MultiSimilarityLoss(2.0, float(beta), mine=mine)(X, LABELS)
    assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_the_definition_with_loops():
    x, labels = batch(0)
    s, a, b, base, epsilon = cosine_similarities(x), 3.0, 20.0, 0.4, 0.1
    expected = []
    for i in range(len(x)):
        positives = [s[i, j] for j in range(len(x)) if labels[j] == labels[i] and j != i]
        negatives = [s[i, j] for j in range(len(x)) if labels[j] != labels[i]]
        kept_n = [v for v in negatives if v > min(positives) - epsilon]
        kept_p = [v for v in positives if v < max(negatives) + epsilon]
        expected.append(
            torch.log(1 + sum(torch.exp(-a * (v - base)) for v in kept_p)) / a
            + torch.log(1 + sum(torch.exp(b * (v - base)) for v in kept_n)) / b
        )
    loss = MultiSimilarityLoss(a, b, base, epsilon, reduction="none")(x, labels)
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-8, atol=1e-8)


def test_the_weights_are_their_closed_form_and_the_gradient_of_the_loss():
    s, pairs = cosine_similarities(X), mined(cosine_similarities(X), pairs_of(LABELS), 0.1)
    weights = pair_weights(s, LABELS, pairs=pairs, beta=40.0)
    for i, j in pairs.positives.nonzero().tolist():
        others = s[i, pairs.positives[i]]
        expected = 1 / (torch.exp(-2 * (0.5 - s[i, j])) + torch.exp(-2 * (others - s[i, j])).sum())
        torch.testing.assert_close(weights[i, j], expected)
    for i, j in pairs.negatives.nonzero().tolist():
        others = s[i, pairs.negatives[i]]
        expected = 1 / (torch.exp(40 * (0.5 - s[i, j])) + torch.exp(40 * (others - s[i, j])).sum())
        torch.testing.assert_close(weights[i, j], expected)
    assert (weights[~(pairs.positives | pairs.negatives)] == 0).all()
    leaf = s.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(multi_similarity(leaf, pairs, beta=40.0).mean(), leaf)
    sign = pairs.negatives.double() - pairs.positives.double()
    torch.testing.assert_close(gradient, sign * weights / len(X))


def test_the_weights_of_earlier_losses():
    x, labels = batch(2)
    s, (positives, negatives) = cosine_similarities(x), pairs_of(labels)
    w = pair_weights(s, labels, "contrastive", margin=0.3)
    assert (w[positives] == 1).all()
    torch.testing.assert_close(w[negatives], (s[negatives] > 0.3).double())

    w = pair_weights(s, labels, "binomial_deviance", alpha=2.0, beta=30.0, base=0.5)
    torch.testing.assert_close(w[positives], 1 / (1 + torch.exp(2 * (s[positives] - 0.5))))
    torch.testing.assert_close(w[negatives], 1 / (1 + torch.exp(30 * (0.5 - s[negatives]))))

    w = pair_weights(s, labels, "lifted_structure", base=0.5)  # every anchor's hinge is active here
    down, up = torch.exp(0.5 - s) * positives, torch.exp(s - 0.5) * negatives
    torch.testing.assert_close(w, down / down.sum(1, keepdim=True) + up / up.sum(1, keepdim=True))

    w = pair_weights(s, labels, "triplet", margin=0.2)
    for n in negatives[0].nonzero()[:, 0]:
        assert w[0, n] == (s[0, n] - s[0, positives[0]] + 0.2 > 0).sum()  # the triplets that it violates
    assert (w[~(positives | negatives)] == 0).all()


def test_weights_of_a_loss_of_ones_own():
    s = cosine_similarities(X)
    own = pair_weights(s, LABELS, lambda s, pairs: (3.0 * s * pairs.negatives).sum(1))
    torch.testing.assert_close(own, 3.0 * pairs_of(LABELS).negatives.double())


def test_limits_of_the_weights():
    s, (positives, negatives) = cosine_similarities(X), pairs_of(LABELS)
    w = pair_weights(s, LABELS, alpha=1e-9, beta=1e-9)
    torch.testing.assert_close(w[positives], torch.full((6,), 0.5, dtype=torch.float64))  # 1 / (1 + |P|)
    torch.testing.assert_close(w[negatives], torch.full((24,), 0.2, dtype=torch.float64))  # 1 / (1 + |N|)
    sharp = multi_similarity(s, pairs_of(LABELS)._replace(positives=torch.zeros_like(positives)), beta=1e6)
    hardest = s.masked_fill(~negatives, -torch.inf).amax(1)
    torch.testing.assert_close(sharp, (hardest - 0.5).clamp(min=0), atol=1e-5, rtol=0)


def test_mining_with_much_slack_keeps_every_pair():
    x, labels = batch(3)
    torch.testing.assert_close(
        MultiSimilarityLoss(epsilon=10.0)(x, labels), MultiSimilarityLoss(mine=False)(x, labels), rtol=0, atol=0
    )
    pairs = MultiSimilarityMiner(10.0)(x, labels)
    assert [len(index) for index in pairs] == [36, 36, 96, 96]


def test_the_miner_keeps_the_pairs_of_the_loss():
    x, labels = batch(4)
    kept = mined(cosine_similarities(x), pairs_of(labels), 0.1)
    found = MultiSimilarityMiner()(x, labels)
    assert torch.equal(torch.stack([found.anchors, found.positives], 1), kept.positives.nonzero())
    assert torch.equal(torch.stack([found.negative_anchors, found.negatives], 1), kept.negatives.nonzero())
    assert 0 < len(found.negatives) < 96


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_rotations_and_permutations_do_not_matter(seed):
    x, labels = batch(seed)
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    order = torch.randperm(len(x), generator=generator)
    loss = MultiSimilarityLoss()
    torch.testing.assert_close(loss((x @ turn)[order], labels[order]), loss(x, labels))


def test_a_separated_batch_has_loss_zero_and_a_graph():
    x = torch.tensor([[1.0, 0], [1, 0.01], [0, 1], [0.01, 1]], requires_grad=True)
    loss = MultiSimilarityLoss()(x, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss == 0
    assert torch.equal(x.grad, torch.zeros(4, 2))


@pytest.mark.parametrize("mine", [True, False])
def test_anchors_without_one_of_the_sides_count_as_zero(mine):
    x, _ = batch(5, m=4)
    none = MultiSimilarityLoss(mine=mine, reduction="none")
    assert torch.equal(none(x, torch.zeros(4, dtype=torch.long)), torch.zeros(4, dtype=torch.float64))
    assert torch.equal(none(x, torch.arange(4)), torch.zeros(4, dtype=torch.float64))
    assert none(x, torch.tensor([0, 0, 1, 2]))[2:].eq(0).all()


def test_duplicates_are_positives():
    x = torch.tensor([[1.0, 0], [1, 0], [0.9, 0.1], [0, 1]])
    labels = torch.tensor([0, 0, 1, 1])
    assert MultiSimilarityMiner()(x, labels).positives[0] == 1


def test_misuse_is_refused_with_the_argument_named(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # the annotations' checks would come first
    for arguments in (
        {"alpha": 0.0},
        {"alpha": float("nan")},
        {"beta": -1.0},
        {"base": float("inf")},
        {"epsilon": -0.1},
        {"reduction": "average"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
            MultiSimilarityLoss(**arguments)
    with pytest.raises(ValueError, match="epsilon"):
        MultiSimilarityMiner(float("nan"))
    with pytest.raises(ValueError, match="at least 2 rows"):
        MultiSimilarityLoss()(X[:1], LABELS[:1])
    with pytest.raises(ValueError, match="similarity"):
        pair_weights(torch.zeros(2, 3), LABELS[:2])
    with pytest.raises(ValueError, match="loss must be one of contrastive"):
        pair_weights(torch.zeros(2, 2), LABELS[:2], "proxy")
