"""The bytes of tensors alive at once, counted exactly: equal steps give equal numbers on every machine."""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Counts the storages of tensors alive at once while it is entered; `peak` is the most bytes there were.

    It knows the tensors it is given and every tensor that goes into or comes out of an operation. A storage counts
    once, however many tensors view it, until it is freed. Scratch space inside an operation does not count.
    """

    def __init__(self, alive: Iterable[Any] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[weakref.ref[torch.UntypedStorage], int] = {}
        self._count(alive)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._count((args, kwargs))
        result = func(*args, **(kwargs or {}))
        self._count(result)
        return result

    def _count(self, values: Any) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                # Equal weak references hash alike, and a storage keeps its Python object for as long as it lives.
                storage = weakref.ref(value.untyped_storage(), self._freed)
                if storage not in self._sizes:
                    self._sizes[storage] = value.untyped_storage().nbytes()
                    self.now += self._sizes[storage]
        self.peak = max(self.peak, self.now)

    def _freed(self, storage: "weakref.ref[torch.UntypedStorage]") -> None:
        self.now -= self._sizes.pop(storage, 0)


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps from step to step, its parameters aside."""
    storages = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for value in tree_leaves(list(optimizer.state.values()))
        if isinstance(value, Tensor)
    }
    return sum(storages.values())
