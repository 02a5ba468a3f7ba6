import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fairtrial.methods.quantization import StraightThroughLinear, straight_through_linear
from fairtrial.methods.quantization.fake_quantization import round_by_largest


def test_levels_by_hand() -> None:
    x = torch.tensor([[3.0, 0.9, -0.1, -2.9]], requires_grad=True)
    rounded = round_by_largest(x, 2)  # levels -3, -1, 1, 3
    torch.testing.assert_close(rounded, torch.tensor([[3.0, 1.0, -1.0, -3.0]]))
    torch.testing.assert_close(round_by_largest(x, 1), torch.tensor([[3.0, 3.0, -3.0, -3.0]]))
    rounded.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert x.grad.tolist() == [[1, 2, 3, 4]]
    assert round_by_largest(torch.zeros(2, 3), 4).abs().max() < 1e-7


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
    with pytest.raises(ValueError, match="weight_bits must be from 1 to 8, got 0"):
        straight_through_linear(model, 0)
    with pytest.raises(ValueError, match="act_bits must be from 1 to 8, got 9"):
        straight_through_linear(model, 4, 9)
    with pytest.raises(ValueError, match="nn.Linear to replace"):
        straight_through_linear(nn.ReLU())
