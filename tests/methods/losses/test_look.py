import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.losses import KeyQueue, LOOKLoss, MomentumEncoder, loo_knn_accuracy
from fairtrial.methods.losses.look import nearest, similarities

Z = F.normalize(
    torch.tensor([[1, 0], [0.9, 0.2], [0, 1], [0.3, 0.9], [-1, 0.1], [0.7, 0.7]], dtype=torch.float64), dim=1
)
Y = torch.tensor([0, 0, 1, 1, 0, 1])


def batch(seed, n=10, d=4, classes=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64), torch.arange(n) % classes


def test_golden_neighbours():
    near = nearest(similarities(Z, None), 2, leave_one_out=True)
    assert near.place.tolist() == [[1, 5], [0, 5], [3, 5], [2, 5], [2, 3], [3, 1]]


@pytest.mark.parametrize(
    ("k", "p", "losses"),
    [
        (2, [0.936482, 0.790055, 1, 1, 0, 0.624257], {"clamp": 3.198859, "skip": 0.154494, "append": 1.884192}),
        (
            3,
            [0.935290, 0.783934, 0.999391, 0.991838, 0, 0.569627],
            {"clamp": 3.217098, "skip": 0.176382, "append": 1.902537},
        ),
        (
            5,
            [0.935239, 0.783624, 0.999134, 0.990719, 0.000044, 0.604259],
            {"clamp": 1.810982, "skip": 1.810982, "append": 1.810982},
        ),
    ],
)
def test_golden_values(k, p, losses):
    found = LOOKLoss(k).vote(Z, Y)
    torch.testing.assert_close(found.p, torch.tensor(p, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.empty.sum() == (0 if k == 5 else 1)
    for empty, expected in losses.items():
        assert LOOKLoss(k, empty=empty)(Z, Y).item() == pytest.approx(expected, abs=1e-6)


def test_appending_lets_the_nearest_of_the_class_vote():
    assert LOOKLoss(2, empty="append").vote(Z, Y).p[4].item() == pytest.approx(0.000027, abs=1e-6)


def test_the_gradient_is_its_closed_form():
    z, y = batch(0)
    z = F.normalize(z).requires_grad_()
    tau, k = 0.3, 4
    found = LOOKLoss(k, tau, empty="clamp").vote(z, y)
    (gradient,) = torch.autograd.grad(-found.log_p[0], z)
    place = nearest(similarities(z.detach(), None), k, leave_one_out=True).place[0]
    logits, same = z.detach()[place] @ z.detach()[0] / tau, y[place] == y[0]
    w, w_same = logits.softmax(0), logits.masked_fill(~same, -torch.inf).softmax(0)
    expected = ((w - w_same)[:, None] * z.detach()[place]).sum(0) / tau
    tangent = expected - (expected @ z.detach()[0]) * z.detach()[0]  # the length does not matter
    torch.testing.assert_close(gradient[0], tangent)


def test_all_references_give_neighbourhood_components_analysis():
    z, y = batch(1)
    s = F.normalize(z) @ F.normalize(z).T / 0.2
    s.fill_diagonal_(-torch.inf)
    p = (s.softmax(1) * (y[:, None] == y)).sum(1)
    for k in (9, 50):
        torch.testing.assert_close(LOOKLoss(k, 0.2)(z, y), -p.log().mean())


def test_limits_in_the_temperature():
    z, y = batch(2, n=20)
    near = nearest(similarities(z, None), 5, leave_one_out=True)
    same = y[near.place] == y[:, None]
    torch.testing.assert_close(LOOKLoss(5, 1e9).vote(z, y).p, same.double().mean(1), atol=1e-8, rtol=0)
    torch.testing.assert_close(LOOKLoss(5, weights="uniform").vote(z, y).p, same.double().mean(1))
    torch.testing.assert_close(LOOKLoss(5, 1e-6).vote(z, y).p, same[:, 0].double(), atol=1e-6, rtol=0)


def test_neighbours_of_one_class_have_loss_and_gradient_zero():
    z = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [-1, 0], [-1, 0.1], [-1, 0.2]], requires_grad=True)
    loss = LOOKLoss(2)(z, torch.tensor([0, 0, 0, 1, 1, 1]))
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros(6, 2))


def test_a_class_may_keep_two_clusters():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0]])
    z = centres.repeat_interleave(20, 0) + 0.05 * torch.randn(60, 3, generator=generator)
    y = torch.tensor([0, 0, 1]).repeat_interleave(20)

    def steepness(loss):
        leaf = z.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        return gradient.norm()

    def supervised_contrastive(z):
        s = similarities(z, None) / 0.1
        same = (y[:, None] == y) & ~torch.eye(60, dtype=torch.bool)
        return -(s.log_softmax(1).masked_fill(~same, 0.0).sum(1) / same.sum(1)).mean()

    head = nn.Linear(3, 2)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, -1, 0], [0, 1, 0]]))
        head.bias.zero_()
    assert steepness(lambda z: LOOKLoss(10)(z, y)) < 1e-6
    assert steepness(supervised_contrastive) > 0.05
    assert steepness(lambda z: F.cross_entropy(head(z), y)) > 0.02


@pytest.mark.parametrize("empty", ["skip", "append"])
def test_without_any_neighbour_of_the_class_the_loss_is_a_zero_with_a_graph(empty):
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = LOOKLoss(2, empty=empty)(z, torch.arange(4))
    loss.backward()
    assert loss == 0
    assert torch.equal(z.grad, torch.zeros(4, 3))


def test_clamping_is_a_constant():
    z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    loss = LOOKLoss(2, empty="clamp")(z, torch.arange(4))
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8))
    assert torch.equal(z.grad, torch.zeros(4, 3, dtype=torch.float64))


def test_uniform_votes_have_no_gradient():
    z, y = batch(3)
    z.requires_grad_()
    for empty in ("skip", "append", "clamp"):
        (gradient,) = torch.autograd.grad(LOOKLoss(3, weights="uniform", empty=empty)(z, y), z)
        assert torch.equal(gradient, torch.zeros_like(z))


def test_references_of_their_own():
    z, y = batch(4)
    ref, ref_labels = batch(5, n=30)
    s = F.normalize(z) @ F.normalize(ref).T / 0.1
    top = s.topk(6, 1)
    weights = top.values.softmax(1)
    p = (weights * (ref_labels[top.indices] == y[:, None])).sum(1)
    found = LOOKLoss(6).vote(z, y, ref, ref_labels)
    torch.testing.assert_close(found.p, p)
    assert LOOKLoss(6)(z[:1], y[:1], ref, ref_labels).isfinite()  # one embedding is enough here


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999), k=st.integers(1, 12))
def test_every_way_with_empty_ones_is_differentiable(seed, k):
    z, y = batch(seed, n=8, classes=3)
    for empty in ("skip", "append", "clamp"):
        leaf = z.clone().requires_grad_()
        loss = LOOKLoss(k, empty=empty)(leaf, y)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite()
        assert gradient.isfinite().all()
    assert torch.autograd.gradcheck(lambda z: LOOKLoss(k, empty="append")(z, y), z.clone().requires_grad_())


def test_leave_one_out_accuracy():
    z = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.3], [-1, 0], [-1, 0.1], [0.9, 0.3]])
    labels = torch.tensor([7, 7, 7, 3, 3, 3])
    assert loo_knn_accuracy(z, labels, k=1).item() == pytest.approx(4 / 6)  # the last two of the first cluster disagree
    assert loo_knn_accuracy(z, labels, k=3).item() == pytest.approx(5 / 6)


def test_the_queue_holds_the_latest_keys():
    queue = KeyQueue(5, 2)
    assert queue.keys.shape == (0, 2)
    keys = torch.arange(16.0).view(8, 2) + 1
    queue.push(keys[:3], torch.arange(3))
    torch.testing.assert_close(queue.keys, F.normalize(keys[:3]))
    before = queue.keys
    queue.push(keys[3:], torch.arange(3, 8))
    torch.testing.assert_close(before, F.normalize(keys[:3]))
    assert sorted(queue.labels.tolist()) == [3, 4, 5, 6, 7]
    torch.testing.assert_close(queue.keys[queue.labels.argsort()], F.normalize(keys[3:]))
    queue.push(torch.cat([keys, keys]), torch.arange(16))
    assert sorted(queue.labels.tolist()) == [11, 12, 13, 14, 15]
    assert repr(queue) == "KeyQueue(size=5, dim=2)"


def test_the_queue_survives_saving_and_has_no_gradient():
    queue, other = KeyQueue(4, 2), KeyQueue(4, 2)
    keys = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    queue.push(keys, torch.arange(6))
    assert not queue.keys.requires_grad
    file = io.BytesIO()
    torch.save(queue.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (other, copy.deepcopy(queue), pickle.loads(pickle.dumps(queue))):
        assert torch.equal(each.keys, queue.keys)
        assert torch.equal(each.labels, queue.labels)
    LOOKLoss(2)(keys, torch.arange(6), queue.keys, queue.labels).backward()
    assert keys.grad.isfinite().all()


def test_the_momentum_encoder_follows():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    slow = MomentumEncoder(encoder, 0.9)
    start = encoder[0].weight.detach().clone()
    with torch.no_grad():
        encoder[0].weight += 1.0
    encoder(torch.ones(4, 3))
    slow.update_parameters(encoder)
    torch.testing.assert_close(slow.module[0].weight, start + 0.1)
    torch.testing.assert_close(slow.module[1].running_mean, encoder[1].running_mean)
    assert not slow(torch.ones(4, 3)).requires_grad
    assert not any(p.requires_grad for p in slow.parameters())
    assert encoder[0].weight.requires_grad
    again = pickle.loads(pickle.dumps(slow))
    assert torch.equal(again.module[0].weight, slow.module[0].weight)
    assert "momentum=0.9" in repr(slow)


def test_misuse_is_refused_with_the_argument_named(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # the annotations' checks would come first
    for arguments in ({"k": 0}, {"temperature": 0.0}, {"temperature": float("nan")}, {"weights": "x"}, {"empty": "x"}):
        with pytest.raises(ValueError, match=f"{next(iter(arguments))} must be"):
            LOOKLoss(**arguments)
    z, y = batch(6)
    with pytest.raises(ValueError, match="z must be at least 2 rows"):
        LOOKLoss()(z[:1], y[:1])
    with pytest.raises(ValueError, match="ref_labels must be given just where ref is"):
        LOOKLoss()(z, y, z)
    with pytest.raises(ValueError, match="ref must be at least 1 rows"):
        LOOKLoss()(z, y, z[:0], y[:0])
    with pytest.raises(ValueError, match="ref must be of shape"):
        LOOKLoss()(z, y, torch.zeros(3, 7, dtype=torch.float64), y[:3])
    with pytest.raises(ValueError, match="k must be"):
        loo_knn_accuracy(z, y, 0)
    with pytest.raises(ValueError, match="keys must be"):
        KeyQueue(3, 2).push(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    for size, dim, name in ((0, 2, "size"), (2, 0, "dim")):
        with pytest.raises(ValueError, match=f"{name} must be"):
            KeyQueue(size, dim)
    with pytest.raises(ValueError, match="momentum must be"):
        MomentumEncoder(nn.Linear(1, 1), 1.0)
