"""The numbers are those of the package mnist1d 0.0.2, whose samples these equal bit for bit in float32."""

import pytest
import torch

from fairtrial.tasks.mnist1d import samples


def test_golden_values() -> None:
    data = samples()
    assert data.x.shape == (4000, 40)
    assert data.x_test.shape == (1000, 40)
    assert data.x.dtype == torch.float32
    assert data.x[0, :5].tolist() == pytest.approx([-0.3320057, -0.4719104, -0.7786971, -1.0097408, -0.8823526])
    assert data.x_test[-1, -5:].tolist() == pytest.approx([-0.0986461, 0.4472329, 0.6598756, 0.8777344, 1.1931518])
    assert data.x.double().sum().item() == pytest.approx(-51.78747, abs=1e-3)
    assert data.y[:10].tolist() == [2, 6, 4, 5, 6, 6, 6, 0, 3, 1]
    assert data.y_test[-5:].tolist() == [2, 5, 9, 6, 4]
    assert torch.bincount(torch.cat([data.y, data.y_test])).tolist() == [500] * 10


def test_samples_are_made_once() -> None:
    assert samples() is samples()
