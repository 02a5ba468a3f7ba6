"""How much memory an optimizer keeps between two steps."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


def optimizer_state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in `optimizer.state`, each storage once and in full, however small the view of it.

    Moments, step counts and indices count; parameters, gradients and hyperparameters do not.
    """
    storages = [tensor.untyped_storage() for tensor in tensors_within(optimizer.state)]
    return sum({(storage.device, storage.data_ptr()): storage.nbytes() for storage in storages}.values())


def tensors_within(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings, lists and tuples; the keys of mappings are passed over."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_within(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_within(item)
