"""The bytes of tensors alive at once, counted exactly: equal steps give equal numbers."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fairtrial.methods.optimizers.state_size import tensors_within


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages of tensors alive at once while it is entered; `peak` is the most bytes there were.

    It knows the tensors it is given and every tensor that goes into or comes out of an operation. A storage counts
    once, however many tensors view it, until it is freed. Scratch space inside an operation does not count, nor do
    sparse tensors, which have no storage.
    """

    def __init__(self, alive: Any = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
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
        for tensor in tensors_within(values):
            if tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()  # the same Python object for as long as the memory is in use
            reference = weakref.ref(storage, self._freed)
            if reference not in self._sizes:
                self._sizes[reference] = storage.nbytes()
                self.now += self._sizes[reference]
        self.peak = max(self.peak, self.now)

    def _freed(self, storage: "weakref.ref[torch.UntypedStorage]") -> None:
        self.now -= self._sizes.pop(storage, 0)
