import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.losses import (
    SCMIL,
    GatedAttentionPool,
    ProgressiveLoss,
    SCMILLoss,
    SupConLoss,
    make_imbalanced_bags,
)

Z = torch.tensor([[1, 0], [0.8, 0.6], [0, 1], [-0.6, 0.8]], dtype=torch.float64)
LABELS = torch.tensor([0, 0, 1, 1])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.fixture
def unchecked(monkeypatch):
    """Shapes and types are left to the module itself: the annotations' checks would come before its own."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


def made(make):
    """A module of double precision with the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


@pytest.mark.parametrize(("temperature", "expected"), [(0.1, 0.063780), (0.5, 0.430190), (1.0, 0.673577)])
def test_golden_contrast(temperature, expected):
    assert SupConLoss(temperature)(Z, LABELS).item() == pytest.approx(expected, abs=1e-6)


def test_golden_contrast_of_each_anchor():
    expected = [0.000336, 0.127223, 0.127223, 0.000336]
    logits = Z @ Z.T / 0.1
    for anchor in range(4):
        partner = anchor ^ 1
        others = [k for k in range(4) if k != anchor]
        value = logits[anchor, others].logsumexp(0) - logits[anchor, partner]
        assert value.item() == pytest.approx(expected[anchor], abs=1e-6)
    alone = torch.tensor([0, 0, 1, 2])  # two anchors have no partner, and do not count
    found = SupConLoss(0.1)(Z, alone).item()
    assert found == pytest.approx((0.000336 + 0.127223) / 2, abs=1e-6)


def test_embeddings_are_normalised():
    torch.testing.assert_close(SupConLoss()(Z * torch.tensor([[1], [5], [0.1], [30]]), LABELS), SupConLoss()(Z, LABELS))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), temperature=st.floats(0.05, 2.0))
def test_the_gradient_is_what_attracts_less_what_repels(seed, temperature):
    embeddings, labels = normal(7, 4, seed=seed).requires_grad_(), torch.tensor([0, 0, 0, 1, 1, 2, 2])
    (found,) = torch.autograd.grad(SupConLoss(temperature)(embeddings, labels), embeddings)
    z = F.normalize(embeddings.detach(), dim=1).requires_grad_()
    own = torch.eye(7, dtype=torch.bool)
    q = (z @ z.T / temperature).masked_fill(own, -math.inf).softmax(1).detach()
    positives = ((labels[:, None] == labels) & ~own).double()
    p = positives / positives.sum(1, keepdim=True)
    by_z = ((q - p) + (q - p).T) @ z.detach() / temperature / 7  # as anchor, and as another's partner
    (expected,) = torch.autograd.grad(F.normalize(embeddings, dim=1), embeddings, by_z)
    torch.testing.assert_close(found, expected)


def test_one_class_has_the_mean_surprise_of_all_pairs():
    embeddings = normal(5, 3)
    logits = (F.normalize(embeddings, dim=1) @ F.normalize(embeddings, dim=1).T / 0.5).fill_diagonal_(-math.inf)
    surprise = -logits.log_softmax(1)
    expected = surprise[~torch.eye(5, dtype=torch.bool)].mean()
    torch.testing.assert_close(SupConLoss(0.5)(embeddings, torch.zeros(5, dtype=torch.long)), expected)


def test_two_alike_and_one_other_have_the_closed_form():
    embeddings = torch.tensor([[1.0, 0], [1, 0], [0, 1]], dtype=torch.float64)
    found = SupConLoss(0.5)(embeddings, torch.tensor([0, 0, 1]))
    assert found.item() == pytest.approx(math.log(1 + math.exp(-2.0)))


def test_the_least_contrast_is_the_logarithm_of_the_number_of_partners():
    embeddings = torch.tensor([[1.0, 0]] * 4 + [[-1.0, 0]] * 4, dtype=torch.float64)
    labels = torch.arange(8) // 4
    assert SupConLoss(0.01)(embeddings, labels).item() == pytest.approx(math.log(3), abs=1e-9)
    assert SupConLoss(0.5)(embeddings, labels) > math.log(3)


def test_without_partners_the_contrast_is_nothing_and_warns():
    embeddings = Z.clone().requires_grad_()
    with pytest.warns(UserWarning, match="no two embeddings are of one label"):
        loss = SupConLoss()(embeddings, torch.arange(4))
    loss.backward()
    assert loss == 0
    assert torch.equal(embeddings.grad, torch.zeros_like(Z))


@pytest.mark.parametrize(
    ("schedule", "beta_end", "epoch", "expected"),
    [
        ("parabolic", 0.0, 0, 1.0),
        ("parabolic", 0.0, 10, 0.9375),
        ("parabolic", 0.0, 20, 0.75),
        ("parabolic", 0.3, 20, 0.825),
        ("parabolic", 0.3, 40, 0.3),
        ("linear", 0.0, 20, 0.5),
        ("cosine", 0.0, 10, 0.853553),
        ("cosine", 0.0, 20, 0.5),
        ("linear", 0.0, 40, 0.0),
        ("cosine", 0.0, 40, 0.0),
    ],
)
def test_golden_weights(schedule, beta_end, epoch, expected):
    loss = ProgressiveLoss(40, schedule, beta_end)
    assert loss.beta(epoch) == pytest.approx(expected, abs=1e-6)
    scl, ce = normal(()), normal((), seed=1)
    torch.testing.assert_close(loss(scl, ce, epoch), loss.beta(epoch) * scl + (1 - loss.beta(epoch)) * ce)
    assert repr(loss) == f"ProgressiveLoss(total_epochs=40, schedule={schedule!r}, beta_end={beta_end})"


def test_the_joint_loss_goes_from_contrast_to_cross_entropy_epoch_by_epoch():
    logits, embeddings, target = normal(6, 3), normal(6, 4, seed=1), torch.arange(6) % 3
    loss, contrast, classification = SCMILLoss(4, 2), SupConLoss()(embeddings, target), F.cross_entropy(logits, target)
    by_epoch = ProgressiveLoss(4)
    for step in range(12):
        expected = by_epoch(contrast, classification, min(step // 2, 4))
        torch.testing.assert_close(loss.eval()(logits, embeddings, target), expected)
        torch.testing.assert_close(loss.train()(logits, embeddings, target), expected)
    assert loss.step == 12


@pytest.mark.parametrize(("step", "unmoved"), [(0, "classifier"), (40, "projection")])
def test_at_either_end_one_head_is_left_alone(step, unmoved):
    model, loss = made(lambda: SCMIL(5, 3)), SCMILLoss(4, 10)
    loss.step += step
    found = model(normal(6, 7, 5))
    loss(found.logits, found.z, torch.arange(6) % 3).backward()
    for name in ("encoder", "pool", "classifier", "projection"):
        moved = any(p.grad.count_nonzero() for p in getattr(model, name).parameters())
        assert moved == (name != unmoved)


def test_the_joint_loss_has_both_derivatives_half_way():
    loss, target = SCMILLoss(4, 1).eval(), torch.arange(5) % 3
    loss.step += 2
    leaves = normal(5, 3).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *scored: loss(*scored, target), leaves)
    assert torch.autograd.gradgradcheck(lambda *scored: loss(*scored, target), leaves)


def test_attention_is_a_share_of_each_instance_whatever_their_order():
    pool, h = made(lambda: GatedAttentionPool(5, 8)), normal(3, 6, 5)
    bag, attention = pool(h)
    torch.testing.assert_close(attention.sum(1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(bag, (attention[:, :, None] * h).sum(1))
    scores = (torch.tanh(h @ pool.V.weight.T + pool.V.bias) * torch.sigmoid(h @ pool.U.weight.T + pool.U.bias)) @ (
        pool.w.weight[0]
    )
    torch.testing.assert_close(attention, scores.softmax(1))
    order = torch.randperm(6, generator=generator())
    moved_bag, moved_attention = pool(h[:, order])
    torch.testing.assert_close(moved_attention, attention[:, order])
    torch.testing.assert_close(moved_bag, bag)
    torch.testing.assert_close(pool(h.repeat(1, 2, 1))[0], bag)


def test_masked_instances_are_as_good_as_none():
    model, bags = made(lambda: SCMIL(5, 3)), normal(2, 6, 5)
    mask = torch.tensor([[True] * 6 + [False], [True] * 4 + [False] * 3])
    padded = torch.cat([bags, torch.full((2, 1, 5), math.nan, dtype=torch.float64)], 1)
    found, as_list = model(padded, mask), model([bags[0], bags[1, :4]])
    for row, size in ((0, 6), (1, 4)):
        alone = model(bags[row : row + 1, :size])
        torch.testing.assert_close(found.logits[row], alone.logits[0])
        torch.testing.assert_close(found.z[row], alone.z[0])
        torch.testing.assert_close(found.attention[row, :size], alone.attention[0])
        assert found.attention[row, size:].count_nonzero() == 0
    torch.testing.assert_close(as_list.logits, found.logits)
    torch.testing.assert_close(as_list.attention, found.attention[:, :6])


def test_the_network_gives_logits_of_pooled_bags_and_z_of_length_one(unchecked):
    encoder = nn.Sequential(nn.Linear(5, 16), nn.Tanh())
    model, bags = made(lambda: SCMIL(5, 4, width=16, embedding_dim=8, encoder=encoder)), normal(3, 6, 5)
    found = model(bags)
    pooled, _ = model.pool(encoder(bags))
    torch.testing.assert_close(found.logits, model.classifier(pooled))
    torch.testing.assert_close(found.z, F.normalize(model.projection(pooled), dim=1))
    assert found.z.shape == (3, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(bags), found)


def test_bags_have_the_key_instances_of_their_class():
    y = torch.arange(600) % 10
    x = torch.stack([y.float(), torch.arange(600.0)], 1)
    options = {"background": (0, 1, 2), "keys": (9, 7), "instances": 12, "key_share": 0.15}
    bags, classes = make_imbalanced_bags(x, y, (20, 5, 3), **options, generator=generator())
    assert bags.shape == (28, 12, 2)
    assert torch.bincount(classes).tolist() == [20, 5, 3]
    labels = bags[:, :, 0]
    for key, of_class in ((9, 1), (7, 2)):
        assert torch.equal((labels == key).sum(1), 2 * (classes == of_class))
    assert (labels[classes == 0] <= 2).all()
    assert len({tuple(row.tolist()) for row in (labels == 9)[classes == 1].nonzero()[:, 1].view(-1, 2)}) > 1
    again, _ = make_imbalanced_bags(x, y, (20, 5, 3), **options, generator=generator())
    assert torch.equal(again, bags)
    only, _ = make_imbalanced_bags(x, y, (0, 1, 0), **options | {"key_share": 0.01}, generator=generator())
    assert (only[:, :, 0] == 9).sum() == 1


def test_misuse_is_refused_with_the_argument_named(unchecked):
    for name, make in (
        ("temperature", lambda: SupConLoss(0.0)),
        ("temperature", lambda: SupConLoss(math.nan)),
        ("temperature", lambda: SCMILLoss(4, 1, temperature=0.0)),
        ("total_epochs", lambda: ProgressiveLoss(0)),
        ("steps_per_epoch", lambda: SCMILLoss(4, 0)),
        ("schedule", lambda: ProgressiveLoss(4, "step")),
        ("beta_end", lambda: ProgressiveLoss(4, beta_end=1.5)),
        ("epoch", lambda: ProgressiveLoss(4).beta(4.5)),
        ("epoch", lambda: ProgressiveLoss(4).beta(-1.0)),
        ("embeddings", lambda: SupConLoss()(Z[:0], LABELS[:0])),
        ("labels", lambda: SupConLoss()(Z, LABELS.double())),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            make()
    pool = GatedAttentionPool(5)
    empty = torch.tensor([[True, False], [False, False]])
    for name, arguments in (
        ("mask", (torch.zeros(2, 2, 5), empty)),
        ("mask", (torch.zeros(2, 2, 5), empty[:1])),
        ("mask", ([torch.zeros(2, 5)], empty)),
        ("h", (torch.zeros(2, 2, 4),)),
        ("h", (torch.zeros(2, 0, 5),)),
        ("h", ([torch.zeros(2, 5), torch.zeros(0, 5)],)),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            pool(*arguments)


def test_bags_that_cannot_be_made():
    x, y = torch.zeros(10, 1), torch.arange(10)
    good = {"background": (0, 1), "keys": (9,), "instances": 4, "key_share": 0.5}
    for name, changed in (
        ("keys", {"keys": (9, 8)}),
        ("keys", {"keys": (1,)}),
        ("background", {"background": ()}),
        ("instances", {"instances": 0}),
        ("key_share", {"key_share": 0.0}),
        ("y", {"keys": (11,)}),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be"):
            make_imbalanced_bags(x, y, (2, 2), **good | changed, generator=generator())
    with pytest.raises(ValueError, match="^sizes must be"):
        make_imbalanced_bags(x, y, (0, 0), **good, generator=generator())
