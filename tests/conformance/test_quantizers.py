"""What every registered post-training quantiser must do, enrolled by its `@method(slot="quantizer")` alone.

Formats that have their bits once and for all are tested with `weight_formats`.
"""

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fairtrial.methods.quantization import average_bits, load_packed_, packed_layers, quantize_, save_packed
from fairtrial.methods.registry import index

QUANTIZERS = [
    entry
    for entry in index()
    if entry.slot == "quantizer" and "bits" in inspect.signature(entry.load().factory).parameters
]

each_quantizer = pytest.mark.parametrize("entry", QUANTIZERS, ids=[entry.name for entry in QUANTIZERS])


def config_of(entry, bits, group_size=32):
    method = entry.load()
    setting = SimpleNamespace(bits=bits, group_size=group_size, generator=torch.Generator().manual_seed(0))
    short = {"steps": 10} if "steps" in inspect.signature(method.factory).parameters else {}  # of what is trained
    return method.factory(**{**method.bind(setting), **short})


def text(rows=8, length=64):
    return torch.randint(32, 127, (rows, length), generator=torch.Generator().manual_seed(0))


def quantised(entry, small_gpt, bits):
    model = copy.deepcopy(small_gpt.model)
    return quantize_(model, config_of(entry, bits), torch.split(text(), 2))


@torch.no_grad()
def scores(model):
    return model(text()[:2]).logits


@each_quantizer
def test_errors_fall_with_bits_and_codes_take_what_they_should(entry, small_gpt):
    exact, errors = scores(small_gpt.model), []
    for bits in (2, 3, 4):
        model = quantised(entry, small_gpt, bits)
        errors.append((scores(model) - exact).square().mean().item())
        assert bits <= average_bits(model) <= bits + 2
    assert errors == sorted(errors, reverse=True)
    assert {name for name, _ in packed_layers(model)} == {
        name for name, m in small_gpt.model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"
    }


@each_quantizer
def test_a_file_brings_back_the_same_model(entry, small_gpt, tmp_path):
    model = quantised(entry, small_gpt, 4)
    save_packed(model, tmp_path / "model.safetensors")
    again = load_packed_(copy.deepcopy(small_gpt.model), tmp_path / "model.safetensors")
    torch.testing.assert_close(scores(again), scores(model), rtol=0, atol=0)


@each_quantizer
def test_the_same_data_give_the_same_codes_and_leave_global_randomness_alone(entry, small_gpt):
    before = torch.get_rng_state()
    a, b = (quantised(entry, small_gpt, 3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    for (name, one), (_, other) in zip(packed_layers(a), packed_layers(b), strict=True):
        assert torch.equal(one.packed, other.packed), name


@each_quantizer
def test_rows_of_zeros_do_not_collapse(entry, small_gpt):
    model = copy.deepcopy(small_gpt.model)
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    with torch.no_grad():
        layer.weight[5:9] = 0
    quantize_(model, config_of(entry, 3), [text()[:4]])
    weight = model.get_submodule("model.layers.1.mlp.up_proj").dequantize()
    assert weight.isfinite().all()
    assert (weight[5:9].abs() < 1e-3).all()  # offsets that are trained afterwards move a little


@each_quantizer
def test_what_cannot_be_is_refused_before_anything_changes(entry, small_gpt):
    model = copy.deepcopy(small_gpt.model)
    for wrong in (0, 17):
        with pytest.raises(ValueError, match="bits"):
            config_of(entry, wrong)
    with pytest.raises(ValueError, match="group_size"):
        quantize_(model, config_of(entry, 4, 48), [text()])
    assert not any(True for _ in packed_layers(model))
    quantize_(model, config_of(entry, 4), [text()])
    with pytest.raises(ValueError, match="quantised already"):
        quantize_(model, config_of(entry, 4), [text()])
