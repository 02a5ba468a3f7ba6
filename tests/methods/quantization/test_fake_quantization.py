import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.quantization import (
    StraightThroughLinear,
    lsq_layers,
    quest_linear,
    statsq_linear,
    straight_through_linear,
)
from fairtrial.methods.quantization.fake_quantization import round_by_largest


def test_levels_by_hand() -> None:
    x = torch.tensor([[3.0, 0.9, -0.1, -2.9]], requires_grad=True)
    rounded = round_by_largest(x, 2)  # levels -3, -1, 1, 3
    torch.testing.assert_close(rounded, torch.tensor([[3.0, 1.0, -1.0, -3.0]]))
    torch.testing.assert_close(round_by_largest(x, 1), torch.tensor([[3.0, 3.0, -3.0, -3.0]]))
    rounded.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert x.grad.tolist() == [[1, 2, 3, 4]]
    assert round_by_largest(torch.zeros(2, 3), 4).abs().max() < 1e-7


@pytest.mark.parametrize("size", [0.0, 1e-7, 400.0])
def test_rows_of_float16_have_finite_levels(size: float) -> None:
    x = (size * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))).half()
    rounded = round_by_largest(x, 4)
    assert rounded.dtype == torch.float16
    torch.testing.assert_close(rounded, round_by_largest(x.float(), 4).half(), rtol=0, atol=0)


@given(seed=st.integers(0, 1000), bits=st.integers(1, 8))
def test_there_are_as_many_levels_as_bits_allow_and_none_is_farther_than_half_a_step(seed: int, bits: int) -> None:
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rounded = round_by_largest(x, bits)
    assert all(len(row.unique()) <= 2**bits for row in rounded)
    step = 2 * x.abs().amax(1, keepdim=True) / (2**bits - 1)
    assert ((rounded - x).abs() <= step / 2 + 1e-7).all()


def test_layers_are_replaced_and_keep_their_parameters() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2, bias=False))
    weight = model[0].weight
    straight_through_linear(model, 2, 3, skip=("2",))
    assert isinstance(model[0], StraightThroughLinear)
    assert type(model[2]) is nn.Linear
    assert model[0].weight is weight
    model(torch.randn(4, 8)).sum().backward()
    assert weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="weight_bits must be a whole number from 1 to 8, got 0"):
        straight_through_linear(model, 0)
    with pytest.raises(ValueError, match="act_bits must be a whole number from 1 to 8, got 9"):
        straight_through_linear(model, 4, 9)
    with pytest.raises(ValueError, match="nn.Linear to replace"):
        straight_through_linear(nn.ReLU())


def test_parts_of_bits_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks would come before the method's own
    with pytest.raises(ValueError, match=r"weight_bits must be a whole number from 1 to 8, got 2\.5"):
        straight_through_linear(nn.Linear(4, 4), 2.5)


@pytest.mark.parametrize("surgery", [straight_through_linear, quest_linear, statsq_linear, lsq_layers])
def test_encoders_compute_with_rounded_layers_in_evaluation_too(surgery) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    nn.init.normal_(layer.norm1.bias)  # or each token's mean, which a rotation makes an entry of, is 0 but for rounding
    encoder, x = nn.TransformerEncoder(layer, 2), torch.randn(2, 5, 32)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    surgery(encoder, 2, 2)
    attention = encoder.layers[0].self_attn
    assert attention.out_proj.weight is dict(attention.named_parameters())["out_proj.weight"]
    expected = [encoder(x), encoder(x, src_key_padding_mask=padding)]
    encoder.eval()
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), expected[0])
        torch.testing.assert_close(encoder(x, src_key_padding_mask=padding)[0], expected[1][0])


@pytest.mark.parametrize("wrong", [2.5, 4.0, True])
def test_layers_have_whole_bits(monkeypatch, wrong) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks would come before the method's own
    for bits in ((wrong, 4), (4, wrong)):
        with pytest.raises(ValueError, match="_bits must be a whole number from 1 to 8"):
            StraightThroughLinear(nn.Linear(4, 4), *bits)
