"""The byte transformer of the task `text`, with layers that compute with few bits while it is trained."""

from dataclasses import replace

from fairtrial.contract import Choice
from fairtrial.methods.quantization.fake_quantization import output_layer, straight_through_linear
from fairtrial.methods.registry import Method
from fairtrial.tasks import standard, text
from fairtrial.tasks.samples import Samples
from fairtrial.tasks.slots import Options, layer_slot, optimizer_slot, schedule_slot

STEPS = 400
STRAIGHT_THROUGH = Method(
    "StraightThrough", "layer", straight_through_linear, bind=lambda setting: {"skip": output_layer(setting.model)}
)


def samples() -> Samples:
    """The bytes of the task `text`."""
    return text.samples()


small_lm_qat = replace(
    text.text,
    name="small-lm-qat",
    samples=samples,
    total_steps=STEPS,
    slots={
        slot.name: slot
        for slot in (
            replace(layer_slot(), options=Options((*standard.LAYERS, STRAIGHT_THROUGH), "layer")),
            optimizer_slot(Choice("AdamW", {"lr": 5e-3})),
            schedule_slot(Choice("OneCycleLR", {"pct_start": 0.2})),
        )
    },
)
