"""One fine-tuning for all bit widths: layers, what is drawn, merging and the search."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.quantization import (
    OnceForAll,
    OnceForAllQuantLinear,
    PackedLinear,
    RoundToNearest,
    TriangularBitSchedule,
    adapter_parameters,
    gaussian_bit_probs,
    load_packed_,
    max_entropy_bit_probs,
    merge,
    merge_,
    neighbour_bit_probs,
    quantize_,
    sample_config,
    save_packed,
    search_subnet,
    set_config,
)

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def network(depth=4, width=16):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(width, 3))


def once_for_all(model, **options):
    config = OnceForAll(group_size=8, rank=2, quantizer=RoundToNearest, generator=seeded(1), **options)
    return quantize_(model, config)


def trained(layer):
    """The layer with adapters that are no longer 0."""
    with torch.no_grad():
        for number, adapter in enumerate(layer.adapters.values()):
            adapter.B.copy_(normal(*adapter.B.shape, seed=number))
    return layer


def test_schedule_golden():
    schedule = TriangularBitSchedule(2, 4, 8000)
    assert [schedule(t) for t in (0, 1000, 2000, 4000, 6000, 8000)] == [4, 3.5, 3, 2, 3, 4]
    assert sum(map(schedule, range(8000))) / 8000 == pytest.approx(3)


@pytest.mark.parametrize(
    ("probs", "mean", "expected"),
    [
        (max_entropy_bit_probs, 2.1, (0.907834, 0.084332, 0.007834)),
        (max_entropy_bit_probs, 2.5, (0.616204, 0.267592, 0.116204)),
        (max_entropy_bit_probs, 3, (1 / 3, 1 / 3, 1 / 3)),
        (max_entropy_bit_probs, 3.7, (0.051567, 0.196866, 0.751567)),
        (max_entropy_bit_probs, 2, (1, 0, 0)),
        (max_entropy_bit_probs, 4, (0, 0, 1)),
        (gaussian_bit_probs, 2.1, (0.831502, 0.167877, 0.000621)),
        (gaussian_bit_probs, 2.5, (0.495463, 0.495463, 0.009075)),
        (gaussian_bit_probs, 3, (0.106507, 0.786986, 0.106507)),
        (neighbour_bit_probs, 2.1, (0.9, 0.1, 0)),
        (neighbour_bit_probs, 2, (1, 0, 0)),
        (neighbour_bit_probs, 4, (0, 0, 1)),
    ],
)
def test_probabilities_golden(probs, mean, expected):
    torch.testing.assert_close(probs((2, 3, 4), mean), torch.tensor(expected, dtype=F64), atol=1e-6, rtol=0)


def test_gaussian_means_are_only_about_those_asked_for():
    for mean, expected in ((2.1, 2.169119), (2.5, 2.513612)):
        found = gaussian_bit_probs((2, 3, 4), mean) @ torch.tensor([2.0, 3, 4], dtype=F64)
        assert found.item() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    bits=st.lists(st.integers(1, 8), min_size=1, max_size=5, unique=True).map(sorted),
    place=st.floats(0, 1),
    probs=st.sampled_from([max_entropy_bit_probs, neighbour_bit_probs]),
)
def test_probabilities_have_the_mean_asked_for(bits, place, probs):
    mean = min(bits[0] + place * (bits[-1] - bits[0]), float(bits[-1]))
    found = probs(bits, mean)
    assert found.min() >= 0
    assert found.sum().item() == pytest.approx(1)
    assert (found @ torch.tensor(bits, dtype=F64)).item() == pytest.approx(mean, abs=1e-9)


def test_drawn_means_are_spread_evenly_over_a_period_and_not_if_all_widths_are_alike():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(32)))
    quantize_(model, OnceForAll(group_size=4, rank=1, quantizer=RoundToNearest))
    schedule, generator = TriangularBitSchedule(2, 4, 200), seeded()
    drawn = [[*sample_config(model, schedule(t), generator).values()] for t in range(200)]
    means = torch.tensor(drawn, dtype=F64).mean(1)
    counts = torch.histc(means, 8, 2, 4) / 200
    assert counts.min() > 0.05  # 0.125 each
    assert counts.max() < 0.2
    drawn = [[*sample_config(model, 3, generator).values()] for _ in range(200)]
    means = torch.tensor(drawn, dtype=F64).mean(1)
    assert means.std().item() == pytest.approx(math.sqrt(2 / 3 / 32), rel=0.15)  # 0.144338
    assert ((means - 3).abs() <= 0.45).double().mean() > 0.99


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_at_first_every_width_is_the_plain_quantised_network(bits):
    model, x = once_for_all(network()), normal(5, 16)
    plain = quantize_(network(), RoundToNearest(bits, 8))
    set_config(
        model, dict.fromkeys([n for n, m in model.named_modules() if isinstance(m, OnceForAllQuantLinear)], bits)
    )
    assert torch.equal(model(x), plain(x))


def test_only_adapters_that_were_drawn_learn():
    model = once_for_all(network())
    assert not {id(p) for p in model.parameters()} - {id(p) for p in adapter_parameters(model)}
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.1, weight_decay=0.5)
    for seed in range(2):  # in the second step, those of the first have momentum
        before = copy.deepcopy(model.state_dict())
        config = sample_config(model, 3, seeded(seed))
        set_config(model, config)
        optimizer.zero_grad()
        model(normal(8, 16)).square().sum().backward()
        optimizer.step()
        changed = {name.rsplit(".", 1)[0] for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
        assert changed == {f"{name}.adapters.{bits}" for name, bits in config.items()}


def test_merge_golden():
    layer = OnceForAllQuantLinear(
        nn.Linear(4, 2, bias=False), (2,), group_size=2, rank=1, alpha=0.25, quantizer=RoundToNearest
    )
    with torch.no_grad():
        layer.adapters["2"].A.copy_(torch.tensor([[1.0, -1]]))
        layer.adapters["2"].B.copy_(torch.tensor([[2.0], [0.5]]))
    x = torch.tensor([[1.0, 3, -2, 4]])
    assert layer.adapters["2"](x).tolist() == [[0.5, 0.125]]
    change = merge(layer, 2).offset - layer.copies["2"].offset
    torch.testing.assert_close(change, torch.tensor([[0.25, -0.25], [0.0625, -0.0625]]), atol=1e-6, rtol=0)
    torch.testing.assert_close(change @ torch.tensor([4.0, 2]), torch.tensor([0.5, 0.125]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [8, 32, -1])
def test_a_merged_layer_computes_the_same(size):
    layer = trained(OnceForAllQuantLinear(nn.Linear(32, 24), group_size=size, rank=4, quantizer=RoundToNearest))
    x = normal(2, 5, 32)
    for bits in layer.bits:
        layer.active_bits = bits
        merged = merge(layer, bits)
        assert (merged.bits, merged.groups) == (bits, layer.copies["2"].groups)
        torch.testing.assert_close(merged(x), layer(x), rtol=1e-5, atol=1e-5)


def test_unpooled_adapters_compute_but_do_not_merge():
    layer = trained(
        OnceForAllQuantLinear(nn.Linear(8, 4), group_size=4, rank=2, quantizer=RoundToNearest, pooled=False)
    )
    adapter, x = layer.adapters["4"], normal(3, 8)
    torch.testing.assert_close(layer(x) - layer.copies["4"](x), 8 * x @ adapter.A.t() @ adapter.B.t())
    with pytest.raises(ValueError, match="means of 4 inputs, to be merged"):
        merge(layer, 4)


def test_a_merged_model_is_packed_and_loads(tmp_path):
    model, x = once_for_all(network()), normal(5, 16)
    for module in model.modules():
        if isinstance(module, OnceForAllQuantLinear):
            trained(module)
    set_config(model, {"0": 2, "2": 3})
    expected = model(x)
    merge_(model)
    assert [model[i].bits for i in (0, 2, 4)] == [2, 3, 4]
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    save_packed(model, tmp_path / "model.safetensors")
    assert torch.equal(load_packed_(network(), tmp_path / "model.safetensors")(x), model(x))


def test_the_default_quantiser_takes_calibration_data_in_a_language_model(small_gpt):
    model = copy.deepcopy(small_gpt.model)
    ids = torch.arange(64, 96)[None]
    quantize_(model, OnceForAll(group_size=64, bits=(3, 8)), [ids])
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, OnceForAllQuantLinear)
    with torch.no_grad():
        assert (model(ids).logits - small_gpt.model(ids).logits).abs().max() < 0.5  # the highest width is active
        weight = small_gpt.model.get_submodule("model.layers.0.self_attn.q_proj").weight
        errors = [(c.dequantize() - weight).square().mean() for c in layer.copies.values()]
        assert errors[1] < errors[0] / 100


def test_the_search_finds_the_layers_that_need_bits():
    model = quantize_(
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(8))), OnceForAll(group_size=8, quantizer=RoundToNearest)
    )
    worth = torch.tensor([5.0, 0, 0, 4, 0, 0, 3, 0])
    seen = []

    def score(scored):
        bits = torch.tensor([layer.active_bits for layer in scored], dtype=torch.float32)
        seen.append(bits)
        return float(bits @ worth)

    set_config(model, {"3": 2})
    found = search_subnet(model, score, 2.75, 60, 40, generator=seeded())
    assert len(seen) == 100
    assert all(bits.mean() <= 2.75 for bits in seen[60:])
    assert torch.stack(seen[60:])[:, [1, 2, 4, 5, 7]].amax(0).sort().values[:4].tolist() == [2, 2, 2, 2]
    assert found.score == max(float(bits @ worth) for bits in seen[60:])
    assert [found.config[name] for name in "036"] == [4, 4, 4]
    assert found.mean_bits == sum(found.config.values()) / 8 <= 2.75
    assert [layer.active_bits for layer in model] == [4, 4, 4, 2, 4, 4, 4, 4]
    assert search_subnet(model, score, 2, 2, 1, generator=seeded()).config == dict.fromkeys("01234567", 2)
    assert search_subnet(model, score, 4, 2, 1, generator=seeded()).mean_bits == 4


def test_the_budget_counts_weights_not_layers():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8))
    quantize_(model, OnceForAll(group_size=8, quantizer=RoundToNearest))
    for seed in range(5):
        found = search_subnet(model, lambda m: float(m[0].active_bits), 2.5, 5, 5, generator=seeded(seed))
        bits = torch.tensor([found.config[name] for name in "012"], dtype=F64)
        assert found.mean_bits == float(bits @ torch.tensor([1.0, 4, 4], dtype=F64) / 9) <= 2.5


def test_misuse_is_refused_with_the_argument_named():
    linear = nn.Linear(8, 4)
    with pytest.raises(ValueError, match="group_size must be"):
        OnceForAllQuantLinear(linear, group_size=3, quantizer=RoundToNearest)
    with pytest.raises(ValueError, match="found must be"):
        OnceForAllQuantLinear(linear, group_size=8)
    for wrong in ({"bits": (4, 2)}, {"bits": ()}, {"bits": (2, 9)}, {"rank": 0}, {"alpha": math.nan}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OnceForAllQuantLinear(linear, group_size=8, quantizer=RoundToNearest, **wrong)
        with pytest.raises(ValueError, match=next(iter(wrong))):
            OnceForAll(**wrong)
    layer = OnceForAllQuantLinear(linear, group_size=8, quantizer=RoundToNearest)
    with pytest.raises(ValueError, match="bits must be one of the layer's 2, 3, 4, got 5"):
        layer.active_bits = 5
    with pytest.raises(ValueError, match="bits must be one of"):
        merge(layer, 8)
    model = nn.Sequential(layer)
    for mean in (1.9, 4.1, math.nan):
        with pytest.raises(ValueError, match="mean must be from 2 to 4"):
            sample_config(model, mean, seeded())
        with pytest.raises(ValueError, match="budget_mean_bits must be"):
            search_subnet(model, lambda m: 0.0, mean, generator=seeded())
    with pytest.raises(ValueError, match="sampler must be"):
        sample_config(model, 3, seeded(), "uniform")
    with pytest.raises(ValueError, match="names of OnceForAllQuantLinear"):
        set_config(model, {"0": 2, "1": 3})
    assert layer.active_bits == 4
    with pytest.raises(ValueError, match="score_fn"):
        search_subnet(model, lambda m: math.nan, 3, generator=seeded())
    with pytest.raises(ValueError, match="with OnceForAllQuantLinear layers"):
        merge_(nn.Linear(8, 4))
    with pytest.raises(ValueError, match="period"):
        TriangularBitSchedule(2, 4, 0)
    with pytest.raises(ValueError, match="b_max"):
        TriangularBitSchedule(4, 2)
    with pytest.raises(ValueError, match="divisor"):
        quantize_(nn.Sequential(linear), OnceForAll(group_size=3, quantizer=RoundToNearest))
    assert isinstance(merge_(layer), PackedLinear)
