"""Tasks of SmolLM2 at inference, on short passages."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fairtrial.contract import BadInput, Choice
from fairtrial.tasks import documentation, load, models
from fairtrial.tasks.models import Loaded
from fairtrial.tasks.smollm2 import SCORED
from fairtrial.tasks.streams import Streams
from fairtrial.tasks.trained import TrainedTask, held


def short(name: str, length: int) -> TrainedTask:
    task = load(name)
    assert isinstance(task, TrainedTask)
    return replace(task, length=length)


def test_perplexity_is_that_of_one_whole_forward(smollm2: Loaded) -> None:
    task = short("smollm2-perplexity", SCORED + 64)
    task.check({"cache": Choice("DynamicCache")})
    outcome = task.run({}, 3, split="test")
    ids = documentation.windows(documentation.tokens(smollm2.tokenizer, "test"), 1, SCORED + 64, Streams(3)("passages"))
    with torch.no_grad():
        logits = smollm2.model(ids).logits[0, -SCORED:-1]
    expected = torch.nn.functional.cross_entropy(logits, ids[0, -SCORED + 1 :])
    assert outcome.value == pytest.approx(float(expected), rel=1e-4)
    assert outcome.costs.peak_memory == (SCORED + 63) * 30 * 2 * 3 * 64 * 4  # layers, keys and values, heads, float32
    assert outcome.costs.step_time is not None
    again = task.run({}, 3, split="test")
    assert again.value == outcome.value
    assert task.run({}, 3).value != outcome.value


def test_facts_are_found_in_short_passages(smollm2: Loaded) -> None:
    outcome = short("smollm2-retrieval", 96).run({}, 0)
    assert outcome.value >= 0.75
    assert len(outcome.metrics) == 4


def test_parts_of_the_text_have_nothing_in_common(smollm2: Loaded) -> None:
    parts = [documentation.tokens(smollm2.tokenizer, part) for part in documentation.ENDS]
    whole = torch.tensor(smollm2.tokenizer(documentation.text()).input_ids)
    assert torch.equal(torch.cat(parts), whole)
    with pytest.raises(BadInput, match="passages of 9 tokens cannot be cut from 8"):
        documentation.windows(torch.arange(8), 1, 9, torch.Generator())


def test_bytes_of_a_cache_are_those_of_its_tensors(smollm2: Loaded) -> None:
    cache = models.transformers().DynamicCache(config=smollm2.model.config)
    assert held(cache) == 0
    with torch.no_grad():
        smollm2.model(torch.arange(5)[None], past_key_values=cache)
    assert held(cache) == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_a_model_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FAIRTRIAL_MODELS", str(tmp_path))
    with pytest.raises(BadInput, match="`fairtrial models smollm2` gets it"):
        load("smollm2-perplexity").check({})


def test_slots_that_are_not_there_are_refused() -> None:
    with pytest.raises(BadInput, match="no slot 'optimizer'; it has: cache"):
        load("smollm2-perplexity").check({"optimizer": Choice("AdamW")})


def own(name: str, tmp_path: Path, **changes: Any) -> TrainedTask:
    task = load(name)
    assert isinstance(task, TrainedTask)
    (tmp_path / "notes.txt").write_text("".join(f"Line {number} of the notes.\n" for number in range(400)))
    folder = shutil.copytree(models.folder_of("small-gpt"), tmp_path / "model", dirs_exist_ok=True)
    return replace(task, model=str(folder), corpus=str(tmp_path / "notes.txt"), **changes)


@pytest.mark.parametrize(
    ("name", "choices", "changes"),
    [
        ("small-lm-ptq", {"quantizer": Choice("GPTQ")}, {"passages": 4, "length": 64, "calibration": (4, 64)}),
        ("smollm2-perplexity", {"cache": Choice("XKVCache")}, {"length": SCORED + 32}),
        ("smollm2-generation", {"decoder": Choice("TopHLogitsProcessor")}, {"passages": 2}),
    ],
)
def test_a_task_runs_on_a_persons_own_model_and_text(
    small_gpt: Loaded, tmp_path: Path, name: str, choices: dict[str, Choice], changes: dict[str, Any]
) -> None:
    task = own(name, tmp_path, **changes)
    task.check(choices)
    setting, passages = task.given(0, "test")
    words = small_gpt.tokenizer.batch_decode([*passages, setting.corpus])
    assert all(" of the notes." in text for text in words)
    assert task.run(choices, 0).ended == "finished"


def test_results_on_another_model_or_text_are_kept_apart(small_gpt: Loaded, tmp_path: Path) -> None:
    task = own("small-lm-ptq", tmp_path)
    (tmp_path / "others.txt").write_text("Other words.")
    other_text = replace(task, corpus=str(tmp_path / "others.txt"))
    other_model = replace(task, model="small-gpt")
    assert len({t.data_hash for t in (task, other_text, other_model)}) == 3
    assert replace(task, name="again").data_hash == task.data_hash


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"corpus": "nowhere.txt"}, "nowhere.txt cannot be read"),
        ({"length": 100_000}, "passages of 100000 tokens cannot be cut"),
        ({"model": "no/such/folder/at/all"}, "and no folder"),
    ],
)
def test_what_is_not_there_of_a_persons_own_is_named(
    small_gpt: Loaded, tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(BadInput, match=complaint):
        replace(own("small-lm-ptq", tmp_path), **changes).run({}, 0)
