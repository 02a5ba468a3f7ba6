import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fairtrial.methods.optimizers import IndexedDataset, MESALoss, TrajectoryLoss, mesa_teacher, trajectory_divergence

F64 = torch.float64
Z = torch.tensor([[2.0, 0, -1], [0.5, 1, 0]], dtype=F64)
PAST = torch.tensor([[1.0, 1, 0], [0, 2, -1]], dtype=F64)
Y, INDEX = torch.tensor([0, 2]), torch.tensor([3, 1])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def with_past(scores=PAST, epoch=3, **options):
    """A loss that has seen scores in an epoch, three epochs before the next one asked for."""
    loss = TrajectoryLoss(5, 3, dtype=F64, **options)
    loss(scores, Y, INDEX, epoch)
    return loss


def value_and_gradient(function, z):
    z = z.clone().requires_grad_()
    value = function(z)
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize(("scale", "expected"), [(True, 0.427568), (False, 0.017103)])
def test_golden_value(scale, expected):
    loss = with_past(lam=1.0, scale_tau2=scale)
    term = loss(Z, Y, INDEX, 6) - F.cross_entropy(Z, Y)
    torch.testing.assert_close(term, torch.tensor(expected, dtype=F64), rtol=0, atol=5e-7)


def test_golden_gradient():
    loss = with_past(lam=1.0)
    _, gradient = value_and_gradient(lambda z: loss(z, Y, INDEX, 6), Z)
    _, plain = value_and_gradient(lambda z: F.cross_entropy(z, Y), Z)
    q, p = (Z / 5).softmax(1), (PAST / 5).softmax(1)
    expected = torch.tensor([[0.239643, -0.131764, -0.107879], [0.075402, -0.208653, 0.133251]], dtype=F64)
    torch.testing.assert_close(gradient - plain, expected, rtol=0, atol=5e-7)
    torch.testing.assert_close(gradient - plain, 5 * (q - p) / 2, rtol=1e-12, atol=1e-15)
    assert (gradient - plain).sum(1).abs().max() < 1e-15


@pytest.mark.parametrize(
    ("options", "past", "now"),
    [
        ({"lam": 0.0}, 3, 6),
        ({}, 2, 5),  # the start is excluded
        ({"end_epoch": 6}, 3, 6),  # and so is the end
        ({}, 3, 7),  # another epoch than three ago
        ({}, 4, 6),
        ({"delay": 2}, 3, 6),
    ],
)
def test_cross_entropy_alone(options, past, now):
    assert with_past(epoch=past, **options)(Z, Y, INDEX, now) == F.cross_entropy(Z, Y)


def test_a_past_like_the_present_adds_nothing():
    loss = with_past(Z)
    value, gradient = value_and_gradient(lambda z: loss(z, Y, INDEX, 6), Z)
    plain = value_and_gradient(lambda z: F.cross_entropy(z, Y), Z)
    torch.testing.assert_close((value, gradient), plain, rtol=1e-14, atol=1e-15)


def test_a_high_temperature_leaves_half_the_variance():
    z, past, tau = normal(4, 7), normal(4, 7, seed=1), 1e3
    centred = (z - z.mean(1, keepdim=True)) - (past - past.mean(1, keepdim=True))
    quadratic = centred.square().sum(1) / (2 * 7)
    torch.testing.assert_close(tau**2 * trajectory_divergence(z, past, tau), quadratic, rtol=1e-3, atol=0)


def test_the_divergence_can_be_differentiated_and_its_direction_is_from_the_past():
    z, past = normal(3, 4).requires_grad_(), normal(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: trajectory_divergence(z, past, 2.0), z)
    assert torch.autograd.gradgradcheck(lambda z: trajectory_divergence(z, past, 2.0), z)
    p, q = (past / 2).softmax(1), (z / 2).softmax(1)
    torch.testing.assert_close(trajectory_divergence(z, past, 2.0), (p * (p / q).log()).sum(1))
    (gradient,) = torch.autograd.grad(trajectory_divergence(z, past).sum(), past, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_the_target_is_of_so_many_epochs_ago(delay):
    """Scores (e, 0, 0) in epoch e tell which epoch is compared with."""
    loss = TrajectoryLoss(5, 3, lam=1.0, tau=1.0, delay=delay, start_epoch=0, dtype=F64)
    for epoch in range(12):
        z = torch.tensor([[float(epoch), 0, 0]] * 2, dtype=F64)
        past = torch.tensor([[float(epoch - delay), 0, 0]] * 2, dtype=F64)
        expected = F.cross_entropy(z, Y)
        if epoch >= max(delay, 1):
            expected = expected + trajectory_divergence(z, past, 1.0).mean()
        torch.testing.assert_close(loss(z, Y, INDEX, epoch), expected, rtol=1e-12, atol=0)


def test_a_sample_seen_twice_in_an_epoch_is_remembered_as_last_seen():
    loss = with_past(100 * PAST)
    loss(PAST, Y, INDEX, 3)
    assert loss(Z, Y, INDEX, 6) == with_past()(Z, Y, INDEX, 6)


def test_only_samples_with_a_past_have_the_term():
    loss = with_past(reduction="none")
    other = torch.tensor([3, 0])
    values, plain = loss(Z, Y, other, 6), F.cross_entropy(Z, Y, reduction="none")
    assert values[0] > plain[0]
    assert values[1] == plain[1]


def test_epochs_are_counted_by_calls_and_evaluation_does_not_count():
    told, counting = (TrajectoryLoss(4, 3, dtype=F64, start_epoch=1, steps_per_epoch=2) for _ in range(2))
    for call in range(12):
        index = torch.tensor([0, 1]) if call % 2 else torch.tensor([2, 3])
        z = normal(2, 3, seed=call)
        assert counting(z, Y, index) == told(z, Y, index, call // 2)
        counting.eval()
        assert counting(normal(2, 3, seed=99), Y, index) == F.cross_entropy(normal(2, 3, seed=99), Y)
        counting.train()
    assert counting.calls == 12


@pytest.mark.parametrize("persistent", [False, True])
def test_a_saved_past_goes_on_and_one_that_is_not_saved_begins_anew(persistent):
    loss = with_past(persistent=persistent)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    other = TrajectoryLoss(5, 3, dtype=F64, persistent=persistent)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other(Z, Y, INDEX, 6) == (loss(Z, Y, INDEX, 6) if persistent else F.cross_entropy(Z, Y))


def test_memory_is_half_precision_by_default_and_survives_its_overflow():
    loss = TrajectoryLoss(5, 3)
    assert loss.history.dtype == torch.float16
    assert loss.history.numel() == 5 * 4 * 3
    loss(1e6 * PAST, Y, INDEX, 3)
    assert loss(1e6 * Z, Y, INDEX, 6).isfinite()


def test_mesa_is_the_same_term_with_the_teachers_scores():
    mesa = MESALoss(lam=0.3)
    assert mesa(Z, Y, PAST, 6) == with_past()(Z, Y, INDEX, 6)
    assert mesa(Z, Y, PAST, 5) == F.cross_entropy(Z, Y)
    assert MESALoss(reduction="none")(Z, Y, Z, 6).shape == (2,)
    assert "lam=0.8, tau=5.0, start_epoch=5" in repr(MESALoss())


def test_the_teacher_is_a_moving_average_of_weights_and_statistics():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    teacher = mesa_teacher(model, decay=0.9)
    weight, mean = model[0].weight.detach().clone(), model[1].running_mean.clone()
    for step in range(3):
        model(normal(8, 3, seed=step).float())
        with torch.no_grad():
            model[0].weight += 1
        teacher.update_parameters(model)
        weight = 0.9 * weight + 0.1 * model[0].weight.detach()
        mean = 0.9 * mean + 0.1 * model[1].running_mean
    torch.testing.assert_close(teacher.module[0].weight, weight)
    torch.testing.assert_close(teacher.module[1].running_mean, mean)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_training_with_a_loader_that_knows_the_samples():
    x, y = normal(20, 3).float(), torch.arange(20) % 3
    dataset = IndexedDataset(TensorDataset(x, y))
    assert len(dataset) == 20
    loader = DataLoader(dataset, batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(3, 3)
    loss = TrajectoryLoss(20, 3, start_epoch=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(5):
        for index, inputs, targets in loader:
            assert torch.equal(x[index], inputs)
            optimizer.zero_grad()
            loss(model(inputs), targets, index, epoch).backward()
            optimizer.step()
    assert set(loss.epochs.flatten().tolist()) == {1, 2, 3, 4}


def test_misuse_is_refused_with_the_argument_named(monkeypatch):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks of types would come first
    bad = {
        "lam": (-0.1, math.nan),
        "tau": (0.0, -1.0, math.nan),
        "delay": (0, 1.5),
        "steps_per_epoch": (0,),
        "dtype": (torch.int8,),
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                TrajectoryLoss(5, 3, **{name: value})
            if name in ("lam", "tau"):
                with pytest.raises(ValueError, match=name):
                    MESALoss(**{name: value})
    for sizes in ((0, 3), (5, 1)):
        with pytest.raises(ValueError, match="num_"):
            TrajectoryLoss(*sizes)
    loss = with_past()
    for index in (torch.tensor([0, 5]), torch.tensor([-1, 0]), torch.tensor([0]), torch.tensor([0.0, 1.0])):
        with pytest.raises(ValueError, match="index"):
            loss(Z, Y, index, 6)
    with pytest.raises(ValueError, match="input"):
        loss(Z[:, :2], torch.tensor([0, 1]), INDEX, 6)
    with pytest.raises(ValueError, match="epoch"):
        loss(Z, Y, INDEX)
    with pytest.raises(ValueError, match="ema_logits"):
        MESALoss()(Z, Y, PAST[:1], 6)
    with pytest.raises(ValueError, match="decay"):
        mesa_teacher(nn.Linear(2, 2), decay=1.0)
