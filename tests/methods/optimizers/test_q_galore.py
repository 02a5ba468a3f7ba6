import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.optimizers import (
    GaLoreAdamW,
    Int8Linear,
    QGaLoreAdamW,
    dequantize_affine,
    optimizer_state_bytes,
    q_galore_param_groups,
    quantize_affine,
    with_int8_weights,
)
from fairtrial.methods.optimizers.q_galore import pack, unpack

F64 = torch.float64
ROW = torch.tensor([-1, -0.3, 0.2, 0.8], dtype=F64)
POSITIVE = torch.tensor([0.5, 0.6, 0.9, 1.0], dtype=F64)


def random(*shape, seed=0, dtype=F64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def there_and_back(w, *arguments, **options):
    return dequantize_affine(*quantize_affine(w, *arguments, **options), w.shape)


@pytest.mark.parametrize(
    ("bits", "codes", "scale", "zero", "back"),
    [
        (4, [0, 6, 10, 15], 0.12, 8, [-0.96, -0.24, 0.24, 0.84]),
        (8, [0, 100, 170, 255], 0.00705882, 142, [-1.002353, -0.296471, 0.197647, 0.797647]),
    ],
)
def test_golden_codes(bits, codes, scale, zero, back):
    found = quantize_affine(ROW, bits, 4)
    assert found.codes.tolist() == [codes]
    assert found.zeros.item() == zero
    assert found.scales.item() == pytest.approx(scale, abs=5e-9)
    torch.testing.assert_close(dequantize_affine(*found, ROW.shape), torch.tensor(back, dtype=F64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_group_without_zero_in_its_range_is_lost_unless_the_range_is_extended(bits):
    assert there_and_back(POSITIVE, bits, 4).tolist() == pytest.approx([0.5] * 4)
    torch.testing.assert_close(there_and_back(POSITIVE, bits, 4, safe_zero=True), POSITIVE, atol=1 / 30, rtol=0)
    torch.testing.assert_close(there_and_back(-POSITIVE, bits, 4, safe_zero=True), -POSITIVE, atol=1 / 30, rtol=0)


def test_stochastic_rounding_is_unbiased_but_where_it_is_clamped():
    generator = torch.Generator().manual_seed(0)
    draws = there_and_back(ROW.repeat(20_000), 8, 4, stochastic=True, generator=generator).view(-1, 4)
    expected = torch.tensor([-1, -0.3, 0.2, 0.797647], dtype=F64)
    torch.testing.assert_close(draws.mean(0), expected, atol=1.5e-4, rtol=0)
    assert len(draws[:, 3].unique()) == 1


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), bits=st.integers(2, 8), stochastic=st.booleans(), dtype=st.sampled_from([F64, None]))
def test_the_error_is_at_most_half_a_step_or_with_stochastic_rounding_one(seed, bits, stochastic, dtype):
    w = random(6, 16, seed=seed, dtype=dtype or torch.float32)
    generator = torch.Generator().manual_seed(seed)
    found = quantize_affine(w, bits, 16, stochastic, generator, safe_zero=True)
    if not stochastic:
        error = (dequantize_affine(*found, w.shape) - w).abs()
        # the zero is rounded as well, so that an end of the range can lie half a step outside
        assert (error <= found.scales * (0.5 + 0.5 * (error == error.amax(1, keepdim=True))) + 1e-6).all()
        inside = (found.codes > 0) & (found.codes < 2**bits - 1)
        assert (error[inside] <= (found.scales.expand_as(w) / 2)[inside] + 1e-6).all()
    else:
        assert ((dequantize_affine(*found, w.shape) - w).abs() < found.scales * (1 + 1e-4)).all()


@given(count=st.integers(1, 33))
def test_packed_codes_come_back(count):
    codes = torch.randint(16, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    packed = pack(codes[None])
    assert packed.numel() == math.ceil(count / 2)
    assert torch.equal(unpack(packed, count), codes)


def steps(cls, gradients, *, start=None, **options):
    w = nn.Parameter(torch.zeros_like(gradients[0]) if start is None else start.clone())
    optimizer = cls([w], **{"rank": 2, "lr": 0.1, **options})
    for gradient in gradients:
        w.grad = gradient.clone()
        optimizer.step()
    return w.detach(), optimizer, optimizer.state[w]


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_with_everything_switched_off_it_is_galore(shape):
    gradients = [random(*shape, seed=i) for i in range(7)]
    options = {"update_proj_gap": 3, "weight_decay": 0.1}
    ours, _, state = steps(QGaLoreAdamW, gradients, proj_bits=None, cos_threshold=None, **options)
    theirs, _, _ = steps(GaLoreAdamW, gradients, **options)
    assert torch.equal(ours, theirs)
    assert state["svd_count"] == 3


def renewals(gradient, count, **options):
    """The steps at which there is a new subspace, and the gap after each."""
    w = nn.Parameter(torch.zeros_like(gradient(0)))
    optimizer = QGaLoreAdamW([w], rank=1, proj_bits=None, **{"update_proj_gap": 2, "fix_signs": True, **options})
    found, gaps, before = [], [], 0
    for step in range(count):
        w.grad = gradient(step)
        optimizer.step()
        state = optimizer.state[w]
        if state["svd_count"] > before:
            found.append(step)
            gaps.append(int(state["gap"]) if "gap" in state else None)
        before = int(state["svd_count"])
    return found, gaps


def test_the_gap_doubles_at_every_renewal_from_the_sixth_on_while_the_gradient_stays():
    constant = random(4, 6)
    found, gaps = renewals(lambda step: constant.clone(), 1000)
    assert found == [0, 2, 4, 6, 8, 10, 12, 16, 32, 64, 128, 256, 512]
    assert gaps[:8] == [2, 2, 2, 2, 2, 4, 8, 16]
    assert len(renewals(lambda step: constant.clone(), 100, cos_threshold=None)[0]) == 50


def test_random_gradients_leave_the_gap_alone():
    generator = torch.Generator().manual_seed(0)
    _, gaps = renewals(lambda step: torch.randn(64, 64, generator=generator), 40, fix_signs=False)
    assert set(gaps) == {2}


def test_a_vector_that_turns_round_blocks_the_gap_unless_signs_are_left_out(monkeypatch):
    svd, calls = torch.linalg.svd, []

    def alternating(matrix, full_matrices):
        calls.append(1)
        sign = (-1) ** len(calls)
        U, S, Vh = svd(matrix, full_matrices=full_matrices)
        return U * sign, S, Vh * sign

    monkeypatch.setattr(torch.linalg, "svd", alternating)
    constant = random(4, 6)
    assert set(renewals(lambda step: constant.clone(), 40, fix_signs=False)[1]) == {2}
    assert max(renewals(lambda step: constant.clone(), 40, fix_signs=False, abs_cos=True)[1]) > 2


@pytest.mark.parametrize(
    ("bits", "stored"),
    [(4, 8 * 64 // 2), (8, 8 * 64), (5, 8 * 64), (2, 8 * 64 // 2)],
)
def test_bases_are_stored_in_few_bits(bits, stored):
    _, optimizer, state = steps(QGaLoreAdamW, [random(64, 64, dtype=torch.float32)], rank=8, proj_bits=bits)
    assert state["right_codes"].nbytes == stored
    groups = 8 * 64 // 256
    assert state["right_scales"].nbytes + state["right_zeros"].nbytes == groups * (4 + 1)
    lazy = 4 * 64 + 4 * 5 + 8 + 8  # leading vector, cosines, gap and count
    assert optimizer_state_bytes(optimizer) == 2 * 4 * 8 * 64 + 4 + stored + 5 * groups + lazy


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_what_is_stored_is_what_projects_there_and_back(proj_type):
    gradient = random(32, 32)
    w, _, state = steps(QGaLoreAdamW, [gradient], rank=8, proj_type=proj_type, eps=0.0, scale=1.0)
    bases = {}
    for side in ("left", "right") if proj_type == "full" else ("right",):
        codes = unpack(state[f"{side}_codes"], 256).view(1, 256)
        shape = (32, 8) if side == "left" else (8, 32)
        bases[side] = dequantize_affine(codes, state[f"{side}_scales"], state[f"{side}_zeros"], shape)
    low = gradient @ bases["right"].T if proj_type == "std" else bases["left"].T @ gradient @ bases["right"].T
    back = low.sign() @ bases["right"] if proj_type == "std" else bases["left"] @ low.sign() @ bases["right"]
    torch.testing.assert_close(w, -0.1 * back, rtol=1e-9, atol=1e-9)
    near = bases["right"] @ bases["right"].T
    assert (near - torch.eye(8)).abs().max() < 0.2
    assert not torch.allclose(near, torch.eye(8, dtype=F64), atol=1e-3)


def small_model(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 4))


def train(model, optimizer, count, first=0):
    for number in range(first, first + count):
        x = random(8, 16, seed=number % 4, dtype=torch.float32)
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()


def loss_of(model):
    x = random(8, 16, dtype=torch.float32)
    return (model(x) - x[:, :4]).square().mean().item()


def test_an_int8_layer_is_the_layer_of_its_numbers_and_hands_gradients_through():
    linear = nn.Linear(16, 32)
    layer = Int8Linear.from_linear(linear, group_size=64)
    expected = there_and_back(linear.weight.detach(), 8, 64)
    torch.testing.assert_close(layer.dequantize(), expected)
    x = random(5, 16, dtype=torch.float32).requires_grad_()
    same = nn.Linear(16, 32)
    with torch.no_grad():
        same.weight.copy_(expected)
        same.bias.copy_(linear.bias)
    for module in (layer, same):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer(x), same(x))
    torch.testing.assert_close(layer.weight.grad, same.weight.grad)
    assert layer.weight.grad.is_contiguous()
    layer(x).sum().backward()
    assert not torch.equal(layer.weight.grad, same.weight.grad)  # gradients add up
    assert layer.weight.untyped_storage().nbytes() == 4
    kept = sum(buffer.nbytes for buffer in layer.buffers())
    assert kept == 16 * 32 + 8 * 5  # a byte each, and a scale and a zero for 64 of them
    assert set(layer.state_dict()) == {"qweight", "scales", "zeros", "bias"}


@pytest.mark.parametrize("rank", [2, None])
def test_int8_weights_are_trained(rank):
    model = with_int8_weights(small_model())
    assert [type(module).__name__ for module in model[::2]] == ["Int8Linear", "Int8Linear", "Linear"]
    groups = q_galore_param_groups(model, rank)
    groups = groups if rank else [group | {"rank": None} for group in groups]
    options = {"lr": 0.02, "proj_group_size": 32, "scale": 1.0}
    if rank:
        optimizer = QGaLoreAdamW(groups, **options)
    else:
        with pytest.warns(UserWarning, match="no parameter group has a rank"):
            optimizer = QGaLoreAdamW(groups, **options)
    before, codes = loss_of(model), model[0].qweight.clone()
    train(model, optimizer, 60)
    assert loss_of(model) < 0.5 * before
    assert not torch.equal(model[0].qweight, codes)


def test_steps_far_smaller_than_a_code_act_only_with_stochastic_rounding():
    changed = {}
    for stochastic in (True, False):
        model = with_int8_weights(small_model(), stochastic_round=stochastic)
        start = model[0].qweight.clone()
        optimizer = QGaLoreAdamW(q_galore_param_groups(model, 2), lr=2e-5, scale=1.0, proj_group_size=32)
        train(model, optimizer, 20)
        changed[stochastic] = (model[0].qweight != start).double().mean().item()
    assert changed[True] > 0.05 > 5 * changed[False]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_of_int8_models_go_the_same_way(duplicate):
    model = with_int8_weights(small_model())
    optimizer = QGaLoreAdamW(q_galore_param_groups(model, 2), proj_group_size=32, update_proj_gap=2)
    train(model, optimizer, 3)
    model_2, optimizer_2 = duplicate((model, optimizer))
    train(model, optimizer, 4, 3)
    codes = model[0].qweight.clone()
    train(model_2, optimizer_2, 4, 3)
    assert torch.equal(model_2[0].qweight, codes)
    assert torch.equal(model[0].qweight, codes)


def test_int8_models_are_resumed_bit_for_bit():
    whole = with_int8_weights(small_model())
    options = {"proj_group_size": 32, "update_proj_gap": 2}
    train(whole, QGaLoreAdamW(q_galore_param_groups(whole, 2), **options), 20)
    model = with_int8_weights(small_model())
    optimizer = QGaLoreAdamW(q_galore_param_groups(model, 2), **options)
    train(model, optimizer, 13)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    model = with_int8_weights(small_model(1))
    model.load_state_dict(weights)
    optimizer = QGaLoreAdamW(q_galore_param_groups(model, 2), **options)
    optimizer.load_state_dict(state)
    train(model, optimizer, 7, 13)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_moved_layer_is_still_its_codes():
    model = with_int8_weights(small_model()).to(F64)
    assert model[0].weight.dtype == model[0].scales.dtype == F64
    assert model[0].qweight.dtype == torch.uint8
    optimizer = QGaLoreAdamW(q_galore_param_groups(model, 2), lr=0.1, proj_group_size=32)
    before = model[0].qweight.clone()
    model(random(8, 16)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].qweight, before)


def test_a_model_of_int8_layers_alone_has_one_group():
    model = Int8Linear(16, 16, bias=False)
    (group,) = q_galore_param_groups(model, 4)
    assert group["rank"] == 4
    assert group["params"] == [model.weight]


def test_a_state_with_codes_of_another_type_is_refused():
    _, optimizer, _ = steps(QGaLoreAdamW, [random(16, 32)], rank=16)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["left_codes"] = state["state"][0]["left_codes"].float()
    with pytest.raises(ValueError, match="left_codes"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("proj_bits", value) for value in (1, 9)),
        *(("proj_group_size", value) for value in (0, 7)),
        *(("cos_threshold", value) for value in (-1.1, 1.1, math.nan)),
        *(("gamma_proj", value) for value in (0.5, math.nan, math.inf)),
        ("queue_size", 0),
    ],
)
def test_misuse_of_the_optimizer_is_refused_with_the_argument_named(name, value):
    options = {"rank": 2, "proj_group_size": 4, name: value}
    with pytest.raises(ValueError, match=name):
        QGaLoreAdamW([nn.Parameter(torch.ones(4, 4))], **options)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bits", (ROW, 1, 4)),
        ("bits", (ROW, 9, 4)),
        ("group_size", (ROW, 4, 3)),
        ("group_size", (ROW, 4, 0)),
        ("w", (torch.tensor([math.nan, 1.0]), 4, 2)),
        ("w", (torch.tensor([math.inf, 1.0]), 4, 2)),
    ],
)
def test_misuse_of_the_quantiser_is_refused_with_the_argument_named(name, arguments):
    with pytest.raises(ValueError, match=name):
        quantize_affine(*arguments)
    if name == "group_size":
        with pytest.raises(ValueError, match=name):
            Int8Linear(3, 5)
