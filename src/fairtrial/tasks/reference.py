"""Tasks by reference: the name of a shipped one, or a Python file. torch is imported when one is loaded."""

import importlib

from fairtrial.contract import BadInput, Task
from fairtrial.spelling import nearest
from fairtrial.tasks import user

_shipped = {
    "digits": "digits",
    "digits-bags": "digits_bags",
    "digits-cnn": "digits",
    "diabetes-bottleneck": "diabetes_bottleneck",
    "digits-fewshot": "digits_fewshot",
    "digits-longtail": "digits_longtail",
    "digits-noisy": "digits_noisy",
    "digits-noisy-pairs": "digits_noisy",
    "digits-retrieval": "digits_retrieval",
    "digits-ssl": "digits_ssl",
    "docs-retrieval": "docs_retrieval",
    "mnist1d": "mnist1d",
    "tabular": "tabular",
    "tabular-wine": "tabular",
    "tabular-diabetes": "tabular",
    "diabetes-bags": "diabetes_bags",
    "tabular-screening": "screening",
    "text": "text",
    "docs-tags": "docs_tags",
    "docs-tokens": "docs_tokens",
    "arithmetic": "arithmetic",
    "thin-structures": "thin_structures",
    "thin-structures-noisy": "thin_structures",
    "modular-addition": "modular_addition",
    "separable": "separable",
    "smollm2-perplexity": "smollm2",
    "smollm2-perplexity-8k": "smollm2",
    "smollm2-retrieval": "smollm2",
    "small-lm-ptq": "post_training",
    "small-lm-ptq-2": "post_training",
    "small-lm-ptq-4": "post_training",
    "encoder-ptq": "post_training",
    "smollm2-generation": "generation",
    "small-lm-qat": "small_lm_qat",
    "digits-vit": "digits_vit",
    "heston-hedging": "heston_hedging",
}


def names() -> list[str]:
    """The shipped tasks."""
    return list(_shipped)


def load(reference: str) -> Task:
    """The shipped task of that name, or the one in a Python file: 'FILE.py', or 'FILE.py:NAME' if it has several."""
    if user.is_file(reference):
        return user.load(reference)
    if reference not in _shipped:
        known = nearest(reference, _shipped)
        raise BadInput(f"no task {reference!r}; {known} (a task of your own is named by its file, FILE.py)")
    module = importlib.import_module(f"fairtrial.tasks.{_shipped[reference]}")
    task: Task = getattr(module, reference.replace("-", "_"))
    return task
