"""GWQ: the numbers of a small example, masks and their invariances, and what the outliers are worth."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.quantization import (
    GWQ,
    PackedLinear,
    RoundToNearest,
    average_bits,
    gradient_outlier_mask,
    gwq_quantize,
    load_packed_,
    packed_layers,
    quantize_,
    save_packed,
)
from fairtrial.methods.quantization.gwq import largest, next_token_loss, outliers, round_around

F32 = torch.float32
TEXT = b"The compound statements of a program contain other statements; they affect or control them in some way. "
IDS = torch.tensor(list(TEXT * 2))[None]


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squares(model, batch):
    return model(batch).square().mean()


# A small example ------------------------------------------------------------------------------------------------------

WEIGHT = torch.tensor([[0.1, -0.8, 0.3, 0.05], [1.2, 0.02, -0.4, 0.6]])
GRADIENT = torch.tensor([[0.01, 0.5, 0.02, 0.001], [0.03, 0.9, 0.002, 0.01]])
EXACT = {"bits": 3, "group_size": -1, "outlier_dtype": F32, "scale_dtype": F32}


@pytest.mark.parametrize("scope", ["matrix", "row", "global"])
def test_golden_mask(scope):
    mask = outliers({"layer": GRADIENT}, 0.25, scope)["layer"]
    assert mask.nonzero().tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("alone", "first"),
    [(True, [0.107143, -0.8, 0.285714, 0.035714]), (False, [0.157143, -0.8, 0.314286, 0.0])],
)
def test_golden_weights(alone, first):
    mask = outliers({"layer": GRADIENT}, 0.25, "matrix")["layer"]
    made = round_around(linear(WEIGHT), mask, fit_without_outliers=alone, **EXACT).dequantize()
    expected = torch.tensor([first, [1.142857, 0.02, -0.457143, 0.685714]])
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)


# Masks ----------------------------------------------------------------------------------------------------------------


def test_gradients_are_those_of_the_loss_and_the_model_is_left_alone():
    model, x = network(), drawn(20, 16)
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    masks = gradient_outlier_mask(model, x, 0.1, loss=squares)
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    model[0].weight.requires_grad_()
    squares(model, x).backward()
    for name, mask in masks.items():
        gradient = model.get_submodule(name).weight.grad.abs()
        assert mask.sum() == gradient.numel() // 10
        assert gradient[mask].min() >= gradient[~mask].max()


def test_a_multiple_of_the_loss_gives_the_same_mask():
    model, x = network(), drawn(20, 16)
    masks = gradient_outlier_mask(model, x, 0.1, loss=squares)
    for factor in (-8.0, 1024.0):
        again = gradient_outlier_mask(model, x, 0.1, loss=lambda m, b, factor=factor: factor * squares(m, b))
        assert all(again[name].equal(mask) for name, mask in masks.items())


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_permuted_outputs_permute_the_mask(scope):
    x, order = drawn(20, 16), torch.randperm(32, generator=torch.Generator().manual_seed(0))
    model, permuted = network(), network()
    with torch.no_grad():
        permuted[0].weight.copy_(model[0].weight[order])
        permuted[0].bias.copy_(model[0].bias[order])
        permuted[2].weight.copy_(model[2].weight[:, order])
    mask, other = (gradient_outlier_mask(each, x, 0.1, scope, loss=squares) for each in (model, permuted))
    assert other["0"].equal(mask["0"][order])
    assert other["2"].equal(mask["2"][:, order])


def test_each_score_is_its_formula():
    model, x = network(), drawn(20, 16)
    squares(model, x).backward()
    w, g = model[2].weight.detach(), model[2].weight.grad
    inputs = torch.tanh(model[0](x)).detach()
    expected = {
        "grad": g.abs(),
        "grad_weight": (g * w).abs(),
        "magnitude": w.abs(),
        "hessian_diag": w.square() * inputs.square().mean(0),
        "random": None,
    }
    for score, values in expected.items():
        generator = torch.Generator().manual_seed(3)
        mask = gradient_outlier_mask(model, x, 0.05, "matrix", score, loss=squares, generator=generator)["2"]
        assert mask.sum() == 12
        if values is not None:
            assert mask.equal(largest(values.view(1, -1), 0.05).view(w.shape))
    drawings = [
        gradient_outlier_mask(model, x, 0.25, "row", "random", generator=torch.Generator().manual_seed(seed))["0"]
        for seed in (3, 3, 4)
    ]
    assert drawings[0].equal(drawings[1])
    assert not drawings[0].equal(drawings[2])


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 12),
    ratio=st.floats(0, 1),
    levels=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_of_equal_scores_the_first_are_taken(rows, width, ratio, levels, seed):
    score = torch.randint(levels, (rows, width), generator=torch.Generator().manual_seed(seed)).float()
    mask = largest(score, ratio)
    count = int(ratio * width + 1e-9)
    for row, chosen in zip(score.tolist(), mask, strict=True):
        best_first = sorted(range(width), key=lambda place: -row[place])
        assert chosen.nonzero().flatten().tolist() == sorted(best_first[:count])


def test_the_loss_of_a_language_model_is_that_of_transformers(small_gpt):
    model = small_gpt.model
    torch.testing.assert_close(next_token_loss(model, IDS), model(IDS, labels=IDS).loss)
    padded = {"input_ids": F.pad(IDS, (0, 9)), "attention_mask": F.pad(torch.ones_like(IDS), (0, 9))}
    torch.testing.assert_close(next_token_loss(model, padded), model(IDS, labels=IDS).loss)


def test_a_model_of_16_bits_is_differentiated_in_32(small_gpt):
    half = copy.deepcopy(small_gpt.model).half()
    masks = gradient_outlier_mask(half, IDS)
    exact = gradient_outlier_mask(copy.deepcopy(half).float(), IDS)
    assert all(mask.equal(exact[name]) for name, mask in masks.items())
    assert half.lm_head.weight.dtype == torch.float16


# Rounding -------------------------------------------------------------------------------------------------------------


def test_without_outliers_it_is_rounding_to_nearest():
    x = drawn(20, 16)  # each group has weights of both signs, so that 0 lies within its range
    plain, ours = (
        quantize_(network(), config, [x]) for config in (RoundToNearest(3, 16), GWQ(3, 16, ratio=0.0, loss=squares))
    )
    for name, layer in packed_layers(plain):
        assert ours.get_submodule(name).kept is None
        torch.testing.assert_close(ours.get_submodule(name).dequantize(), layer.dequantize(), rtol=0, atol=0)
    assert average_bits(ours) == average_bits(plain) == 5


def test_with_all_weights_kept_nothing_is_lost():
    model, x = network(), drawn(20, 16)
    exact = model(x)
    masks = {name: torch.ones_like(model.get_submodule(name).weight, dtype=torch.bool) for name in ("0", "2")}
    torch.testing.assert_close(gwq_quantize(model, masks, 2, 8, outlier_dtype=F32)(x), exact)
    assert all(layer.scale.isfinite().all() and layer.offset.isfinite().all() for _, layer in packed_layers(model))


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    bits=st.integers(1, 8),
    ratio=st.floats(0, 0.9),
    shift=st.floats(-3, 3),
    alone=st.booleans(),
)
def test_outliers_are_exact_and_the_others_within_a_step(seed, bits, ratio, shift, alone):
    weight = drawn(6, 16, seed=seed) + shift
    mask = largest(drawn(6, 16, seed=seed + 1).abs(), ratio)
    options = {"outlier_dtype": F32, "scale_dtype": F32, "fit_without_outliers": alone}
    layer = round_around(linear(weight), mask, bits, 8, **options)
    made = layer.dequantize()
    assert made[mask].equal(weight[mask])
    off = (made - weight).abs().view(6, 2, 8)[~mask.view(6, 2, 8)]
    steps = layer.scale[..., None].expand(6, 2, 8)[~mask.view(6, 2, 8)]
    assert torch.all(off <= steps * (1 + 1e-4) + 1e-6)


def test_groups_without_a_range():
    weight = torch.tensor([[0.7] * 4, [-0.7] * 4, [0.0] * 4, [1.0, 2.0, 3.0, 4.0]])
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[3] = True
    torch.testing.assert_close(round_around(linear(weight), mask, **EXACT).dequantize(), weight)


def test_a_language_models_weights_are_nearer_with_outliers_and_are_saved_with_them(small_gpt, tmp_path):
    ours, plain = (
        quantize_(copy.deepcopy(small_gpt.model), config, [IDS[:, :100], IDS[:, 100:]])
        for config in (GWQ(3, 64), RoundToNearest(3, 64))
    )
    weights = {name: small_gpt.model.get_submodule(name).weight for name, _ in packed_layers(ours)}
    errors = [
        sum((layer.dequantize() - weights[name]).square().sum().item() for name, layer in packed_layers(model))
        for model in (ours, plain)
    ]
    assert errors[0] < errors[1]
    assert average_bits(ours) == pytest.approx(3 + 32 / 64 + 0.01 * (16 + 32), abs=0.002)
    assert "lm_head" not in dict(packed_layers(ours))
    save_packed(ours, tmp_path / "packed.safetensors")
    loaded = load_packed_(copy.deepcopy(small_gpt.model), tmp_path / "packed.safetensors")
    with torch.no_grad():
        assert loaded(IDS).logits.equal(ours(IDS).logits)


# Misuse ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"ratio": math.nan},
        {"scope": "layer"},
        {"score": "gradient"},
        {"generator": None, "score": "random"},
        {"bits": 0},
        {"group_size": 0},
    ],
)
def test_misuse_is_refused_with_the_argument_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GWQ(**wrong)
    if not {"bits", "group_size"} & set(wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            gradient_outlier_mask(network(), drawn(4, 16), **wrong)


def test_gradients_that_are_missing_or_not_finite_are_refused():
    model, x = network(), drawn(4, 16)
    with pytest.raises(ValueError, match="layer 2 no gradient"):
        gradient_outlier_mask(model, x, loss=lambda m, b: m[0](b).sum())
    with pytest.raises(ValueError, match="layer 0 a gradient that is not finite"):
        gradient_outlier_mask(model, x, loss=lambda m, b: m(b).sum() * math.inf)
    with pytest.raises(ValueError, match="batch must be token ids"):
        gradient_outlier_mask(model, (x,))
    with pytest.raises(ValueError, match="model must be one that gives logits"):
        gradient_outlier_mask(model, x)
    with pytest.raises(ValueError, match="model must be one with linear layers"):
        gradient_outlier_mask(nn.ReLU(), x)


def test_masks_that_do_not_fit_are_refused_and_nothing_changed():
    model = network()
    fits = torch.zeros(32, 16, dtype=torch.bool)
    for masks, message in (
        ({"0": fits, "1": fits}, "masks must be of linear layers"),
        ({"0": fits, "2": fits}, r"masks\['2'\] must be of the weight's shape \(8, 32\)"),
    ):
        with pytest.raises(ValueError, match=message):
            gwq_quantize(model, masks, group_size=8)
    with pytest.raises(ValueError, match=r"0: group_size must be -1 or a divisor"):
        gwq_quantize(model, {"0": fits}, group_size=5)
    tied = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="1 shares its weights"):
        gwq_quantize(tied, {"1": fits}, group_size=8)
    assert isinstance(model[0], nn.Linear)
    gwq_quantize(model, {"0": fits}, group_size=8)
    with pytest.raises(ValueError, match="masks must be of linear layers that are not quantised yet"):
        gwq_quantize(model, {"0": fits}, group_size=8)


def test_weights_that_are_not_finite_or_too_large_are_refused_and_nothing_changed():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    masks = {name: torch.zeros_like(model[int(name)].weight, dtype=torch.bool) for name in ("0", "1")}
    with torch.no_grad():
        model[1].weight.mul_(1e9)
    with pytest.raises(ValueError, match="scale_dtype"):
        gwq_quantize(model, masks, group_size=4)
    with torch.no_grad():
        model[1].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the weights of 1 are not finite"):
        gwq_quantize(model, masks, group_size=4)
    assert isinstance(model[0], nn.Linear)


def test_a_layer_that_is_the_model_or_in_two_places_is_replaced():
    layer = nn.Linear(8, 8)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    assert isinstance(gwq_quantize(layer, {"": mask}, group_size=8), PackedLinear)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    gwq_quantize(model, {"0": mask}, group_size=8)
    assert isinstance(model[2], PackedLinear)
    assert model[0] is model[2]


@pytest.mark.parametrize("wrong", [2.5, 4.0, True])
def test_bits_and_groups_are_whole_numbers(monkeypatch, wrong) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks would come before the method's own
    masks = {"0": torch.zeros(32, 16, dtype=torch.bool)}
    for options in ({"bits": wrong}, {"group_size": wrong}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            GWQ(**options)
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            gwq_quantize(network(), masks, **options)
