import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.quantization import (
    AdaQuant,
    AffineFakeQuant,
    FakeQuantLayer,
    RoundToNearest,
    adaquant_layer,
    adaquant_model,
    allocate_bits_ip,
    average_bits,
    fold_batchnorm,
    load_packed_,
    packed_layers,
    quantize_,
    retune_batchnorm,
    save_packed,
    tune_bias,
)

X = torch.tensor([-1, -0.8, -0.3, 0.1, 0.5, 1.2, 1.7, 2])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (2, [-0.833333, -0.833333, 0, 0, 0.833333, 0.833333, 1.666667, 1.666667]),
        (4, [-0.833333, -0.833333, -0.333333, 0.166667, 0.5, 1.166667, 1.666667, 1.666667]),
    ],
)
def test_golden_levels(bits, expected):
    quantizer = AffineFakeQuant(bits)
    with torch.no_grad():
        quantizer.range.fill_(2.5)
        quantizer.zero.fill_(-0.8)
    torch.testing.assert_close(quantizer(X), torch.tensor(expected), atol=1e-6, rtol=0)


@settings(max_examples=25, deadline=None)
@given(bits=st.integers(1, 8), low=st.floats(-3, 0), width=st.floats(0.1, 5), seed=st.integers(0, 100))
def test_zero_is_a_level_and_there_are_few(bits, low, width, seed):
    quantizer = AffineFakeQuant(bits)
    with torch.no_grad():
        quantizer.range.fill_(width)
        quantizer.zero.fill_(low)
    found = quantizer(torch.cat([torch.zeros(1), 3 * normal(500, seed=seed)]))
    assert found[0].abs() <= 1e-6
    assert len(found.unique()) <= 2**bits


def test_gradients_pass_the_roundings_and_stop_at_the_clamps():
    quantizer = AffineFakeQuant(4).double()
    with torch.no_grad():
        quantizer.range.fill_(2.5)
        quantizer.zero.fill_(-0.8)
    x, v = X.double().requires_grad_(), torch.arange(1, 9, dtype=torch.float64)
    found = quantizer(x)
    (found * v).sum().backward()
    inside = (x >= -5 / 6) & (x <= 10 / 6)
    torch.testing.assert_close(x.grad, v * inside)
    # by the code k of an entry and its place p before rounding: Δ (k - ẑ), with Δ = R / 15 and ẑ = -15 m / R
    codes, place = found.detach() * 6 + 5, x.detach() * 6 + 5
    by_range = torch.where(inside, codes - place, codes - 5 + 4.8) / 15
    torch.testing.assert_close(quantizer.range.grad, (v * by_range).sum()[None])
    torch.testing.assert_close(quantizer.zero.grad, (v * ~inside).sum()[None])


def test_ranges_of_channels_and_samples():
    x = torch.tensor([[1.0, 2, 3], [-1, 0.5, 4], [0, 0, 0]])
    rows = AffineFakeQuant(4, 0, 3)
    rows.set_extremes(x)
    assert rows.zero.tolist() == [0, -1, 0]
    assert rows.range.tolist() == [3, 5, 1]  # never nothing, where all weights are zero
    columns = AffineFakeQuant(4, 1, 3)
    columns.set_extremes(x)
    assert columns.range.tolist() == [2, 2, 4]
    whole = AffineFakeQuant(4)
    whole.set_sample_means(x[:2])
    assert [whole.zero.item(), whole.range.item()] == [0.0, 3.5]
    assert torch.equal(rows(x)[2], torch.zeros(3))


def problem(seed, signed=False):
    draw = generator(seed)
    layer = nn.Linear(16, 8)
    with torch.no_grad():
        layer.weight.normal_(0, 0.25, generator=draw)
        layer.bias.normal_(0, 0.1, generator=draw)
    x = torch.randn(512, 16, generator=draw)
    x = x if signed else x.relu()
    return layer, x, layer(x).detach(), draw


@pytest.mark.parametrize(("seed", "signed", "factor"), [(5, False, 2.0), (0, True, 1.4)])
def test_tuning_lowers_the_error_of_a_layer(seed, signed, factor):
    layer, x, y, draw = problem(seed, signed)
    before = copy.deepcopy(layer.state_dict())
    found, errors = adaquant_layer(layer, x, y, generator=draw)
    assert errors.before > factor * errors.after
    assert errors.after == pytest.approx(F.mse_loss(found(x), y).item(), rel=1e-5)
    if not signed:
        assert 0.010 < errors.before < 0.019
        assert 0.003 < errors.after < 0.006
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert not any(p.requires_grad for p in found.parameters())


def test_sixteen_bits_lose_nothing_but_what_is_clipped():
    layer, x, y, _ = problem(0)
    wide = {"steps": 0, "weight_bits": 16, "act_bits": 16}
    assert adaquant_layer(layer, x, y, **wide, input_range="extremes")[1].before < 1e-7
    assert 0.003 < adaquant_layer(layer, x, y, **wide)[1].before < 0.03


def test_after_a_relu_only_what_it_lets_through_counts():
    layer, x, y, _ = problem(2)
    target = y.clone()
    found, errors = adaquant_layer(layer, x, y, 20, relu=True, weight_bits=3)
    assert errors.after == pytest.approx(F.mse_loss(found(x).relu(), y.relu()).item(), rel=1e-5)
    assert torch.equal(y, target)


def network(width=12):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(8, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 3),
        )


def test_one_layer_is_the_same_in_parallel_and_one_after_the_other():
    x = normal(60, 8)
    found = []
    for sequential in (True, False):
        model = nn.Sequential(copy.deepcopy(network()[0]))
        adaquant_model(model, [x[:30], x[30:]], sequential, steps=20)
        found.append(model(x))
    assert torch.equal(*found)


def test_a_network_is_rounded_in_the_order_of_its_calls():
    model, x = network(), normal(60, 8)
    exact = copy.deepcopy(model).eval()
    bits = {"0": 8, "3": 3, "5": 4}
    errors = adaquant_model(model, [x], weight_bits=bits, act_bits=bits, steps=40, relu=("3",))
    assert list(errors) == ["0", "3", "5"]
    assert [model[i].weight_quantizer.bits for i in (0, 3, 5)] == [8, 3, 4]
    assert model[3].input_quantizer.bits == 3
    assert errors["3"].after < errors["3"].before
    plain = copy.deepcopy(exact)
    adaquant_model(plain, [x], weight_bits=bits, act_bits=bits, steps=0)
    assert F.mse_loss(model(x), exact(x)) < F.mse_loss(plain(x), exact(x))
    with pytest.raises(ValueError, match="without rounded layers"):
        adaquant_model(model, [x])


def test_convolutions_are_rounded_too():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    x = normal(20, 1, 8, 8)
    exact = copy.deepcopy(model)
    adaquant_model(model, [x], steps=10, relu=("0",), weight_bits=8, act_bits=8)
    assert (model(x) - exact(x)).abs().max() < 0.2
    assert all(len(channel.unique()) <= 256 for channel in model[0].weight)


def test_statistics_are_those_of_the_data():
    model, x = network(), normal(4000, 8)
    model[1](model[0](x))  # one running mean has moved
    retune_batchnorm(model, x.split(1000), passes=2)
    outputs = model[0](x)
    torch.testing.assert_close(model[1].running_mean, outputs.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(model[1].running_var, outputs.var(0), atol=0.02, rtol=0)
    assert [module.training for module in model] == [True] * 6
    assert model[1].momentum == 0.1


@pytest.mark.parametrize("rounded", [False, True])
def test_folding_leaves_outputs_as_they_are(rounded):
    model, x = network(), normal(50, 8)
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(-1.5, 1.5, 12))
        model[1].bias.normal_(generator=generator())
    model(x)
    model.eval()
    if rounded:
        adaquant_model(model, [x], steps=5)
        retune_batchnorm(model, [x])
    before = model(x)
    assert fold_batchnorm(model) is model
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="batch norms"):
        fold_batchnorm(model)


def test_tuning_biases_changes_biases_alone():
    model, x = network(), normal(60, 8)
    exact = copy.deepcopy(model).eval()
    adaquant_model(model, [x], steps=0, weight_bits=2)
    before = copy.deepcopy(model.state_dict())
    losses = tune_bias(model, [(x, exact(x).detach())], epochs=20, lr=0.01)
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"0.layer.bias", "3.layer.bias", "5.layer.bias"}
    assert all(p.grad is None for p in model.parameters())
    labels = torch.arange(60) % 3
    assert tune_bias(model, [(x, labels)], loss=F.cross_entropy, epochs=1)[0] > 0


@pytest.mark.parametrize(
    ("ratio", "bits", "loss", "size"),
    [
        (0.1875, [8, 8, 4], 0.2, 3600),
        (0.15625, [8, 4, 4], 0.3, 2800),
        (0.125, [4, 4, 4], 0.8, 2400),
        (0.25, [8] * 3, 0, 4800),
    ],
)
def test_golden_allocations(ratio, bits, loss, size):
    found = allocate_bits_ip({4: (0.5, 0.1, 0.2)}, (100, 200, 300), 8, ratio)
    assert found.bits == bits
    assert found.loss == pytest.approx(loss, abs=1e-5)
    assert found.size == size <= ratio * 32 * 600


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), ratio=st.floats(0.0625, 0.25))
def test_allocations_are_the_best_there_are(seed, ratio):
    losses = torch.rand(2, 4, generator=generator(seed)).tolist()
    sizes = torch.randint(1, 50, (4,), generator=generator(seed)).tolist()
    found = allocate_bits_ip({2: losses[0], 4: losses[1]}, sizes, 8, ratio)
    table = {2: losses[0], 4: losses[1], 8: [0.0] * 4}
    choices = torch.cartesian_prod(*[torch.tensor([2, 4, 8])] * 4).tolist()
    fitting = [
        c for c in choices if sum(b * s for b, s in zip(c, sizes, strict=True)) <= ratio * 32 * sum(sizes) + 1e-6
    ]
    best = min(sum(table[b][i] for i, b in enumerate(c)) for c in fitting)
    assert found.loss == pytest.approx(best, abs=1e-4)


def test_a_language_model_is_packed_and_comes_back_from_its_file(small_gpt, tmp_path):
    ids = torch.arange(40).view(2, 20) + 60
    plain = quantize_(copy.deepcopy(small_gpt.model), RoundToNearest(2, 64), [ids], skip=("lm_head",))
    model = copy.deepcopy(small_gpt.model)
    quantize_(model, AdaQuant(2, 64, steps=15, range_lr=3e-3, bias_lr=0.0), [ids[:1], ids[1:]])
    assert average_bits(model) == 2.5
    assert len(list(packed_layers(model))) == 28
    with torch.no_grad():
        exact = small_gpt.model(ids).logits
        assert F.mse_loss(model(ids).logits, exact) < F.mse_loss(plain(ids).logits, exact)
    save_packed(model, tmp_path / "model.safetensors")
    again = load_packed_(copy.deepcopy(small_gpt.model), tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_layer_packs_what_it_rounds_to():
    layer = nn.Linear(32, 6)
    fake = FakeQuantLayer(layer, 3, None, size=8)
    packed = fake.packed(torch.float32)
    torch.testing.assert_close(packed.dequantize(), fake.weight, atol=1e-6, rtol=0)
    torch.testing.assert_close(packed(normal(4, 32)), fake(normal(4, 32)), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="inputs that are not rounded"):
        FakeQuantLayer(layer, 3, 3).packed()


@pytest.mark.parametrize("act_bits", [None, 2])
def test_encoders_compute_with_rounded_layers_in_evaluation_too(act_bits):
    torch.manual_seed(0)
    encoder, x = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), torch.randn(3, 5, 16)
    adaquant_model(encoder, [x], weight_bits=2, act_bits=act_bits, steps=0)
    assert isinstance(encoder.linear1, FakeQuantLayer)
    expected = encoder.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(x), expected)
        encoder.activation_relu_or_gelu = 1  # as where layers are put in place by hand
        encoder.linear1, encoder.linear2 = (
            FakeQuantLayer(m.layer, 2, None) for m in (encoder.linear1, encoder.linear2)
        )
        torch.testing.assert_close(encoder(x), encoder.train()(x))


def test_parallel_calibration_sees_the_inputs_of_the_float_model():
    x = normal(40, 8)
    found = []
    for sequential in (True, False):
        model = quantize_(network(), AdaQuant(2, -1, sequential, steps=10), [x])
        found.append(model[5].dequantize())
    assert not torch.equal(*found)


LAYER = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("bits", lambda: AffineFakeQuant(0)),
        ("channels", lambda: AffineFakeQuant(4, None, 3)),
        ("bits", lambda: FakeQuantLayer(LAYER, 17)),
        ("group_size", lambda: FakeQuantLayer(LAYER, 4, size=3)),
        ("x must be one or more samples", lambda: adaquant_layer(LAYER, torch.ones(0, 4), torch.ones(0, 2))),
        ("steps", lambda: adaquant_layer(LAYER, torch.ones(3, 4), torch.ones(3, 2), -1)),
        ("batch", lambda: adaquant_layer(LAYER, torch.ones(3, 4), torch.ones(3, 2), batch=0)),
        ("error must be finite", lambda: adaquant_layer(LAYER, torch.full((3, 4), math.nan), torch.ones(3, 2), 1)),
        ("bits", lambda: AdaQuant(9)),
        ("group_size", lambda: AdaQuant(group_size=0)),
        ("weight_lr", lambda: AdaQuant(weight_lr=math.nan)),
        ("steps", lambda: AdaQuant(steps=-1)),
        ("group_size", lambda: quantize_(network(), AdaQuant(group_size=5), [torch.ones(1, 8)])),
        ("needs calibration data", lambda: quantize_(network(), AdaQuant())),
        ("calib_loader", lambda: adaquant_model(network(), [])),
        ("nn.Linear or nn.Conv2d", lambda: adaquant_model(nn.ReLU(), [torch.ones(1)])),
        ("loader", lambda: retune_batchnorm(network(), [])),
        ("passes", lambda: retune_batchnorm(network(), [torch.ones(2, 8)], 0)),
        ("batch norms", lambda: retune_batchnorm(nn.Linear(2, 2), [torch.ones(2, 2)])),
        ("loader", lambda: tune_bias(network(), [])),
        ("lr", lambda: tune_bias(network(), [(torch.ones(1, 8), torch.ones(1, 3))], lr=0.0)),
        ("target_ratio must be 0.125 or more", lambda: allocate_bits_ip({4: (1.0,)}, (10,), 8, 0.12)),
        ("delta_loss", lambda: allocate_bits_ip({8: (1.0,)}, (10,), 8, 0.5)),
        ("delta_loss", lambda: allocate_bits_ip({4: (math.nan,)}, (10,), 8, 0.5)),
        ("delta_loss", lambda: allocate_bits_ip({4: (1.0, 2.0)}, (10,), 8, 0.5)),
        ("sizes", lambda: allocate_bits_ip({4: ()}, (), 8, 0.5)),
    ],
)
def test_misuse_is_refused_with_the_argument_named(name, call):
    with pytest.raises(ValueError, match=name):
        call()


def test_the_widths_of_all_layers_are_asked_for_before_anything_changes():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).train()
    for argument in ("weight_bits", "act_bits"):
        with pytest.raises(ValueError, match=rf"{argument} must be of all layers, \['2'\] too"):
            adaquant_model(model, [torch.randn(16, 8)], steps=2, **{argument: {"0": 4}})
    with torch.no_grad():
        model[2].weight[0] = torch.nan
    with pytest.raises(ValueError, match="the weights of 2 are not finite"):
        adaquant_model(model, [torch.randn(16, 8)], steps=2)
    with pytest.raises(ValueError, match="model must be one with layers"):
        adaquant_model(model[0], [torch.randn(16, 8)], steps=2)
    assert isinstance(model[0], nn.Linear)
    assert model.training


def test_a_layer_in_two_places_of_a_network_is_rounded_in_both():
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    adaquant_model(model, [torch.randn(16, 8)], steps=1)
    assert isinstance(model[2], FakeQuantLayer)
    assert model[0] is model[2]


def test_statistics_come_back_when_new_ones_cannot_be_taken():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model(torch.randn(50, 4) + 3)
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        retune_batchnorm(model, [torch.randn(9, 4), torch.randn(1, 4)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model[1].momentum == 0.1
    assert not model[1].training


def test_layers_of_16_bits_are_tuned_as_if_they_had_32():
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16).half(), torch.randn(100, 32).half()
    with torch.no_grad():
        y = layer(x)
    fake, errors = adaquant_layer(layer, x, y, 50, weight_bits=3)
    assert errors.after < errors.before
    assert fake(x).dtype == torch.float16
    assert {p.dtype for p in fake.parameters()} == {torch.float16}
    assert ((fake(x) - y).float().square().mean() - errors.after).abs() < 0.2 * errors.after
    model = quantize_(nn.Sequential(layer), AdaQuant(steps=5), [x])
    assert (model(x) - y).abs().max() < 0.5


def test_budgets_hold_to_the_last_bit():
    sizes = [10_000_000, 3]
    limit = 8 * sizes[0] + 4 * sizes[1]
    found = allocate_bits_ip({4: [10.0, 1.0]}, sizes, 8, limit / (32 * sum(sizes)))
    assert (found.bits, found.size) == ([8, 4], limit)
    assert allocate_bits_ip({4: [10.0, 10.0]}, sizes, 8, limit / (32 * sum(sizes))).size <= limit


def test_texts_may_have_different_lengths():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    rows, batches = copy.deepcopy(model), [torch.arange(10).view(2, 5), torch.arange(6).view(2, 3)]
    errors = adaquant_model(model, batches, steps=10)
    assert errors == adaquant_model(rows, [each.flatten() for each in batches], steps=10)
    assert torch.equal(model(batches[0]), rows(batches[0]))


def test_what_a_network_cannot_be_tuned_on_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(8, 8), nn.Conv2d(1, 2, 3)).train()
    before = copy.deepcopy(model.state_dict())
    sizes, broken = [torch.ones(2, 1, 6, 8), torch.ones(2, 1, 5, 8)], [torch.ones(2, 1, 6, 8)] * 2
    broken[1] = broken[1] * math.nan
    for batches, message in (
        (sizes, "calib_loader must be data that have one shape at the convolution 1"),
        (broken, "batch 1 of the calibration data has values that are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            adaquant_model(model, batches, steps=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_biases_come_back_when_they_cannot_be_tuned():
    def broken(output, target):
        calls.append(0)
        return F.mse_loss(output, target) if len(calls) == 1 else 1 / 0

    def steep(output, target):  # finite, with gradients that are not
        return (output - output.detach()).abs().sqrt().sum()

    model, x, y, calls = nn.Sequential(nn.Linear(8, 8)), normal(6, 8), normal(6, 8, seed=1), []
    model.train().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    for pairs, options, refused, message in (
        ([(x, y)] * 2, {"loss": broken}, ZeroDivisionError, "division"),
        ([(x, y)], {"loss": steep}, ValueError, "biases must stay finite"),
        ([(x, y)], {"lr": 1e30}, ValueError, "loss must be finite"),
        ([(x, y), (x, y / 0)], {}, ValueError, "batch 1 of the calibration data"),
    ):
        with pytest.raises(refused, match=message):
            tune_bias(model, pairs, **options)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        assert model.training


@pytest.mark.parametrize("wrong", [2.5, 4.0, True])
def test_counts_are_whole_numbers(monkeypatch, wrong):
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks would come before the method's own
    x, y = normal(3, 4), normal(3, 2)
    model = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)).train()
    for name, call in (
        ("bits", lambda: AffineFakeQuant(wrong)),
        ("channels", lambda: AffineFakeQuant(4, 0, wrong)),
        ("bits", lambda: FakeQuantLayer(LAYER, wrong)),
        ("bits", lambda: FakeQuantLayer(LAYER, 4, wrong)),
        ("group_size", lambda: FakeQuantLayer(LAYER, 4, size=wrong)),
        ("steps", lambda: adaquant_layer(LAYER, x, y, wrong)),
        ("batch", lambda: adaquant_layer(LAYER, x, y, batch=wrong)),
        ("bits", lambda: AdaQuant(wrong)),
        ("group_size", lambda: AdaQuant(group_size=wrong)),
        ("steps", lambda: AdaQuant(steps=wrong)),
        ("batch_size", lambda: AdaQuant(batch_size=wrong)),
        ("weight_bits", lambda: adaquant_model(model, [x], weight_bits=wrong)),
        ("act_bits", lambda: adaquant_model(model, [x], act_bits={"0": wrong})),
        ("steps", lambda: adaquant_model(model, [x], steps=wrong)),
        ("batch", lambda: adaquant_model(model, [x], batch=wrong)),
        ("passes", lambda: retune_batchnorm(model, [x], wrong)),
        ("epochs", lambda: tune_bias(model, [(x, y)], epochs=wrong)),
        ("delta_loss", lambda: allocate_bits_ip({wrong: (1.0,)}, (10,), 8, 0.5)),
        ("sizes", lambda: allocate_bits_ip({2: (1.0,)}, (wrong,), 8, 0.5)),
        ("base_bits", lambda: allocate_bits_ip({1: (1.0,)}, (10,), wrong, 0.5)),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"):
            call()
    assert model.training
    assert isinstance(model[0], nn.Linear)
