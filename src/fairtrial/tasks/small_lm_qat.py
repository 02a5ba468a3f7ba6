"""The byte transformer of the task `text`, with layers that compute with few bits while it is trained."""

from dataclasses import replace

from fairtrial.contract import Choice
from fairtrial.tasks import text
from fairtrial.tasks.samples import Samples
from fairtrial.tasks.slots import layer_slot, optimizer_slot, schedule_slot

STEPS = 400


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
            layer_slot(),
            optimizer_slot(Choice("AdamW", {"lr": 5e-3})),
            schedule_slot(Choice("OneCycleLR", {"pct_start": 0.2})),
        )
    },
)
