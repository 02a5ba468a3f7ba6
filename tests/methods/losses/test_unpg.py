import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from fairtrial.methods.losses import UNPGLoss, box_whisker_filter, negative_pair_similarities, unpg_cross_entropy

COSINES = torch.tensor([[0.3, 0.1, -0.2], [0, 0.5, 0.2], [0.1, -0.1, 0.4]], dtype=torch.float64)
FEATURES = F.normalize(torch.tensor([[1, 0.2], [0.1, 1], [-1, 0.3]], dtype=torch.float64), dim=1)
LABELS = torch.arange(3)
NONE = torch.zeros(0, dtype=torch.float64)


def batch(seed=0, b=12, d=5, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(b, d, generator=generator, dtype=torch.float64), torch.arange(b) % classes


def loss_with(seed=0, d=5, classes=4, **options):
    loss = UNPGLoss(classes, d, **options).double()
    with torch.no_grad():
        loss.weight.copy_(batch(seed + 100, b=classes, d=d)[0])
    return loss


def test_golden_similarities():
    found = negative_pair_similarities(FEATURES, LABELS)
    expected = torch.tensor([0.292714, -0.882872, 0.190615], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert len(box_whisker_filter(found)) == 3


@pytest.mark.parametrize(("scale", "expected", "alone"), [(64.0, 0.162848, 9.233e-07), (8.0, 0.605064, 0.135334)])
def test_golden_values(scale, expected, alone):
    extra = negative_pair_similarities(FEATURES, LABELS)
    assert unpg_cross_entropy(COSINES, extra, LABELS, scale).item() == pytest.approx(expected, abs=1e-6)
    assert unpg_cross_entropy(COSINES, NONE, LABELS, scale).item() == pytest.approx(alone, rel=1e-4)


def test_the_filter_keeps_the_inner_values():
    inner = torch.linspace(-0.2, 0.3, 11, dtype=torch.float64)
    values = torch.cat([inner, torch.tensor([0.9, -0.95], dtype=torch.float64)])
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    assert torch.equal(box_whisker_filter(values[order]), inner)
    ascending = values.sort().values
    assert (ascending[int(0.25 * 13)].item(), ascending[int(0.75 * 13)].item()) == pytest.approx((-0.1, 0.2))
    assert torch.equal(box_whisker_filter(torch.full((5,), 0.3)), torch.full((5,), 0.3))
    assert len(box_whisker_filter(values, 10.0)) == 13


@settings(deadline=None, max_examples=50)
@given(values=st.lists(st.floats(-1, 1), min_size=1, max_size=40), whisker=st.floats(0, 3))
def test_the_filter_is_its_definition(values, whisker):
    ascending = sorted(values)
    first, third = ascending[int(0.25 * len(values))], ascending[int(0.75 * len(values))]
    reach = whisker * (third - first)
    expected = [value for value in ascending if first - reach <= value <= third + reach]
    assert box_whisker_filter(torch.tensor(values, dtype=torch.float64), whisker).tolist() == expected


@pytest.mark.parametrize("head", ["cosface", "arcface", None])
@pytest.mark.parametrize("filtered", [True, False])
def test_the_loss_is_cross_entropy_of_logits_with_the_negatives_in_each_row(head, filtered):
    x, labels = batch(1)
    loss = loss_with(1, head=head, scale=8.0, margin=0.3, filter=filtered)
    cosines = F.normalize(x) @ F.normalize(loss.weight).T
    target = cosines[torch.arange(12), labels]
    margin = {"cosface": target - 0.3, "arcface": torch.cos(target.acos() + 0.3), None: target}[head]
    cosines = cosines.index_put((torch.arange(12), labels), margin)
    extra = negative_pair_similarities(x, labels)
    assert len(extra) == 54
    if filtered:
        extra = box_whisker_filter(extra)
    rows = torch.cat([cosines, extra.expand(12, -1)], 1)
    torch.testing.assert_close(loss(x, labels), F.cross_entropy(8 * rows, labels))


def test_outliers_get_no_gradient():
    x = F.normalize(torch.tensor([[1, 0], [0.97, 0.2], [0, 1], [0.2, 0.97], [-0.99, 0.1]], dtype=torch.float64), dim=1)
    labels = torch.tensor([0, 1, 2, 3, 4])
    extra = negative_pair_similarities(x, labels)
    kept = box_whisker_filter(extra, 0.2)
    assert 0 < len(kept) < len(extra)
    leaf = extra.clone().requires_grad_()
    cosines = torch.zeros(5, 5, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(unpg_cross_entropy(cosines, box_whisker_filter(leaf, 0.2), labels, 4.0), leaf)
    is_kept = torch.isin(extra, kept)
    assert (gradient[~is_kept] == 0).all()
    # a kept pair's weight: its probability in each row, averaged over rows, times the scale
    probability = torch.exp(4 * extra[is_kept]) / (5 + torch.exp(4 * kept).sum())
    torch.testing.assert_close(gradient[is_kept], 4 * probability)


def test_a_pair_moves_both_of_its_members():
    x, labels = batch(2, b=2, classes=2)
    loss = loss_with(2, classes=2, head=None, scale=4.0, filter=False)
    x.requires_grad_()
    alone = unpg_cross_entropy(F.normalize(x) @ F.normalize(loss.weight).T, NONE, labels, 4.0)
    (difference,) = torch.autograd.grad(loss(x, labels) - alone, x)
    assert (difference.norm(dim=1) > 1e-6).all()


def test_a_batch_of_one_class_has_the_loss_of_the_head():
    x, _ = batch(3)
    labels = torch.full((12,), 2)
    loss = loss_with(3, scale=16.0, margin=0.2)
    cosines = F.normalize(x) @ F.normalize(loss.weight).T
    cosines = cosines - 0.2 * F.one_hot(labels, 4)
    torch.testing.assert_close(loss(x, labels), F.cross_entropy(16 * cosines, labels))


def test_of_one_class_weight_it_is_a_softplus():
    extra = torch.tensor([0.4, -0.1, 0.7], dtype=torch.float64)
    cosines = torch.tensor([[0.9], [0.2]], dtype=torch.float64)
    labels = torch.zeros(2, dtype=torch.long)
    expected = F.softplus((8 * extra).logsumexp(0) - 8 * cosines[:, 0])
    torch.testing.assert_close(unpg_cross_entropy(cosines, extra, labels, 8.0, reduction="none"), expected)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_negatives_never_lower_the_loss_and_rotations_do_not_matter(seed):
    x, labels = batch(seed)
    turn, _ = torch.linalg.qr(batch(seed + 1, b=5)[0])
    loss = loss_with(seed, scale=8.0, margin=0.1)
    value = loss(x, labels)
    cosines = F.normalize(x) @ F.normalize(loss.weight).T - 0.1 * F.one_hot(labels, 4)
    assert value >= unpg_cross_entropy(cosines, NONE, labels, 8.0)
    with torch.no_grad():
        loss.weight.copy_(loss.weight @ turn)
    torch.testing.assert_close(loss(x @ turn, labels), value)


@pytest.mark.parametrize("head", ["cosface", "arcface", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_samples_on_their_class_weight_have_finite_gradients(head, dtype):
    loss = UNPGLoss(3, 3, head=head)
    with torch.no_grad():
        loss.weight.copy_(torch.eye(3))
    for sign in (1.0, -1.0):
        x = (sign * torch.eye(3, dtype=dtype)).requires_grad_()
        value = loss(x, LABELS)
        value.backward()
        assert value.isfinite()
        assert x.grad.isfinite().all()
        assert loss.weight.grad.isfinite().all()


def test_its_weights_are_parameters():
    x, labels = batch(4)
    loss = loss_with(4)
    loss(x, labels).backward()
    assert [p.shape for p in loss.parameters()] == [(4, 5)]
    assert loss.weight.grad.abs().sum() > 0
    bound = math.sqrt(6 / (4 + 5))
    assert UNPGLoss(4, 5).weight.abs().max() <= bound


def test_misuse_is_refused_with_the_argument_named(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    for arguments in (
        {"num_classes": 0},
        {"embedding_dim": 0},
        {"head": "magface"},
        {"scale": 0.0},
        {"margin": -0.1},
        {"margin": float("nan")},
        {"whisker": -1.0},
        {"whisker": float("nan")},
        {"reduction": "average"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
            UNPGLoss(**{"num_classes": 3, "embedding_dim": 2, **arguments})
    x, labels = batch(5)
    loss = loss_with(5)
    with pytest.raises(ValueError, match="features must be at least 2 rows"):
        loss(x[:1], labels[:1])
    with pytest.raises(ValueError, match="labels must be within 0..3"):
        loss(x, labels + 1)
    with pytest.raises(ValueError, match="features must be of shape"):
        loss(x[:, :3], labels)
    with pytest.raises(ValueError, match="values must be of shape"):
        box_whisker_filter(NONE)
    with pytest.raises(ValueError, match="whisker must be"):
        box_whisker_filter(torch.zeros(3), -1.0)
    with pytest.raises(ValueError, match="scale must be"):
        unpg_cross_entropy(COSINES, NONE, LABELS, 0.0)
