"""Lists of tensors in pieces that stay in a processor's cache from one operation to the next, and their products."""

from collections.abc import Iterator

import torch
from torch import Tensor

NUMBERS = 2**18  # in the tensors of one list of a piece, unless a single tensor has more


def pieces(lists: tuple[list[Tensor], ...]) -> Iterator[tuple[list[Tensor], ...]]:
    """Split parallel lists of tensors on the CPU; those on other devices, where launches cost, stay as they are.

    What is computed tensor by tensor is the same. Temporary tensors are small, so that their memory is used again.
    """
    if not lists[0] or lists[0][0].device.type != "cpu":
        yield lists
        return
    start = size = 0
    for place, tensor in enumerate(lists[0]):
        if size and size + tensor.numel() > NUMBERS:
            yield tuple(each[start:place] for each in lists)
            start, size = place, 0
        size += tensor.numel()
    yield tuple(each[start:] for each in lists)


def dots(a: list[Tensor], b: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The inner product of each pair in a dtype, without a tensor of products where the dtype is theirs."""
    if a and a[0].dtype == dtype:
        return [torch.dot(x.reshape(-1), y.reshape(-1)) for x, y in zip(a, b, strict=True)]
    return [product.sum(dtype=dtype) for product in torch._foreach_mul(a, b)]
