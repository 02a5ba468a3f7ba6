"""Rounding, sensitivities and the allocation of bits, and projections that spare the first token."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.quantization import (
    ActivationQuantizer,
    BOSAwareProjection,
    MixDQ,
    MixedGroup,
    allocate_bits,
    average_bits,
    decoupled_allocate,
    fake_quantize,
    global_ssim,
    layer_sensitivity,
    load_packed_,
    packed_layers,
    quantize_,
    save_packed,
    split_mean_bits,
    sqnr_db,
)
from fairtrial.methods.quantization.mixdq import is_content

SIZES = {"a": 100, "b": 200, "c": 300}
SCORES = {"a": {2: 8, 4: 18, 8: 40}, "b": {2: 5, 4: 14, 8: 33}, "c": {2: 10, 4: 21, 8: 41}}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def test_signal_to_noise_golden():
    ref, pred = torch.tensor([1.0, 2, 3]), torch.tensor([1.1, 1.8, 3.05])
    found = sqnr_db(pred, ref)
    assert found == pytest.approx(24.259687, abs=1e-5)
    assert sqnr_db(7 * pred, 7 * ref) == pytest.approx(found, abs=1e-5)
    assert sqnr_db(ref + (pred - ref) / 2, ref) - found == pytest.approx(6.0206, abs=1e-4)
    assert sqnr_db(ref, ref) == math.inf


def test_similarity_is_one_for_equal_images_and_blind_to_texture():
    ref, noise = normal(4, 1, 8, 8), normal(4, 1, 8, 8, seed=1)
    assert global_ssim(ref, ref, 1.0) == pytest.approx(1)
    assert global_ssim(2 * ref.mean((1, 2, 3), keepdim=True) - ref, ref, 1.0) < 0
    assert global_ssim(ref + 0.1 * noise, ref, 1.0) > global_ssim(ref + noise, ref, 1.0)
    x, y = ref[0].double(), (ref + noise)[0].double()
    c1, c2, mx, my = 1e-4, 9e-4, x.mean(), y.mean()
    sxy = ((x - mx) * (y - my)).mean()
    by_hand = (2 * mx * my + c1) * (2 * sxy + c2)
    by_hand /= (mx**2 + my**2 + c1) * (x.var(correction=0) + y.var(correction=0) + c2)
    assert global_ssim((ref + noise)[:1], ref[:1], 1) == pytest.approx(by_hand.item())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_rounding_keeps_its_levels_and_its_gradient(symmetric, axis):
    x = (normal(4, 50) + 0.3).requires_grad_()
    for bits in (2, 3, 8):
        found = fake_quantize(x, bits, symmetric, axis)
        rows = [found.flatten()] if axis is None else list(found.transpose(0, axis))
        assert all(len(row.unique()) <= 2**bits for row in rows)
        assert (found == 0).any() or bits == 8
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert (fake_quantize(x, 16, symmetric, axis) - x).abs().max() < 1e-3 * x.abs().max()
    assert torch.equal(fake_quantize(torch.zeros(2, 3), 4, symmetric, axis), torch.zeros(2, 3))


def test_rounding_golden():
    assert fake_quantize(torch.tensor([-3.0, 0.4, 1.6, 3]), 3).tolist() == [-3, 0, 2, 3]
    assert fake_quantize(torch.tensor([1.0, 2, 3]), 2, symmetric=False).tolist() == [1, 2, 3]  # 0 is in the range
    found = fake_quantize(torch.tensor([-1.0, 0.4, 1.9]), 2, symmetric=False)
    torch.testing.assert_close(found, torch.tensor([-0.9667, 0, 1.9333]), atol=1e-4, rtol=0)


def test_ranges_run_over_calibration_batches():
    quantizer = ActivationQuantizer(8)
    own = quantizer(torch.tensor([1.0, 3.0]))
    assert own.tolist() == fake_quantize(torch.tensor([1.0, 3.0]), 8, symmetric=False).tolist()
    quantizer.observe(torch.tensor([-1.0, 3.0]))
    quantizer.observe(torch.tensor([1.0, 5.0]))
    assert (quantizer.low.item(), quantizer.high.item()) == pytest.approx((-0.95, 3.1))
    assert quantizer(torch.tensor([100.0])).item() == pytest.approx(3.1, abs=0.02)


def test_the_first_token_is_exact_and_leaves_the_others_their_range():
    linear, text = nn.Linear(8, 6), normal(3, 5, 8)
    text[:, 0] *= 100
    projection = BOSAwareProjection(copy.deepcopy(linear), 8, 8)
    alone = fake_quantize(text[:, 1:], 8, symmetric=False)
    expected = F.linear(alone, fake_quantize(linear.weight, 8, channel_axis=0), linear.bias)
    for calibrated in (False, True):
        if calibrated:
            projection.observe(text)
        found = projection(text)
        torch.testing.assert_close(found[:, 0], linear(text[:, 0]), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(found[:, 1:], expected, rtol=1e-6, atol=1e-6)
    naive = F.linear(fake_quantize(text, 8, symmetric=False), fake_quantize(linear.weight, 8, channel_axis=0))
    errors = [(y[:, 1:] - linear(text)[:, 1:]).square().mean() for y in (found, naive + linear.bias)]
    assert errors[1] > 100 * errors[0]


def test_a_text_of_the_first_token_alone_is_projected_in_float():
    linear, text = nn.Linear(8, 4), normal(2, 3, 8)
    projection = BOSAwareProjection(copy.deepcopy(linear), 4, 4)
    for _ in range(2):
        projection.observe(text[:, :1])
        torch.testing.assert_close(projection(text[:, :1]), linear(text[:, :1]))
        assert projection(text[:, :0]).shape == (2, 0, 4)
        before = projection.inputs.low.clone()
        projection.observe(text)
    assert before == projection.inputs.low == text[:, 1:].amin()


@pytest.mark.parametrize("kind", ["weight", "activation"])
def test_sensitivity_rounds_one_layer_at_a_time(kind):
    model, x = network(), normal(40, 16)
    before = copy.deepcopy(model.state_dict())
    found = layer_sensitivity(model, ["0", "2", "4"], (2, 4, 8, 16), lambda m: m(x), sqnr_db, kind)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    for by_bits in found.values():
        assert list(by_bits.values()) == sorted(by_bits.values())
        assert by_bits[16] > 60
    changed, inputs = copy.deepcopy(model), x
    with torch.no_grad():
        if kind == "weight":
            changed[0].weight.copy_(fake_quantize(changed[0].weight, 4, channel_axis=0))
        else:
            inputs = fake_quantize(x, 4, symmetric=False)
        assert found["0"][4] == pytest.approx(sqnr_db(changed(inputs), model(x)))
    grouped = layer_sensitivity(model, ["2"], (2,), lambda m: m(x), sqnr_db, kind, grouped=8)
    assert grouped["2"][2] > found["2"][2] if kind == "weight" else grouped["2"] == {2: found["2"][2]}


def test_allocation_golden():
    found = allocate_bits(SCORES, SIZES, 5, (2, 4, 8))
    assert found == {"a": 8, "b": 8, "c": 2}
    assert sum(SCORES[name][b] for name, b in found.items()) == 83


@settings(max_examples=40, deadline=None)
@given(
    layers=st.lists(
        st.tuples(st.integers(1, 50), st.lists(st.floats(-30, 30), min_size=3, max_size=3)), min_size=1, max_size=6
    ),
    mean=st.floats(2, 8),
    tol=st.sampled_from([0.02, 0.3, 1.0]),
    sense=st.sampled_from(["max", "min"]),
)
def test_no_other_allocation_is_better(layers, mean, tol, sense):
    bits = (2, 4, 8)
    sizes = {str(i): size for i, (size, _) in enumerate(layers)}
    scores = {str(i): dict(zip(bits, values, strict=True)) for i, (_, values) in enumerate(layers)}
    total, sign = sum(sizes.values()), 1 if sense == "max" else -1
    sums = [
        sign * sum(scores[name][b] for name, b in zip(sizes, choice, strict=True))
        for choice in itertools.product(bits, repeat=len(layers))
        if abs(sum(b * n for b, n in zip(choice, sizes.values(), strict=True)) / total - mean) <= tol - 1e-5
    ]
    if sums:
        found = allocate_bits(scores, sizes, mean, bits, tol, sense)
        assert abs(sum(found[name] * n for name, n in sizes.items()) / total - mean) <= tol + 1e-5
        assert sign * sum(scores[name][b] for name, b in found.items()) >= max(sums) - 1e-6


def test_the_mean_is_split_golden():
    assert split_mean_bits(5, 0.5, 1.2) == pytest.approx((4.6875, 5.625))
    assert (4.6875 + 0.5 * 5.625) / 1.5 == 5
    assert split_mean_bits(5, 0.5, 1) == (5, 5)


def test_groups_are_allocated_apart_and_judged_together():
    quality = MixedGroup({n: {4: 1.0, 8: s} for n, s in (("q1", 2.0), ("q2", 3.0))}, {"q1": 10, "q2": 10}, (4, 8))
    content = MixedGroup(
        {n: {2: 0.5, 4: 0.8, 8: s} for n, s in (("c1", 0.9), ("c2", 1.0))}, {"c1": 10, "c2": 10}, (2, 4, 8)
    )
    asked = []

    def error(found):
        asked.append(dict(found))
        return abs(found["q2"] - 8) + abs(found["c1"] - 2)

    grid = (0.5, 0.75, 1.0, 1.25)
    found = decoupled_allocate(quality, content, 5.0, error, k_grid=grid, tol=0.3)
    assert found in asked
    assert error(found) == min(map(error, list(asked)))
    for each in asked:
        assert abs(sum(each.values()) / 4 - 4.85) <= 0.15 + 0.3
    with pytest.raises(ValueError, match="target"):
        decoupled_allocate(quality, content, 2.9, error, k_grid=grid)
    assert [is_content(n) for n in ("up.0.attn2.to_k", "up.0.attn1.to_k", "mid.ff.net.2", "conv_in")] == [1, 0, 1, 0]


def test_layers_of_a_model_get_the_bits_that_they_need(tmp_path):
    model, x = network(), normal(60, 16)
    with torch.no_grad():
        model[2].weight.mul_(torch.where(normal(32, 32, seed=2) > 2, 30.0, 1.0))  # hard to round
    exact = model(x)
    mixed = quantize_(copy.deepcopy(model), MixDQ(5, tol=0.7), [x[:30], x[30:]])
    widths = {name: layer.bits for name, layer in packed_layers(mixed)}
    sizes = {"0": 512, "2": 1024, "4": 128}
    assert abs(sum(widths[n] * s for n, s in sizes.items()) / 1664 - 5) <= 0.7
    scores = layer_sensitivity(model, list(sizes), (2, 4, 8), lambda m: m(x), sqnr_db)
    assert widths == allocate_bits(scores, sizes, 5, (2, 4, 8), 0.7)
    assert sqnr_db(mixed(x), exact) > 5
    save_packed(mixed, tmp_path / "model.safetensors")
    assert torch.equal(load_packed_(network(), tmp_path / "model.safetensors")(x), mixed(x))


def test_a_language_model_has_the_mean_bits_asked_for(small_gpt):
    model = quantize_(copy.deepcopy(small_gpt.model), MixDQ(3, 64), [torch.arange(64, 96)[None]])
    assert abs(average_bits(model) - 0.5 - 3) <= 0.02
    assert {layer.bits for _, layer in packed_layers(model)} <= {2, 4, 8}


def test_misuse_is_refused_with_the_argument_named():
    for bits in (1, 17):
        with pytest.raises(ValueError, match="bits"):
            fake_quantize(torch.ones(2), bits)
        with pytest.raises(ValueError, match="bits"):
            ActivationQuantizer(bits)
        with pytest.raises(ValueError, match="bits"):
            BOSAwareProjection(nn.Linear(2, 2), bits)
    with pytest.raises(ValueError, match="x must be finite"):
        ActivationQuantizer(8).observe(torch.tensor([1.0, math.nan]))
    for data_range in (0, math.nan):
        with pytest.raises(ValueError, match="data_range"):
            global_ssim(torch.ones(1, 2), torch.ones(1, 2), data_range)
    lacking = SCORES | {"a": {2: 8, 4: 18}}
    for scores, sizes, mean, message in (
        (lacking, SIZES, 5, r"finite for \[8\] bits.*of a"),
        (SCORES | {"a": {2: 8, 4: 18, 8: math.inf}}, SIZES, 5, r"finite for \[8\] bits"),
        (SCORES, SIZES | {"b": 0}, 5, "positive for b"),
        (SCORES, {"a": 1, "b": 1}, 5, "positive for c"),
        (SCORES, SIZES, 7.9, "mean_bits must be reachable"),
        (SCORES, SIZES, math.nan, "mean_bits"),
        ({}, SIZES, 5, "scores"),
    ):
        with pytest.raises(ValueError, match=message):
            allocate_bits(scores, sizes, mean, (2, 4, 8))
    for arguments in ((math.nan, 1, 1), (5, 0, 1), (5, 1, -1)):
        with pytest.raises(ValueError, match="positive"):
            split_mean_bits(*arguments)
    for wrong in ({"bits": 1}, {"bits": math.nan}, {"candidates": (1, 4)}, {"tol": -1}, {"group_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MixDQ(**wrong)
    model = network()
    with pytest.raises(ValueError, match="mean_bits must be reachable"):
        quantize_(model, MixDQ(7.5), [normal(2, 16)])
    with pytest.raises(ValueError, match="needs calibration data"):
        quantize_(model, MixDQ(4))
    assert all(type(m) in (nn.Linear, nn.ReLU) for m in model)


@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-8, 1e6])
def test_allocations_are_the_best_however_small_the_scores(scale):
    rng = np.random.default_rng(0)
    widths = (2, 4, 8)
    for _ in range(10):
        costs, sizes = rng.random((5, 3)) * scale, rng.integers(1, 9, 5)
        scores = {str(k): dict(zip(widths, row, strict=True)) for k, row in enumerate(costs.tolist())}
        by_name = {str(k): int(size) for k, size in enumerate(sizes)}
        choices = [
            sum(row[widths.index(b)] for row, b in zip(costs, choice, strict=True))
            for choice in itertools.product(widths, repeat=5)
            if abs(np.dot(sizes, choice) / sizes.sum() - 4) <= 0.3 + 1e-12
        ]
        if not choices:
            continue
        found = allocate_bits(scores, by_name, 4, widths, tol=0.3, sense="min")
        assert sum(scores[name][b] for name, b in found.items()) <= min(choices) * (1 + 1e-6)


def test_layers_that_lose_nothing_leave_their_bits_to_others():
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[2].weight)
    quantize_(model, MixDQ(bits=4, tol=1), [torch.randn(4, 16)])
    assert model[3].bits == 8


def test_batches_with_labels_are_judged_by_logits(small_gpt):
    ids = torch.arange(32, 96).view(2, 32)
    plain, labelled = (
        quantize_(copy.deepcopy(small_gpt.model), MixDQ(bits=4), [batch])
        for batch in ({"input_ids": ids}, {"input_ids": ids, "labels": ids})
    )
    assert [layer.bits for _, layer in packed_layers(plain)] == [layer.bits for _, layer in packed_layers(labelled)]


@pytest.mark.parametrize("wrong", [2.5, 4.0, True])
def test_widths_are_whole_numbers(monkeypatch, wrong):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks would come before the method's own
    model = network()
    for call in (
        lambda: fake_quantize(torch.ones(2), wrong),
        lambda: ActivationQuantizer(wrong),
        lambda: BOSAwareProjection(nn.Linear(2, 2), wrong),
        lambda: BOSAwareProjection(nn.Linear(2, 2), 8, wrong),
        lambda: layer_sensitivity(model, ["0"], [wrong], lambda m: m(normal(2, 16)), sqnr_db),
    ):
        with pytest.raises(ValueError, match="bits must be a whole number from 2 to 16"):
            call()
    scores = {"a": {2: 1.0, wrong: 2.0}}
    for call in (lambda: allocate_bits(scores, {"a": 1}, 2, (2, wrong)), lambda: MixDQ(candidates=(2, wrong))):
        with pytest.raises(ValueError, match="candidates"):
            call()
    with pytest.raises(ValueError, match="group_size"):
        MixDQ(group_size=wrong)
