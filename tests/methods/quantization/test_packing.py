"""Packed integers, the layers that hold them, and their files."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.quantization import (
    CPUInt4Linear,
    CPUInt8Linear,
    PackedLinear,
    RoundToNearest,
    average_bits,
    for_inference_,
    load_packed_,
    pack,
    quantize_,
    save_packed,
    unpack,
)
from fairtrial.methods.quantization.packing import group_size, packed_width


@given(bits=st.integers(1, 8), rows=st.integers(1, 4), n=st.integers(1, 40), seed=st.integers(0, 100))
def test_packing_and_back(bits: int, rows: int, n: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, n), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, packed_width(n, bits))
    assert torch.equal(unpack(packed, bits, n), codes)


def test_bits_lie_as_documented() -> None:
    assert pack(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist() == [[0b00111001]]
    assert pack(torch.tensor([[7, 0, 0, 0, 0, 0, 0, 5]], dtype=torch.uint8), 3).tolist() == [[7, 0, 0b10100000]]
    assert [packed_width(64, bits) for bits in (2, 3, 4, 8)] == [16, 24, 32, 64]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="codes of 2 bits must be below 4, got 4"):
        pack(torch.tensor([[4]], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="bits"):
        pack(torch.tensor([[0]], dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="of width 2, for 3 codes of 4 bits"):
        unpack(torch.zeros(1, 3, dtype=torch.uint8), 4, 3)


def layer(bits: int = 4, out: int = 32, width: int = 64, groups: int = 2) -> PackedLinear:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (out, width), generator=generator, dtype=torch.uint8)
    scale, offset = torch.rand(2, out, groups, generator=generator)
    return PackedLinear(codes, scale, offset - 8 * scale, bits, torch.rand(out, generator=generator))


def test_a_layer_computes_with_the_levels_of_its_codes() -> None:
    packed = layer()
    codes, (scale, offset) = packed.codes(), (t.repeat_interleave(32, 1) for t in (packed.scale, packed.offset))
    weight = codes * scale + offset
    torch.testing.assert_close(packed.dequantize(), weight)
    x = torch.randn(3, 5, 64)
    torch.testing.assert_close(packed(x), F.linear(x, weight, packed.bias))
    assert packed(x.double()).dtype == torch.float64


def test_kept_weights_take_the_place_of_their_codes() -> None:
    codes, ones = torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1)
    packed = PackedLinear(codes, ones, ones, 2, kept=(torch.tensor([1, 6]), torch.tensor([5.0, -3.0])))
    assert packed.dequantize().tolist() == [[1, 5, 1, 1], [1, 1, -3, 1]]


def test_bytes_are_what_the_arithmetic_says() -> None:
    packed = layer(bits=3, width=128, groups=2)
    assert packed.bits_per_weight() == 3 + 2 * 32 / 64
    model = nn.Sequential(nn.Linear(128, 16), nn.Linear(16, 16))
    quantize_(model, RoundToNearest(bits=2, group_size=16))
    assert average_bits(model) == 2 + 2 * 16 / 16


@pytest.mark.parametrize(("kind", "bits", "groups"), [(CPUInt4Linear, 4, 2), (CPUInt8Linear, 8, 1)])
@pytest.mark.parametrize("rows", [1, 7, 8, 20])
def test_the_cpu_kernels_compute_the_same_in_bfloat16(kind, bits: int, groups: int, rows: int) -> None:
    packed = layer(out=48, width=128, bits=bits, groups=groups)
    fast = kind(packed)
    x = torch.randn(rows, 128)
    exact = packed(x)
    assert (fast(x) - exact).abs().max() < 0.01 * exact.abs().max()
    assert fast(x).dtype == x.dtype
    assert packed.bits_per_weight() - 1 <= fast.bits_per_weight() <= packed.bits_per_weight() + 1
    with pytest.raises(ValueError, match=f"PyTorch's kernel for {bits} bits on the CPU takes"):
        kind(layer(bits=3))


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16, bias=False), nn.ReLU(), nn.Linear(16, 4))


def test_for_inference_takes_what_the_kernel_takes() -> None:
    quantised = quantize_(model(), RoundToNearest(bits=4, group_size=32), skip=("4",))
    x = torch.randn(3, 64)
    before = quantised(x)
    for_inference_(quantised)
    assert [type(quantised[i]) for i in (0, 2, 4)] == [CPUInt4Linear, CPUInt4Linear, nn.Linear]
    assert (quantised(x) - before).abs().max() < 0.02 * before.abs().max()
    rows = for_inference_(quantize_(model(), RoundToNearest(bits=8, group_size=-1), skip=("4",)))
    assert [type(rows[i]) for i in (0, 2, 4)] == [CPUInt8Linear, CPUInt8Linear, nn.Linear]
    assert (rows(x) - model()(x)).abs().max() < 0.02 * before.abs().max()
    with pytest.raises(ValueError, match="quantised already: 0 is a CPUInt8Linear"):
        quantize_(rows, RoundToNearest())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_file_is_as_small_as_the_arithmetic_says_and_loads(bits: int, tmp_path) -> None:
    quantised = quantize_(model(), RoundToNearest(bits=bits, group_size=16))
    path = tmp_path / "model.safetensors"
    save_packed(quantised, path)
    weights = 64 * 32 + 32 * 16 + 16 * 4
    held = weights * bits // 8 + 2 * 2 * weights // 16 + 4 * (32 + 4)
    assert held <= path.stat().st_size <= held + 3000  # names and shapes
    again = load_packed_(model(), path)
    x = torch.randn(3, 64)
    assert torch.equal(again(x), quantised(x))


def test_files_of_others_are_refused_before_anything_changes(tmp_path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    plain = model()
    before = copy.deepcopy(plain.state_dict())
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="no packed model"):
        load_packed_(plain, path)
    save_file({"a": torch.ones(1)}, path, metadata={"format": "fairtrial-packed", "version": "0"})
    with pytest.raises(ValueError, match="version 0 of the packed format"):
        load_packed_(plain, path)
    save_packed(quantize_(nn.Sequential(nn.Linear(32, 32)), RoundToNearest(group_size=16)), path)
    with pytest.raises(ValueError, match=r"0\.packed has shape \(32, 16\)"):
        load_packed_(plain, path)
    save_packed(quantize_(nn.Sequential(nn.Linear(32, 32)), RoundToNearest(group_size=16)), path)
    with pytest.raises(ValueError, match="has a layer 0, which the model has not"):
        load_packed_(nn.Linear(32, 32), path)
    bigger = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32))
    save_packed(quantize_(bigger, RoundToNearest(group_size=16), skip=("1",)), path)
    with pytest.raises(ValueError, match=r"has 1\.(weight|bias), which the model has not"):
        load_packed_(nn.Sequential(nn.Linear(64, 32)), path)
    save_packed(quantize_(nn.Sequential(nn.Linear(64, 32)), RoundToNearest(group_size=16)), path)
    with pytest.raises(ValueError, match=r"lacks 2\.weight, which the model has"):
        load_packed_(plain, path)
    with pytest.raises(ValueError, match="no packed layer"):
        save_packed(plain, path)
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())
    assert isinstance(plain[0], nn.Linear)


def test_scales_and_offsets_load_in_the_dtypes_that_they_had(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    codes = torch.zeros(4, 8, dtype=torch.uint8)
    held = nn.Sequential(PackedLinear(codes, torch.ones(4, 1).half(), torch.full((4, 1), 1 + 2**-20), 4))
    save_packed(held, path)
    again = load_packed_(nn.Sequential(nn.Linear(8, 4, bias=False)), path)
    assert (again[0].scale.dtype, again[0].offset.dtype) == (torch.float16, torch.float32)
    assert torch.equal(again[0].dequantize(), held[0].dequantize())


def test_tied_weights_are_in_a_file_once(tmp_path) -> None:
    def tied() -> nn.Module:
        made = nn.ModuleDict({"embedding": nn.Embedding(8, 16), "inner": nn.Linear(16, 16), "head": nn.Linear(16, 8)})
        made["head"].weight = made["embedding"].weight
        return made

    path, model = tmp_path / "model.safetensors", tied()
    save_packed(quantize_(model, RoundToNearest(group_size=16), skip=("head",)), path)
    again = load_packed_(tied(), path)
    assert torch.equal(again["head"].weight, model["embedding"].weight)
    assert again["head"].weight is again["embedding"].weight


def test_weights_can_be_read_past_the_call_and_are_no_parameter() -> None:
    packed = quantize_(model(), RoundToNearest(bits=4, group_size=16))
    assert torch.equal(packed[0].weight, packed[0].dequantize())
    assert copy.deepcopy(packed).half()[0].weight.dtype == torch.float16
    assert "0.weight" not in packed.state_dict()
    assert not list(packed.named_parameters())
    again = copy.deepcopy(packed)
    again.load_state_dict(packed.state_dict())
    assert torch.equal(again[0].weight, packed[0].weight)


@pytest.mark.parametrize(("bits", "size"), [(4, 32), (8, -1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_layers_of_the_cpu_kernels_take_other_dtypes(bits: int, size: int, dtype: torch.dtype) -> None:
    packed, x = quantize_(model(), RoundToNearest(bits=bits, group_size=size), skip=("4",)), torch.randn(9, 64)
    exact = packed(x)
    fast = for_inference_(packed).to(dtype)
    for rows in (2, 9):
        y = fast(x[:rows].to(dtype))
        assert y.dtype == dtype
        assert (y.float() - exact[:rows]).abs().max() < 0.03 * exact.abs().max()


def test_only_models_whose_layers_are_all_packed_are_saved(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    some = for_inference_(quantize_(model(), RoundToNearest(bits=4, group_size=16), skip=("2",)))
    with torch.no_grad():
        half = quantize_(model(), RoundToNearest(bits=4, group_size=32), skip=("4",))
        half[4] = quantize_(model(), RoundToNearest(bits=4, group_size=16))[4]
    for_inference_(half)
    with pytest.raises(ValueError, match="0 is a CPUInt4Linear, which packed files do not hold"):
        save_packed(half, path)
    with pytest.raises(ValueError, match="model must be a model that has packed layers, not one itself"):
        save_packed(some[0], path)
    assert not path.exists()


def test_a_layer_in_two_places_comes_back_in_both(tmp_path) -> None:
    def twice() -> nn.Module:
        made = nn.ModuleDict({"a": nn.Linear(16, 16)})
        made["b"] = made["a"]
        return made

    path, packed = tmp_path / "model.safetensors", quantize_(twice(), RoundToNearest(group_size=16))
    save_packed(packed, path)
    again = load_packed_(twice(), path)
    assert again["a"] is again["b"]
    assert torch.equal(again["b"].weight, packed["a"].weight)


@pytest.mark.parametrize(("kind", "bits", "groups"), [(CPUInt4Linear, 4, 2), (CPUInt8Linear, 8, 1)])
def test_layers_of_the_cpu_kernels_have_weights_to_read(kind, bits: int, groups: int) -> None:
    packed = layer(out=48, width=128, bits=bits, groups=groups)
    fast = kind(packed)
    assert fast.weight.dtype == packed.weight.dtype
    torch.testing.assert_close(fast.weight, packed.weight, rtol=0.01, atol=0.01 * packed.weight.abs().max().item())


@pytest.mark.parametrize(("kind", "bits", "groups"), [(CPUInt4Linear, 4, 2), (CPUInt8Linear, 8, 1)])
@pytest.mark.parametrize("rows", [2, 20])
def test_gradients_flow_through_the_layers_of_the_cpu_kernels(kind, bits: int, groups: int, rows: int) -> None:
    packed = layer(out=48, width=128, bits=bits, groups=groups)
    fast, x, weight = kind(packed), torch.randn(rows, 128, requires_grad=True), torch.randn(rows, 48)
    (exact,) = torch.autograd.grad((packed(x) * weight).sum(), x)
    y = fast(x)
    (found,) = torch.autograd.grad((y * weight).sum(), x)
    assert found.dtype == x.dtype
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()
    with torch.no_grad():
        assert (y - fast(x)).abs().max() < 0.01 * y.abs().max()


@pytest.mark.parametrize("wrong", [2.5, 4.0, True])
def test_bits_and_sizes_of_groups_are_whole_numbers(monkeypatch, wrong) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks would come before the method's own
    codes, ones = torch.zeros(2, 4, dtype=torch.uint8), torch.ones(2, 1)
    for call in (
        lambda: pack(codes, wrong),
        lambda: unpack(codes, wrong, 4),
        lambda: PackedLinear(codes, ones, ones, wrong),
        lambda: RoundToNearest(bits=wrong),
    ):
        with pytest.raises(ValueError, match="bits must be a whole number from 1 to 8"):
            call()
    with pytest.raises(ValueError, match="group_size must be -1 or a whole number"):
        RoundToNearest(group_size=wrong)
    with pytest.raises(ValueError, match="group_size must be -1 or a divisor"):
        group_size(8, wrong)
