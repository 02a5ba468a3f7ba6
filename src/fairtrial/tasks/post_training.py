"""Trained models whose weights are to be quantised: the small language model, and the encoder of sentences."""

import copy
import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from fairtrial.contract import Choice, Costs, Diverged, Metric, Slot
from fairtrial.methods.quantization.gptq import GPTQ
from fairtrial.methods.quantization.packing import quantised_layers
from fairtrial.methods.quantization.quantize import RoundToNearest, average_bits, quantize_, tensor_bytes
from fairtrial.methods.registry import Method
from fairtrial.tasks import documentation, small_gpt
from fairtrial.tasks.slots import Options
from fairtrial.tasks.trained import Setting, TrainedTask, Trial, median_seconds

NATS = math.log(2)  # in a bit
AT_ONCE = 32  # passages that go through a model together
ROUND_TO_NEAREST = Choice("RoundToNearest")


def not_quantised() -> None:
    """The weights as they are."""


def asked_for(setting: Setting) -> dict[str, Any]:
    return {"bits": setting.bits, "group_size": setting.group_size}


QUANTIZERS = (
    Method("NotQuantised", "quantizer", not_quantised),
    Method("RoundToNearest", "quantizer", RoundToNearest, bind=asked_for),
    Method("GPTQ", "quantizer", GPTQ, bind=asked_for),
)


def quantizer_slot(default: Choice = ROUND_TO_NEAREST) -> Slot:
    """What `quantize_` takes as its config."""
    return Slot("quantizer", default, Options(QUANTIZERS, "quantizer"))


def quantised(trial: Trial) -> tuple[nn.Module, dict[str, float], Costs]:
    """A copy of the model with its weights quantised as the choice says, the bits they take, and what it costs.

    The bytes are of all parameters and buffers, the time is that of reading one passage.
    """
    model, config = copy.deepcopy(trial.model), trial.parts["quantizer"]
    with torch.enable_grad():
        model = model if config is None else quantize_(model, config, trial.setting.calibration)
    seconds = median_seconds(lambda: model(trial.passages[:1]))
    return model, {"bits per weight": bits_of(model)}, Costs(step_time=seconds, peak_memory=tensor_bytes(model))


def bits_of(model: nn.Module) -> float:
    """Bits that a quantised weight takes with all that belongs to it; 32 where nothing is quantised."""
    return average_bits(model) if any(True for _ in quantised_layers(model)) else 32.0


# The small language model ------------------------------------------------------------------------------------------


def bytes_of_text(
    name: str, part: documentation.Part, count: int, length: int, generator: torch.Generator
) -> Int[Tensor, "n t"]:
    """Windows that the small model was trained on, to calibrate with; of the others one half for each other part."""
    found = small_gpt.passages("training" if part == "calibration" else "test")
    if part != "calibration":
        found = found[: len(found) // 2] if part == "validation" else found[len(found) // 2 :]
    return found[torch.randperm(len(found), generator=generator)[:count], :length]


def bits_per_byte(trial: Trial) -> tuple[float, dict[str, float], Costs]:
    """Cross entropy of the next byte."""
    model, figures, costs = quantised(trial)
    nats = nats_per_byte(model, trial.passages)
    if not math.isfinite(nats):
        raise Diverged("the model's scores are no longer finite")
    return nats / NATS, figures, costs


@torch.no_grad()
def nats_per_byte(model: nn.Module, passages: Int[Tensor, "n t"]) -> float:
    """Mean cross entropy of every byte but the first of each passage."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.split(passages, AT_ONCE):
        logits = model(rows).logits[:, :-1]
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").double()
    return total.item() / passages[:, 1:].numel()


def _small_lm(name: str, bits: int) -> TrainedTask:
    return TrainedTask(
        name=name,
        version=1,
        metric=Metric("bits per byte", "minimize", "bits per byte", margin=0.01, worst=8.0),
        measure=bits_per_byte,
        slots={"quantizer": quantizer_slot()},
        model="small-gpt",
        passages=64,
        length=small_gpt.CONTEXT,
        text=bytes_of_text,
        calibration=(32, small_gpt.CONTEXT),
        bits=bits,
    )


small_lm_ptq = _small_lm("small-lm-ptq", 3)
small_lm_ptq_2, small_lm_ptq_4 = _small_lm("small-lm-ptq-2", 2), _small_lm("small-lm-ptq-4", 4)


# The encoder -------------------------------------------------------------------------------------------------------


def embeddings(model: nn.Module, ids: Int[Tensor, "n t"]) -> Float[Tensor, "n d"]:
    """Sentence vectors of length 1: the mean of the last layer's."""
    hidden: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return F.normalize(hidden.mean(1), dim=1)


def likeness(trial: Trial) -> tuple[float, dict[str, float], Costs]:
    """Mean cosine of a passage's vector and the one that the model gave before it was quantised.

    Also how often the vector of a passage's first half is nearest to that of its second half.
    """
    exact = embeddings(trial.model, trial.passages)
    model, figures, costs = quantised(trial)
    cosine = (embeddings(model, trial.passages) * exact).sum(1).mean().item()
    if math.isnan(cosine):
        raise Diverged("the model's vectors are no longer finite")
    first, second = (embeddings(model, half) for half in trial.passages.chunk(2, 1))
    found = (first @ second.t()).argmax(1) == torch.arange(len(first))
    return cosine, {"halves found": found.double().mean().item(), **figures}, costs


encoder_ptq = TrainedTask(
    name="encoder-ptq",
    version=1,
    metric=Metric("cosine", "maximize", "cosine", margin=0.005, worst=-1.0),
    measure=likeness,
    slots={"quantizer": quantizer_slot()},
    model="minilm",
    passages=64,
    length=64,
    calibration=(32, 64),
)
