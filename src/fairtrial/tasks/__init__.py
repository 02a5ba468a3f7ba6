"""What a method can be tried on: the shipped tasks, and a person's own."""

import importlib

from fairtrial.contract import BadInput, Task

_shipped = {
    "digits": "digits",
    "digits-cnn": "digits",
}


def names() -> list[str]:
    """The shipped tasks."""
    return list(_shipped)


def load(reference: str) -> Task:
    """The shipped task of that name."""
    if reference not in _shipped:
        raise BadInput(f"there is no task {reference!r}; there is: {', '.join(_shipped)}, or write a Python file")
    module = importlib.import_module(f"{__name__}.{_shipped[reference]}")
    task: Task = getattr(module, reference.replace("-", "_"))
    return task
