"""What torch asks of an optimizer besides its formula, for the optimizers of this family to share.

Arguments are checked for every parameter group, gradients are refused before anything has changed, tensors are handed
to `torch._foreach_*` by device and dtype, and a saved state is checked before it replaces the present one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fairtrial.methods.arguments import require


def check_rates(group: Mapping[str, Any]) -> None:
    """Refuse a parameter group whose learning rate, decay or eps is not a number of at least 0."""
    for name in ("lr", "weight_decay", "eps"):
        require(0 <= group[name] < float("inf"), name, group[name], "at least 0 and finite")


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The loss of a closure given to `step`, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def params_with_gradient(optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    """The parameters to update, group by group: those that have a gradient and at least one element.

    Raises:
        RuntimeError: a gradient is sparse or complex.
    """
    chosen = [[p for p in group["params"] if p.grad is not None and p.numel()] for group in optimizer.param_groups]
    for params in chosen:
        for p in params:
            if p.grad.layout != torch.strided:
                raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients ({p.grad.layout})")
            if p.is_complex():
                raise RuntimeError(f"{type(optimizer).__name__} does not support complex parameters ({p.dtype})")
    return chosen


def batches(*lists: Sequence[Tensor], foreach: bool) -> Iterator[tuple[list[Tensor], ...]]:
    """Split parallel lists by device and dtype of the first; without `foreach` every tensor is a batch of its own."""
    indices: dict[Any, list[int]] = {}
    for i, p in enumerate(lists[0]):
        indices.setdefault((p.device, p.dtype) if foreach else i, []).append(i)
    for chosen in indices.values():
        yield tuple([tensors[i] for i in chosen] for tensors in lists)


def check_state(
    state: Mapping[str, Any],
    hyperparameters: Mapping[str, Any],
    shapes: Callable[[Mapping[str, Any], Tensor], Mapping[str, Sequence[int]]],
) -> None:
    """Refuse what `Optimizer.__setstate__` is about to take if it is another optimizer's or another model's.

    Args:
        state: 'param_groups', and 'state' for each of their parameters that has one.
        hyperparameters: the names that every group must hold.
        shapes: for a group and one of its parameters, the state tensors it may have and their shapes.

    Raises:
        ValueError: a name is missing, is not known here, or stands for a tensor of another shape.
    """
    for group in state["param_groups"]:
        missing = hyperparameters.keys() - group.keys()
        require(not missing, "state_dict", f"parameter groups without {sorted(missing)}", "of the same optimizer")
        for p in group["params"]:
            saved = state["state"].get(p)
            if saved:
                found = {name: tuple(value.shape) for name, value in saved.items()}
                expected = {name: tuple(shape) for name, shape in shapes(group, p).items()}
                require(found == expected, "state_dict", found, f"{expected} for a parameter of shape {tuple(p.shape)}")
