"""What torch asks of an optimizer besides its formula, for the optimizers of this family to share.

Arguments are checked for every parameter group, gradients are refused before anything has changed, tensors are handed
to `torch._foreach_*` by device and dtype, and a saved state is checked before it replaces the present one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fairtrial.methods.arguments import require


def check_rates(group: Mapping[str, Any]) -> None:
    """Refuse a parameter group whose learning rate, decay or eps is not a number of at least 0."""
    for name in ("lr", "weight_decay", "eps"):
        require(0 <= float(group[name]) < float("inf"), name, group[name], "at least 0 and finite")


def evaluate(closure: Callable[[], Any] | None) -> Any:
    """The loss of a closure given to `step`, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def with_gradient(
    optimizer: torch.optim.Optimizer, *, elementwise: bool = False
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The parameters of each group that have a gradient and at least one element, and their gradients.

    Args:
        optimizer: the one that takes a step.
        elementwise: whether no element of an update depends on another, so that a process may update its shards alone.

    Raises:
        RuntimeError: a gradient is sparse or complex, or a parameter is a DTensor and the step is not elementwise.
    """
    found = []
    for group in optimizer.param_groups:
        pairs = [(p, p.grad) for p in group["params"] if p.grad is not None and p.numel()]
        for p, grad in pairs:
            if grad.layout != torch.strided:
                raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients ({grad.layout})")
            if p.is_complex():
                raise RuntimeError(f"{type(optimizer).__name__} does not support complex parameters ({p.dtype})")
            if is_dtensor(p) and not elementwise:
                refusal = f"{type(optimizer).__name__} does not support DTensor parameters"
                raise RuntimeError(f"{refusal}, such as FSDP2's: it needs whole tensors")
        found.append(([p for p, _ in pairs], [grad for _, grad in pairs]))
    return found


def batches(*lists: list[Tensor], foreach: bool) -> Iterator[tuple[list[Tensor], ...]]:
    """Split parallel lists by device and dtype of the first; without `foreach` every tensor is a batch of its own.

    DTensors are handed on as the shards of this process, which share their memory.
    """
    indices: dict[Any, list[int]] = {}
    for i, p in enumerate(lists[0]):
        indices.setdefault((p.device, p.dtype) if foreach else i, []).append(i)
    for chosen in indices.values():
        yield tuple([shard_of(tensors[i]) for i in chosen] for tensors in lists)


def is_dtensor(tensor: Tensor) -> bool:
    """Told by what only DTensors have: their module takes longer to import than torch's optimizers."""
    return hasattr(tensor, "to_local")


def shard_of(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def scalars(values: Float[Tensor, " n"]) -> list[Any]:
    """The values as numbers; under `torch.compile` as tensors, since every new number would be compiled anew."""
    return list(values.unbind()) if torch.compiler.is_compiling() else values.tolist()


def descend_(params: list[Tensor], updates: list[Tensor], lr: float | Float[Tensor, ""]) -> None:
    """w ← w - lr u."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(updates, lr))
    else:
        torch._foreach_add_(params, updates, alpha=-lr)


def check_state(
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    shapes: Callable[[Mapping[str, Any], Tensor, Mapping[str, Tensor]], Mapping[str, Sequence[int]]],
) -> None:
    """Refuse a loaded state of another optimizer or model, before `Optimizer.__setstate__` takes it.

    Args:
        optimizer: the one that loads it.
        state: what `__setstate__` is given: 'param_groups', and 'state' by parameter; a pickle, which also holds
            'defaults', is taken as it is.
        shapes: of the state tensors that a parameter of a group must have, given those that it does have.

    Raises:
        ValueError: a hyperparameter or tensor is missing, unknown or of another shape.
    """
    if "defaults" in state:
        return
    # unpickling adds `differentiable` to the defaults, but not to the groups
    names = optimizer.defaults.keys() - {"differentiable"}
    for group in state["param_groups"]:
        missing = sorted(names - group.keys())
        require(not missing, "state_dict", f"a parameter group without {missing}", f"of {type(optimizer).__name__}")
        for p in group["params"]:
            if saved := state["state"].get(p):
                tensors = all(isinstance(value, Tensor) for value in saved.values())
                require(tensors, "state_dict", saved, "tensors, by name, for every parameter")
                found = {name: tuple(value.shape) for name, value in saved.items()}
                expected = {name: tuple(shape) for name, shape in shapes(group, p, saved).items()}
                require(found == expected, "state_dict", found, f"{expected} for a parameter of shape {tuple(p.shape)}")
