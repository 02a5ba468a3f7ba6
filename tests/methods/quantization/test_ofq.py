import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.quantization import (
    ConfidenceGuidedAnnealing,
    LSQActivation,
    OscillationTracker,
    QKReparamAttention,
    StatsQLinear,
    StatsQuantizer,
    anneal,
    statsq_linear,
)

F64 = torch.float64
ROWS = torch.tensor([[0.9, -0.3, 0.05, -1.4], [0.2, 0.1, -0.2, 0.7]])
BOUNDARY_ROW = torch.tensor([[0.5, -0.5, 0.001, -0.002, 0.4985, 1, -1, -0.5005]])


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, [[0.99375, -0.33125, 0.33125, -0.99375], [0.15, 0.15, -0.15, 0.45]]),
        (3, [[0.828125, -0.165625, 0.165625, -1.159375], [0.225, 0.075, -0.225, 0.525]]),
        (4, [[0.910938, -0.248438, 0.082813, -1.242188], [0.1875, 0.1125, -0.1875, 0.5625]]),
    ],
)
def test_golden_weights(bits, expected):
    quantizer, weight = StatsQuantizer(bits), ROWS.clone().requires_grad_()
    torch.testing.assert_close(quantizer.scale(weight).flatten(), torch.tensor([1.325, 0.6]))
    found = quantizer(weight)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    found.sum().backward()
    assert torch.equal(weight.grad, torch.ones(2, 4))


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(2, 8), c=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_weights_have_few_levels_that_scale_with_them(bits, c, seed):
    weight, quantizer = normal(4, 300, seed=seed), StatsQuantizer(bits)
    found = quantizer(weight)
    assert all(len(row.unique()) <= 2**bits for row in found)
    torch.testing.assert_close(quantizer(c * weight), c * found)
    codes = quantizer.codes(weight)
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() < 2 ** (bits - 1)


def test_other_shapes_zero_rows_and_one_bit():
    heads = normal(3, 5, 7)
    by_head = torch.cat([StatsQuantizer(3)(heads.transpose(0, 1).flatten(1))]).view(5, 3, 7).transpose(0, 1)
    torch.testing.assert_close(StatsQuantizer(3, channel_axis=1)(heads), by_head)
    assert StatsQuantizer(2)(torch.zeros(2, 4)).abs().max() < 1e-8
    one = StatsQuantizer(1, binary=True)(ROWS)
    torch.testing.assert_close(one, ROWS.sign() * torch.tensor([[1.325], [0.6]]) / 2)
    half = StatsQuantizer(2)(ROWS.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), StatsQuantizer(2)(ROWS), atol=1e-3, rtol=1e-3)
    assert not StatsQuantizer(2)(torch.zeros(2, 4).half()).any()


def test_golden_positions_and_weights_that_may_move():
    quantizer = StatsQuantizer(2)
    expected = torch.tensor([[0.4995, -1.499501, -0.498001, -0.503998, 0.496502, 1.499, -2.499, -1.5005]])
    torch.testing.assert_close(quantizer.position(BOUNDARY_ROW), expected, atol=2e-6, rtol=0)
    moves = torch.isin(torch.arange(8), torch.tensor([0, 1, 2, 3, 4, 7]))[None]
    assert torch.equal(quantizer.near_threshold(BOUNDARY_ROW, 0.005), moves)
    assert torch.equal(quantizer.near_threshold(BOUNDARY_ROW, 0.5), moves)
    assert not quantizer.near_threshold(BOUNDARY_ROW, 0.0).any()
    weight = BOUNDARY_ROW.clone().requires_grad_()
    StatsQuantizer(2, boundary_range=0.005)(weight).sum().backward()
    assert torch.equal(weight.grad, moves.float())


@pytest.mark.parametrize("boundary_range", [0.0, 0.005, 0.1, 0.5])
def test_frozen_weights_stay_bit_for_bit(boundary_range):
    weight, free = nn.Parameter(normal(20, 30)), nn.Parameter(normal(6))
    optimizer = torch.optim.AdamW([weight, free], 0.05, weight_decay=0.1)
    for _ in range(3):  # so that there is momentum
        (weight.square().sum() + free.square().sum()).backward()
        optimizer.step()
    annealing = ConfidenceGuidedAnnealing(optimizer, [weight], 3, boundary_range)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        ((weight - 1).square().sum() + free.square().sum()).backward()
        v = StatsQuantizer(3).position(weight)
        distance = torch.stack([(v - j - 0.5).abs() for j in range(-4, 3)]).amin(0)
        before, free_before = weight.detach().clone(), free.detach().clone()
        annealing.step()
        schedule.step()
        assert torch.equal(weight == before, distance > boundary_range)
        assert (free != free_before).all()
    annealing.remove()
    before = weight.detach().clone()
    optimizer.step()
    assert (weight != before).all()


@pytest.mark.parametrize(
    ("bits", "signed", "lowest", "highest"), [(2, True, -2, 1), (3, True, -4, 3), (3, False, 0, 7), (1, False, 0, 1)]
)
def test_learned_steps_round_and_get_their_gradients(bits, signed, lowest, highest):
    x = normal(50, 8) if signed else normal(50, 8).abs()
    layer = LSQActivation(bits, signed).double()
    x.requires_grad_()
    found, v = layer(x), normal(50, 8, seed=1)
    step = layer.step.item()
    assert step == pytest.approx((2 if signed else 4) * x.abs().mean().item() / math.sqrt(highest))
    places = (x / step).detach()
    codes = places.clamp(lowest, highest).round()
    torch.testing.assert_close(found, codes * step)
    (found * v).sum().backward()
    inside = (places >= lowest) & (places <= highest)
    torch.testing.assert_close(x.grad, v * inside)
    slope = torch.where(inside, codes - places, codes)
    torch.testing.assert_close(layer.step.grad.item(), ((slope * v).sum() / math.sqrt(400 * highest)).item())


def test_steps_of_channels_and_of_one_bit():
    x = normal(6, 5, 4) * torch.tensor([1.0, 2, 3, 4], dtype=F64)
    layer = LSQActivation(4, channels=4).double()
    found = layer(x)
    for channel in range(4):
        alone = LSQActivation(4).double()
        torch.testing.assert_close(found[..., channel], alone(x[..., channel]))
    rows = LSQActivation(2, channels=6, axis=0).double()
    rows(x)
    torch.testing.assert_close(rows.step, 2 * x.abs().mean((1, 2)))
    binary = LSQActivation(1).double()
    torch.testing.assert_close(binary(x), 2 * x.sign() * x.abs().mean())
    again = LSQActivation(4, channels=4).double()
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(100 * x), layer(100 * x))  # the step that was learned, not one of these inputs


@pytest.mark.parametrize("channels", [1, 4])
def test_steps_start_from_the_first_input_that_says_anything(channels):
    layer, x = LSQActivation(4, channels=channels).double(), normal(6, 4)
    for nothing in (torch.zeros(0, 4, dtype=F64), torch.zeros(6, 4, dtype=F64)):
        assert torch.equal(layer(nothing), nothing)
    torch.testing.assert_close(layer(x), LSQActivation(4, channels=channels).double()(x))


def attention(dim=32, heads=4, bias=True):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.MultiheadAttention(dim, heads, bias=bias, batch_first=True, dtype=F64)
        if bias:
            nn.init.normal_(made.in_proj_bias)
            nn.init.normal_(made.out_proj.bias)
    return made


@pytest.mark.parametrize("bias", [True, False])
def test_attention_that_rounds_nothing_is_the_ordinary_one(bias):
    plain, x = attention(bias=bias), normal(2, 9, 32)
    found = QKReparamAttention.from_attention(plain, None, None)
    if bias:
        with torch.no_grad():
            plain.in_proj_bias[:64] = 0
    torch.testing.assert_close(found(x), plain(x, x, x, need_weights=False)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found(x[0]), found(x)[0])
    assert found.product().numel() == 4 * 32**2
    fine = QKReparamAttention.from_attention(plain, 16, 16)
    coarse = QKReparamAttention.from_attention(plain, 2, 2)
    errors = [(module(x) - found(x)).square().mean().item() for module in (fine, coarse)]
    assert errors[0] < errors[1]


def test_attention_rounds_the_products_and_trains_their_factors():
    module = QKReparamAttention.from_attention(attention(), 2, 3)
    seen = []
    module.product_quantizer.register_forward_hook(lambda m, args, out: seen.append(out))
    module(normal(2, 9, 32)).square().sum().backward()
    assert seen[0].shape == (4 * 32, 32)
    assert all(len(row.unique()) <= 4 for row in seen[0])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert module.query.weight.grad.abs().sum() > 0


def test_annealing_a_model_takes_all_its_weights():
    model = nn.Sequential(
        QKReparamAttention.from_attention(attention(), 2, 2), StatsQLinear(32, 8, dtype=F64).double(), nn.Linear(8, 2)
    ).double()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    annealing = anneal(model, optimizer, 0.0)
    assert len(annealing.params) == 3
    frozen = [p.detach().clone() for p in annealing.params]
    others = model[2].weight.detach().clone()
    model(normal(2, 9, 32)).square().sum().backward()
    assert not model[0].query.weight.grad.any()
    optimizer.step()
    assert all(torch.equal(p, before) for p, before in zip(annealing.params, frozen, strict=True))
    assert (model[2].weight != others).all()
    annealing.remove()
    model(normal(2, 9, 32)).square().sum().backward()
    assert model[0].query.weight.grad.any()
    assert model[0].product_quantizer.boundary_range is None


def test_surgery_shares_weights_and_leaves_what_it_is_told(small_gpt):
    model = copy.deepcopy(small_gpt.model)
    weights = dict(model.named_parameters())
    statsq_linear(model, 4, 8, unsigned=("down_proj",))
    assert type(model.lm_head) is nn.Linear
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer, StatsQLinear)
    assert layer.weight is weights["model.layers.0.mlp.down_proj.weight"]
    assert [layer.input_quantizer.lsq.signed, model.model.layers[0].mlp.up_proj.input_quantizer.lsq.signed] == [0, 1]
    ids = torch.arange(64, 96)[None]
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()


def test_surgery_leaves_attention_with_one_matrix_alone():
    model = nn.Sequential(QKReparamAttention(8, 2), nn.Linear(8, 4))
    statsq_linear(model)
    assert type(model[0].query) is nn.Linear
    assert type(model[1]) is StatsQLinear


def test_training_at_two_bits_goes_down():
    x = normal(256, 16, dtype=torch.float32)
    y = (x[:, :8].square().sum(1) > 8).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    statsq_linear(model, 2, 2, unsigned=("2",), skip=("0", "4"))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(80):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_weights_of_one_bit_are_allowed_where_they_are_asked_for():
    model = statsq_linear(nn.Sequential(nn.Linear(8, 4, bias=False)), 1, 4, binary=True)
    mean = model[0].weight.abs().mean(1, keepdim=True)
    rounded = model[0].weight_quantizer(model[0].weight)
    torch.testing.assert_close(rounded, mean * torch.where(model[0].weight >= 0, 1.0, -1.0))


@pytest.mark.parametrize(
    ("sequence", "count"), [([0, 1, 0, 1], 2), ([0, 1, 1, 1, 0], 1), ([0, 1, 2, 3], 0), ([0, 2, -1, 1, 1, 0], 3)]
)
def test_oscillations_are_changes_back(sequence, count):
    tracker = OscillationTracker(momentum=0.25)
    counts, frequency = [0], torch.zeros(2)
    for code in sequence:
        tracker.update(torch.tensor([code, 5]))
        counts.append(int(tracker.counts[0]))
        frequency = 0.75 * frequency + 0.25 * torch.tensor([counts[-1] - counts[-2], 0])
    assert tracker.counts.tolist() == [count, 0]
    torch.testing.assert_close(tracker.frequency, frequency)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("bits", lambda: StatsQuantizer(1)),
        ("bits", lambda: StatsQuantizer(17)),
        ("boundary_range", lambda: StatsQuantizer(2, boundary_range=0.6)),
        ("bits", lambda: LSQActivation(0)),
        ("channels", lambda: LSQActivation(2, channels=0)),
        ("heads", lambda: QKReparamAttention(10, 3)),
        ("attention", lambda: QKReparamAttention.from_attention(nn.MultiheadAttention(8, 2, kdim=4))),
        ("batch_first=True", lambda: QKReparamAttention.from_attention(nn.MultiheadAttention(8, 2))),
        (
            "without dropout",
            lambda: QKReparamAttention.from_attention(nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)),
        ),
        ("weight_bits", lambda: statsq_linear(nn.Linear(4, 4), 1)),
        ("act_bits", lambda: statsq_linear(nn.Linear(4, 4), 2, 0)),
        ("nn.Linear to replace", lambda: statsq_linear(nn.ReLU())),
        ("momentum", lambda: OscillationTracker(0.0)),
        ("StatsQ weights", lambda: anneal(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.ones(2))]))),
    ],
)
def test_misuse_is_refused_with_the_argument_named(name, call):
    with pytest.raises(ValueError, match=name):
        call()


def test_misuse_of_annealing_and_tracking():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.SGD([weight], 0.1)
    with pytest.raises(ValueError, match="quantised_params"):
        ConfidenceGuidedAnnealing(optimizer, [nn.Parameter(torch.ones(2, 2))], 2)
    with pytest.raises(ValueError, match="quantised_params"):
        ConfidenceGuidedAnnealing(optimizer, [], 2)
    with pytest.raises(ValueError, match="boundary_range"):
        ConfidenceGuidedAnnealing(optimizer, [weight], 2, math.nan)
    ConfidenceGuidedAnnealing(optimizer, [weight], 2)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)
    tracker = OscillationTracker()
    tracker.update(torch.zeros(3))
    with pytest.raises(ValueError, match="codes"):
        tracker.update(torch.zeros(4))
