import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.quantization import (
    QuESTLinear,
    best_half_range,
    gaussian_error,
    gaussian_scale,
    hadamard_matrix,
    quest_linear,
    quest_quantize,
)
from fairtrial.methods.quantization.quest import HALF_RANGES, TERNARY, largest_block, rotate

F64 = torch.float64
X = torch.tensor([0.1, -0.5, 1.2, 2.9, -0.05, 0.7, -1.6, 0.3])


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask_of(x, bits, **options):
    """The mask, read off the gradient of the sum in the space that is rounded."""
    x = x.clone().requires_grad_()
    quest_quantize(x, bits, hadamard=None, **options).sum().backward()
    return x.grad


@pytest.mark.parametrize(
    ("bits", "expected", "masked"),
    [
        (1, [1.026937 * sign for sign in (1, -1, 1, 1, -1, 1, -1, 1)], [3]),
        (2, [0.640764, -0.640764, 0.640764, 1.922291, -0.640764, 0.640764, -1.922291, 0.640764], [3]),
        (4, [0.215708, -0.647124, 1.078539, 2.804202, -0.215708, 0.647124, -1.509955, 0.215708], []),
    ],
)
def test_golden_levels_and_masks(bits, expected, masked):
    found = quest_quantize(X, bits, hadamard=None)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    assert torch.equal(mask_of(X, bits) == 0, torch.isin(torch.arange(8), torch.tensor(masked, dtype=torch.long)))


def test_the_half_range_has_the_least_error_for_a_normal():
    for bits, a in HALF_RANGES.items():
        levels = 3 if bits == TERNARY else 2**bits
        below = {6: 0.0014, 7: 0.0100, 8: 0.0373}.get(bits, 0.0)
        assert best_half_range(levels) - a == pytest.approx(below, abs=1e-4)
        assert gaussian_scale(bits) == a
    assert gaussian_scale(1) == pytest.approx(math.sqrt(2 / math.pi), abs=1e-8)
    assert gaussian_scale(9) == best_half_range(512) > gaussian_scale(8)
    errors = [gaussian_error(2**bits, gaussian_scale(bits)) for bits in (1, 2, 3, 4)]
    assert errors == pytest.approx([0.363380, 0.118846, 0.037440, 0.011543], abs=1e-6)
    assert errors[0] == pytest.approx(1 - 2 / math.pi, abs=1e-9)


@pytest.mark.parametrize(
    ("bits", "error", "masked"),
    [(1, 0.363380, 0.110540), (2, 0.118846, 0.046439), (3, 0.037440, 0.019074), (4, 0.011543, 0.007329)],
)
def test_error_and_masked_share_of_sampled_rows(bits, error, masked):
    x = normal(400, 4096, dtype=torch.float32)
    found = quest_quantize(x, bits, hadamard=None)
    assert (found - x).square().mean().item() == pytest.approx(error, rel=0.03)
    assert (mask_of(x, bits) == 0).double().mean().item() == pytest.approx(masked, rel=0.03)
    a = HALF_RANGES[bits]
    beyond = math.erfc((a + a / (2**bits - 1)) / math.sqrt(2))
    assert beyond == pytest.approx(masked, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(bits=st.sampled_from([1, TERNARY, 2, 3, 4, 8]), c=st.floats(0.1, 1e3), seed=st.integers(0, 1000))
def test_levels_scale_with_the_row_are_symmetric_and_few(bits, c, seed):
    x = normal(3, 128, seed=seed)
    found = quest_quantize(x, bits)
    torch.testing.assert_close(quest_quantize(c * x, bits), c * found, rtol=1e-6, atol=1e-6 * c)
    torch.testing.assert_close(quest_quantize(-x, bits), -found)
    levels = 3 if bits == TERNARY else 2**bits
    assert all(len(row.unique()) <= levels for row in quest_quantize(x, bits, hadamard="half"))
    assert 0 in quest_quantize(x, TERNARY, hadamard="half")
    assert 0 not in quest_quantize(x, 2, hadamard="half")


@pytest.mark.parametrize("hadamard", [None, "half", "full"])
@pytest.mark.parametrize("size", [0.0, 1e-7, 400.0])
def test_rows_of_float16_have_finite_levels(size, hadamard):
    x = (size * normal(2, 64, dtype=torch.float32)).half().requires_grad_()
    rounded = quest_quantize(x, 4, hadamard=hadamard, block=64)
    rounded.float().sum().backward()
    assert rounded.dtype == torch.float16
    assert rounded.isfinite().all()
    assert x.grad.isfinite().all()


def test_levels_with_zero_among_them():
    x = normal(4, 64)
    scale = gaussian_scale(2) * x.square().mean(-1, keepdim=True).sqrt() + 1e-8
    found = quest_quantize(x, 2, hadamard=None, centered=False)
    levels = torch.tensor([-0.5, 0, 0.5, 1], dtype=F64)
    nearest = levels[((x / scale)[..., None] - levels).abs().argmin(-1)]
    torch.testing.assert_close(found, nearest * scale)


def test_rotations_are_orthonormal_and_half_is_full_rotated():
    H = torch.block_diag(*[hadamard_matrix(64, F64) / 8] * 3)
    x, weight = normal(5, 192, seed=1), normal(7, 192, seed=2)
    torch.testing.assert_close(H.t() @ H, torch.eye(192, dtype=F64))
    torch.testing.assert_close(rotate(x, 64), x @ H)
    for bits in (1, 2, 4):
        half, full = (quest_quantize(x, bits, hadamard=kind, block=64) for kind in ("half", "full"))
        torch.testing.assert_close(full @ H, half)
        products = [
            quest_quantize(x, bits, hadamard=kind, block=64) @ quest_quantize(weight, bits, hadamard=kind, block=64).t()
            for kind in ("half", "full")
        ]
        torch.testing.assert_close(*products)


@pytest.mark.parametrize("kind", ["half", "full"])
def test_gradients_pass_where_the_error_is_small(kind):
    H = torch.block_diag(*[hadamard_matrix(32, F64) / math.sqrt(32)] * 2)
    x, v = normal(6, 64, seed=3).requires_grad_(), normal(6, 64, seed=4)
    (quest_quantize(x, 2, hadamard=kind, block=32) * v).sum().backward()
    rotated = (x @ H).detach()
    rms = rotated.square().mean(-1, keepdim=True).sqrt()
    half = quest_quantize(x.detach(), 2, hadamard="half", block=32)
    mask = (half - rotated).abs() <= gaussian_scale(2) / 3 * rms + 1e-8
    assert 0 < (~mask).sum() < 40
    torch.testing.assert_close(x.grad, (v @ H if kind == "full" else v) * mask @ H.t())


def test_trust_says_how_far():
    x = normal(8, 256)
    error = (quest_quantize(x, 2, hadamard=None) - x).abs()
    rms = x.square().mean(-1, keepdim=True).sqrt()
    for trust in (0.1, 0.3, 0.7):
        torch.testing.assert_close(mask_of(x, 2, trust=trust), (error <= trust * rms).double())
    assert mask_of(x, 1, trust=math.inf).all()
    zeros = torch.zeros(2, 8)
    assert quest_quantize(zeros, 4, hadamard=None).abs().max() < 1e-8
    assert mask_of(zeros, 1).all()  # or a row of zeros could never be trained


def test_a_linear_layer_rounds_both_and_is_the_product_of_both():
    layer = QuESTLinear(192, 5, weight_bits=3, act_bits=4, block=64, dtype=F64)
    x = normal(2, 3, 192)
    expected = F.linear(quest_quantize(x, 4, block=64), quest_quantize(layer.weight, 3, block=64), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(layer.eval()(x), layer.train()(x))
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    exact = F.linear(x, layer.weight, layer.bias)
    errors = []
    for bits in (1, 2, 4, 8):
        rough = QuESTLinear(192, 5, weight_bits=bits, act_bits=bits, block=64, dtype=F64)
        rough.load_state_dict(layer.state_dict())
        errors.append((rough(x) - exact).square().mean().item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * exact.square().mean()


def test_surgery_shares_weights_and_leaves_what_it_is_told(small_gpt):
    model = copy.deepcopy(small_gpt.model)
    weights = dict(model.named_parameters())
    assert quest_linear(model, 4, 4) is model
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert kinds.pop("lm_head") is nn.Linear
    assert set(kinds.values()) == {QuESTLinear}
    assert dict(model.named_parameters()).keys() == weights.keys()
    assert all(p is weights[name] for name, p in model.named_parameters())
    ids = torch.arange(64, 96)[None]
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.isfinite().all()
    assert 0 < (logits - small_gpt.model(ids).logits.detach()).abs().mean() < 2


def test_surgery_takes_the_largest_block_there_is():
    model = nn.Sequential(nn.Linear(96, 100), nn.ReLU(), nn.Linear(100, 25), nn.ReLU(), nn.Linear(25, 256))
    quest_linear(model, skip=())
    assert [model[i].block for i in (0, 2, 4)] == [32, 4, 1]
    assert model(torch.randn(3, 96)).shape == (3, 256)
    assert isinstance(quest_linear(nn.Linear(8, 2)), QuESTLinear)
    assert largest_block(384) == 128


def test_binary_training_goes_down_and_on_from_a_checkpoint():
    x = normal(256, 64, dtype=torch.float32)
    y = (x[:, :8].square().sum(1) > 8).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))
    quest_linear(model, 1, 1, skip=("0", "4"))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("bits", lambda: quest_quantize(X, 0)),
        ("bits", lambda: quest_quantize(X, 2.5)),
        ("bits", lambda: gaussian_scale(17)),
        ("trust", lambda: quest_quantize(X, 2, -0.1)),
        ("trust", lambda: quest_quantize(X, 2, math.nan)),
        ("hadamard", lambda: quest_quantize(X, 2, hadamard="quarter")),
        ("centered", lambda: quest_quantize(X, TERNARY, hadamard=None, centered=False)),
        ("block .* divides the width 96, such as 32", lambda: quest_quantize(torch.ones(2, 96), 2)),
        ("block", lambda: quest_quantize(torch.ones(2, 96), 2, block=24)),
        ("x must be of floating point", lambda: quest_quantize(torch.ones(8, dtype=torch.long), 2)),
        ("levels", lambda: best_half_range(1)),
        ("weight_bits", lambda: QuESTLinear(128, 4, weight_bits=0)),
        ("act_bits", lambda: QuESTLinear(128, 4, act_bits=3.5)),
        ("block .* divides the width 64, such as 64", lambda: QuESTLinear(64, 4)),
        ("trust", lambda: QuESTLinear(128, 4, trust=-1.0)),
        ("block", lambda: quest_linear(nn.Linear(64, 4), block=48)),
        ("without any but lm_head", lambda: quest_linear(nn.ReLU())),
    ],
)
def test_misuse_is_refused_with_the_argument_named(name, call):
    with pytest.raises((ValueError, TypeError), match=name):
        call()
