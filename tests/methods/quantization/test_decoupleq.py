"""decoupleQ: the authors' numbers, exact solves, and what its turns and its second stage gain."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.quantization import (
    DecoupleQ,
    PackedLinear,
    RoundToNearest,
    average_bits,
    decoupleq_quantize_linear,
    fit_scale_zero,
    load_packed_,
    minimize_block,
    packed_layers,
    quantize_,
    save_packed,
)
from fairtrial.methods.quantization.decoupleq import check_shapes, damp, levels, squared_error

F64 = torch.float64


def golden():
    a = torch.arange(32, dtype=F64).view(4, 8)
    c, n = torch.arange(512, dtype=F64).view(64, 8), torch.arange(64, dtype=F64)[:, None]
    x = torch.cos(0.37 * c**1.1) + 0.5 * torch.sin(n)
    return torch.sin(1.7 * a + 0.3 * a**1.3), x.t() @ x / 64


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def problem(rows, width, seed):
    x = drawn(3 * width, width, seed=seed) @ drawn(width, width, seed=seed + 1)
    return drawn(rows, width, seed=seed + 2), x.t() @ x / len(x)


# The authors' numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "mean"), [(0, 0.162857), (1, 0.057047), (4, 0.009369)])
def test_golden_errors(turns, mean):
    assert decoupleq_quantize_linear(*golden(), max_iter=turns).row_error.mean().item() == pytest.approx(mean, abs=1e-6)


def test_golden_numbers_scales_and_offsets():
    found = decoupleq_quantize_linear(*golden())
    assert found.numbers.dtype == torch.int8
    assert found.numbers.tolist() == [
        [1, 1, -2, 0, 1, -2, 1, 0],
        [-2, 1, -2, 0, 0, -2, 1, -2],
        [1, 0, -2, 1, -2, 1, -2, 0],
        [0, -2, 1, -2, 1, -2, 1, -1],
    ]
    assert found.scale.flatten().tolist() == pytest.approx([0.269823, 0.489609, 0.268483, 0.198768], abs=1e-5)
    assert found.zero.flatten().tolist() == pytest.approx([0.074831, 0.294387, 0.143921, 0.099310], abs=1e-5)


def test_golden_error_by_training():
    found = decoupleq_quantize_linear(*golden(), solver="train", iters_before_round=200, inner_iters=5)
    assert found.row_error.mean().item() == pytest.approx(0.017184, abs=1e-4)


def test_a_solve_in_closed_form():
    weight = torch.tensor([[1, 0.2, -0.7, 0.5]], dtype=F64)
    numbers = torch.tensor([[1, 0, -2, 0]], dtype=torch.int8)
    hessian = torch.tensor([[2, 0.5, 0, 0.1], [0.5, 1, 0.2, 0], [0, 0.2, 1.5, 0.3], [0.1, 0, 0.3, 1]], dtype=F64)
    scale, zero = fit_scale_zero(numbers, weight, hessian)
    assert (scale.item(), zero.item()) == pytest.approx((0.552230, 0.391315), abs=1e-6)
    error = squared_error(levels(numbers.double(), scale, zero), weight, hessian)
    assert error.item() == pytest.approx(0.045325, abs=1e-6)


# The exact solve ------------------------------------------------------------------------------------------------------


def test_without_correlations_it_is_ordinary_least_squares():
    weight, numbers = drawn(3, 10), torch.randint(-2, 2, (3, 10), generator=torch.Generator().manual_seed(0))
    scale, zero = fit_scale_zero(numbers, weight, torch.eye(10, dtype=F64))
    for row in range(3):
        design = torch.stack([numbers[row].double(), torch.ones(10, dtype=F64)], 1)
        expected = torch.linalg.lstsq(design, weight[row]).solution
        torch.testing.assert_close(torch.cat([scale[row], zero[row]]), expected)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), group_size=st.sampled_from([-1, 12, 4]), symmetric=st.booleans())
def test_no_gradient_is_left(seed, group_size, symmetric):
    weight, hessian = problem(6, 12, seed)
    numbers = torch.randint(-4, 4, (6, 12), generator=torch.Generator().manual_seed(seed)).double()
    numbers[:, ::4], numbers[:, 1::4] = -4, 3  # nowhere are those of a group all alike
    symmetric = symmetric and group_size == -1
    found = [
        each.requires_grad_() for each in fit_scale_zero(numbers, weight, hessian, group_size, symmetric=symmetric)
    ]
    error = squared_error(levels(numbers, *found), weight, hessian)
    free = found[:1] if symmetric else found
    for gradient in torch.autograd.grad(error.sum(), free):
        assert gradient.abs().max() < 1e-5 * (weight @ hessian).abs().max()
    if symmetric:
        assert not found[1].any()


def test_a_row_whose_numbers_are_all_alike_does_not_spoil_the_others(monkeypatch):
    weight, hessian = problem(3, 8, 0)
    numbers = torch.randint(-2, 2, (3, 8), generator=torch.Generator().manual_seed(1)).double()
    expected = fit_scale_zero(numbers, weight, hessian, 4)
    numbers[1] = 0
    monkeypatch.setattr("fairtrial.methods.quantization.decoupleq.AT_ONCE", 16)  # one row at a time
    found = fit_scale_zero(numbers, weight, hessian, 4)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours[::2], theirs[::2])


# The first stage ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(
    seed=st.integers(0, 1000),
    bits=st.integers(1, 4),
    group_size=st.sampled_from([-1, 4]),
    solver=st.sampled_from(["gptq", "train"]),
)
def test_no_row_gets_worse_from_turn_to_turn(seed, bits, group_size, solver):
    weight, hessian = problem(6, 12, seed)
    runs = [
        decoupleq_quantize_linear(
            weight, hessian, bits, group_size, max_iter=turns, solver=solver, iters_before_round=20, inner_iters=2
        )
        for turns in range(5)
    ]
    h = damp(hessian, 0.01)
    for run in runs:
        assert run.numbers.amin() >= -(2 ** (bits - 1))
        assert run.numbers.amax() < 2 ** (bits - 1)
        stated = squared_error(levels(run.numbers.double(), run.scale, run.zero), weight, h)
        torch.testing.assert_close(run.row_error, stated)
    for before, after in pairwise(runs):
        assert torch.all(after.row_error <= before.row_error * (1 + 1e-12))


def test_no_iteration_is_rounding_to_nearest():
    weight, hessian = problem(6, 12, 0)
    found = decoupleq_quantize_linear(weight, hessian, 3, max_iter=0)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    torch.testing.assert_close(found.scale, (high - low) / 7)
    torch.testing.assert_close(found.zero, low + 4 * found.scale)
    assert torch.all(
        (levels(found.numbers.double(), found.scale, found.zero) - weight).abs() <= found.scale / 2 + 1e-12
    )


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("solver", ["gptq", "train"])
def test_weights_ten_times_as_large_get_the_same_numbers(symmetric, solver):
    weight, hessian = problem(6, 12, 0)
    options = {"symmetric": symmetric, "solver": solver, "iters_before_round": 0, "inner_iters": 0}
    found, larger = (decoupleq_quantize_linear(c * weight, hessian, 3, **options) for c in (1, 10))
    torch.testing.assert_close(larger.numbers, found.numbers)
    torch.testing.assert_close(larger.scale, 10 * found.scale)
    torch.testing.assert_close(larger.zero, 10 * found.zero)
    assert bool(found.zero.any()) is not symmetric


@pytest.mark.parametrize("options", [{}, {"group_size": 4}, {"symmetric": True}])
def test_rows_and_groups_of_zeros_stay_zeros(options):
    weight, hessian = problem(4, 12, 0)
    weight[1], weight[2, :4] = 0, 0
    found = decoupleq_quantize_linear(weight, hessian, 2, **options, max_iter=1)
    made = levels(found.numbers.double(), found.scale, found.zero)
    torch.testing.assert_close(made[1], weight[1])
    for turns in (1, 4):
        found = decoupleq_quantize_linear(weight, hessian, 2, **options, max_iter=turns)
        assert found.row_error[1] < 1e-20
    whole = decoupleq_quantize_linear(weight.abs(), torch.zeros_like(hessian), 2, **options)  # inputs that are all 0
    assert all(each.isfinite().all() for each in whole[1:])


# Models ---------------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Three blocks with a norm and two layers each, on inputs that are far from uncorrelated."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.out(torch.tanh(self.into(self.norm(x))))


def chain():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Chain()


def inputs():
    return list((drawn(240, 16, seed=5) @ drawn(16, 16, seed=6)).float().split(60))


def test_the_output_suffers_less_the_more_is_done(monkeypatch):
    monkeypatch.setattr("fairtrial.methods.quantization.decoupleq.RANGES", 20)
    x = torch.cat(inputs())
    with torch.no_grad():
        exact = chain()(x)
        errors = [
            (quantize_(chain(), config, inputs())(x) - exact).square().mean().item()
            for config in (
                DecoupleQ(max_iter=0, epochs=0),
                DecoupleQ(max_iter=1, epochs=0),
                DecoupleQ(epochs=0),
                DecoupleQ(epochs=20, lr=1e-3, train_bias=True),
            )
        ]
    assert errors == sorted(errors, reverse=True)


def test_the_second_stage_keeps_the_numbers_and_lowers_the_blocks_error():
    block, x = chain().blocks[0], torch.cat(inputs())
    with torch.no_grad():
        target = block(x)
    quantized = quantize_(copy.deepcopy(block), DecoupleQ(scale_dtype=torch.float32), [x])
    before = {name: tensor.clone() for name, tensor in quantized.state_dict().items()}
    errors = [minimize_block(quantized, [((x,), {})], [target], 1, 1e-3, train_bias=True) for _ in range(10)]
    assert errors[-1] < 0.9 * errors[0]
    changed = {name for name, tensor in quantized.state_dict().items() if not tensor.equal(before[name])}
    assert changed == {name for name in before if not name.endswith("packed")}
    assert not any(tensor.requires_grad for name, tensor in quantized.named_buffers())
    assert quantized.norm.weight.requires_grad
    assert quantized.norm.weight.grad is None


def test_what_is_not_to_be_trained_is_not():
    block, x = chain().blocks[0], torch.cat(inputs())
    with torch.no_grad():
        target = block(x)
    quantized = quantize_(copy.deepcopy(block), DecoupleQ(symmetric=True, scale_dtype=torch.float32), [x])
    minimize_block(quantized, [((x,), {})], [target], 3, 1e-3, train_norms=False, symmetric=True)
    torch.testing.assert_close(quantized.norm.weight, block.norm.weight, rtol=0, atol=0)
    torch.testing.assert_close(quantized.into.bias, block.into.bias.detach(), rtol=0, atol=0)
    torch.testing.assert_close(quantized.into.offset, -2 * quantized.into.scale, rtol=0, atol=0)


def test_a_rate_that_is_too_large_is_refused_and_the_block_as_it_was():
    block, x = chain().blocks[0], torch.cat(inputs())
    quantized = quantize_(copy.deepcopy(block), DecoupleQ(), [x])
    before = copy.deepcopy(quantized.state_dict())
    with pytest.raises(ValueError, match="lr must be so small"):
        minimize_block(quantized, [((x,), {})] * 3, [x] * 3, 3, 1e30)
    torch.testing.assert_close(quantized.state_dict(), before, rtol=0, atol=0)


def test_a_language_model_loses_less_than_by_rounding(small_gpt, tmp_path, monkeypatch):
    monkeypatch.setattr("fairtrial.methods.quantization.decoupleq.RANGES", 20)
    text = b"The compound statements of a program contain other statements; they affect or control them in some way. "
    ids = torch.tensor(list(text * 2))[None]
    losses, models = [], []
    for config in (DecoupleQ(2, 64, epochs=1), RoundToNearest(2, 64)):
        models.append(quantize_(copy.deepcopy(small_gpt.model), config, [ids]))
        with torch.no_grad():
            losses.append(models[-1](ids, labels=ids).loss.item())
    assert losses[0] < losses[1]
    assert average_bits(models[0]) == 2 + 32 / 64
    assert all(layer.bits == 2 for _, layer in packed_layers(models[0]))
    save_packed(models[0], tmp_path / "packed.safetensors")
    loaded = load_packed_(copy.deepcopy(small_gpt.model), tmp_path / "packed.safetensors")
    with torch.no_grad():
        assert loaded(ids).logits.equal(models[0](ids).logits)


def test_a_packed_layer_is_what_the_numbers_stand_for():
    weight, hessian = problem(6, 16, 0)
    model = nn.Sequential(nn.Linear(16, 6))
    model[0].weight.data = weight.float()
    x = torch.linalg.cholesky(hessian, upper=True).float() * 4  # so that xᵀx/n is the Hessian
    quantize_(model, DecoupleQ(3, 8, scale_dtype=torch.float32), [x])
    found = decoupleq_quantize_linear(weight.float(), x.double().t() @ x.double() / 16, 3, 8)
    assert isinstance(model[0], PackedLinear)
    torch.testing.assert_close(model[0].dequantize(), levels(found.numbers.float(), found.scale, found.zero))


# Misuse ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 0},
        {"bits": 9},
        {"group_size": 0},
        {"symmetric": True, "group_size": 8},
        {"max_iter": -1},
        {"solver": "adam"},
        {"percdamp": 0.0},
        {"percdamp": math.nan},
        {"iters_before_round": -1},
        {"inner_iters": -1},
    ],
)
def test_misuse_is_refused_with_the_argument_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DecoupleQ(**wrong)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        decoupleq_quantize_linear(*golden(), **wrong)


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"lr": 0.0}, {"lr": math.nan}, {"weight_decay": -1.0}])
def test_misuse_of_the_second_stage_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DecoupleQ(**wrong)
    block, x = quantize_(chain().blocks[0], DecoupleQ(), inputs()), inputs()[0]
    with pytest.raises(ValueError, match=next(iter(wrong))):
        minimize_block(block, [((x,), {})], [x], **wrong)


def test_shapes_that_do_not_fit_are_refused():
    weight, hessian = golden()
    with pytest.raises(ValueError, match=r"hessian must be of shape \(8, 8\)"):
        check_shapes(weight, hessian[:4, :4], -1)
    with pytest.raises(ValueError, match="group_size must be -1 or a divisor of the layer's input width 8"):
        decoupleq_quantize_linear(weight, hessian, group_size=3)
    with pytest.raises(ValueError, match="symmetric must be False with groups"):
        fit_scale_zero(weight, weight, hessian, 4, symmetric=True)
    with pytest.raises(ValueError, match="block must be a module with packed layers"):
        minimize_block(chain().blocks[0], [((weight,), {})], [weight])
    with pytest.raises(ValueError, match="targets must be as many as inputs"):
        minimize_block(chain().blocks[0], [], [])


def test_scales_too_small_to_be_held_get_numbers_of_those_that_are():
    torch.manual_seed(0)
    for size in (1e-6, 1e-7):
        layer, errors = nn.Linear(64, 32), []
        with torch.no_grad():
            layer.weight.mul_(8 * size)
        for config in (DecoupleQ(bits=4), RoundToNearest(4, -1)):
            model = quantize_(nn.Sequential(copy.deepcopy(layer)), config, [torch.randn(100, 64)])
            errors.append((model[0].dequantize() - layer.weight).norm())
        assert errors[0] < 1.5 * errors[1]
