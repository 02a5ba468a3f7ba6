"""The Walsh-Hadamard transform of any power of two, in O(n log n) and as a few small matrix products."""

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from fairtrial.methods.arguments import require

DIRECT = 128  # up to here one matrix product is fastest
FACTOR = 5  # at most 2^5 is the size of a factor of a longer transform


@cache
def _matrix(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is cached has to serve training too
        return hadamard_matrix(n, dtype, device)


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Sylvester's matrix of ±1, of size n; row i, column j is (-1)^(number of ones in i & j).

    Raises:
        ValueError: `n` is no power of two.
    """
    require(type(n) is int and n >= 1 and n & (n - 1) == 0, "n", n, "a power of two")
    matrix = torch.ones(1, 1, dtype=dtype, device=device)
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def hadamard_transform(x: Float[Tensor, "*b n"], *, normalize: bool = True) -> Float[Tensor, "*b n"]:
    """x H along the last dimension, H being Sylvester's matrix.

    Args:
        x: its last dimension is a power of two.
        normalize: divide by √n, which makes H orthogonal and the transform its own inverse.

    Raises:
        ValueError: the last dimension is no power of two.
    """
    n = x.shape[-1]
    require(n >= 1 and n & (n - 1) == 0, "the last dimension of x", n, "a power of two")
    if n <= DIRECT:
        y = x @ _matrix(n, x.dtype, x.device)
    else:
        y, left, bits = x, n, n.bit_length() - 1
        while left > 1:  # H of a·b is the Kronecker product of those of a and b; factors are about equal
            power = math.ceil(bits / math.ceil(bits / FACTOR))
            left, bits = left >> power, bits - power
            matrix = _matrix(2**power, x.dtype, x.device)
            y = matrix @ y.reshape(-1, 2**power, left) if left > 1 else y.reshape(-1, 2**power) @ matrix
    return (y / math.sqrt(n) if normalize else y).view(x.shape)
