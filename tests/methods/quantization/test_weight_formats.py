"""The formats nf4, fp4 and int8, the layers that hold them, and their files."""

import copy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from fairtrial.methods.quantization import (
    Codes,
    Int8Linear,
    TableLinear,
    apply_ptq,
    bits_per_weight,
    dequantize,
    format_layers,
    int8_linear_mixed,
    load_formats_,
    quantize_4bit,
    quantize_codes,
    quantize_int8_rowwise,
    save_formats,
)
from fairtrial.methods.quantization.weight_formats import FORMATS, _pairs, table

ROWS = torch.tensor([[0.5, -1.27, 0.013, 0.3], [0.02, 0.01, -0.004, 0.0]])


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_golden_codes() -> None:
    codes, scale = quantize_codes(ROWS, "int8")
    assert codes.tolist() == [[50, -127, 1, 30], [127, 64, -25, 0]]
    torch.testing.assert_close(scale, torch.tensor([1.27, 0.02]))
    codes, scale = quantize_codes(ROWS, "nf4", 4)
    assert codes.tolist() == [[12, 0, 7, 10], [15, 12, 5, 7]]
    expected = torch.tensor([[0.559701, -1.27, 0, 0.312563], [0.02, 0.008814, -0.003695, 0]])
    torch.testing.assert_close(dequantize(Codes(codes, scale), "nf4", 4), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(quantize_4bit(ROWS, "nf4", 4).dequantize(), expected, atol=1e-6, rtol=0)


def test_the_error_on_many_weights_is_what_it_should_be() -> None:
    gaussian, uniform = normal(2**20), 2 * torch.rand(2**20, generator=torch.Generator().manual_seed(0)) - 1

    def error(weight: torch.Tensor, method: str) -> float:
        return (dequantize(quantize_codes(weight, method), method) - weight).square().mean().item()

    for method, expected in (("nf4", 0.00846), ("fp4", 0.01486)):
        assert error(gaussian, method) == pytest.approx(expected, rel=0.03)
    for method, expected in (("nf4", 0.00278), ("fp4", 0.00411)):
        assert error(uniform, method) == pytest.approx(expected, rel=0.03)
    for row, expected in ((64, 3.5e-5), (1024, 6.19e-5)):
        assert error(gaussian.view(-1, row), "int8") == pytest.approx(expected, rel=0.03)


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(7,), (3, 50), (2, 3, 20), (1, 1)]),
    size=st.integers(1, 70),
    method=st.sampled_from(["nf4", "fp4", "int8"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
@example(seed=34, shape=(3, 50), size=1, method="int8", dtype=torch.bfloat16)  # half a step is not of bfloat16
def test_the_largest_magnitude_is_exact_and_errors_are_bounded(seed, shape, size, method, dtype) -> None:
    weight = normal(*shape, seed=seed).to(dtype)
    codes = quantize_codes(weight, method, size)
    levels = dequantize(codes, method, size)
    largest = weight.abs().max().item()
    assert levels.abs().max() == pytest.approx(largest, rel=1e-6)
    gap = {"nf4": 0.15190, "fp4": 1 / 6, "int8": 0.5 / 127}[method]
    assert (levels - weight).abs().max() <= gap * largest * (1 + 1e-3)
    again = quantize_codes(levels, method, size)
    assert torch.equal(again.codes, codes.codes)


def test_nothing_but_zeros_stays_so() -> None:
    for method in ("nf4", "fp4", "int8"):
        levels = dequantize(quantize_codes(torch.zeros(3, 10), method, 8), method, 8)
        assert levels.tolist() == torch.zeros(3, 10).tolist()
    for fmt in ("nf4-dq", "fp4"):
        layer = apply_ptq(nn.Sequential(nn.Linear(8, 8)).requires_grad_(False), fmt)[0]
        assert layer.dequantize().isfinite().all()


def test_tables_are_sorted_and_codes_are_their_places() -> None:
    for method, size in (("nf4", 16), ("fp4", 15)):
        levels = table(method)
        assert len(levels) == size
        assert torch.equal(quantize_codes(levels, method).codes, torch.arange(size, dtype=torch.uint8))
    assert torch.equal(table("fp4"), -table("fp4").flip(0))


def test_double_quantisation_only_scales_blocks() -> None:
    weight = 0.02 * normal(256, 256)
    plain, double = quantize_4bit(weight), quantize_4bit(weight, double_quant=True)
    assert torch.equal(plain.codes, double.codes)
    exact, absmax = plain.absmax, double.absmax.dequantize()
    relative = (absmax / exact - 1).abs()
    assert 0 < relative.max() < 0.01
    ratio = (double.dequantize() / plain.dequantize()).view(-1, 64)
    torch.testing.assert_close(ratio.nan_to_num((absmax / exact)[0].item()).median(1).values, absmax / exact)


def test_bits() -> None:
    assert bits_per_weight("nf4") == bits_per_weight("fp4") == 4.5
    assert bits_per_weight("nf4-dq") == pytest.approx(4.126953, abs=1e-6)
    assert bits_per_weight("fp4", block_size=32) == 5
    assert (bits_per_weight("int8"), bits_per_weight("int8", row=64), bits_per_weight("bf16")) == (8, 8.5, 16)
    for fmt in FORMATS:
        layer = apply_ptq(nn.Sequential(nn.Linear(256, 512)), fmt)[0]
        mean = 32 / (256 * 512) if fmt.endswith("-dq") else 0
        assert layer.bits_per_weight() == bits_per_weight(fmt, row=256) + mean


@pytest.mark.parametrize("fmt", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
@pytest.mark.parametrize("shape", [(16, 64), (5, 7), (3, 50)])
def test_a_layer_computes_with_what_its_codes_stand_for(fmt: str, shape: tuple[int, int]) -> None:
    linear = nn.Linear(shape[1], shape[0])
    layer = apply_ptq(nn.Sequential(copy.deepcopy(linear)), fmt)[0]
    assert isinstance(layer, TableLinear)
    quantized = quantize_4bit(linear.weight, fmt[:3], 64, fmt.endswith("-dq"))
    assert torch.equal(layer.codes(), quantized.codes)
    torch.testing.assert_close(layer.dequantize(), quantized.dequantize())
    x = normal(2, 3, shape[1])
    torch.testing.assert_close(layer(x), F.linear(x, quantized.dequantize(), linear.bias))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_int8_products_are_exact_for_what_is_on_the_grid() -> None:
    weight = torch.randint(-127, 128, (20, 40), generator=torch.Generator().manual_seed(0)).float()
    x = torch.randint(-127, 128, (2, 9, 40), generator=torch.Generator().manual_seed(1)).float()
    weight[:, 0], x[..., 0] = 127, 127
    codes = quantize_int8_rowwise(weight)
    torch.testing.assert_close(int8_linear_mixed(x, codes, threshold=float("inf")), x @ weight.t())


def test_columns_with_outliers_are_multiplied_in_16_bits() -> None:
    weight, x = normal(30, 64), normal(50, 64, seed=1)
    x[:, 3] *= 100
    codes = quantize_int8_rowwise(weight)
    levels = dequantize(codes, "int8")
    exact = x @ levels.t()
    inside = x.clone()
    inside[:, (x.abs() > 6).any(0)] = 0
    mixed = int8_linear_mixed(x, codes)
    assert (mixed - exact).abs().max() < 0.4  # values below 6 in 127 steps, and 16-bit products of up to 800
    assert (int8_linear_mixed(x, codes, threshold=float("inf")) - exact).abs().max() > 5 * (mixed - exact).abs().max()
    only = int8_linear_mixed(x - inside, codes)
    sixteen = (x - inside).half().double() @ levels.half().double().t()
    torch.testing.assert_close(only.double(), sixteen, rtol=1e-5, atol=1e-3)
    layer = Int8Linear(codes, torch.ones(30))
    torch.testing.assert_close(layer(x), mixed + 1)


def test_int8_takes_single_rows_and_zeros() -> None:
    codes = quantize_int8_rowwise(normal(30, 64))
    assert int8_linear_mixed(torch.zeros(1, 64), codes).abs().max() == 0
    x = normal(1, 64, seed=2)
    both = int8_linear_mixed(torch.cat([x, 0.1 * x]), codes)
    torch.testing.assert_close(int8_linear_mixed(x[0], codes), both[0])


@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients_are_those_of_the_product_with_the_weights_that_are_held(fmt: str) -> None:
    layer = apply_ptq(nn.Sequential(nn.Linear(64, 32)), fmt)[0]
    x, v = normal(2, 3, 64).requires_grad_(), normal(2, 3, 32, seed=1)
    y = layer(x)
    y.backward(v)
    torch.testing.assert_close(x.grad, v @ layer.dequantize())
    assert torch.equal(layer(x.detach()), y)


@pytest.mark.parametrize("fmt", FORMATS)
def test_layers_take_empty_batches_and_show_their_weights(fmt: str) -> None:
    linear = nn.Linear(64, 32)
    layer = apply_ptq(nn.Sequential(copy.deepcopy(linear)), fmt)[0]
    assert layer(torch.zeros(0, 64)).shape == (0, 32)
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, layer.dequantize())
    assert apply_ptq(nn.Sequential(copy.deepcopy(linear).half()), fmt)[0].weight.dtype == torch.float16
    assert (layer.weight - linear.weight).abs().max() < 0.03
    encoder = nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True).eval()
    apply_ptq(encoder, fmt, skip=("out_proj",))
    x = normal(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), encoder.train()(x), rtol=0, atol=0.1)


def test_training_goes_on_after_inference() -> None:
    _pairs.cache_clear()
    layer, x = apply_ptq(nn.Sequential(nn.Linear(64, 32)), "nf4")[0], normal(3, 64)
    with torch.inference_mode():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, 64))


def model() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 16, bias=False), nn.ReLU(), nn.Linear(16, 5))


@pytest.mark.parametrize("fmt", FORMATS)
def test_files_are_as_small_as_the_arithmetic_says_and_load(fmt: str, tmp_path) -> None:
    quantized = apply_ptq(model(), fmt)
    path = tmp_path / "model.safetensors"
    save_formats(quantized, path)
    held = sum(b.numel() * b.element_size() for b in quantized.buffers())
    assert held <= path.stat().st_size <= held + 3000  # names and shapes
    again = load_formats_(model(), path)
    x = normal(3, 64)
    assert torch.equal(again(x), quantized(x))
    assert [type(layer) for _, layer in format_layers(again)] == [type(layer) for _, layer in format_layers(quantized)]


def test_files_of_others_are_refused_before_anything_changes(tmp_path) -> None:
    from safetensors.torch import save_file

    path, plain = tmp_path / "model.safetensors", model()
    with pytest.raises(ValueError, match="no layer in one of the formats"):
        save_formats(plain, path)
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="is no model of fairtrial's weight formats"):
        load_formats_(plain, path)
    save_file({"a": torch.ones(1)}, path, metadata={"format": "fairtrial-weight-format", "version": "0"})
    with pytest.raises(ValueError, match="version 0 of the weight formats"):
        load_formats_(plain, path)
    save_formats(apply_ptq(nn.Sequential(nn.Linear(32, 32)), "nf4"), path)
    with pytest.raises(ValueError, match=r"0\.packed has shape \(512,\)"):
        load_formats_(plain, path)
    with pytest.raises(ValueError, match="has a layer 0, which the model has not"):
        load_formats_(nn.Linear(32, 32), path)
    with pytest.raises(ValueError, match="0 is a ReLU in the model"):
        load_formats_(nn.Sequential(nn.ReLU()), path)
    assert all(isinstance(layer, nn.Linear | nn.ReLU) for layer in plain)


def test_what_cannot_be_quantised_is_refused(monkeypatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks would come before the method's own
    for wrong, word in ((torch.tensor([1.0, torch.nan]), "weight"), (torch.zeros(0), "weight")):
        with pytest.raises(ValueError, match=word):
            quantize_codes(wrong, "int8")
    with pytest.raises(ValueError, match="method must be one of int8, nf4, fp4, got 'int3'"):
        quantize_codes(ROWS, "int3")
    with pytest.raises(ValueError, match="block_size"):
        quantize_codes(ROWS, "nf4", 0)
    with pytest.raises(ValueError, match="scale must be of shape"):
        dequantize(Codes(quantize_codes(ROWS, "nf4", 4).codes, torch.ones(3)), "nf4", 4)
    with pytest.raises(ValueError, match="threshold"):
        int8_linear_mixed(ROWS, quantize_int8_rowwise(ROWS), threshold=-1.0)
    with pytest.raises(ValueError, match="of width 4"):
        int8_linear_mixed(ROWS, quantize_int8_rowwise(torch.ones(2, 3)))
    for arguments in (("nf3",), ("nf4", 0), ("int8", 64, 0)):
        with pytest.raises(ValueError, match="fmt|block_size|row"):
            bits_per_weight(*arguments)
