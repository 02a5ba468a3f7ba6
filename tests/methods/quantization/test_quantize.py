"""Quantising models in place, with round-to-nearest and with what a configuration may ask for."""

import copy
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from fairtrial.methods.quantization import (
    GPTQ,
    AdaQuant,
    DecoupleQ,
    Found,
    PackedLinear,
    RoundToNearest,
    apply_ptq,
    average_bits,
    for_inference_,
    packed_layers,
    quantize_,
)
from fairtrial.methods.quantization.quantize import chain_of_blocks, fit_range, recorded_chain, round_to


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


# Which blocks are a chain ------------------------------------------------------------------------------------------


class Block(nn.Module):
    """What a block may be called with beside its input."""

    def __init__(self, gives_shift: bool = False) -> None:
        super().__init__()
        self.inner, self.gives_shift = nn.Linear(8, 8), gives_shift

    def forward(self, x, shift=0.0, *, scale=1.0):
        y = torch.tanh(self.inner(x * scale + shift))
        return (y, y.mean(0)) if self.gives_shift else y


def shared_arguments(blocks, x):
    scale = torch.full((8,), 0.5)
    for block in blocks:
        x = block(x, scale=scale)
    return x


def arguments_of_their_own(blocks, x):
    scales = [torch.full((8,), 0.5 + k) for k in range(len(blocks))]
    for block, scale in zip(blocks, scales, strict=True):
        x = block(x, 0.1, scale=scale)
    return x


def residual(blocks, x):
    for block in blocks:
        x = x + block(x)
    return x


def residual_in_place(blocks, x):
    for block in blocks:
        x = block(x)
        x += 1
    return x


def parallel(blocks, x):
    return torch.stack([block(x) for block in blocks])


def by_keyword(blocks, x):
    for block in blocks:
        x = block(x=x)
    return x


def twice(blocks, x):
    return shared_arguments(blocks, shared_arguments(blocks, x))


def handed_on(blocks, x):
    shift = 0.0
    for block in blocks:
        x, shift = block(x, shift)
    return x


def handed_on_by_keyword(blocks, x):
    shift = 0.0
    for block in blocks:
        x, shift = block(x, shift=shift)
    return x


class Flowing(nn.Module):
    def __init__(self, flow) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(flow in (handed_on, handed_on_by_keyword)) for _ in range(3)])
        self.flow = flow

    def forward(self, x):
        return self.flow(self.blocks, x)


@dataclass(frozen=True)
class Looking:
    """Keeps what it was shown, and the layers as they are."""

    seen: dict[str, Found]
    wants: ClassVar = frozenset({"hessian"})

    def quantize(self, name, layer, found):
        self.seen[name] = found
        return layer


def hessians(model: nn.Module, batches: list[torch.Tensor], names: list[str]) -> dict[str, torch.Tensor]:
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, n=name: rows[n].append(args[0].double()))
        for name in names
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(r).T @ torch.cat(r) / len(torch.cat(r)) for name, r in rows.items()}


CHAINS = [shared_arguments, arguments_of_their_own]
OTHERS = [residual, residual_in_place, parallel, by_keyword, twice, handed_on, handed_on_by_keyword]


@pytest.mark.parametrize("flow", CHAINS + OTHERS)
def test_layers_see_what_the_model_gives_them_however_its_blocks_are_called(flow) -> None:
    model, batches = Flowing(flow), [torch.randn(20, 8), torch.randn(7, 8)]
    assert (recorded_chain(model, batches) is not None) == (flow in CHAINS)
    looking = Looking({})
    quantize_(model, looking, batches)
    expected = hessians(model, batches, [f"blocks.{k}.inner" for k in range(3)])
    assert looking.seen.keys() == expected.keys()
    for name, found in looking.seen.items():
        torch.testing.assert_close(found.hessian, expected[name], rtol=1e-4, atol=1e-6)


def test_layers_may_have_different_masks() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    model, ids = transformers.Qwen2ForCausalLM(config).eval(), torch.arange(32).view(2, 16)
    looking, tuples = Looking({}), Looking({})
    quantize_(model, looking, [ids])
    quantize_(model, tuples, [(ids,)])
    names = [*looking.seen]
    rows = {}
    layers = {name: model.get_submodule(name) for name in names}
    handles = [
        m.register_forward_pre_hook(lambda m, args, n=n: rows.update({n: args[0].flatten(0, 1).double()}))
        for n, m in layers.items()
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    for name in names:
        for seen in (looking.seen, tuples.seen):
            torch.testing.assert_close(seen[name].hessian, rows[name].T @ rows[name] / 32, rtol=1e-4, atol=1e-6)


def test_a_layer_may_be_called_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(input=x)

    looking, x = Looking({}), torch.randn(20, 8)
    quantize_(Named(), looking, [x])
    torch.testing.assert_close(looking.seen["inner"].hessian, (x.T @ x / 20).double(), rtol=1e-4, atol=1e-6)


def test_a_list_of_blocks_that_is_never_called_is_no_chain() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 8)
            self.idle = nn.ModuleList([nn.Sequential(nn.Linear(8, 8)) for _ in range(2)])

        def forward(self, x):
            return self.head(x)

    with pytest.raises(ValueError, match=r"never reach the layer idle\.0\.0"):
        quantize_(Idle(), GPTQ(group_size=8), [torch.randn(4, 8)])
    model = quantize_(Idle(), GPTQ(group_size=8), [torch.randn(4, 8)], skip=("idle.0.0", "idle.1.0"))
    assert [name for name, _ in packed_layers(model)] == ["head"]


class Headed(nn.Module):
    """A chain, and a layer outside of it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
            self.head = nn.Linear(8, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_float_inputs_are_those_of_the_float_model_outside_of_the_chain_too() -> None:
    model, x = Headed(), torch.randn(6, 8)
    with torch.no_grad():
        hidden = x
        for block in model.blocks:
            hidden = block(hidden)
    recorder = Recorder({})
    quantize_(model, recorder, [x])
    assert torch.equal(recorder.seen["head"].float_inputs, hidden)
    assert not torch.equal(recorder.seen["head"].inputs, hidden)


# What is replaced --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [RoundToNearest(4, 32), GPTQ(group_size=32), AdaQuant(group_size=32, steps=1)])
def test_a_model_that_is_a_layer_comes_back_quantised(config) -> None:
    layer, x = nn.Linear(32, 16), torch.randn(40, 32)
    packed = quantize_(layer, config, [x])
    assert isinstance(packed, PackedLinear)
    assert 0 < (packed(x) - layer(x)).abs().max() < 0.5
    assert type(for_inference_(packed)).__name__ == "CPUInt4Linear"


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = self.a

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


@pytest.mark.parametrize("config", [RoundToNearest(2, 8), GPTQ(2, 8)])
def test_a_layer_in_two_places_is_replaced_in_both(config) -> None:
    model = quantize_(Twice(), config, [torch.randn(5, 8)])
    assert isinstance(model.b, PackedLinear)
    assert model.a is model.b
    alone = Twice()
    with pytest.raises(ValueError, match="no linear layer to quantise but b"):
        quantize_(alone, config, [torch.randn(5, 8)], skip=("b",))
    assert isinstance(alone.a, nn.Linear)


def test_attention_whose_weights_are_read_past_the_call_still_works() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.attention(x, x, x, need_weights=False)[0])

    model, x = Attending().eval(), torch.randn(2, 3, 8)
    for config in (RoundToNearest(8, 8), GPTQ(8, 8)):
        each = quantize_(copy.deepcopy(model), config, [x])
        assert [name for name, _ in packed_layers(each)] == ["out"]
        with torch.no_grad():
            torch.testing.assert_close(each(x), model(x), rtol=0, atol=0.1)


def test_encoders_that_read_the_weights_of_their_layers_still_work() -> None:
    model, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), torch.randn(2, 3, 8)
    for config in (RoundToNearest(8, 8), GPTQ(8, 8)):
        each = copy.deepcopy(model).eval()
        with torch.no_grad():
            exact = each(x)
            quantize_(each, config, [x])
            assert len(list(packed_layers(each))) == 4
            torch.testing.assert_close(each(x), exact, rtol=0, atol=0.1)
        torch.testing.assert_close(each(x), exact, rtol=0, atol=0.1)


class Breaks(RoundToNearest):
    def quantize(self, name: str, layer: nn.Linear, found: Found) -> nn.Module:
        if name.endswith("linear2"):
            raise ZeroDivisionError
        return super().quantize(name, layer, found)


def test_encoders_call_the_layers_that_were_put_into_them_and_are_as_they_were_after_a_failure() -> None:
    encoder, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), torch.randn(2, 3, 8)
    with pytest.raises(ZeroDivisionError):
        quantize_(encoder, Breaks(8, 8))
    assert encoder.use_nested_tensor
    assert encoder.layers[0].activation_relu_or_gelu == 1
    assert type(encoder.layers[0].linear1) is nn.Linear
    seen = []
    quantize_(encoder, RoundToNearest(8, 8))
    encoder.layers[1].linear2.forward = lambda x: seen.append(x) or x[..., :8]
    with torch.no_grad():
        encoder(x)
    assert len(seen) == 1


# What is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("config", [RoundToNearest(group_size=8), GPTQ(group_size=8), DecoupleQ()])
def test_weights_that_are_not_finite_are_refused_by_name(config, bad: float) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = bad
    with pytest.raises(ValueError, match="the weights of 2 are not finite"):
        quantize_(model, config, [torch.randn(9, 8)])
    assert not list(packed_layers(model))


@pytest.mark.parametrize("config", [RoundToNearest(group_size=8), GPTQ(group_size=8), DecoupleQ(), AdaQuant(steps=1)])
def test_weights_too_large_for_the_scales_dtype_are_refused(config) -> None:
    model = network().train()
    with torch.no_grad():
        model[4].weight.mul_(1e8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"scale_dtype must be one that holds scales and offsets of up to .*float16"):
        quantize_(model, config, [torch.randn(9, 8)])
    assert [type(layer) for layer in model] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh, nn.Linear]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


done: list[nn.Module] = []


class Failing(DecoupleQ):
    """Trains norms, and fails at the third block."""

    def finish(self, block, inputs, targets):
        super().finish(block, inputs, targets)
        done.append(block)
        if len(done) == 3:
            raise RuntimeError("no more")


def test_an_error_in_the_middle_leaves_the_model_as_it_was() -> None:
    model, x = Headed(), torch.randn(9, 8)
    model.blocks[1].eval()
    before, layer = copy.deepcopy(model.state_dict()), model.blocks[0][1]
    done.clear()
    with pytest.raises(RuntimeError, match="no more"):
        quantize_(model, Failing(lr=0.01), [x])
    assert model.blocks[0][1] is layer
    assert not list(packed_layers(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert not model.blocks[1].training
    with torch.no_grad():
        model.blocks[1][1].weight.fill_(3e38)
    with pytest.raises(ValueError, match="scale_dtype|not finite"):
        quantize_(model, GPTQ(group_size=8), [x])
    assert not list(packed_layers(model))


def test_blocks_without_quantised_layers_are_not_finished() -> None:
    model = quantize_(Headed(), DecoupleQ(), [torch.randn(9, 8)], skip=("blocks.2.1",))
    assert [name for name, _ in packed_layers(model)] == ["blocks.0.1", "blocks.1.1", "head"]


@pytest.mark.parametrize("config", [GPTQ, "gptq", None])
def test_what_is_no_configuration_is_refused(config) -> None:
    with pytest.raises(ValueError, match="config must be a configuration such as"):
        quantize_(network(), config, [torch.randn(3, 8)])


def test_a_single_batch_is_no_calibration() -> None:
    with pytest.raises(ValueError, match="calibration must be batches, such as a list of them"):
        quantize_(network(), GPTQ(group_size=8), torch.randn(3, 8))
