"""The language model that claims about inference are measured with."""

from functools import partial

from fairtrial.tasks.trained import loaded

smollm2 = partial(loaded, "smollm2")
