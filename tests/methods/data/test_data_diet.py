import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fairtrial.methods.data import (
    ForgettingTracker,
    PrunedSampler,
    average_scores,
    el2n_scores,
    grand_scores,
    prune_indices,
)
from fairtrial.methods.data.data_diet import SCORING_FRACTION, SCORING_MEMBERS
from fairtrial.methods.registry import index

LOGITS = torch.tensor([[2.0, 0, -1], [0, 0, 0], [-3, 1, 4]], dtype=torch.float64)
TARGETS = torch.tensor([0, 1, 0])


def draw(n, generator=None, classes=4, features=5):
    generator = generator or torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    return x, torch.randint(classes, (n,), generator=generator)


def linear_softmax():
    model = nn.Linear(2, 3).double()
    model.weight.data = torch.tensor([[0.5, -0.2], [0.1, 0.3], [-0.4, 0.0]], dtype=torch.float64)
    model.bias.data = torch.tensor([0.1, 0.0, -0.1], dtype=torch.float64)
    return model


class SmallNet(nn.Module):
    """With batch norm, dropout, a weight used twice and one that is frozen."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first, self.again, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.norm, self.dropout = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.double()
        for parameter in self.parameters():
            parameter.data.normal_(generator=generator)
        self.norm.running_mean.normal_(generator=generator)
        self.norm.bias.requires_grad_(False)

    def forward(self, x):
        hidden = self.dropout(self.norm(self.first(x)).tanh())
        return self.last(self.again(self.again(hidden).tanh()))


def per_example_gradient_norms(model, x, y, params):
    model.eval()
    norms = []
    for i in range(len(x)):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), params)
        norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    return torch.stack(norms)


@pytest.mark.parametrize(
    ("ord", "expected"), [(2, [0.198004, math.sqrt(2 / 3), 1.380700]), (1, [0.312411, 1.333333, 1.998264])]
)
def test_el2n_is_golden(ord, expected):
    scores = el2n_scores(nn.Identity(), [(LOGITS, TARGETS)], ord=ord)
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_el2n_of_a_uniform_prediction(classes):
    scores = el2n_scores(nn.Identity(), [(torch.zeros(1, classes), torch.tensor([0]))])
    assert scores.item() == pytest.approx(math.sqrt((classes - 1) / classes))


def test_el2n_tells_very_small_errors_apart():
    logits = torch.tensor([[0.0, 30.0], [0.0, 40.0]])
    scores = el2n_scores(nn.Identity(), [(logits, torch.tensor([1, 1]))])
    torch.testing.assert_close(scores, math.sqrt(2) * torch.tensor([-30.0, -40.0]).exp(), rtol=1e-5, atol=0)


@settings(deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 999))
def test_el2n_ignores_shifts_and_follows_permutations(shift, seed):
    generator = torch.Generator().manual_seed(seed)
    logits, y = draw(6, generator)
    y = y + 1  # of five
    order = torch.randperm(6, generator=generator)
    scores = el2n_scores(nn.Identity(), [(logits, y)])
    torch.testing.assert_close(el2n_scores(nn.Identity(), [(logits + shift, y)]), scores, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(el2n_scores(nn.Identity(), [(logits[order], y[order])]), scores[order])
    assert (scores <= math.sqrt(2)).all()


def test_grand_of_a_linear_softmax_model_is_golden_and_follows_from_el2n():
    model, x = linear_softmax(), torch.tensor([[1.0, 2], [0, -1], [3, 1]], dtype=torch.float64)
    loader = [(x, TARGETS)]
    grand, el2n = grand_scores(model, loader), el2n_scores(model, loader)
    expected = torch.tensor([[2.142303, 1.312136, 1.504444], [0.874591, 0.927820, 0.453607]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([grand, el2n]), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(grand, el2n * (1 + x.square().sum(1)).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 5, 64])
def test_grand_is_the_norm_of_every_single_gradient(chunk_size):
    model = SmallNet()
    x, y = draw(13)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    scores = grand_scores(model, [(x[:8], y[:8]), (x[8:], y[8:])], chunk_size=chunk_size)
    torch.testing.assert_close(scores, per_example_gradient_norms(model, x, y, trained), rtol=1e-10, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_grand_in_chosen_parameters():
    model = SmallNet()
    x, y = draw(13)
    chosen = [model.again.weight, model.norm.bias]
    scores = grand_scores(model, [(x, y)], chosen)
    model.norm.bias.requires_grad_(True)
    torch.testing.assert_close(scores, per_example_gradient_norms(model, x, y, chosen), rtol=1e-10, atol=0)
    features = []
    model.last.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    el2n = el2n_scores(model, [(x, y)])
    expected = el2n * (1 + features[0].square().sum(1)).sqrt()
    model.last._forward_pre_hooks.clear()
    torch.testing.assert_close(grand_scores(model, [(x, y)], model.last.parameters()), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("score", [el2n_scores, grand_scores])
def test_the_model_keeps_its_modes_its_buffers_and_the_random_state(score):
    model = SmallNet().train()
    model.norm.eval()
    before, state = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    score(model, [draw(4)])
    assert model.training
    assert model.dropout.training
    assert not model.norm.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("score", [el2n_scores, grand_scores])
def test_scores_are_in_data_set_order_however_batches_come(score):
    model = SmallNet()
    x, y = draw(11)
    expected = score(model, [(x, y)])
    assert expected.shape == (11,)
    in_order = DataLoader(TensorDataset(x, y), batch_size=4)
    torch.testing.assert_close(score(model, in_order), expected)
    indexed = TensorDataset(x, y, torch.arange(11))
    shuffled = DataLoader(indexed, batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(score(model, shuffled), expected)


def test_loaders_that_would_misplace_scores_are_refused():
    x, y = draw(11)
    data, indexed = TensorDataset(x, y), TensorDataset(x, y, torch.arange(11))
    with pytest.raises(ValueError, match="loader must be in data-set order"):
        el2n_scores(nn.Identity(), DataLoader(data, batch_size=4, shuffle=True))
    with pytest.raises(ValueError, match="loader must be the whole data set, drop_last=False, got '8 of 11 examples'"):
        el2n_scores(nn.Identity(), DataLoader(data, batch_size=4, drop_last=True))
    with pytest.raises(ValueError, match="loader must be every index of 0..9 once"):
        el2n_scores(nn.Identity(), [tuple(column[1:] for column in indexed.tensors)])
    with pytest.raises(ValueError, match="loader"):
        el2n_scores(nn.Identity(), [(x, y), (x, y, torch.arange(11))])
    with pytest.raises(ValueError, match="loader must be batches"):
        el2n_scores(nn.Identity(), [(x,)])
    with pytest.raises(ValueError, match="loader must be at least one batch"):
        el2n_scores(nn.Identity(), [])


@pytest.mark.parametrize("score", [el2n_scores, grand_scores])
def test_outputs_and_labels_that_do_not_fit_are_refused(score):
    x, y = draw(6)
    with pytest.raises(ValueError, match="y must be within 0..3, got '0..4'"):
        score(nn.Linear(5, 4).double(), [(x, torch.tensor([0, 1, 2, 3, 4, 0]))])
    with pytest.raises(ValueError, match="model must be a classifier"):
        score(nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (2, 2))).double(), [(x, y)])


def test_misuse_is_refused_with_the_argument_named():
    model, batch = nn.Linear(5, 4).double(), draw(6)
    with pytest.raises(ValueError, match="ord must be 1 or 2"):
        el2n_scores(model, [batch], ord=3)
    with pytest.raises(ValueError, match="chunk_size"):
        grand_scores(model, [batch], chunk_size=0)
    with pytest.raises(ValueError, match="params must be at least one"):
        grand_scores(model, [batch], [])
    with pytest.raises(ValueError, match="params must be parameters of the model only"):
        grand_scores(model, [batch], [model.weight, nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="n must be"):
        ForgettingTracker(0)


def test_forgetting_counts_are_golden():
    rows = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.bool)
    tracker = ForgettingTracker(5)
    for column in rows.T:
        order = torch.tensor([2, 0, 3, 1])
        tracker.update(order[:3], column[order[:3]])
        tracker.update(order[3:], column[order[3:]])
    assert tracker.scores().tolist() == [1, math.inf, 0, 0, math.inf]  # the last was never seen


def test_forgetting_refuses_indices_that_do_not_fit():
    tracker = ForgettingTracker(3)
    correct = torch.tensor([True, False])
    for indices in ([0, 3], [-1, 0], [1, 1]):
        with pytest.raises(ValueError, match="indices must be"):
            tracker.update(torch.tensor(indices), correct)


def test_average_of_runs():
    mean = average_scores([torch.tensor([1.0, 2.0, 0.0]), torch.tensor([3.0, math.inf, 1.0])])
    assert mean.tolist() == [2.0, math.inf, 0.5]
    for runs in ([], [torch.ones(2), torch.ones(3)], [torch.tensor([math.nan])]):
        with pytest.raises(ValueError, match="scores must be"):
            average_scores(runs)


@given(
    scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, math.inf]), min_size=1, max_size=30),
    data=st.data(),
)
def test_kept_examples_are_those_of_the_strategy(scores, data):
    n, values = len(scores), torch.tensor(scores)
    kept = data.draw(st.integers(1, n))
    offset = data.draw(st.integers(0, n - kept))
    ranked = sorted(range(n), key=lambda i: (scores[i], i))
    assert prune_indices(values, kept).tolist() == sorted(ranked[n - kept :])
    assert prune_indices(values, kept, "easiest").tolist() == sorted(ranked[:kept])
    assert prune_indices(values, kept, "window", offset).tolist() == sorted(ranked[offset : offset + kept])
    assert len(prune_indices(values, kept / n)) == kept


def test_a_whole_number_is_a_count_and_a_fraction_a_share():
    scores = torch.arange(10.0)
    assert prune_indices(scores, 1).tolist() == [9]
    assert prune_indices(scores, 1.0).tolist() == list(range(10))
    assert prune_indices(scores, 0.3).tolist() == [7, 8, 9]
    assert prune_indices(scores, 0.01).tolist() == [9]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"keep": 11}, "keep"),
        ({"keep": 0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"keep": 0.0}, "keep"),
        ({"keep": math.nan}, "keep"),
        ({"keep": 5, "strategy": "window", "offset": 6}, "offset"),
        ({"keep": 5, "strategy": "window", "offset": -1}, "offset"),
        ({"keep": 5, "offset": 2}, "offset"),
        ({"keep": 5, "strategy": "random"}, "strategy"),
        ({"keep": 5, "scores": torch.tensor([1.0, math.nan])}, "scores"),
        ({"keep": 5, "scores": torch.zeros(0)}, "scores"),
    ],
)
def test_pruning_refuses_misuse_with_the_argument_named(arguments, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        prune_indices(**({"scores": torch.arange(10.0)} | arguments))
    with pytest.raises(ValueError, match=f"^{name} must be"):
        PrunedSampler(**({"scores": torch.arange(10.0)} | arguments))


def test_sampler_permutes_the_kept_examples_afresh_each_epoch():
    scores = torch.arange(100.0).flip(0)
    before = torch.get_rng_state()
    sampler = PrunedSampler(scores, 0.4, generator=torch.Generator().manual_seed(3))
    epochs = [list(sampler) for _ in range(3)]
    assert len(sampler) == 40
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    again = PrunedSampler(scores, 0.4, generator=torch.Generator().manual_seed(3))
    assert [list(again) for _ in range(3)] == epochs
    assert sorted(PrunedSampler(scores)) == list(range(70))
    assert torch.equal(torch.get_rng_state(), before)


def test_sampler_feeds_a_loader():
    data = TensorDataset(torch.arange(10))
    loader = DataLoader(data, batch_size=4, sampler=PrunedSampler(torch.arange(10.0), 5))
    assert sorted(torch.cat([batch for (batch,) in loader]).tolist()) == [5, 6, 7, 8, 9]


def bound_method():
    (entry,) = [entry for entry in index() if entry.paper == "data_diet"]
    return entry.load()


def test_in_a_task_scores_are_averaged_over_early_models():
    x, y = draw(20)
    trained = []

    def pretrain(fraction, member):
        trained.append((fraction, member))
        model = nn.Linear(5, 4).double()
        nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(member))
        nn.init.zeros_(model.bias)
        return model

    batches = lambda: iter([(x[:12], y[:12]), (x[12:], y[12:])])  # noqa: E731
    setting = SimpleNamespace(pretrain=pretrain, score_batches=batches, generator=torch.Generator().manual_seed(0))
    method = bound_method()
    bound = method.bind(setting)
    assert trained == []
    sampler = method.factory(**bound, keep=0.5)
    assert trained == [(SCORING_FRACTION, member) for member in range(SCORING_MEMBERS)]
    members = [el2n_scores(pretrain(0, member), batches()) for member in range(SCORING_MEMBERS)]
    assert torch.equal(sampler.indices, prune_indices(sum(members) / SCORING_MEMBERS, 0.5))
    assert sampler.generator is setting.generator


def test_in_a_task_given_scores_need_no_early_training():
    def pretrain(fraction, member):
        raise AssertionError("scores were given")

    method = bound_method()
    setting = SimpleNamespace(pretrain=pretrain, score_batches=pretrain, generator=torch.Generator())
    sampler = method.factory(**{**method.bind(setting), "scores": torch.arange(4.0), "keep": 0.5})
    assert sampler.indices.tolist() == [2, 3]
