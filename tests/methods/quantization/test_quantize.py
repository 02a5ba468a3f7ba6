"""Quantising models in place, with round-to-nearest and with what a configuration may ask for."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from fairtrial.methods.quantization import (
    GPTQ,
    Found,
    PackedLinear,
    RoundToNearest,
    apply_ptq,
    average_bits,
    packed_layers,
    quantize_,
)
from fairtrial.methods.quantization.quantize import chain_of_blocks, fit_range, round_to


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


@dataclass(frozen=True)
class Recorder:
    """Rounds to 4 bits and keeps what it was shown."""

    seen: dict[str, Found]
    wants: ClassVar = frozenset({"hessian", "inputs", "float inputs"})

    def quantize(self, name, layer, found):
        self.seen[name] = copy.copy(found)
        return RoundToNearest(4, -1).quantize(name, layer, found)


def test_a_grid_holds_zero_and_both_ends() -> None:
    weights = torch.tensor([[[0.1, -0.8, 0.3, 0.05], [0.4, 0.2, 0.1, 0.3], [0.0, 0.0, 0.0, 0.0]]])
    grid = fit_range(weights, 3)
    levels = round_to(weights, grid, 3) * grid.scale[..., None] + grid.offset[..., None]
    assert torch.all((levels - weights).abs() <= grid.scale[..., None] * (0.5 + 0.5))
    zero = -grid.offset / grid.scale
    torch.testing.assert_close(zero, zero.round())
    assert levels[0, 2].tolist() == [0, 0, 0, 0]
    symmetric = fit_range(weights, 3, symmetric=True)
    torch.testing.assert_close(symmetric.offset, -4 * symmetric.scale)
    torch.testing.assert_close(symmetric.scale[0, 0], torch.tensor(0.8 / 3))


def test_errors_fall_with_bits() -> None:
    x = torch.randn(64, 8)
    exact = network()(x)
    errors = [
        (quantize_(network(), RoundToNearest(bits, 8))(x) - exact).square().mean().item() for bits in (2, 3, 4, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * exact.square().mean()


def test_layers_see_what_the_quantised_ones_before_them_give() -> None:
    model, x = network(), torch.randn(20, 8)
    exact = copy.deepcopy(model)
    recorder = Recorder({})
    quantize_(model, recorder, [x[:12], x[12:]])
    assert list(recorder.seen) == ["0", "2", "4"]
    with torch.no_grad():
        for name in recorder.seen:
            found, place = recorder.seen[name], int(name)
            torch.testing.assert_close(found.inputs, model[:place](x))
            torch.testing.assert_close(found.float_inputs, exact[:place](x))
            rows = found.inputs.double()
            torch.testing.assert_close(found.hessian, rows.t() @ rows / 20)


def test_blocks_of_a_transformer_are_taken_one_after_the_other(small_gpt) -> None:
    model = copy.deepcopy(small_gpt.model)
    ids = torch.arange(40).view(2, 20) + 60
    recorder = Recorder({})
    name, blocks = chain_of_blocks(model)
    assert (name, len(blocks)) == ("model.layers", 4)
    quantize_(model, recorder, [ids[:1], ids[1:]])
    names = [n for n, m in small_gpt.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert sorted(recorder.seen) == sorted(names)
    assert all(isinstance(model.get_submodule(n), PackedLinear) for n in names)
    # what a late layer saw is what it is called with when the finished model runs, but for its own block
    seen: dict[str, torch.Tensor] = {}
    for each, reference in ((model, "inputs"), (small_gpt.model, "float_inputs")):
        layer = each.get_submodule("model.layers.3.self_attn.q_proj")
        handle = layer.register_forward_pre_hook(lambda m, args, r=reference: seen.update({r: args[0].detach()}))
        with torch.no_grad():
            each(ids)
        handle.remove()
    found = recorder.seen["model.layers.3.self_attn.q_proj"]
    torch.testing.assert_close(found.inputs, seen["inputs"].flatten(0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.float_inputs, seen["float_inputs"].flatten(0, 1), rtol=1e-4, atol=1e-4)


def test_a_block_may_be_finished_against_its_own_outputs() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    class Finishing(RoundToNearest):
        def finish(self, block, calls, targets):
            for (args, _), target in zip(calls, targets, strict=True):
                errors.append((block(*args) - target).abs().max().item())

    errors: list[float] = []
    model, x = Chain(), torch.randn(6, 8)
    quantize_(model, Finishing(bits=8, group_size=8), [x])
    assert len(errors) == 3
    assert 0 < max(errors) < 0.05


def test_what_cannot_be_quantised_is_refused_and_unchanged() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0: .*group_size.*divisor of the layer's input width 8"):
        quantize_(model, RoundToNearest(group_size=16))
    with pytest.raises(ValueError, match="needs calibration data"):
        quantize_(model, Recorder({}))
    with pytest.raises(ValueError, match="batch 1 of the calibration data has values that are not finite"):
        quantize_(model, Recorder({}), [torch.ones(1, 8), torch.full((1, 8), torch.nan)])
    with pytest.raises(ValueError, match="no linear layer"):
        quantize_(nn.ReLU(), RoundToNearest())
    model[2].weight = nn.Parameter(torch.zeros(16, 16))
    tied = nn.Sequential(model[2], nn.Linear(16, 16))
    tied[1].weight = model[2].weight
    with pytest.raises(ValueError, match="shares its weights"):
        quantize_(tied, RoundToNearest(group_size=16))
    assert model.state_dict().keys() == before.keys()
    quantize_(model, RoundToNearest(group_size=8))
    with pytest.raises(ValueError, match="quantised already: 0 is a PackedLinear"):
        quantize_(model, RoundToNearest(group_size=8))
    for wrong in ({"bits": 0}, {"bits": 9}, {"group_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RoundToNearest(**wrong)


def test_a_language_model_keeps_its_head_and_loses_its_bytes(small_gpt) -> None:
    model = quantize_(copy.deepcopy(small_gpt.model), RoundToNearest(4, 64))
    assert {name for name, _ in packed_layers(model)}.isdisjoint({"lm_head"})
    assert average_bits(model) == 4.5
    with torch.no_grad():
        ids = torch.arange(64, 96)[None]
        assert (model(ids).logits - small_gpt.model(ids).logits).abs().max() < 3


@pytest.mark.parametrize("config", [RoundToNearest(bits=2, group_size=8), GPTQ(bits=2, group_size=8)])
def test_weights_too_small_for_the_scales_dtype_become_no_nan(config) -> None:
    layer = nn.Linear(16, 4)
    with torch.no_grad():
        layer.weight.mul_(1e-9)
    model = quantize_(nn.Sequential(layer), config, [torch.randn(32, 16)])
    assert model[0].dequantize().abs().max() < 1e-6


@pytest.mark.parametrize("fmt", ["nf4", "int8", "bf16"])
def test_a_model_in_a_fixed_format_is_not_quantised_again(fmt: str) -> None:
    model = apply_ptq(nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4)), fmt, skip=("1",))
    with pytest.raises(ValueError, match="quantised already: 0 is a"):
        quantize_(model, RoundToNearest(group_size=4))
    assert average_bits(model) == model[0].bits_per_weight()
