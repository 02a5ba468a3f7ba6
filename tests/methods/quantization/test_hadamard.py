import pytest
import torch

from fairtrial.methods.quantization import hadamard_matrix, hadamard_transform
from fairtrial.methods.quantization.hadamard import _matrix


@pytest.mark.parametrize("n", [1, 2, 8, 64, 128, 256, 512, 2048])
def test_it_is_the_product_with_sylvesters_matrix(n: int) -> None:
    x = torch.randn(3, 2, n, dtype=torch.float64)
    torch.testing.assert_close(hadamard_transform(x, normalize=False), x @ hadamard_matrix(n, torch.float64))


def test_it_is_its_own_inverse() -> None:
    x = torch.randn(4, 1024, dtype=torch.float64)
    y = hadamard_transform(x)
    torch.testing.assert_close(hadamard_transform(y), x)
    torch.testing.assert_close(y.norm(dim=1), x.norm(dim=1))


def test_gradients_flow() -> None:
    assert torch.autograd.gradcheck(hadamard_transform, torch.randn(2, 256, dtype=torch.float64, requires_grad=True))


def test_training_goes_on_after_inference() -> None:
    _matrix.cache_clear()
    weight = torch.ones(3, 8, requires_grad=True)
    with torch.inference_mode():
        hadamard_transform(weight)
    hadamard_transform(weight).square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * torch.ones(3, 8))


def test_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="a power of two"):
        hadamard_transform(torch.ones(3, 6))
    with pytest.raises(ValueError, match="a power of two"):
        hadamard_matrix(12)


@pytest.mark.parametrize("n", [4.0, True])
def test_sizes_are_whole_numbers(monkeypatch, n) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # its checks would come before the method's own
    with pytest.raises(ValueError, match="n must be a power of two"):
        hadamard_matrix(n)
