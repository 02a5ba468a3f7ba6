"""Tasks by reference: the name of a shipped one, or a Python file. torch is imported when one is loaded."""

import difflib
import importlib

from fairtrial.contract import BadInput, Task
from fairtrial.tasks import user

_shipped = {
    "digits": "digits",
    "digits-cnn": "digits",
    "mnist1d": "mnist1d",
    "tabular": "tabular",
    "tabular-wine": "tabular",
    "tabular-diabetes": "tabular",
    "text": "text",
}


def names() -> list[str]:
    """The shipped tasks."""
    return list(_shipped)


def load(reference: str) -> Task:
    """The shipped task of that name, or the one in a Python file: 'FILE.py', or 'FILE.py:NAME' if it has several."""
    if user.is_file(reference):
        return user.load(reference)
    if reference not in _shipped:
        close = difflib.get_close_matches(reference.lower(), _shipped, n=1)
        known = f"did you mean {close[0]!r}?" if close else f"there is: {', '.join(_shipped)};"
        raise BadInput(f"there is no task {reference!r}: {known} A task of your own is named by its file, FILE.py")
    module = importlib.import_module(f"fairtrial.tasks.{_shipped[reference]}")
    task: Task = getattr(module, reference.replace("-", "_"))
    return task
