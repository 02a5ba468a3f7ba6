"""What tasks of trained models share: their slots, what they tell methods, and how a run goes.

Nothing is trained here unless a method does so by itself. The seed decides which text a run sees; the same passage may
come up under several seeds, because there is only so much text.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from fairtrial.contract import BadInput, Choice, Costs, Metric, Outcome, Progress, Slot, Split
from fairtrial.methods.arguments import require
from fairtrial.methods.optimizers.state_size import tensors_within
from fairtrial.methods.registry import Method
from fairtrial.tasks import documentation, models
from fairtrial.tasks.models import Loaded
from fairtrial.tasks.slots import Options
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.supervised import silent


@dataclass
class Setting:
    """What a task of a trained model tells methods about itself; `bind` of a method or a slot reads from it.

    Attributes:
        model: the trained model, which other runs use too: a quantiser gets a copy.
        tokenizer: of the model.
        config: of the model.
        calibration: passages (1, t) of text that is in no other part.
        generator: the methods' own source of randomness.
        temperature: at which the task samples.
        bits: to which the task asks weights to be quantised.
        group_size: of weights that share a scale.
        name: of the model.
        file: that the text is from, where it is not Python's documentation.
        corpus: all tokens of the part of the text that is there to calibrate with.
    """

    model: nn.Module
    tokenizer: Any
    config: Any
    calibration: Sequence[Int[Tensor, "1 t"]]
    generator: torch.Generator
    temperature: float = 1.0
    bits: int = 4
    group_size: int = 64
    name: str = ""
    file: str | None = None

    @property
    def corpus(self) -> Int[Tensor, " n"]:
        return part_of(self.name, "calibration", self.file)


def dynamic_cache(config: Any) -> Any:
    """All keys and values as they are: transformers' `DynamicCache`."""
    return models.transformers().DynamicCache(config=config)


CACHES = (Method("DynamicCache", "cache", dynamic_cache, bind=lambda setting: {"config": setting.config}),)


PLAIN_CACHE = Choice("DynamicCache")


def cache_slot(default: Choice = PLAIN_CACHE) -> Slot:
    """Caches of keys and values, as `transformers` has them, made for the model."""
    return Slot("cache", default, Options(CACHES, "cache"))


@cache
def loaded(name: str) -> Loaded:
    """A named model, read once in a process."""
    return models.load(name)


@cache
def part_of(name: str, part: documentation.Part, file: str | None = None) -> Int[Tensor, " n"]:
    """Tokens of a part of the documentation, or of a file of text, for a model."""
    return documentation.tokens(loaded(name).tokenizer, part, words_of(file))


def words_of(file: str | None) -> str:
    """Python's documentation, or what a file holds.

    Raises:
        BadInput: the file cannot be read as UTF-8.
    """
    if file is None:
        return documentation.text()
    try:
        return Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"the corpus {file} cannot be read as UTF-8 text: {error}") from None


def documentation_of(
    name: str, part: documentation.Part, count: int, length: int, generator: torch.Generator
) -> Int[Tensor, "n t"]:
    """Passages of Python's documentation, as tokens of a named model."""
    return documentation.windows(part_of(name, part), count, length, generator)


@cache
def hash_of_weights(model: nn.Module, *more: str) -> str:
    """Changes when any weight of a model does, or any of the further texts."""
    digest = sha256("\0".join(more).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@dataclass
class TrainedTask:
    """A task that measures a trained model, with what its slots are filled with.

    Attributes:
        name: what the task is called.
        version: to be raised when results are no longer comparable with earlier ones.
        metric: what is measured.
        slots: what may be swapped.
        model: the name of the model, or a folder, a GGUF file or a hub id, as `models.load` takes them.
        measure: carries a run out: it is given the task, the setting, the choices' parts by slot, and text to judge by,
            and returns the metric, further figures, and costs.
        passages, length: how many passages of how many tokens a run is judged by.
        text: gives passages of a part, told the model's name, the part, how many, how long, and what to draw from.
        calibration: how many passages of how many tokens methods are given to calibrate with.
        temperature, bits, group_size: see `Setting`.
        corpus: a UTF-8 text file that passages are cut from, for any model; None for what `text` gives.
    """

    name: str
    version: int
    metric: Metric
    slots: Mapping[str, Slot]
    model: str
    measure: "Callable[[Trial], tuple[float, dict[str, float], Costs]]"
    passages: int
    length: int
    text: Callable[[str, documentation.Part, int, int, torch.Generator], Int[Tensor, "n t"]] = documentation_of
    calibration: tuple[int, int] = (8, 512)
    temperature: float = 1.0
    bits: int = 4
    group_size: int = 64
    corpus: str | None = None

    @property
    def source(self) -> str:
        """The module that defines the task."""
        return self.measure.__module__

    @property
    def data_hash(self) -> str:
        """Changes when the text or the model's weights do."""
        words = words_of(self.corpus)
        if self.model in models.SOURCES:
            return models.hash_of(self.model, words)
        return hash_of_weights(loaded(self.model).model, words)

    def check(self, choices: Mapping[str, Choice]) -> None:
        """Make everything that the choices name, and run nothing."""
        self._know(choices)
        for name, choice in choices.items():
            self.slots[name].check(choice)
        if self.model in models.SOURCES and not models.is_there(self.model):
            raise BadInput(f"the task {self.name!r} needs a model: `fairtrial models {self.model}` gets it")
        self._parts(choices, self._setting(Streams(0)), Streams(0))

    def run(
        self, choices: Mapping[str, Choice], seed: int, *, split: Split = "validation", progress: Progress = silent
    ) -> Outcome:
        """Measure with the choices on passages of `split`. The seed alone decides every draw."""
        start = perf_counter()
        require(split in ("validation", "test"), "split", split, "'validation' or 'test'")
        self._know(choices)
        streams = Streams(seed)
        setting, passages = self.given(seed, split)
        parts = self._parts(choices, setting, streams)
        with streams.globally("run"), torch.no_grad():
            value, figures, costs = self.measure(Trial(self, setting, parts, passages, streams))
        progress(1, 1, value)
        return Outcome(value=value, metrics=figures, costs=costs, seconds=perf_counter() - start)

    def given(self, seed: int, split: Split) -> tuple[Setting, Int[Tensor, "n t"]]:
        """What methods are told under a seed, and the passages that judge."""
        streams = Streams(seed)
        return self._setting(streams), self._cut(split, self.passages, self.length, streams("passages"))

    def _cut(self, part: documentation.Part, count: int, length: int, generator: torch.Generator) -> Int[Tensor, "n t"]:
        if self.corpus is None:
            return self.text(self.model, part, count, length, generator)
        return documentation.windows(part_of(self.model, part, self.corpus), count, length, generator)

    def _know(self, choices: Mapping[str, Choice]) -> None:
        for name in choices:
            if name not in self.slots:
                raise BadInput(f"the task {self.name!r} has no slot {name!r}; it has: {', '.join(self.slots)}")

    def _setting(self, streams: Streams) -> Setting:
        model, tokenizer = loaded(self.model)
        passages = self._cut("calibration", *self.calibration, streams("calibration"))
        return Setting(
            model=model,
            tokenizer=tokenizer,
            config=model.config,
            calibration=list(torch.split(passages, 1)),
            generator=streams("method"),
            temperature=self.temperature,
            bits=self.bits,
            group_size=self.group_size,
            name=self.model,
            file=self.corpus,
        )

    def _parts(self, choices: Mapping[str, Choice], setting: Setting, streams: Streams) -> dict[str, Any]:
        chosen = {name: slot.default for name, slot in self.slots.items()} | dict(choices)
        parts = {}
        for name, choice in chosen.items():
            with streams.globally(name):
                parts[name] = self.slots[name].build(choice, setting)
        return parts


@dataclass
class Trial:
    """What a run's measure is given.

    Attributes:
        task: whose run it is.
        setting: what methods were told.
        parts: what fills the slots.
        passages: text to judge by.
        streams: randomness of the run.
    """

    task: TrainedTask
    setting: Setting
    parts: Mapping[str, Any]
    passages: Int[Tensor, "n t"]
    streams: Streams

    @property
    def model(self) -> Any:
        return self.setting.model


def median_seconds(call: Callable[[], object], repeats: int = 8) -> float:
    """What a call takes, several times one after the other."""
    times = []
    for _ in range(repeats):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return median(times)


def prepared(cache: Any, model: nn.Module) -> Any:
    """A context in which the model works with the cache; one that needs more than keys and values has `attached_to`."""
    attached = getattr(cache, "attached_to", None)
    return nullcontext() if attached is None else attached(model)


def held(cache: Any) -> int:
    """Bytes of the tensors that a cache holds; views of one storage count once."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_within(vars_of(cache))}
    return sum(storages.values())


def vars_of(cache: Any) -> list[dict[str, Any]]:
    return [vars(cache), *(vars(layer) for layer in getattr(cache, "layers", ()))]
